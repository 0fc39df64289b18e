"""Bit widths of weights and activations, written the way AI Hub and the literature write them."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_quant.errors import ConfigurationError
from lightning_quant.utilities.parsing import check, parse_as

_PATTERN = re.compile(r"w(\d+)a(\d+)")


@functools.total_ordering
@dataclass(frozen=True)
class Precision:
    """Integer bit widths of a network or a layer, e.g. ``w8a16``: 8-bit weights, 16-bit activations.

    Ordered from coarse to fine by the size of the weights first, then of the activations.

    Examples:
        >>> Precision.parse("W4A16")
        Precision(weight_bits=4, activation_bits=16)
        >>> str(Precision(8, 8))
        'w8a8'

    Args:
        weight_bits: bits of a weight, 4 or 8.
        activation_bits: bits of an activation, 8 or 16.

    Raises:
        ConfigurationError: for a combination the Hexagon NPU has no kernels for.
    """

    weight_bits: int
    activation_bits: int

    def __post_init__(self) -> None:
        if (self.weight_bits, self.activation_bits) not in _SUPPORTED:
            raise _unknown(f"w{self.weight_bits}a{self.activation_bits}")

    @classmethod
    def parse(cls, value: str | Precision) -> Precision:
        """Read ``"w8a8"`` (any case) or pass a :class:`Precision` through."""
        if isinstance(value, Precision):
            return value
        match = _PATTERN.fullmatch(value.strip().lower()) if isinstance(value, str) else None
        if match is None:
            raise _unknown(value)
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def from_json(cls, value: Any, where: str = "") -> Precision:
        """Read what a file holds.

        Raises:
            FieldError: for anything but the name of a precision.
        """
        parse_as(value, str, where)
        check(value in PRECISIONS, where, value, f"one of {', '.join(PRECISIONS)}")
        return cls.parse(value)

    def __str__(self) -> str:
        return f"w{self.weight_bits}a{self.activation_bits}"

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, Precision):
            return NotImplemented
        return (self.weight_bits, self.activation_bits) < (other.weight_bits, other.activation_bits)


def int16_activations(precision: Precision, layers: Mapping[str, Precision]) -> str | None:
    """Return the part of a network with 16-bit activations, which not every chip computes; ``None`` without any.

    Args:
        precision: of the whole network.
        layers: precision of single ones, by name or glob.
    """
    if precision.activation_bits == 16:
        return str(precision)
    fine = [f"{name} in {one}" for name, one in layers.items() if one.activation_bits == 16]
    return f"{precision} with {', '.join(fine)}" if fine else None


# Integer kernels of the Hexagon NPU: 4- or 8-bit weights with 8- or 16-bit activations.
_SUPPORTED = ((4, 8), (4, 16), (8, 8), (8, 16))
PRECISIONS = tuple(f"w{weight}a{activation}" for weight, activation in _SUPPORTED)


def _unknown(value: object) -> ConfigurationError:
    return ConfigurationError(
        f"Unknown precision {value!r}: expected one of {', '.join(PRECISIONS)} "
        "(w = bits of the weights, a = bits of the activations)."
    )
