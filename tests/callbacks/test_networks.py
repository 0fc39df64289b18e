"""The network is found by its name, and what is not a network is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_quant import PostTrainingQuantization
from lightning_quant.errors import ConfigurationError
from tests.helpers.small import (
    SmallModule,
    SmallNet,
    assert_same_tensors,
    small_loader,
)

MakeTrainer = Callable[..., Trainer]


def assert_unchanged(module: SmallModule, reference: dict[str, Tensor]) -> None:
    assert type(module.model) is SmallNet
    assert module.called == []
    assert_same_tensors(module.state_dict(), reference)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"network": "modle"}, r"SmallModule has no attribute 'modle'.*Did you mean 'model'\?"),
        ({"network": "model.stam"}, r"SmallNet has no attribute 'stam'.*Did you mean 'stem'\?"),
        ({"network": "called"}, r"network='called' is list: expected an nn.Module"),
        ({"overrides": {"haed*": "w8a16"}}, r"'haed\*' matches no layer.*stem"),
    ],
)
@pytest.mark.parametrize("stage", ["fit", "validate", "predict"])
def test_bad_names(trainer: MakeTrainer, arguments: dict[str, Any], message: str, stage: str) -> None:
    module = SmallModule()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ConfigurationError, match=message):
        getattr(trainer(PostTrainingQuantization(**arguments)), stage)(module, small_loader())
    assert_unchanged(module, before)


def test_a_lightning_module_is_not_a_network(trainer: MakeTrainer) -> None:
    module = SmallModule()
    module.inner = SmallModule()
    with pytest.raises(ConfigurationError, match=r"network='inner' is a LightningModule.*'inner\.model'"):
        trainer(PostTrainingQuantization(network="inner")).fit(module, small_loader())
