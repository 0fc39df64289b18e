"""How far one tensor of two computations is apart, and how much of that rounding alone explains."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# Floats that differ by less, relative to the largest, are sums in another order.
_NOISE = 2.0**-19
# Distance from the middle between two integers, in steps, up to which a sum in another order rounds the other way.
_TIE = 1e-3


@dataclass(frozen=True)
class Difference:
    """How far a tensor is from its reference, over all samples.

    Args:
        psnr_db: peak signal-to-noise ratio in dB, ``20 log10(max|reference| / rmse)``; infinite when equal.
        largest: the largest difference, in steps of the reference's grid; of a tensor that is not rounded, in parts of
            2^16 of its largest value.
        differing: share of the values on another integer, 0 to 1.
        unexplained: how many of them rounding alone does not explain: values that were not on the border between two
            neighboring integers.
    """

    psnr_db: float
    largest: float
    differing: float
    unexplained: int


class Differences:
    """Collects the difference of one tensor, sample by sample."""

    def __init__(self) -> None:
        self._count = self._differing = self._unexplained = 0
        self._peak = self._squares = self._largest = 0.0

    def add(
        self, reference: np.ndarray, actual: np.ndarray, step: float | None = None, unrounded: np.ndarray | None = None
    ) -> None:
        """Add one sample.

        Args:
            reference: the values that are expected.
            actual: the values to compare, of the same size.
            step: distance of two integers of the reference's grid; ``None`` for a tensor that is not rounded.
            unrounded: the values to compare before they were rounded.
        """
        expected, got = (one.astype(np.float64).reshape(-1) for one in (reference, actual))
        peak = float(np.abs(expected).max(initial=0.0))
        distance = np.where(expected == got, 0.0, np.abs(expected - got))
        distance[~np.isfinite(distance)] = np.inf
        unit = step or (peak or 1.0) * 2.0**-16
        # a scale that is off in its last digits moves all values a little, by no step
        differing = distance > 0.25 * unit + 2e-5 * np.abs(expected)
        unexplained = differing
        if step is not None and unrounded is not None:
            before = unrounded.astype(np.float64).reshape(-1) / step
            from_middle = np.abs(before - np.floor(before) - 0.5)
            noise = _NOISE * float(np.abs(before[np.isfinite(before)]).max(initial=0.0))
            tie = (distance < 1.5 * unit) & (from_middle <= max(_TIE, noise))
            unexplained = differing & ~tie
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
