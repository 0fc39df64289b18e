"""The gate of the accuracy ladder: pure logic over what was measured; :mod:`.climb` does the work."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lightning_quant.errors import ConfigurationError
from lightning_quant.utilities.monitor import Monitor


@dataclass
class RungResult:
    """What one rung did and cost.

    Args:
        rung: its name.
        metric: the monitored metric afterwards; ``None`` if it was skipped or failed.
        drop: how much worse than float that is, in units of the metric; negative if better.
        seconds: wall time of the rung, and of measuring it.
        peak_memory_bytes: most memory of the process meanwhile (GPU: most allocated); ``None`` where unknown.
        changed: what it changed.
        kept: whether the next rung starts from there; if not, the network was rolled back.
        reason: why, or why not.
    """

    rung: str
    metric: float | None
    drop: float | None
    seconds: float
    peak_memory_bytes: int | None
    changed: str
    kept: bool
    reason: str


@dataclass
class Ladder:
    """What was measured so far, and what follows from it.

    Args:
        monitor: name of the metric.
        mode: ``"max"`` or ``"min"``, whichever is better.
        max_drop: how much worse than float is good enough, in units of the metric. ``None``: nothing is, every rung
            is tried.
        float_metric: the metric of the float network.
        float_reestimated: the same with its batch norms re-estimated on the calibration data, if a rung does so.
        rungs: the results, in order.
    """

    monitor: str
    mode: Literal["max", "min"] = "max"
    max_drop: float | None = None
    float_metric: float | None = None
    float_reestimated: float | None = None
    rungs: list[RungResult] = field(default_factory=list)

    def __post_init__(self) -> None:
        _ = self.comparison  # raises for another mode

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Ladder:
        """Make a ladder from what :meth:`to_dict` returned."""
        return cls(**{**values, "rungs": [RungResult(**rung) for rung in values["rungs"]]})

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for checkpoints and records."""
        return asdict(self)

    @property
    def comparison(self) -> Monitor:
        """The metric with its direction."""
        return Monitor(self.monitor, self.mode)

    @property
    def reference(self) -> float:
        """The best metric of a float network: a gain that the float network has as well is not credited to a rung."""
        known = [value for value in (self.float_metric, self.float_reestimated) if value is not None]
        if not known:
            raise ConfigurationError("The float network was not measured: expected its metric before any rung's.")
        return self.comparison.best(known)

    @property
    def best(self) -> RungResult | None:
        """The rung that made the network what it is: the last that was kept."""
        return next((rung for rung in reversed(self.rungs) if rung.kept), None)

    @property
    def satisfied(self) -> bool:
        """Whether the network is as good as was asked for."""
        return self.best is not None and self.best.metric is not None and self.suffices(self.best.metric)

    def drop(self, metric: float) -> float:
        """Compute how much worse than float, in units of the metric."""
        return self.comparison.drop(metric, self.reference)

    def suffices(self, metric: float) -> bool:
        """Return whether the drop is within the bound."""
        return self.max_drop is not None and self.drop(metric) <= self.max_drop

    def is_better(self, metric: float, other: float | None) -> bool:
        """Return whether ``metric`` is better than ``other``. Any value is better than ``None`` and NaN."""
        return self.comparison.is_better(metric, other)

    def judge(
        self, rung: str, metric: float, changed: str, seconds: float, peak_memory_bytes: int | None = None
    ) -> RungResult:
        """Decide whether a rung is kept, and record it."""
        before = self.best.metric if self.best else None
        kept = self.is_better(metric, before)
        if math.isnan(metric):
            reason = f"{self.monitor} is NaN: rolled back"
        elif not kept:
            reason = f"no better than {self.best.rung}: rolled back" if self.best else "rolled back"
        elif self.suffices(metric):
            reason = f"within {self.max_drop:g} of float"
        else:
            reason = "best so far"
        drop = None if math.isnan(metric) else self.drop(metric)
        value = None if math.isnan(metric) else metric
        result = RungResult(rung, value, drop, round(seconds, 2), peak_memory_bytes, changed, kept, reason)
        self.rungs.append(result)
        return result

    def skip(self, rung: str, reason: str, seconds: float = 0.0) -> RungResult:
        """Record a rung that was not tried or failed; the network stays as it was."""
        result = RungResult(rung, None, None, round(seconds, 2), None, "", False, reason)
        self.rungs.append(result)
        return result
