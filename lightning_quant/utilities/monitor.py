"""A metric and its direction: which of two values is better, and by how much."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from lightning_quant.errors import ConfigurationError


@dataclass(frozen=True)
class Monitor:
    """A monitored metric.

    Args:
        name: as the user's validation logs it.
        mode: ``"max"`` if more of it is better, ``"min"`` if less is.

    Raises:
        ConfigurationError: for another mode.
    """

    name: str
    mode: Literal["max", "min"] = "max"

    def __post_init__(self) -> None:
        if self.mode not in ("max", "min"):
            raise ConfigurationError(f"mode={self.mode!r}: expected 'max' or 'min'.")

    @property
    def worst(self) -> float:
        """The value that every other is better than: an infinity."""
        return -math.inf if self.mode == "max" else math.inf

    def drop(self, metric: float, reference: float) -> float:
        """Compute how much worse ``metric`` is than ``reference``, in units of the metric; negative if better."""
        return reference - metric if self.mode == "max" else metric - reference

    def score(self, metric: float) -> float:
        """Return the metric with the sign that makes more of it better. Applied twice, it is the metric again."""
        return metric if self.mode == "max" else -metric

    def lowered(self, reference: float, drop: float) -> float:
        """Compute the value that is ``drop`` worse than ``reference``."""
        return reference - drop if self.mode == "max" else reference + drop

    def is_better(self, metric: float, other: float | None) -> bool:
        """Return whether ``metric`` is better than ``other``. Any value is better than ``None`` and NaN."""
        if math.isnan(metric):
            return False
        if other is None or math.isnan(other):
            return True
        return metric > other if self.mode == "max" else metric < other

    def best(self, metrics: Iterable[float]) -> float:
        """Return the best of at least one value."""
        return max(metrics) if self.mode == "max" else min(metrics)
