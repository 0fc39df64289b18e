"""Training that comes to NaN or infinity stops, says where, and leaves the weights of the step before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import SGD

import lightning_quant as lq
from lightning_quant.callbacks.finiteness import GradientWatch, Step
from lightning_quant.errors import TrainingError
from tests.helpers.small import SIZE, SmallModule, assert_same_tensors, small_loader
from tests.helpers.trainers import quiet_trainer

STEP = 5


class Relative(nn.Module):
    """NaN for an image that is black: the mean of an empty selection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, bias=False)
        self.head = nn.Linear(4 * (SIZE - 2) ** 2, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x - x[x > 0].mean()).flatten(1))


class WithBadGradients(SmallModule):
    """Something becomes NaN in the sixth step; in those after it, too, if that lasts."""

    def __init__(self, what: str, lasts: bool = False) -> None:
        super().__init__(Relative(), lambda module: SGD(module.parameters(), lr=1e-3))
        self.what = what
        self.lasts = lasts
        self.before: dict[str, Tensor] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        bad_step = self.global_step >= STEP if self.lasts else self.global_step == STEP
        if bad_step:
            self.before = {name: value.clone() for name, value in self.state_dict().items() if torch.is_tensor(value)}
            if self.what == "batch":
                images[0, 0, 0, 0] = torch.nan
            elif self.what == "layer":
                images = torch.zeros_like(images)
        loss = super().training_step((images, labels), batch_idx)
        return loss * torch.inf if self.what == "loss" and bad_step else loss


def fit(module: pl.LightningModule, callback: pl.Callback, folder: Path, *others: Any, **arguments: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {"max_epochs": 4, "num_sanity_val_steps": 0, "enable_checkpointing": bool(others)}
    trainer = quiet_trainer(folder, callback, *others, **{**defaults, **arguments})
    trainer.fit(module, small_loader(), small_loader())
    return trainer


@pytest.mark.parametrize(
    ("what", "where"),
    [
        ("batch", "the batch itself holds NaN or Inf"),
        ("layer", "the output of layer 'mean' is the first that is not finite"),
        ("loss", "it comes from the loss or its gradient"),
    ],
)
def test_step_and_layer_are_named_and_the_step_is_not_taken(tmp_path: Path, what: str, where: str) -> None:
    module = WithBadGradients(what)
    callback = lq.QuantizationAwareTraining("w8a8", calibration_samples=16)
    with pytest.raises(TrainingError, match=r"Step 6 \(epoch 1, batch 1\)") as raised:
        fit(module, callback, tmp_path)
    assert where in str(raised.value)
    now = {name: value for name, value in module.state_dict().items() if torch.is_tensor(value)}
    assert_same_tensors(now, module.before)


def test_after_rungs_it_ends_with_the_best_network(tmp_path: Path) -> None:
    module = WithBadGradients("loss")
    monitor: dict[str, Any] = {"monitor": "val_loss", "mode": "min", "max_drop": -10.0}
    callback = lq.QuantizationAwareTraining("w8a8", calibration_samples=16, **monitor)
    with pytest.warns(UserWarning, match=r"Step 6 \(epoch 1.*Training ends here, with the best network so far"):
        fit(module, callback, tmp_path)
    assert [rung.rung for rung in callback.result.rungs] == ["ptq", "qat"]
    best = torch.load(callback.best_model_path, weights_only=True)["state_dict"]
    now = {name: value for name, value in module.state_dict().items() if torch.is_tensor(value)}
    assert_same_tensors(now, {name: best[name] for name in now})
    if callback.result.rungs[-1].kept:  # trained for five steps and validated after them
        assert_same_tensors(now, module.before)


# Where looking is waiting: the flag of a step is read at the next one


def late(**arguments: Any) -> lq.QuantizationAwareTraining:
    """A callback that reads late, as on a GPU."""
    callback = lq.QuantizationAwareTraining("w8a8", calibration_samples=16, **arguments)
    callback._guard.watch = GradientWatch(late=True)
    return callback


def test_every_step_is_checked_and_reported_one_step_late(tmp_path: Path) -> None:
    module = WithBadGradients("loss")
    taken: list[int] = []
    step = module.optimizer_step
    module.optimizer_step = lambda *args, **kwargs: (step(*args, **kwargs), taken.append(module.global_step))  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=r"Step 6 \(epoch 1, batch 1\) has gradients .* The step was taken"):
        fit(module, late(), tmp_path)
    assert taken == [0, 1, 2, 3, 4, 5]  # but not the one after it


@pytest.mark.parametrize(
    "arguments",
    [{"max_steps": 6}, {"max_steps": 6, "limit_val_batches": 0}, {"val_check_interval": 2}],
    ids=["end of training", "without validation", "validation"],
)
def test_the_last_step_before_validation_and_end_is_not_missed(tmp_path: Path, arguments: dict[str, Any]) -> None:
    module = WithBadGradients("loss")
    with pytest.raises(TrainingError, match=r"Step 6 \(epoch 1, batch 1\)"):
        fit(module, late(), tmp_path, **arguments)
    assert module.called.count("training") == 6
    assert module.called[-1] == "training"


def test_no_checkpoint_keeps_what_such_a_step_made(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    with pytest.raises(TrainingError, match=r"Step 6 "):
        fit(WithBadGradients("loss"), late(), tmp_path, keep)
    assert {path.stem for path in tmp_path.glob("*.ckpt")} == {f"step={step}" for step in range(1, 6)}


def test_late_after_rungs_it_ends_with_the_best_network(tmp_path: Path) -> None:
    module = WithBadGradients("loss")
    callback = late(monitor="val_loss", mode="min", max_drop=-10.0)
    with pytest.warns(UserWarning, match=r"Step 6 \(epoch 1.*was taken.*Training ends here, with the best network"):
        fit(module, callback, tmp_path)
    best = torch.load(callback.best_model_path, weights_only=True)["state_dict"]
    now = {name: value for name, value in module.state_dict().items() if torch.is_tensor(value)}
    assert_same_tensors(now, {name: best[name] for name in now})
    assert all(torch.isfinite(value).all() for value in now.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_reads_late_by_itself() -> None:
    watch, parameter = GradientWatch(), nn.Parameter(torch.ones(3, device="cuda"))
    found = []
    for number, value in enumerate((1.0, torch.nan, 1.0), start=1):
        parameter.grad = torch.full_like(parameter, value)
        found.append(watch.check([parameter], Step(number, 0, number - 1)))
    assert found == [None, None, Step(2, 0, 1)]
    assert watch.last() is None


# 16-bit training, whose scaler skips steps that overflow


def half(scale: float = 4.0) -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return {"plugins": MixedPrecision("16-mixed", "cpu", scaler=scaler)}


def test_an_occasional_overflow_is_left_to_the_scaler(tmp_path: Path) -> None:
    for callback in (lq.QuantizationAwareTraining("w8a8", calibration_samples=16), late()):
        module = WithBadGradients("loss")
        trainer = fit(module, callback, tmp_path, **half())
        assert trainer.global_step == 16
        assert all(torch.isfinite(value).all() for value in module.parameters())


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize(
    ("what", "where"), [("layer", "the output of layer 'mean'"), ("loss", "it comes from the loss or its gradient")]
)
def test_numbers_that_stay_infinite_are_reported(tmp_path: Path, is_late: bool, what: str, where: str) -> None:
    module = WithBadGradients(what, lasts=True)
    callback = late() if is_late else lq.QuantizationAwareTraining("w8a8", calibration_samples=16)
    # step 6 with a scale of 4, 7 with 2, 8 with 1: only 9 with 0.5 is not explained by scaling
    with pytest.raises(TrainingError, match=r"Step 9 .* The loss scale has fallen to 0.5") as raised:
        fit(module, callback, tmp_path, **half())
    assert where in str(raised.value)
    now = {name: value for name, value in module.state_dict().items() if torch.is_tensor(value)}
    assert_same_tensors(now, module.before)


def test_after_rungs_numbers_that_stay_infinite_end_the_fit(tmp_path: Path) -> None:
    module = WithBadGradients("loss", lasts=True)
    callback = lq.QuantizationAwareTraining(
        "w8a8", calibration_samples=16, monitor="val_loss", mode="min", max_drop=-10.0
    )
    with pytest.warns(UserWarning, match=r"Step 9 .*fallen to 0.5.*Training ends here, with the best network"):
        trainer = fit(module, callback, tmp_path, **half())
    assert trainer.global_step == 9
    assert callback.result.rungs[-1].rung == "qat"
