"""Ranges that a function makes of histograms, where AIMET has no analyzer for them.

Importing this module imports AIMET.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_quant.errors import CalibrationError
from lightning_quant.simulation.aimet import (
    PercentileEncodingAnalyzer,
    StatisticsNotFoundError,
    adjust_min_max,
)


class HistogramAnalyzer(PercentileEncodingAnalyzer):
    """Observe a histogram for each range, as AIMET does for percentiles, and compute the range from it.

    Args:
        name: of the range estimator, for messages.
        ends: returns the ends of a range from the counts ``(bins,)`` and the edges ``(bins + 1,)`` of its histogram.
        shape: shape of the ranges.
        block_size: values that share a range, along each axis.
    """

    observer: Any

    def __init__(
        self,
        name: str,
        ends: Callable[[Tensor, Tensor], tuple[float, float]],
        shape: tuple[int, ...],
        block_size: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(shape, block_size=block_size)
        self._name, self._ends = name, ends

    @torch.no_grad()
    def compute_encodings_from_stats(self, stats: Any, num_steps: int, is_symmetric: bool) -> tuple[Tensor, Tensor]:
        """Return the lower and upper ends, each of the analyzer's shape."""
        if stats[0].histogram is None:
            raise StatisticsNotFoundError("No statistics present to compute encodings.")
        pairs = [self._checked(one, num_steps, is_symmetric) for one in stats]
        low, high = (torch.stack(list(ends)).view(self.observer.shape) for ends in zip(*pairs, strict=True))
        return low, high

    def _checked(self, seen: Any, num_steps: int, is_symmetric: bool) -> tuple[Tensor, Tensor]:
        low, high = (float(end) for end in self._ends(seen.histogram, seen.bin_edges))
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise CalibrationError(
                f"The range estimator {self._name!r} returned a range from {low} to {high}: expected two finite "
                "numbers, the smaller one first. Look at its ends()."
            )
        return adjust_min_max(seen.min.new_tensor(low), seen.max.new_tensor(high), num_steps, is_symmetric)
