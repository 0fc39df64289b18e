"""Rungs by name, by dotted path and as instances; whatever is wrong with them is a ConfigurationError."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from typing_extensions import override

from lightning_quant.errors import ConfigurationError
from lightning_quant.ladder.registry import parse_rungs, rung_spec
from lightning_quant.ladder.rung import RUNGS, Rung, RungContext
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.range_estimators import Percentile
from tests.helpers.estimators import Deviations
from tests.helpers.rungs import ScaledWeights


class Mine(Rung):
    name = "mine"

    def __init__(self, strength: float = 1.0) -> None:
        self.strength = strength

    @override
    def apply(self, network: QuantizedNetwork, context: RungContext) -> str:
        return "nothing"


class AlsoMine(Mine):
    """Of the same name."""


class Nameless(Rung):
    @override
    def apply(self, network: QuantizedNetwork, context: RungContext) -> str:
        return "nothing"


class Unnamed(Nameless):
    """Has none either."""


class Unfinished(Rung):
    name = "unfinished"


def path(kind: type) -> str:
    return f"{__name__}.{kind.__qualname__}"


def test_every_name_makes_a_rung_of_that_name() -> None:
    assert [rung.name for rung in parse_rungs(list(RUNGS.homes))] == list(RUNGS.homes)


@pytest.mark.parametrize("options", [{}, None, {"budget": 0.1, "samples": 8}])
def test_options_may_be_left_empty(options: Any) -> None:
    (mixed,) = parse_rungs([{"mixed": options}])
    assert (mixed.budget, mixed.samples) == (0.1, 8)  # type: ignore[attr-defined]


def test_a_range_estimator_is_an_option_of_ptq() -> None:
    (plain, first, second) = parse_rungs(
        [
            "ptq",
            {"percentile": {"percentile": 99.9}},
            {"ptq": {"range_estimator": {"tests.helpers.estimators.Deviations": {"count": 2.0}}}},
        ]
    )
    assert [one.name for one in (plain, first, second)] == ["ptq", "percentile", "deviations"]
    assert [one.estimator for one in (plain, first, second)] == [None, Percentile(99.9), Deviations(2.0)]  # type: ignore[attr-defined]


def test_options_of_a_users_class() -> None:
    made = parse_rungs(["ptq", {path(Mine): {"strength": 2.0}}])
    assert [one.name for one in made] == ["ptq", "mine"]
    assert made[1].strength == 2.0  # type: ignore[attr-defined]


def test_each_call_makes_rungs_of_its_own() -> None:
    (first,), (second,) = parse_rungs(["mixed"]), parse_rungs(["mixed"])
    assert first is not second


@pytest.mark.parametrize(
    "given",
    [
        "scaled_weights",
        "tests.helpers.rungs.ScaledWeights",
        ScaledWeights(),
        {"tests.helpers.rungs.ScaledWeights": None},
    ],
)
def test_a_users_rung(given: Any) -> None:
    _, mine = parse_rungs(["ptq", given])
    assert type(mine) is ScaledWeights
    assert mine.factor == 1.05
    assert rung_spec(mine) == "tests.helpers.rungs.ScaledWeights"


@pytest.mark.parametrize(
    "given",
    [{"scaled_weights": {"factor": 2.0}}, {"tests.helpers.rungs.ScaledWeights": {"factor": 2.0}}, ScaledWeights(2.0)],
)
def test_options_of_a_users_rung(given: Any) -> None:
    (mine,) = parse_rungs([given])
    assert rung_spec(mine) == {"tests.helpers.rungs.ScaledWeights": {"factor": 2.0}}
    assert copy.deepcopy(mine).options == {"factor": 2.0}


def test_an_option_may_be_an_array() -> None:
    class Weighted(Mine):
        name = "weighted"

        def __init__(self, weights: np.ndarray | None = None) -> None:
            self.weights = weights

    assert Weighted().options == {}
    assert list(Weighted(np.ones(2)).options["weights"]) == [1, 1]


@pytest.mark.parametrize(
    "spec",
    [
        *RUNGS.homes,
        {"mixed": {"budget": 0.05}},
        {"percentile": {"percentile": 99.9}},
        {"ptq": {"range_estimator": "tf_enhanced"}},
    ],
)
def test_a_rung_is_made_again_from_its_spec(spec: Any) -> None:
    assert rung_spec(parse_rungs([spec])[0]) == spec


@pytest.mark.parametrize(
    ("rungs", "message"),
    [
        ([path(Mine), path(AlsoMine)], "names 'mine' twice"),
        ([path(Unfinished)], "Rung '.*Unfinished' with options {}: .*abstract"),
        ([f"{__name__}.Absent"], "Rung '.*Absent' cannot be imported"),
        ([path(Nameless)], "Rung '.*Nameless' has no name"),
        (["mixd"], "Did you mean 'mixed'"),
        (["zzzzzz"], r"Unknown rung 'zzzzzz': expected one of ptq, .* or the dotted path of a class of your own\.$"),
        ({"mixed": {}}, "expected a list"),
        ([{}], "Rung {}: expected a name"),
        ([("mixed", {})], "expected a name"),
        ([{"ptq": {"samples": 3}}], "Rung 'ptq' with options {'samples': 3}"),
        ([{"mixed": {"budget": "0.1"}}], "budget"),
        ([{"mixed": {"budget": float("nan")}}], "budget=nan: expected a share"),
        ([{"qat": {}}], "training follows the rungs by itself"),
        ([Mine], r"expected a name, .*, or a lightning_quant\.Rung"),
        ([Unnamed()], "Rung 'Unnamed' has no name"),
        (None, "rungs=None: expected a list"),
        ("ptq", "rungs='ptq': expected a list"),
        ([], r"rungs=\[\]: expected a list of at least one"),
        (["ptq", "ptq"], "names 'ptq' twice"),
        (["qat"], "training follows the rungs by itself"),
        ([3], "Rung 3: expected a name"),
        ([{"mixed": {}, "cle": {}}], "expected a name, .*one of them with its options"),
        ([{"mixed": {"depth": 3}}], "Rung 'mixed' with options .*depth"),
        ([{"mixed": {"budget": 0}}], "budget=0: expected a share above 0"),
        ([{"adaround": {"iterations": 0}}], "iterations=0: expected a whole number"),
        ([{"seq_mse": {"samples": -1}}], "samples=-1: expected a whole number"),
        (["no_such_package.Rung"], "Rung 'no_such_package.Rung' cannot be imported"),
        (["torch.nn.Linear"], "Rung 'torch.nn.Linear' is not a subclass of .*Rung"),
    ],
)
def test_wrong_rungs(rungs: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        parse_rungs(rungs)


@pytest.mark.parametrize(
    ("name", "whose"), [("ptq", r"lightning_quant\..*CalibratedRanges"), ("qat", "a keyword"), ("float", "a keyword")]
)
def test_a_name_that_is_taken(name: str, whose: str) -> None:
    with pytest.raises(ConfigurationError, match=f"Taken is named '{name}', as {whose} is"):
        type("Taken", (Mine,), {"name": name})


@pytest.mark.parametrize(
    ("rungs", "message"),
    [
        pytest.param([{"mixed": 5}], "mixed", id="options that are a number"),
        pytest.param([{"mixed": "budget"}], "mixed", id="options that are a string"),
        pytest.param([".mine.Rung"], "mine", id="a relative path"),
    ],
)
def test_invalid_options_and_paths(rungs: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        parse_rungs(rungs)
