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
from lightning_quant.ladder.rung import Rung, RungContext
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.utilities.memory import PeakMemory


@dataclass
class Footing:
    """Where the climb stands, besides the quantized network itself.

    Args:
        correction: name of the correction on top of the best network, if there is one.
        base: that network without the correction, for the next rung to start from.
    """

    correction: str | None = None
    base: dict[str, Any] | None = None


def climb(
    ladder: Ladder,
    rungs: Sequence[Rung],
    network: QuantizedNetwork,
    context: RungContext,
    *,
    measure_float: Callable[[nn.Module], float],
    footing: Footing,
    trying: Callable[[str], AbstractContextManager[None]],
    done: Callable[[RungResult], None],
) -> None:
    """Try the rungs that are not in the ladder's results yet, until it is satisfied or there is none left.

    The network ends as the best rung left it; a rung that does not help is rolled back bit for bit. If one raises,
    the network is rolled back before the exception goes on.

    Args:
        ladder: knows the float metric; gets a result for each rung.
        rungs: the rungs, in order.
        network: changed in place.
        context: what the rungs work with.
        measure_float: the metric of another float network in the place of the user's.
        footing: where an earlier climb stopped; updated.
        trying: what each rung runs within, given its name.
        done: called after each rung, with the network as it is to go on.
    """
    tried = {rung.rung for rung in ladder.rungs}
    corrections = {rung.name: rung for rung in rungs if rung.is_correction}
    plain_measure = context.measure

    def measure() -> float:
        correction = corrections.get(footing.correction or "")
        if correction is None:
            return plain_measure()
        before = network.snapshot()
        try:
            correction.apply(network, context)
            return plain_measure()
        finally:
            network.restore(before)

    context = replace(context, measure=measure)
    for rung in rungs:
        if ladder.satisfied:
            return
        if rung.name in tried:
            continue
        if (reason := rung.skip_reason(network, context)) is not None:
            done(ladder.skip(rung.name, reason))
            continue
        before = network.snapshot()
        kept = False
        start = time.perf_counter()
        try:
            if (reference := rung.float_reference(context)) is not None:
                ladder.float_reestimated = measure_float(reference)
            with trying(rung.name), PeakMemory() as memory:
                if rung.start == "float":
                    network.reset_to(context.prepared.network)
                elif footing.base is not None:
                    network.restore(footing.base)
                changed = rung.apply(network, context)
                correction = corrections.get(footing.correction or "")
                base = None
                if rung.is_correction:
                    correction, base = rung, footing.base or before
                elif correction is not None:
                    base = network.snapshot()
                    changed += f"; then {correction.apply(network, context)}"
                metric = plain_measure()
            seconds = time.perf_counter() - start
            result = ladder.judge(rung.name, metric, changed, seconds, memory.peak_bytes)
            kept = result.kept
            if kept:
                footing.base, footing.correction = base, correction.name if correction else None
        except LightningQuantError as error:  # of this rung alone: the others may do
            result = ladder.skip(rung.name, f"failed: {error}", time.perf_counter() - start)
        finally:
            if not kept:
                network.restore(before)
        done(result)
