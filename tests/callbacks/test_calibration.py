"""As many calibration samples as asked for, and what is wrong with them named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from lightning.pytorch import Trainer
from torch.utils.data import TensorDataset

from lightning_quant import PostTrainingQuantization, QuantizationAwareTraining
from lightning_quant.errors import CalibrationError
from tests.helpers.small import (
    SmallModule,
    assert_same_tensors,
    encodings,
    small_data,
    small_loader,
)

MakeTrainer = Callable[..., Trainer]


def test_calibration_reads_as_many_samples_as_asked_for(trainer: MakeTrainer) -> None:
    images, labels = small_data().tensors
    few, cut = SmallModule(), SmallModule()
    trainer(PostTrainingQuantization(calibration_samples=13)).fit(few, small_loader())
    trainer(PostTrainingQuantization()).fit(cut, small_loader(TensorDataset(images[:13], labels[:13])))
    assert_same_tensors(encodings(few.quantized), encodings(cut.quantized))


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_no_calibration_sample(trainer: MakeTrainer, stage: str) -> None:
    module = SmallModule()
    empty = small_loader(small_data(4), drop_last=True)
    callback = PostTrainingQuantization(calibration_dataloader=empty)
    with pytest.raises(CalibrationError, match=r"calibration data loader gave no batch.*drop_last"):
        getattr(trainer(callback), stage)(module, small_loader())
    assert module.called == []
    assert not module.quantized.calibrated


@pytest.mark.parametrize(("value", "name"), [(float("nan"), "NaN"), (float("inf"), "Inf")])
def test_calibration_batch_that_is_not_finite_is_named(trainer: MakeTrainer, value: float, name: str) -> None:
    images, labels = small_data().tensors
    damaged = images.clone()
    damaged[20, 0, 3, 3] = value
    module = SmallModule()
    callback = QuantizationAwareTraining(calibration_dataloader=small_loader(TensorDataset(damaged, labels)))
    with pytest.raises(CalibrationError, match=rf"Calibration batch 2 holds {name}"):
        trainer(callback, max_epochs=1).fit(module, small_loader(), small_loader())
    assert module.called == []
    assert not module.quantized.calibrated
    # the half-finished statistics leave no trace once the data is repaired
    trainer(PostTrainingQuantization()).fit(module, small_loader())
    fresh = SmallModule()
    trainer(PostTrainingQuantization()).fit(fresh, small_loader())
    assert_same_tensors(encodings(module.quantized), encodings(fresh.quantized))
