"""A range estimator as a user writes one, in a file of their own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

import lightning_quant as lq


@dataclass(frozen=True)
class Deviations(lq.RangeEstimator):
    """Mean of the values, and some standard deviations to both sides."""

    name = "deviations"
    count: float = 3.0

    def ends(self, counts: Tensor, edges: Tensor) -> tuple[float, float]:
        """Return the ends of the range."""
        centers = (edges[1:] + edges[:-1]) / 2
        mean = (counts * centers).sum() / counts.sum()
        deviation = ((counts * (centers - mean) ** 2).sum() / counts.sum()).sqrt()
        return float(mean - self.count * deviation), float(mean + self.count * deviation)
