"""A rung in a user's file: in a fit, from Python, Lightning's command line and Hydra."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.errors import ConfigurationError
from lightning_quant.ladder.rung import Cost
from tests.helpers.rungs import ScaledWeights
from tests.helpers.small import SmallModule, small_loader

MakeTrainer = Callable[..., Trainer]
PATH = "tests.helpers.rungs.ScaledWeights"
GIVEN: list[Any] = [PATH, {PATH: {"factor": 1.1}}]


class Dear(ScaledWeights):
    """A rung that says that it takes so many validations."""

    name = "dear"

    def __init__(self, validations: float) -> None:
        super().__init__()
        self.validations = validations

    def cost(self, network: Any, context: Any) -> Cost:
        return Cost(0, self.validations)


def made_by(callback: lq.QuantizationAwareTraining) -> tuple[type, float]:
    _, mine = callback.rungs
    assert isinstance(mine, ScaledWeights)
    return type(mine), mine.factor


@pytest.mark.parametrize("rung", [ScaledWeights(1.1), {"scaled_weights": {"factor": 1.1}}])
def test_it_is_tried_and_judged(trainer: MakeTrainer, rung: Any) -> None:
    quantization = lq.QuantizationAwareTraining("w8a8", monitor="val_loss", mode="min", rungs=("ptq", rung))
    trainer(quantization, max_epochs=0).fit(SmallModule(), small_loader(), small_loader())
    assert [result.rung for result in quantization.result.rungs] == ["ptq", "scaled_weights"]
    assert quantization.result.rungs[1].changed == "weight ranges 1.1 times as wide"


@pytest.mark.parametrize(("validations", "is_told"), [(1e6, True), (0, False), (float("inf"), False)])
def test_how_long_it_takes_is_said_where_it_is_long(
    trainer: MakeTrainer, caplog: pytest.LogCaptureFixture, validations: float, is_told: bool
) -> None:
    quantization = lq.QuantizationAwareTraining(
        "w8a8", monitor="val_loss", mode="min", rungs=("ptq", Dear(validations))
    )
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        trainer(quantization, max_epochs=0).fit(SmallModule(), small_loader(), small_loader())
    told = re.findall(r"Rung dear takes about (\d+) minutes\.", caplog.text)
    assert bool(told) == is_told
    if is_told:  # of a validation that takes between a millisecond and ten seconds
        assert 1e6 * 0.001 / 60 < int(told[0]) < 1e6 * 10 / 60


@pytest.mark.parametrize("rung", [*GIVEN, {"class_path": PATH, "init_args": {"factor": 1.1}}])
def test_from_lightnings_command_line(rung: Any) -> None:
    arguments = {"rungs": ["ptq", rung]}
    callback = {"class_path": "lightning_quant.QuantizationAwareTraining", "init_args": arguments}
    trainer = {"accelerator": "cpu", "logger": False, "callbacks": [callback]}
    cli = LightningCLI(SmallModule, args={"trainer": trainer}, run=False, save_config_callback=None)
    (made,) = [one for one in cli.trainer.callbacks if isinstance(one, lq.QuantizationAwareTraining)]
    assert made_by(made) == (ScaledWeights, 1.05 if rung == PATH else 1.1)


@pytest.mark.parametrize("rung", [*GIVEN, {"_target_": PATH, "factor": 1.1}])
def test_from_hydra(rung: Any) -> None:
    made = instantiate({"_target_": "lightning_quant.QuantizationAwareTraining", "rungs": ["ptq", rung]})
    assert made_by(made) == (ScaledWeights, 1.05 if rung == PATH else 1.1)


def test_everything_after_precision_is_taken_by_keyword() -> None:
    with pytest.raises(TypeError, match="positional"):
        lq.QuantizationAwareTraining("w8a8", "model")  # type: ignore[misc]


def test_a_metric_is_needed_only_where_something_is_compared() -> None:
    assert not lq.QuantizationAwareTraining(monitor=None).climbs
    with pytest.raises(ConfigurationError, match="monitor=None"):
        lq.QuantizationAwareTraining(monitor=None, max_drop=0.1)


class Counting(nn.Module):
    """Counts its calls, and draws a random number in each."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 5, 1)
        self.calls = 0  # no buffer, which is rolled back with the rung

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x).mean((2, 3)) + 0 * torch.rand(())  # type: ignore[no-any-return]


class Fails(Dear):
    """A rung whose cost fails."""

    name = "fails"

    def cost(self, network: Any, context: Any) -> Cost:
        raise ZeroDivisionError


def test_what_it_takes_is_found_out_without_a_trace(trainer: MakeTrainer) -> None:
    """Neither the network's own counters nor the random numbers of training know of it, and it ends no fit."""
    ends = []
    for rung in (ScaledWeights(), Dear(0), Fails(0)):
        torch.manual_seed(0)
        module = SmallModule(Counting())  # type: ignore[arg-type]
        quantization = lq.QuantizationAwareTraining("w8a8", monitor="val_loss", mode="min", rungs=("ptq", rung))
        trainer(quantization, max_epochs=1).fit(module, small_loader(), small_loader())
        assert len(quantization.result.rungs) == 3
        ends.append((module.model.calls, float(torch.rand(()))))
    assert ends[0] == ends[1] == ends[2]
