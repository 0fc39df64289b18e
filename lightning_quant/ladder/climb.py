"""Climb the accuracy ladder: rungs from the cheapest to the dearest, until the metric is good enough."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from lightning_quant.errors import LightningQuantError
from lightning_quant.ladder.gate import RungResult
from lightning_quant.ladder.rung import Rung, RungContext
from lightning_quant.ladder.session import LadderSession
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.utilities.memory import PeakMemory


def climb(
    session: LadderSession, rungs: Sequence[Rung], network: QuantizedNetwork, context: RungContext
) -> Iterator[RungResult]:
    """Try the rungs that are not in the session's ladder yet, until it is satisfied or there is none left.

    The network ends as the best rung left it; a rung that does not help is rolled back bit for bit. If one raises,
    the network is rolled back before the exception is passed on.

    Args:
        session: knows the float metric and where an earlier climb stopped; updated.
        rungs: what to try, in order.
        network: changed in place.
        context: what the rungs work with.

    Yields:
        The result of each rung, with the network and the session as the next rung finds them.
    """
    ladder = session.ladder
    tried = {result.rung for result in ladder.rungs}
    corrections = {rung.name: rung for rung in rungs if rung.is_correction}
    measure = context.measure

    def measure_corrected() -> float:
        correction = corrections.get(session.correction or "")
        if correction is None:
            return measure()
        before = network.snapshot()
        try:
            correction.apply(network, context)
            return measure()
        finally:
            network.restore(before)

    context = replace(context, measure=measure_corrected)
    for rung in rungs:
        if ladder.satisfied:
            return
        if rung.name in tried:
            continue
        if (reason := rung.skip_reason(network, context)) is not None:
            yield ladder.skip(rung.name, reason)
            continue
        before = network.snapshot()
        kept = False
        start = time.perf_counter()
        try:
            with context.attempt(rung), PeakMemory() as memory:
                if (reference := rung.float_reference(context)) is not None:
                    ladder.float_reestimated = context.measure_float(reference)
                if rung.start == "float":
                    network.reset_to(context.prepared.network)
                elif session.base is not None:
                    network.restore(session.base)
                changed = rung.apply(network, context)
                correction = corrections.get(session.correction or "")
                base = None
                if rung.is_correction:
                    correction, base, metric = rung, session.base or before, measure()
                elif correction is None:
                    metric = measure()
                else:
                    base, alone = network.snapshot(), measure()
                    said = correction.apply(network, context)
                    metric = measure()
                    if ladder.is_better(alone, metric):  # what learned from outputs may need no correction
                        network.restore(base)
                        correction, base, metric = None, None, alone
                        changed += f"; worse with {session.correction}"
                    else:
                        changed += f"; then {said}"
            seconds = time.perf_counter() - start
            result = ladder.judge(rung.name, metric, changed, seconds, memory.peak_bytes)
            kept = result.kept
            if kept:
                session.base, session.correction = base, correction.name if correction else None
        except LightningQuantError as error:  # of this rung alone: the others may do
            result = ladder.skip(rung.name, f"failed: {error}", time.perf_counter() - start)
        finally:
            if not kept:
                network.restore(before)
        yield result
