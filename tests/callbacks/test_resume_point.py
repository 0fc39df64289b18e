"""A fit that is resumed from a resume point ends with the bits of one that was never stopped."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from filelock import FileLock
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

import lightning_quant as lq
from lightning_quant.callbacks.resume_point import ResumePoint
from lightning_quant.errors import ConfigurationError
from lightning_quant.ladder.rung import Rung, RungContext
from lightning_quant.simulation.network import QuantizedNetwork
from tests.helpers.small import SmallModule, assert_same_tensors, small_data, small_loader, small_net
from tests.helpers.trainers import quiet_trainer


class Augmented(Dataset[Any]):
    """Draws from all three generators for every item."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = small_data()[index]
        return image * (0.9 + 0.1 * torch.rand(())) + 0.1 * float(np.random.rand()) + 0.1 * random.random(), label


def scheduled(module: pl.LightningModule) -> Any:
    """Asking for the number of steps makes Lightning set the data up, and draw, earlier."""
    steps = module.trainer.estimated_stepping_batches
    optimizer = AdamW(module.parameters(), lr=1e-3)
    scheduler = LambdaLR(optimizer, lambda step: 1 - step / (steps + 1))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Power(pl.Callback):
    """Goes out at a moment of an epoch."""

    def __init__(self, epoch: int, moment: str) -> None:
        self.at = epoch, moment

    def _maybe(self, trainer: pl.Trainer, moment: str) -> None:
        if self.at == (trainer.current_epoch, moment):
            raise RuntimeError("the power went out")

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._maybe(trainer, "training")

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._maybe(trainer, "epoch end")


def run(folder: Path, *callbacks: pl.Callback, optimizers: Any = None, ckpt_path: Any = None) -> SmallModule:
    module = SmallModule(small_net(), optimizers)
    pl.seed_everything(3, verbose=False)
    trainer = quiet_trainer(folder, *callbacks, max_epochs=4, num_sanity_val_steps=0, enable_checkpointing=True)
    train = DataLoader(Augmented(), batch_size=8, shuffle=True)
    trainer.fit(module, train, small_loader(), ckpt_path=ckpt_path, weights_only=True)
    return module


def quantization(kind: str) -> list[pl.Callback]:
    if kind == "float":
        return []
    rungs = ("ptq", "percentile")
    return [
        lq.QuantizationAwareTraining(
            "w4a8", calibration_samples=16, rungs=rungs, monitor="val_loss", mode="min", max_drop=-10.0
        )
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Any], dict[str, Any]]:
    """What a fit that nothing stops ends with; each is run once."""

    @functools.cache
    def ended(kind: str, optimizers: Any) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("whole")
        point = ResumePoint(folder / "whole.ckpt")
        return run(folder, *quantization(kind), point, optimizers=optimizers).state_dict()

    return ended


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float", "qat"])
@pytest.mark.parametrize("optimizers", [None, scheduled], ids=["constant", "scheduled"])
@pytest.mark.parametrize("moment", ["training", "epoch end"])
@pytest.mark.parametrize("epoch", [0, 2])
def test_it_ends_with_the_same_bits(
    tmp_path: Path, whole: Callable[[str, Any], dict[str, Any]], kind: str, optimizers: Any, moment: str, epoch: int
) -> None:
    expected = whole(kind, optimizers)
    point = ResumePoint(tmp_path / "last.ckpt")
    assert point.ckpt_path is None
    with pytest.raises(RuntimeError, match="the power went out"):
        run(tmp_path / "again", *quantization(kind), Power(epoch, moment), point, optimizers=optimizers)
    best = tmp_path / "again/ladder/best.ckpt"  # before the first epoch is over, there is what the rungs left
    start = point.ckpt_path or (str(best) if best.is_file() else None)
    assert (point.ckpt_path is None) == (epoch == 0)
    resumed = run(
        tmp_path / "again", *quantization(kind), ResumePoint(point.path), optimizers=optimizers, ckpt_path=start
    )
    assert_same_tensors(resumed.state_dict(), expected)


def test_a_second_fit_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    def callback() -> lq.QuantizationAwareTraining:
        return lq.QuantizationAwareTraining(
            "w8a8", calibration_samples=16, monitor="val_loss", mode="min", max_drop=9.0
        )

    with FileLock(tmp_path / "ladder/.lock"), pytest.raises(ConfigurationError, match="Another fit is writing to"):
        run(tmp_path, callback())
    for _ in range(2):  # one after the other is fine
        run(tmp_path, callback())


class Fails(Rung):
    """A rung that fails a given number of times."""

    name = "fails"
    times = 0

    @override
    def apply(self, network: QuantizedNetwork, context: RungContext) -> str:
        type(self).times -= 1
        if self.times >= 0:
            raise RuntimeError("the power went out")
        return "nothing"


class FailsLater(Fails):
    name = "fails_later"
    times = 0


def test_a_fit_that_is_stopped_in_one_rung_and_then_in_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Fails.__module__

    def go(folder: str) -> SmallModule:
        monitor: dict[str, Any] = {"monitor": "val_loss", "mode": "min", "max_drop": -10.0}
        rungs = ("ptq", f"{here}.Fails", f"{here}.FailsLater")
        callback = lq.QuantizationAwareTraining("w4a8", calibration_samples=16, rungs=rungs, **monitor)
        best = tmp_path / folder / "ladder/best.ckpt"
        point = ResumePoint(tmp_path / folder / "last.ckpt")
        return run(tmp_path / folder, callback, point, ckpt_path=str(best) if best.is_file() else None)

    whole = go("whole")
    monkeypatch.setattr(Fails, "times", 1)
    monkeypatch.setattr(FailsLater, "times", 1)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the power went out"):
            go("again")
    assert_same_tensors(go("again").state_dict(), whole.state_dict())


def test_training_that_was_good_enough_is_not_resumed(tmp_path: Path) -> None:
    """Killed between the validation that ends it and its end."""

    def callback() -> lq.QuantizationAwareTraining:
        return lq.QuantizationAwareTraining(
            "w4a8", calibration_samples=16, monitor="worse", max_drop=0.5, rungs=("ptq",)
        )

    class Worse(SmallModule):
        """Float 1.0, calibrated 0, 0.9 after the first epoch of training, 0.8 after the second."""

        def on_validation_epoch_end(self) -> None:
            trained = {0: 0.0, 4: 0.9}.get(self.trainer.global_step, 0.8)
            self.log("worse", trained if QuantizedNetwork.of(self.model) is not None else 1.0)

    def fit(*callbacks: pl.Callback, ckpt_path: Any = None) -> pl.Trainer:
        trainer = quiet_trainer(tmp_path, *callbacks, max_epochs=6, num_sanity_val_steps=0, enable_checkpointing=True)
        loader = DataLoader(small_data(), batch_size=8)
        trainer.fit(Worse(small_net()), loader, small_loader(), ckpt_path=ckpt_path, weights_only=True)
        return trainer

    point = ResumePoint(tmp_path / "last.ckpt")
    assert fit(callback(), point).current_epoch == 2
    again = callback()
    trainer = fit(again, ResumePoint(point.path), ckpt_path=point.ckpt_path)
    assert trainer.global_step == 8
    assert [(rung.rung, rung.metric) for rung in again.result.rungs] == [("ptq", 0.0), ("qat", pytest.approx(0.9))]
