"""Classes by name: what can be given for one, and what is refused. What is made of them is tested where they are."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from lightning_quant.errors import ConfigurationError
from lightning_quant.utilities.registry import Registry


class Drink:
    """A base class."""

    name: ClassVar[str]

    def __init_subclass__(cls) -> None:
        DRINKS.register(cls)


DRINKS = Registry("hot drink", Drink, {"tea": f"{__name__}.Tea"}, keywords=["any"])


class Tea(Drink):
    name = "tea"

    def __init__(self, minutes: int = 3, cups: int = 1) -> None:
        self.minutes = minutes
        self.cups = cups


class Unnamed(Drink):
    """A base of others."""


class Coffee(Unnamed):
    name = "coffee"


TEA = f"{__name__}.Tea"


@pytest.mark.parametrize(
    ("given", "minutes"),
    [("tea", 3), (TEA, 3), ({"tea": {"minutes": 5}}, 5), ({TEA: {"minutes": 5}}, 5), ({"tea": None}, 3), (Tea(7), 7)],
)
def test_name_path_and_instance(given: Any, minutes: int) -> None:
    made = DRINKS.make(given)
    assert isinstance(made, Tea)
    assert made.minutes == minutes


def test_names_are_those_of_the_package_and_of_what_was_imported() -> None:
    assert DRINKS.names == ("tea", "coffee")
    assert type(DRINKS.make("coffee")) is Coffee


def test_a_constructor_gets_what_it_names_of_what_is_offered() -> None:
    def offered(kind: type[Drink]) -> dict[str, Any]:
        return {"minutes": 9, "cups": 2, "kind": kind}

    made = DRINKS.make({"tea": {"minutes": 5}}, offered)
    assert isinstance(made, Tea)
    assert (made.minutes, made.cups) == (5, 2)
    assert type(DRINKS.make("coffee", offered)) is Coffee


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "teaa",
            r"Unknown hot drink 'teaa': expected one of any, tea, coffee, or the dotted path.*Did you mean 'tea'\?",
        ),
        ("", "Unknown hot drink ''"),
        ("nowhere.Tea", "Hot drink 'nowhere.Tea' cannot be imported: No module named 'nowhere'"),
        (".mine.Tea", "Hot drink '.mine.Tea' cannot be imported"),
        (f"{__name__}.Absent", "cannot be imported: .*no attribute 'Absent'"),
        (f"{__name__}.DRINKS", r"is not a subclass of lightning_quant\.Drink"),
        ("pathlib.Path", r"is not a subclass of lightning_quant\.Drink"),
        (f"{__name__}.Unnamed", "has no name"),
        (Unnamed(), "'Unnamed' has no name"),
        ({"tea": {"sugar": 1}}, r"Hot drink 'tea' with options {'sugar': 1}: .*unexpected keyword.* It takes \w+"),
        ({"tea": 5}, "Hot drink {'tea': 5}: expected a name, .*one of them with its options"),
        ({"tea": {}, "coffee": {}}, "expected a name"),
        ({}, "expected a name"),
        (3, "Hot drink 3: expected a name"),
        (Tea, "expected a name"),
        (None, "Hot drink None: expected a name"),
    ],
)
def test_refuses(given: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DRINKS.make(given)


def test_imports_nothing_where_paths_are_not_allowed() -> None:
    assert isinstance(DRINKS.make("tea", paths=False), Tea)
    with pytest.raises(ConfigurationError, match="Unknown hot drink"):
        DRINKS.make(TEA, paths=False)


@pytest.mark.parametrize(
    ("taken", "message"),
    [
        ("tea", rf"Mine is named 'tea', as {TEA} is: expected a name of its own"),
        ("coffee", rf"Mine is named 'coffee', as {__name__}\.Coffee is"),
        ("any", "Mine is named 'any', as a keyword is"),
        ("my drink", "name is 'my drink': expected a word"),
        (3, "name is 3: expected a word"),
    ],
)
def test_names_that_are_taken_or_cannot_be(taken: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        type("Mine", (Drink,), {"name": taken})
    assert DRINKS.names == ("tea", "coffee")


def test_the_same_class_may_be_defined_again() -> None:  # a script and its import, a cell of a notebook
    registry = Registry("hot drink", Drink, {})
    first, second = (type("Cocoa", (), {"name": "cocoa"}) for _ in range(2))
    registry.register(first)  # type: ignore[arg-type]
    registry.register(second)  # type: ignore[arg-type]
    assert registry.find("cocoa") is second
