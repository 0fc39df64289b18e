"""Trainers and compiled modules that cannot work with quantization are refused, before anything is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn

from lightning_quant import PostTrainingQuantization, QuantizationAwareTraining
from lightning_quant.errors import ConfigurationError
from tests.helpers.small import (
    SmallModule,
    SmallNet,
    small_loader,
    small_net,
)

MakeTrainer = Callable[..., Trainer]
CALLBACKS = [PostTrainingQuantization, QuantizationAwareTraining]


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
@pytest.mark.parametrize("callback", CALLBACKS)
def test_other_precisions_are_refused(trainer: MakeTrainer, precision: str, callback: Any) -> None:
    module = SmallModule()
    with pytest.raises(ConfigurationError, match=rf"precision='{precision}'.*32-true, 16-mixed, bf16-mixed"):
        trainer(callback(), max_epochs=1, precision=precision).fit(module, small_loader())
    assert type(module.model) is SmallNet


@pytest.mark.parametrize("averaging", [EMAWeightAveraging, lambda: StochasticWeightAveraging(1e-3)])
def test_weight_averaging_before_ours_is_refused(trainer: MakeTrainer, averaging: Any) -> None:
    module = SmallModule()
    with pytest.raises(ConfigurationError, match=r"WeightAveraging is listed before QuantizationAwareTraining"):
        trainer(averaging(), QuantizationAwareTraining(), max_epochs=1).fit(module, small_loader())
    assert type(module.model) is SmallNet


def test_compiled_modules_are_refused(trainer: MakeTrainer) -> None:
    module = SmallModule()
    with pytest.raises(ConfigurationError, match=r"torch\.compile\(\) of SmallModule"):
        trainer(QuantizationAwareTraining(), max_epochs=1).fit(torch.compile(module), small_loader())
    with pytest.raises(ConfigurationError, match="network='model' was compiled"):
        trainer(PostTrainingQuantization()).fit(SmallModule(torch.compile(small_net())), small_loader())
    part = SmallModule()
    part.model.branch = torch.compile(part.model.branch)
    with pytest.raises(ConfigurationError, match=r"torch\.compile\(\) of model\.branch with PostTraining"):
        trainer(PostTrainingQuantization()).fit(part, small_loader())
    in_place = SmallModule()
    in_place.model.branch.compile()
    with pytest.raises(ConfigurationError, match=r"model\.branch\.compile\(\) with PostTrainingQuantization"):
        trainer(PostTrainingQuantization()).fit(in_place, small_loader())
    assert type(module.model) is SmallNet


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients_are_refused(trainer: MakeTrainer, kind: Any) -> None:
    module = SmallModule()
    module.model.table = kind(10, 4, sparse=True)
    with pytest.raises(ConfigurationError, match=r"model\.table has sparse=True"):
        trainer(QuantizationAwareTraining(), max_epochs=1).fit(module, small_loader())
    assert type(module.model) is SmallNet


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy])
def test_sharding_strategies_are_refused(trainer: MakeTrainer, strategy: Any) -> None:
    # They want a GPU, and DeepSpeed its package, to be constructed in a Trainer: an empty one is put in its place.
    one = trainer(PostTrainingQuantization(), max_epochs=1)
    module = SmallModule()
    one.strategy.__class__ = strategy
    with pytest.raises(ConfigurationError, match=rf"{strategy.__name__} with PostTrainingQuantization.*'ddp'"):
        one.callbacks[0].setup(one, module, "fit")
    assert type(module.model) is SmallNet
