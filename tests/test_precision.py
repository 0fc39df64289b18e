"""Bit widths: read, ordered, printed, and what is said about the ones that do not exist."""

import dataclasses
import pickle

import pytest

from lightning_quant.errors import ConfigurationError, LightningQuantError
from lightning_quant.precision import PRECISIONS, Precision


@pytest.mark.parametrize("text", PRECISIONS)
def test_prints_what_it_was_parsed_from(text: str) -> None:
    assert str(Precision.parse(text)) == text


def test_reads_any_case_and_passes_itself_through() -> None:
    expected = Precision(weight_bits=4, activation_bits=16)
    assert Precision.parse("W4A16") == Precision.parse(" w4a16 ") == expected
    assert Precision.parse(expected) is expected


def test_ordered_from_coarse_to_fine_by_weights_first() -> None:
    mixed = [Precision.parse(text) for text in ("w8a16", "w4a16", "w8a8", "w4a8")]
    assert [str(precision) for precision in sorted(mixed)] == ["w4a8", "w4a16", "w8a8", "w8a16"]
    assert Precision(4, 16) < Precision(8, 8) <= Precision(8, 8)
    with pytest.raises(TypeError):
        Precision(4, 16) < "w8a8"  # type: ignore[operator]  # noqa: B015


def test_is_a_value() -> None:
    assert len({Precision(8, 8), Precision.parse("w8a8")}) == 1
    assert pickle.loads(pickle.dumps(Precision(8, 16))) == Precision(8, 16)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Precision(8, 8).weight_bits = 4  # type: ignore[misc]


@pytest.mark.parametrize("bad", ["int8", "w8", "w8a8x", "w16a8", "w8a4", "w2a8", "", 8, None, ("w8", "a8")])
def test_unknown_precision_lists_the_known_ones(bad: object) -> None:
    with pytest.raises(ConfigurationError, match="expected one of w4a8, w4a16, w8a8, w8a16") as caught:
        Precision.parse(bad)  # type: ignore[arg-type]
    assert repr(bad) in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, LightningQuantError)


def test_constructor_refuses_the_same() -> None:
    with pytest.raises(ConfigurationError, match=r"'w8a4'.*expected one of"):
        Precision(8, 4)
