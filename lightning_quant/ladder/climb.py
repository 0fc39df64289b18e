"""Climbing the accuracy ladder: repairs from the cheapest to the dearest, until the metric is good enough."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lightning_quant.errors import LightningQuantError
from lightning_quant.ladder.gate import Ladder, RungResult
from lightning_quant.ladder.rung import Technique, Workbench
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.utilities.memory import PeakMemory


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
    trying: Callable[[str], AbstractContextManager[None]],
    done: Callable[[RungResult], None],
) -> None:
    """Try the techniques that are not in the ladder's results yet, until it is satisfied or there is none left.

    The network ends as the best rung left it; a rung that does not help is rolled back bit for bit. If one raises,
    the network is rolled back before the exception goes on.

    Args:
        ladder: knows the float metric; gets a result for each rung.
        techniques: the rungs, in order.
        network: changed in place.
        bench: what the techniques work with.
        measure_float: the metric of another float network in the place of the user's.
        footing: where an earlier climb stopped; updated.
        trying: what each rung runs within, given its name.
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

    bench = replace(bench, measure=measure)
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
            with trying(technique.name), PeakMemory() as memory:
                if technique.start == "float":
                    network.reset_to(bench.prepared.network)
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
