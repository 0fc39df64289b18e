"""What rungs say that they take: in samples passed through the network, and in validations."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_quant.ladder.registry import parse_rungs
from lightning_quant.ladder.rung import RUNGS, Cost
from tests.ladder.rungs.contexts import context_of


def cost_of(rung: Any, samples: int = 128) -> Cost:
    network, context = context_of(precision="w4a8", calibration_samples=samples)
    (made,) = parse_rungs([rung])
    cost = made.cost(network, context)
    assert cost is not None
    return cost


@pytest.mark.parametrize("name", list(RUNGS.homes))
def test_every_rung_reads_all_calibration_samples_and_is_measured(name: str) -> None:
    cost = cost_of(name)
    assert cost.validations >= 1
    assert 128 <= cost.samples < 1e6
    assert cost_of(name, samples=256).samples >= cost.samples + 128


@pytest.mark.parametrize(
    ("name", "option", "few", "many"),
    [
        ("rounding", "iterations", 100, 1000),
        ("rounding", "batch", 1, 8),
        ("adaround", "iterations", 100, 1000),
        ("adaround", "samples", 1, 8),
        ("seq_mse", "candidates", 2, 20),
        ("mixed", "samples", 1, 8),
    ],
)
def test_more_of_what_takes_time_costs_more(name: str, option: str, few: int, many: int) -> None:
    assert cost_of({name: {option: few}}).samples < cost_of({name: {option: many}}).samples


def test_re_estimated_batch_norms_are_measured_in_float_too() -> None:
    assert cost_of("bn_reestimation").validations == 2


def test_a_rung_of_the_users_need_not_say() -> None:
    network, context = context_of()
    (made,) = parse_rungs(["tests.helpers.rungs.ScaledWeights"])
    assert made.cost(network, context) is None
