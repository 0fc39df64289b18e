"""The gate: what a metric means compared with the float network's."""

from __future__ import annotations

import json
import math

import pytest

from lightning_quant.errors import ConfigurationError
from lightning_quant.ladder.gate import Ladder


@pytest.mark.parametrize(("mode", "sign"), [("max", 1), ("min", -1)])
def test_drop_and_bound_in_both_modes(mode: str, sign: int) -> None:
    ladder = Ladder("metric", mode, max_drop=0.5, float_metric=sign * 10.0)
    assert ladder.drop(sign * 9.0) == 1.0
    assert ladder.drop(sign * 11.0) == -1.0
    assert ladder.suffices(sign * 9.5)
    assert not ladder.suffices(sign * 9.4)
    assert ladder.is_better(sign * 2.0, sign * 1.0)
    assert not ladder.is_better(sign * 1.0, sign * 1.0)
    assert ladder.is_better(1.0, None)
    assert ladder.is_better(1.0, math.nan)
    assert not ladder.is_better(math.nan, None)


def test_the_reference_is_the_better_float_network() -> None:
    assert Ladder("m", "max", None, 0.5, 0.6).reference == 0.6
    assert Ladder("m", "min", None, 0.5, 0.6).reference == 0.5
    assert Ladder("m", "max", None, 0.5).reference == 0.5
    with pytest.raises(ConfigurationError, match="was not measured"):
        _ = Ladder("m").reference


def test_verdicts() -> None:
    ladder = Ladder("m", "max", max_drop=0.1, float_metric=1.0)
    first = ladder.judge("a", 0.5, "", 1.0)
    worse = ladder.judge("b", 0.4, "", 1.0)
    broken = ladder.judge("c", math.nan, "", 1.0)
    skipped = ladder.skip("d", "nothing to do")
    assert not ladder.satisfied
    enough = ladder.judge("e", 0.95, "", 1.0)
    assert [one.kept for one in (first, worse, broken, skipped, enough)] == [True, False, False, False, True]
    assert worse.reason == "no better than a: rolled back"
    assert broken.reason == "m is NaN: rolled back"
    assert (broken.metric, broken.drop) == (None, None)
    assert enough.reason == "within 0.1 of float"
    assert ladder.best is enough
    assert ladder.satisfied


def test_without_a_bound_nothing_suffices() -> None:
    ladder = Ladder("m", float_metric=1.0)
    ladder.judge("a", 2.0, "", 0.0)
    assert not ladder.satisfied


def test_it_survives_json() -> None:
    ladder = Ladder("m", "min", 0.1, 1.0, 0.9)
    ladder.judge("a", 0.95, "changed", 1.234, 100)
    ladder.skip("b", "no")
    assert Ladder.from_dict(json.loads(json.dumps(ladder.to_dict()))) == ladder
