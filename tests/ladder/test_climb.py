"""The climb: what is kept, what is rolled back, and when it stops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from typing_extensions import override

from lightning_quant.errors import LightningQuantError
from lightning_quant.ladder.climb import climb
from lightning_quant.ladder.gate import Ladder, RungResult
from lightning_quant.ladder.rung import Rung, RungContext
from lightning_quant.ladder.session import LadderSession
from lightning_quant.simulation.network import QuantizedNetwork
from tests.helpers.small import assert_same_tensors
from tests.ladder.rungs.contexts import context_of


class Noise(Rung):
    """Adds to the head's bias; what it adds is what it costs."""

    amount = 0.0
    applied: list[str]

    @override
    def apply(self, network: QuantizedNetwork, context: RungContext) -> str:
        Noise.applied.append(self.name)
        network.get_parameter("network.head.bias").add_(self.amount)
        return f"added {self.amount}"


class Small(Noise):
    name, amount = "small", 0.01


class Large(Noise):
    name, amount = "large", 1.0


class Failing(Noise):
    name, amount = "failing", 5.0
    error: Exception = LightningQuantError("this network has no head")

    @override
    def apply(self, network: QuantizedNetwork, context: RungContext) -> str:
        super().apply(network, context)
        raise self.error


class Broken(Failing):
    name = "broken"
    error = RuntimeError("a bug")


class Afresh(Noise):
    name, amount, start = "afresh", 0.001, "float"


class Finish(Noise):
    """Takes whatever noise there is back by half."""

    name, is_correction = "finish", True

    @override
    def apply(self, network: QuantizedNetwork, context: RungContext) -> str:
        Noise.applied.append(self.name)
        bias = network.get_parameter("network.head.bias")
        bias.sub_(0.5 * (bias - context.float_network.head.bias))
        return "halved"


class Tenth(Noise):
    """Makes the noise a tenth of what it is."""

    name = "tenth"

    @override
    def apply(self, network: QuantizedNetwork, context: RungContext) -> str:
        Noise.applied.append(self.name)
        bias = network.get_parameter("network.head.bias")
        self.seen = float((bias - context.float_network.head.bias).abs().max())
        bias.sub_(0.9 * (bias - context.float_network.head.bias))
        self.measured = context.measure()
        self.left = float((bias - context.float_network.head.bias).abs().max())
        return "a tenth"


def noise(network: QuantizedNetwork, context: RungContext) -> float:
    return float((network.get_parameter("network.head.bias") - context.float_network.head.bias).detach().abs().max())


class Climb:
    def __init__(self, *rungs: Rung, max_drop: float = -1.0) -> None:
        Noise.applied = []
        self.network, self.context = context_of(precision="w8a16")
        self.context.measure = lambda: -noise(self.network, self.context)
        self.ladder = Ladder("noise", "max", max_drop, float_metric=0.0)
        self.session = LadderSession(self.ladder)
        self.results: list[RungResult] = []
        self.rungs = rungs

    def start(self) -> Climb:
        with torch.no_grad():
            self.results.extend(climb(self.session, self.rungs, self.network, self.context))
        return self


def test_it_stops_at_the_first_rung_that_suffices() -> None:
    done = Climb(Large(), Afresh(), Small(), max_drop=0.1).start()
    assert Noise.applied == ["large", "afresh"]
    assert [rung.rung for rung in done.results] == ["large", "afresh"]
    assert done.results == done.ladder.rungs
    assert done.ladder.satisfied


def test_a_rung_that_hurts_is_rolled_back_bit_for_bit() -> None:
    climber = Climb(Small(), Large())
    climber.rungs = (Small(),)
    climber.start()
    after_small = climber.network.snapshot()
    climber.rungs = (Small(), Large())
    climber.start()
    assert Noise.applied == ["small", "large"]  # what is in the ladder is not tried again
    assert [rung.kept for rung in climber.ladder.rungs] == [True, False]
    assert_same_tensors(climber.network.state_dict(), after_small)


def test_a_rung_that_fails_is_skipped() -> None:
    climber = Climb(Failing(), Small()).start()
    assert [rung.rung for rung in climber.ladder.rungs] == ["failing", "small"]
    assert climber.ladder.rungs[0].reason == "failed: this network has no head"
    assert noise(climber.network, climber.context) == pytest.approx(0.01, abs=1e-6)


def test_a_bug_is_raised_and_leaves_the_network_whole() -> None:
    climber = Climb(Broken())
    before = climber.network.snapshot()
    with pytest.raises(RuntimeError, match="a bug"):
        climber.start()
    assert_same_tensors(climber.network.state_dict(), before)
    assert climber.ladder.rungs == []


def test_a_rung_may_start_from_float_again() -> None:
    climber = Climb(Small(), Large(), Afresh()).start()
    assert climber.ladder.best is not None
    assert climber.ladder.best.rung == "afresh"
    assert noise(climber.network, climber.context) == pytest.approx(0.001, abs=1e-6)


def test_a_correction_is_reverted_before_the_next_rung_and_applied_again_after_it() -> None:
    tenth = Tenth()
    climber = Climb(Small(), Finish(), tenth).start()
    assert Noise.applied == ["small", "finish", "tenth", "finish", "finish"]
    assert tenth.seen == pytest.approx(0.01, abs=1e-6)  # not the corrected 0.005
    assert tenth.measured == pytest.approx(-0.0005, abs=1e-6)  # measured with the correction
    assert tenth.left == pytest.approx(0.001, abs=1e-6)  # which was gone again
    assert noise(climber.network, climber.context) == pytest.approx(0.0005, abs=1e-6)
    assert climber.ladder.rungs[-1].changed == "a tenth; then halved"
    assert climber.session.correction == "finish"
    assert climber.session.base is not None


def test_another_correction_replaces_the_first() -> None:
    class Better(Finish):
        name = "better"

        @override
        def apply(self, network: QuantizedNetwork, context: RungContext) -> str:
            bias = network.get_parameter("network.head.bias")
            self.seen = float((bias - context.float_network.head.bias).abs().max())
            bias.sub_(0.9 * (bias - context.float_network.head.bias))
            return "better"

    better = Better()
    climber = Climb(Small(), Finish(), better).start()
    assert better.seen == pytest.approx(0.01, abs=1e-6)
    assert climber.session.correction == "better"
    assert noise(climber.network, climber.context) == pytest.approx(0.001, abs=1e-6)


def test_the_float_network_is_measured_after_the_same_repair() -> None:
    class Both(Small):
        name = "both"

        @override
        def float_reference(self, context: RungContext) -> Any:
            return context.float_network

    climber = Climb(Both())
    climber.context.measure_float = lambda network: 0.5
    climber.start()
    assert climber.ladder.float_reestimated == 0.5
    assert climber.ladder.rungs[0].drop == pytest.approx(0.51, abs=1e-6)
