"""Same seed, same bits: calibration, training, export. Under ``Trainer(deterministic=True)`` too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

import lightning_quant as lq
from tests.helpers.small import SmallModule, assert_same_tensors, small_data, small_loader, small_net
from tests.helpers.trainers import quiet_trainer

pytestmark = pytest.mark.slow

RUNGS = (
    "ptq",
    "tf_enhanced",
    "percentile",
    "cle",
    "bias_correction",
    "bn_reestimation",
    "seq_mse",
    "rounding",
    "adaround",
    "mixed",
)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


def run(folder: Path, deterministic: bool) -> tuple[SmallModule, dict[str, bytes]]:
    pl.seed_everything(11, verbose=False)
    module = SmallModule(small_net())
    rungs = [{name: {"iterations": 20}} if name in ("adaround", "rounding") else name for name in RUNGS]
    quantization = lq.QuantizationAwareTraining(
        "w4a8", calibration_samples=16, monitor="val_loss", mode="min", max_drop=-10.0, rungs=rungs, distillation=0.5
    )
    export = lq.DeviceExport(folder / "export", name="net", target=None, samples=2)
    trainer = quiet_trainer(
        folder, quantization, export, max_epochs=2, deterministic=deterministic, num_sanity_val_steps=0
    )
    trainer.fit(module, DataLoader(small_data(), batch_size=8, shuffle=True), small_loader())
    assert [rung.rung for rung in quantization.result.rungs] == [*RUNGS, "qat"]
    files = {path.name: path.read_bytes() for path in (folder / "export/net").rglob("*") if path.is_file()}
    return module, files


@pytest.mark.parametrize("deterministic", [False, True])
def test_every_rung_training_and_export(tmp_path: Path, deterministic: bool) -> None:
    first, first_files = run(tmp_path / "first", deterministic)
    second, second_files = run(tmp_path / "second", deterministic)
    assert_same_tensors(first.state_dict(), second.state_dict())
    assert first_files.keys() == {
        *("net.onnx", "model.onnx", "model.encodings", "manifest.json", "io.json"),
        *("host.py", "host.cpp", "Host.kt"),
    }
    assert first_files == second_files
