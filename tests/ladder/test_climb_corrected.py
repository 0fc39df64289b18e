"""The climb with a correction in force, and past rungs that are of no use."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from typing_extensions import override

from lightning_quant.errors import LightningQuantError
from lightning_quant.ladder.rung import RungContext
from lightning_quant.simulation.network import QuantizedNetwork
from tests.helpers.small import assert_same_tensors
from tests.ladder.test_climb import Afresh, Broken, Climb, Failing, Finish, Large, Noise, Small, Tenth, noise


class Nan(Noise):
    """Leaves a network that measures NaN."""

    name, amount = "nan", math.nan


@pytest.mark.parametrize("kind", [Large, Nan, Failing, Broken])
def test_what_goes_wrong_on_top_of_a_correction_leaves_it_in_force(kind: type[Noise]) -> None:
    climber = Climb(Small(), Finish()).start()
    before, base = climber.network.snapshot(), climber.session.base
    climber.rungs = (*climber.rungs, kind())
    if kind is Broken:
        with pytest.raises(RuntimeError, match="a bug"):
            climber.start()
    else:
        climber.start()
        assert climber.results[-1].kept is False
    assert Noise.applied[:3] == ["small", "finish", kind.name]
    assert_same_tensors(climber.network.state_dict(), before)
    assert noise(climber.network, climber.context) == pytest.approx(0.005, abs=1e-6)
    assert climber.session.correction == "finish"
    assert base is not None
    assert climber.session.base is base


def test_a_correction_is_applied_again_after_a_rung_that_starts_from_float() -> None:
    climber = Climb(Small(), Finish(), Afresh()).start()
    assert Noise.applied == ["small", "finish", "afresh", "finish"]
    assert noise(climber.network, climber.context) == pytest.approx(0.0005, abs=1e-6)
    assert climber.session.base is not None
    with torch.no_grad():
        climber.network.restore(climber.session.base)
    assert noise(climber.network, climber.context) == pytest.approx(0.001, abs=1e-6)


def test_a_correction_that_a_rung_is_better_without_is_left_out_from_there_on() -> None:
    class Learned(Noise):
        """Leaves nothing for a correction to do, which then does harm."""

        name = "learned"

        @override
        def apply(self, network: QuantizedNetwork, context: RungContext) -> str:
            Noise.applied.append(self.name)
            network.get_parameter("network.head.bias").copy_(context.float_network.head.bias + 0.001)
            return "learned"

    class Overdone(Finish):
        """Takes half a percent back, whatever there is."""

        name = "overdone"

        @override
        def apply(self, network: QuantizedNetwork, context: RungContext) -> str:
            Noise.applied.append(self.name)
            network.get_parameter("network.head.bias").sub_(0.005)
            return "overdone"

    tenth = Tenth()
    climber = Climb(Small(), Overdone(), Learned(), tenth).start()
    assert Noise.applied == ["small", "overdone", "learned", "overdone", "tenth"]
    assert [rung.kept for rung in climber.ladder.rungs] == [True] * 4
    learned = climber.ladder.rungs[2]
    assert learned.metric == pytest.approx(-0.001, abs=1e-6)
    assert learned.changed == "learned; worse with overdone"
    assert (climber.session.correction, climber.session.base) == (None, None)
    assert tenth.seen == pytest.approx(0.001, abs=1e-6)
    assert tenth.measured == pytest.approx(-0.0001, abs=1e-6)


def test_a_rung_fails_if_the_correction_after_it_does() -> None:
    class OnceOnly(Finish):
        name = "once"

        @override
        def apply(self, network: QuantizedNetwork, context: RungContext) -> str:
            if "once" in Noise.applied:
                raise LightningQuantError("only once")
            return super().apply(network, context)

    climber = Climb(Small(), OnceOnly()).start()
    before = climber.network.snapshot()
    climber.rungs = (*climber.rungs, Afresh())
    climber.start()
    assert climber.results[-1].reason == "failed: only once"
    assert_same_tensors(climber.network.state_dict(), before)
    assert climber.session.correction == "once"


def test_a_resumed_climb_corrects_once() -> None:
    climber = Climb(Small(), Finish()).start()
    tenth = Tenth()
    climber.rungs = (*climber.rungs, tenth)
    climber.start()
    assert tenth.seen == pytest.approx(0.01, abs=1e-6)
    assert tenth.measured == pytest.approx(-0.0005, abs=1e-6)
    assert climber.ladder.rungs[-1].metric == pytest.approx(-0.0005, abs=1e-6)
    assert [rung.rung for rung in climber.ladder.rungs] == ["small", "finish", "tenth"]


def test_a_network_that_measures_nan_is_rolled_back() -> None:
    climber = Climb(Small(), Nan(), Afresh()).start()
    assert [rung.kept for rung in climber.ladder.rungs] == [True, False, True]
    assert noise(climber.network, climber.context) == pytest.approx(0.001, abs=1e-6)


def test_first_rungs_that_are_useless_leave_the_network_as_it_was() -> None:
    climber = Climb(Nan(), Failing())
    before = climber.network.snapshot()
    climber.start()
    assert climber.ladder.best is None
    assert not climber.ladder.satisfied
    assert_same_tensors(climber.network.state_dict(), before)


def test_a_rung_with_a_reason_to_skip_it_is_not_tried() -> None:
    class Unsuitable(Large):
        name = "unsuitable"

        @override
        def skip_reason(self, network: QuantizedNetwork, context: RungContext) -> str | None:
            return "there is nothing to do"

    climber = Climb(Unsuitable(), Small()).start()
    assert Noise.applied == ["small"]
    assert (climber.results[0].reason, climber.results[0].kept) == ("there is nothing to do", False)


def test_a_float_network_that_cannot_be_repaired_fails_that_rung_alone() -> None:
    class Unrepairable(Large):
        name = "unrepairable"

        @override
        def float_reference(self, context: RungContext) -> Any:
            raise LightningQuantError("no samples")

    climber = Climb(Unrepairable(), Small()).start()
    assert climber.results[0].reason == "failed: no samples"
    assert climber.ladder.float_reestimated is None
    assert climber.ladder.best is climber.results[1]


def test_less_is_better_with_mode_min() -> None:
    climber = Climb(Large(), Afresh(), Small(), max_drop=0.5)
    climber.ladder.mode = "min"
    climber.context.measure = lambda: noise(climber.network, climber.context)
    climber.start()
    assert [rung.rung for rung in climber.results] == ["large", "afresh"]
    assert climber.ladder.best is climber.results[1]
    assert climber.results[0].drop == pytest.approx(1.0, abs=1e-5)
