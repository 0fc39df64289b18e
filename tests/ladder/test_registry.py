"""Names of rungs in odd shapes: whatever is wrong with them is told as a ConfigurationError."""

from __future__ import annotations

from typing import Any

import pytest
from typing_extensions import override

from lightning_quant.errors import ConfigurationError
from lightning_quant.ladder.registry import TECHNIQUES, techniques
from lightning_quant.ladder.rung import Technique, Workbench
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.range_estimators import Percentile
from tests.helpers.estimators import Deviations


class Mine(Technique):
    name = "mine"

    def __init__(self, strength: float = 1.0) -> None:
        self.strength = strength

    @override
    def apply(self, network: QuantizedNetwork, bench: Workbench) -> str:
        return "nothing"


class AlsoMine(Mine):
    """Of the same name."""


class Borrowed(Mine):
    name = "ptq"


class Nameless(Technique):
    @override
    def apply(self, network: QuantizedNetwork, bench: Workbench) -> str:
        return "nothing"


class Unfinished(Technique):
    name = "unfinished"


def path(kind: type) -> str:
    return f"{__name__}.{kind.__qualname__}"


def test_every_name_makes_a_technique_of_that_name() -> None:
    assert [technique.name for technique in techniques(TECHNIQUES)] == list(TECHNIQUES)


@pytest.mark.parametrize("options", [{}, None, {"budget": 0.1, "samples": 8}])
def test_options_may_be_left_empty(options: Any) -> None:
    (mixed,) = techniques([{"mixed": options}])
    assert (mixed.budget, mixed.samples) == (0.1, 8)  # type: ignore[attr-defined]


def test_a_range_estimator_is_an_option_of_ptq() -> None:
    (plain, first, second) = techniques(
        [
            "ptq",
            {"percentile": {"percentile": 99.9}},
            {"ptq": {"range_estimator": {"tests.helpers.estimators.Deviations": {"count": 2.0}}}},
        ]
    )
    assert [one.name for one in (plain, first, second)] == ["ptq", "percentile", "deviations"]
    assert [one.estimator for one in (plain, first, second)] == [None, Percentile(99.9), Deviations(2.0)]  # type: ignore[attr-defined]


def test_options_of_a_class_of_ones_own() -> None:
    made = techniques(["ptq", {path(Mine): {"strength": 2.0}}])
    assert [one.name for one in made] == ["ptq", "mine"]
    assert made[1].strength == 2.0  # type: ignore[attr-defined]


def test_each_call_makes_techniques_of_its_own() -> None:
    (first,), (second,) = techniques(["mixed"]), techniques(["mixed"])
    assert first is not second


@pytest.mark.parametrize(
    ("rungs", "message"),
    [
        ([path(Mine), path(AlsoMine)], "names 'mine' twice"),
        ([path(Unfinished)], "Rung '.*Unfinished' with options {}: .*abstract"),
        ([f"{__name__}.Absent"], "Rung '.*Absent' cannot be imported"),
        ([path(Nameless)], "Rung '.*Nameless' has no name"),
        (["mixd"], "Did you mean 'mixed'"),
        (["zzzzzz"], r"Unknown rung 'zzzzzz': expected one of ptq, .* of your own\.$"),
        ({"mixed": {}}, "expected a list"),
        ([{}], "expected one name with its options"),
        ([("mixed", {})], "expected a name"),
        ([{"ptq": {"samples": 3}}], "Rung 'ptq' with options {'samples': 3}"),
        ([{"mixed": {"budget": "0.1"}}], "budget"),
        ([{"mixed": {"budget": float("nan")}}], "budget=nan: expected a share"),
        ([{"qat": {}}], "training follows the rungs by itself"),
        ([Mine], "expected a name"),
        (None, "rungs=None: expected a list"),
        ("ptq", "rungs='ptq': expected a list"),
        ([], r"rungs=\[\]: expected a list of at least one"),
        (["ptq", "ptq"], "names 'ptq' twice"),
        (["qat"], "training follows the rungs by itself"),
        ([3], "Rung 3: expected a name"),
        ([{"mixed": {}, "cle": {}}], "expected one name with its options"),
        ([{"mixed": {"depth": 3}}], "Rung 'mixed' with options .*depth"),
        ([{"mixed": {"budget": 0}}], "budget=0: expected a share above 0"),
        ([{"adaround": {"iterations": 0}}], "iterations=0: expected a whole number"),
        ([{"seq_mse": {"samples": -1}}], "samples=-1: expected a whole number"),
        (["no_such_package.Rung"], "Rung 'no_such_package.Rung' cannot be imported"),
        (["torch.nn.Linear"], "Rung 'torch.nn.Linear' is no subclass of .*Technique"),
        ([path(Borrowed)], "is named 'ptq', as one of this package is"),
    ],
)
def test_wrong_rungs(rungs: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        techniques(rungs)


@pytest.mark.parametrize(
    ("rungs", "message"),
    [
        pytest.param([{"mixed": 5}], "mixed", id="options that are a number"),
        pytest.param([{"mixed": "budget"}], "mixed", id="options that are a string"),
        pytest.param([".mine.Rung"], "mine", id="a relative path"),
    ],
)
def test_options_and_paths_that_are_none(rungs: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        techniques(rungs)
