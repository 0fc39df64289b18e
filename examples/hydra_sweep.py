"""Sweep precisions with the command line app, then choose from its table in Python.

The command is the same as in a shell: lightning-quant -m precision=w8a8,w8a16,w4a16 ...
The float network is trained once and used by all three; here it is small and hardly trained.

Run: python examples/hydra_sweep.py                      (about a minute on a CPU)
     python examples/hydra_sweep.py float.epochs=30      (anything that `lightning-quant --help` lists)
"""

import csv
import subprocess
import sys
from pathlib import Path

SWEEP = Path("multirun/example")

overrides = [
    "precision=w8a8,w8a16,w4a16",
    f"hydra.sweep.dir={SWEEP}",
    *("data.train=64", "data.val=16", "data.height=64", "data.width=128", "float.epochs=2"),
    *("quantizer.calibration_samples=16", "qat.epochs=0", "ladder.rungs=[ptq,bn_reestimation]"),
    *("overlays=1", "target.samples=2", "trainer.enable_progress_bar=false"),
]
subprocess.run([sys.executable, "-m", "lightning_quant", "-m", *overrides, *sys.argv[1:]], check=True)

print((SWEEP / "summary.md").read_text())
with (SWEEP / "summary.csv").open() as file:
    rows = list(csv.DictReader(file))
smallest = min(rows, key=lambda row: float(row["MB quantized"]))
print(f"smallest: {smallest['precision']}, {smallest['MB quantized']} MB, mIoU {smallest['miou exported']}")
