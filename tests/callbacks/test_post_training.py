"""Post-training quantization: ``fit`` calibrates and validates, and takes no step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_quant import PostTrainingQuantization, QuantizationAwareTraining
from tests.helpers.small import SmallModule, assert_same_tensors, encodings, small_loader, small_net

MakeTrainer = Callable[..., Trainer]


@pytest.mark.parametrize(
    "limits", [{"max_epochs": 3}, {"max_epochs": 3, "min_epochs": 2}, {"max_steps": 10, "min_steps": 5}, {}]
)
def test_fit_validates_and_takes_no_step(trainer: MakeTrainer, limits: dict[str, int]) -> None:
    module = SmallModule()
    one = trainer(PostTrainingQuantization(), num_sanity_val_steps=0, **limits)
    one.fit(module, small_loader(), small_loader())
    assert one.global_step == 0
    assert module.called == ["validation"] * 4
    (metrics,) = one.validate(module, small_loader(), verbose=False)
    assert float(one.callback_metrics["val_loss"]) == metrics["val_loss"]


def test_fit_leaves_the_weights(trainer: MakeTrainer) -> None:
    module = SmallModule()
    trainer(PostTrainingQuantization(), max_epochs=3).fit(module, small_loader(), small_loader())
    assert torch.equal(module.model.branch.weight, small_net().branch.weight)
    assert torch.equal(module.model.head.weight, small_net().head.weight)


def test_fit_without_validation(trainer: MakeTrainer) -> None:
    module = SmallModule()
    trainer(PostTrainingQuantization(), max_epochs=1).fit(module, small_loader())
    assert module.called == []
    assert module.quantized.calibrated


def test_callbacks_that_watch_a_metric_do_no_harm(trainer: MakeTrainer, tmp_path: Path) -> None:
    best, stop = ModelCheckpoint(tmp_path, monitor="val_loss"), EarlyStopping("val_loss")
    one = trainer(PostTrainingQuantization(), best, stop, max_epochs=1, enable_checkpointing=True)
    one.fit(SmallModule(), small_loader(), small_loader())
    assert "val_loss" in one.callback_metrics
    assert list(tmp_path.glob("*.ckpt")) == []  # without a step there is nothing new to Lightning


def test_fit_validate_and_test_calibrate_alike(trainer: MakeTrainer) -> None:
    fitted, validated = SmallModule(), SmallModule()
    trainer(PostTrainingQuantization()).fit(fitted, small_loader(shuffle=True))
    callback = PostTrainingQuantization(calibration_dataloader=small_loader(shuffle=True))
    trainer(callback).validate(validated, small_loader(), verbose=False)
    assert_same_tensors(encodings(fitted.quantized), encodings(validated.quantized))


def test_training_on_after_it(trainer: MakeTrainer) -> None:
    module = SmallModule()
    trainer(PostTrainingQuantization(), max_epochs=1).fit(module, small_loader())
    before = encodings(module.quantized)
    trainer(QuantizationAwareTraining(), max_epochs=1).fit(module, small_loader())
    assert module.called == ["training"] * 4
    assert any(not torch.equal(encodings(module.quantized)[name], value) for name, value in before.items())


def test_the_calibration_cache_is_for_data_that_can_be_read_twice(trainer: MakeTrainer, tmp_path: Path) -> None:
    once = PostTrainingQuantization(calibration_dataloader=iter(small_loader()), statistics_cache=str(tmp_path / "a"))
    trainer(once).validate(SmallModule(), small_loader(), verbose=False)
    assert not (tmp_path / "a").exists()
    again = PostTrainingQuantization(calibration_dataloader=small_loader(), statistics_cache=str(tmp_path / "b"))
    trainer(again).validate(SmallModule(), small_loader(), verbose=False)
    assert len(list((tmp_path / "b").glob("*.npz"))) == 1
