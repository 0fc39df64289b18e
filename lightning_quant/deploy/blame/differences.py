"""How far one tensor of two computations is apart, and how much of that rounding alone explains."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_quant.utilities.parsing import parse_as, parse_fields

# Floats that differ by less, relative to the largest, are sums in another order.
_NOISE = 2.0**-17
# The same in steps of a coarse grid, where sums are of numbers much larger than their result.
_COARSE_NOISE = 0.02


@dataclass(frozen=True)
class Difference:
    """How far a tensor is from its reference, over all samples.

    Args:
        psnr_db: peak signal-to-noise ratio in dB, ``20 log10(max|reference| / rmse)``; infinite when equal.
        largest: the largest difference, in steps of the reference's grid; of a tensor that is not rounded, in parts of
            2^16 of its largest value.
        differing: share of the values on another integer, 0 to 1.
        unexplained: how many of them rounding alone does not explain: they differed before they were rounded, by more
            than sums in another order do, or were not on the border between two integers.
    """

    psnr_db: float
    largest: float
    differing: float
    unexplained: int

    @classmethod
    def from_json(cls, value: Any, where: str = "") -> Difference:
        """Read JSON values, in which ``None`` stands for infinity.

        Raises:
            FieldError: naming the entry that is missing or cannot be.
        """
        values = parse_as(value, dict[str, Any], where)
        made: Difference = parse_fields(
            {name: math.inf if one is None else one for name, one in values.items()}, cls, where
        )
        return made


class Differences:
    """Collects the difference of one tensor, sample by sample."""

    def __init__(self) -> None:
        self._count = self._differing = self._unexplained = 0
        self._peak = self._squares = self._largest = 0.0

    def add(
        self,
        reference: np.ndarray,
        actual: np.ndarray,
        step: float | None = None,
        before: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        """Add one sample.

        Args:
            reference: the values that are expected.
            actual: the values to compare, of the same size.
            step: distance of two integers of the reference's grid; ``None`` for a tensor that is not rounded.
            before: both before they were rounded, where that is known.
        """
        expected, got = (_flat(one) for one in (reference, actual))
        peak = float(np.abs(expected).max(initial=0.0))
        distance = _distance(expected, got)
        unit = step or (peak or 1.0) * 2.0**-16
        # a scale that is off in its last digits moves all values a little, by no step
        differing = distance > 0.25 * unit + 2e-5 * np.abs(expected)
        unexplained = differing
        if step is not None and before is not None:
            wanted, made = (_flat(one) for one in before)
            finite = np.abs(wanted[np.isfinite(wanted)])
            noise = max(_COARSE_NOISE * step, _NOISE * float(finite.max(initial=0.0)))
            moved = _distance(wanted, made) > noise
            middles = [np.abs(np.abs(one - np.floor(one)) - 0.5) * step for one in (wanted / step, made / step)]
            unexplained = differing & ((distance > 1.5 * unit) | moved | (np.minimum(*middles) > noise))
        self._count += expected.size
        self._differing += int(differing.sum())
        self._unexplained += int(unexplained.sum())
        self._peak = max(self._peak, peak)
        self._squares += float((distance**2).sum())
        self._largest = max(self._largest, float((distance / unit).max(initial=0.0)))

    def result(self) -> Difference:
        """Return the figures of all samples."""
        mean = self._squares / max(self._count, 1)
        psnr = math.inf if mean == 0 else -math.inf
        if mean and self._peak and math.isfinite(mean):
            psnr = 20 * math.log10(self._peak / math.sqrt(mean))
        return Difference(psnr, self._largest, self._differing / max(self._count, 1), self._unexplained)


def _flat(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float64).reshape(-1)


def _distance(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Return how far values are apart; infinite ones and NaN are equal to themselves and infinitely far from others."""
    with np.errstate(invalid="ignore"):
        same = (one == two) | (np.isnan(one) & np.isnan(two))
        distance = np.where(same, 0.0, np.abs(one - two))
    distance[~np.isfinite(distance)] = np.inf
    return distance
