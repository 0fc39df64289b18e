"""Progress bars in a real terminal, and none where there is no terminal."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import importlib, sys, warnings
warnings.filterwarnings("ignore")
import lightning_quant as lq
from tests.callbacks.test_lightning_packages import module_of
from tests.helpers.small import small_loader
package = importlib.import_module(sys.argv[2])
known = {"rich": package.callbacks.RichProgressBar, "tqdm": package.callbacks.TQDMProgressBar}
bars = [known[sys.argv[1]]()] if sys.argv[1] in known else []
trainer = package.Trainer(
    accelerator="cpu", devices=1, max_epochs=0, logger=False, enable_checkpointing=False, enable_model_summary=False,
    enable_progress_bar=bool(bars),
    callbacks=[
        lq.QuantizationAwareTraining("w4a8", max_drop=-1.0, monitor="val_loss", mode="min", rungs=("ptq", "cle")),
        lq.DeviceExport("out", target="htp_emulator", name="net"), *bars,
    ],
)
trainer.fit(module_of(package)(), small_loader(), small_loader())
"""


def in_terminal(tmp_path: Path, bar: str, package: str = "lightning.pytorch") -> str:
    """What a run shows in a terminal of 100 columns."""
    parent, child = pty.openpty()
    termios.tcsetwinsize(child, (40, 100))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "xterm"}
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, bar, package],
        cwd=tmp_path,
        env=environment,
        stdout=child,
        stderr=child,
        stdin=child,
    ) as process:
        os.close(child)
        shown = b""
        while True:
            try:
                part = os.read(parent, 65536)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            shown += part
    os.close(parent)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode(errors="replace"))
    assert process.returncode == 0, text[-3000:]
    return text


@pytest.mark.parametrize(
    ("bar", "package"),
    [
        ("rich", "lightning.pytorch"),
        ("tqdm", "lightning.pytorch"),
        pytest.param("tqdm", "pytorch_lightning", marks=pytest.mark.torture),
    ],
)
def test_each_step_is_shown_in_a_terminal(tmp_path: Path, bar: str, package: str) -> None:
    shown = in_terminal(tmp_path, bar, package)
    for step in ("Calibrating", "Rung cle", "Exporting net", "Waiting for Samsung Galaxy S24 (at most 60 min)"):
        assert step in shown, step
    assert "/256" in shown
    assert shown.count("GPU available") == 1  # of the user's Trainer alone
    assert re.search(r"Waiting for Samsung[^\n]*0:0\d", shown)  # the clock runs


def test_without_the_trainers_bar_none_is_shown(tmp_path: Path) -> None:
    shown = in_terminal(tmp_path, "none")
    assert "Calibrating" not in shown
    assert "Waiting for" not in shown
    assert "Exported " in shown


def test_no_bar_outside_a_terminal(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "rich", "lightning.pytorch"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Calibrating" not in done.stdout + done.stderr
    assert "Waiting for" not in done.stdout + done.stderr
