"""What importing and using the package does to the program around it: nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def run(script: str, tmp_path: Path) -> str:
    """Standard output of a fresh interpreter."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_import_loads_nothing(tmp_path: Path) -> None:
    script = """
import sys
import lightning_quant
import pytest

from lightning_quant import errors
assert "DeviceExport" in dir(lightning_quant)
heavy = {"torch", "aimet_torch", "lightning", "onnx", "onnxruntime", "numpy", "hydra"} & sys.modules.keys()
assert not heavy, heavy
try:
    lightning_quant.Nothing
except AttributeError as error:
    assert "Nothing" in str(error)
assert lightning_quant.PostTrainingQuantization.__name__ == "PostTrainingQuantization"
assert "aimet_torch" not in sys.modules
"""
    assert run(script, tmp_path) == ""


def test_warnings_logging_and_stdout_stay_as_they_were(tmp_path: Path) -> None:
    script = f"""
import logging, sys, warnings
import lightning.pytorch, onnx, onnxruntime, torch, torchvision
root = logging.getLogger()
root.setLevel(logging.ERROR)
warnings.filterwarnings("error", message="a filter of the user's")
before = (list(root.handlers), root.level, list(warnings.filters))
import lightning_quant as lq
from tests.helpers.small import SmallModule, small_loader
assert (root.handlers, root.level, warnings.filters) == before
threads, grad, default = torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()
trainer = lightning.pytorch.Trainer(
    accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
    callbacks=[lq.QuantizationAwareTraining("w4a8", overrides={{"head": "w8a16"}}), lq.DeviceExport({str(tmp_path)!r})],
    enable_checkpointing=False,
)
trainer.fit(SmallModule(), small_loader(), small_loader())
trainer.save_checkpoint({str(tmp_path / "last.ckpt")!r})
lq.load_quantized(SmallModule, {str(tmp_path / "last.ckpt")!r})
assert "aimet_torch" in sys.modules
after = (list(root.handlers), root.level, list(warnings.filters))
assert after == before, (before, after)
assert (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()) == (threads, grad, default)
assert sys.stdout is sys.__stdout__
"""
    assert run(script, tmp_path) == ""
