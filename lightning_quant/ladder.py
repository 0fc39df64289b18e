"""The accuracy ladder: repairs from the cheapest to the dearest, until the user's metric is good enough.

:class:`Ladder` is the gate, pure logic over what was measured; :func:`climb` does the work.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from lightning_quant.errors import ConfigurationError, LightningQuantError
from lightning_quant.memory import PeakMemory
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.techniques.technique import Technique, Workbench


@dataclass
class RungResult:
    """What one rung did and cost.

    Args:
        rung: its name.
        metric: the monitored metric afterwards; ``None`` if it was passed over or failed.
        drop: how much worse than float that is, in units of the metric; negative if better.
        seconds: wall time of the rung, and of measuring it.
        peak_memory_bytes: most memory of the process meanwhile (GPU: most allocated); ``None`` where unknown.
        changed: what it changed.
        kept: whether the ladder went on from there; if not, the network was rolled back.
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
    mode: str = "max"
    max_drop: float | None = None
    float_metric: float | None = None
    float_reestimated: float | None = None
    rungs: list[RungResult] = field(default_factory=list)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Ladder:
        """The inverse of :meth:`to_dict`."""
        return cls(**{**values, "rungs": [RungResult(**rung) for rung in values["rungs"]]})

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for checkpoints and records."""
        return asdict(self)

    @property
    def reference(self) -> float:
        """The best float network known: what a rung gains by doing the float network good is not its own gain."""
        known = [value for value in (self.float_metric, self.float_reestimated) if value is not None]
        if not known:
            raise ConfigurationError("The float network was not measured: expected its metric before any rung's.")
        return max(known) if self.mode == "max" else min(known)

    @property
    def best(self) -> RungResult | None:
        """The rung the network stands on: the last that was kept."""
        return next((rung for rung in reversed(self.rungs) if rung.kept), None)

    @property
    def satisfied(self) -> bool:
        """Whether the network is as good as was asked for."""
        return self.best is not None and self.best.metric is not None and self.suffices(self.best.metric)

    def drop(self, metric: float) -> float:
        """How much worse than float, in units of the metric."""
        return self.reference - metric if self.mode == "max" else metric - self.reference

    def suffices(self, metric: float) -> bool:
        """Whether the drop is within the bound."""
        return self.max_drop is not None and self.drop(metric) <= self.max_drop

    def is_better(self, metric: float, other: float | None) -> bool:
        """Whether ``metric`` is better than ``other``; anything is better than nothing or NaN."""
        if math.isnan(metric):
            return False
        if other is None or math.isnan(other):
            return True
        return metric > other if self.mode == "max" else metric < other

    def judge(
        self, rung: str, metric: float, changed: str, seconds: float, peak_memory_bytes: int | None = None
    ) -> RungResult:
        """Decide whether a rung is kept, and write it down."""
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

    def pass_over(self, rung: str, reason: str, seconds: float = 0.0) -> RungResult:
        """Write down a rung that was not tried or failed; the network stays as it was."""
        result = RungResult(rung, None, None, round(seconds, 2), None, "", False, reason)
        self.rungs.append(result)
        return result


@dataclass
class Footing:
    """Where the climb stands, besides the quantized network itself.

    Args:
        finishing: name of the correction on top of the best network, if there is one.
        base: that network without the correction, for the next rung to start from.
    """

    finishing: str | None = None
    base: dict[str, Any] | None = None


def climb(
    ladder: Ladder,
    techniques: Sequence[Technique],
    network: QuantizedNetwork,
    bench: Workbench,
    *,
    measure_float: Callable[[nn.Module], float],
    footing: Footing,
    done: Callable[[RungResult], None],
) -> None:
    """Try the techniques that are not in the ladder's results yet, until it is satisfied or there is none left.

    The network ends as the best rung left it; a rung that does not help is rolled back bit for bit. If one raises,
    the network is rolled back before the exception goes on.

    Args:
        ladder: knows the float metric; gets a result for each rung.
        techniques: the rungs, in order.
        network: changed in place.
        bench: what the techniques work with. Its ``measure`` is wrapped so that a correction in force is on while
            they measure.
        measure_float: the metric of another float network in the place of the user's.
        footing: where an earlier climb stopped; updated.
        done: called after each rung, with the network as it is to go on.
    """
    tried = {rung.rung for rung in ladder.rungs}
    finishers = {technique.name: technique for technique in techniques if technique.finishing}
    plain_measure = bench.measure

    def measure() -> float:
        finisher = finishers.get(footing.finishing or "")
        if finisher is None:
            return plain_measure()
        before = network.snapshot()
        try:
            finisher.apply(network, bench)
            return plain_measure()
        finally:
            network.restore(before)

    bench.measure = measure
    for technique in techniques:
        if ladder.satisfied:
            return
        if technique.name in tried:
            continue
        if (reason := technique.unsuitable(network, bench)) is not None:
            done(ladder.pass_over(technique.name, reason))
            continue
        before = network.snapshot()
        kept = False
        start = time.perf_counter()
        try:
            if (reference := technique.float_reference(bench)) is not None:
                ladder.float_reestimated = measure_float(reference)
            with PeakMemory() as memory:
                if technique.start == "float":
                    network.start_anew(bench.prepared.network)
                elif footing.base is not None:
                    network.restore(footing.base)
                changed = technique.apply(network, bench)
                finisher = finishers.get(footing.finishing or "")
                base = None
                if technique.finishing:
                    finisher, base = technique, footing.base or before
                elif finisher is not None:
                    base = network.snapshot()
                    changed += f"; then {finisher.apply(network, bench)}"
                metric = plain_measure()
            seconds = time.perf_counter() - start
            result = ladder.judge(technique.name, metric, changed, seconds, memory.peak_bytes)
            kept = result.kept
            if kept:
                footing.base, footing.finishing = base, finisher.name if finisher else None
        except LightningQuantError as error:  # of this rung alone: the others may do
            result = ladder.pass_over(technique.name, f"failed: {error}", time.perf_counter() - start)
        finally:
            if not kept:
                network.restore(before)
        done(result)
