"""Scores of a softmax that hardly differ: 16-bit grids that are finer than its output's, which the NPU gets wrong.

A softmax is at most a quarter as steep as what it is given, and its outputs lie on a grid from 0 to 1: a range of 1 of
the scores shows in them all that they can show. Where scores have a range of an eighth and less, the emulated NPU
returns about half of each value with 16 bits: attention that is hardly trained, routing that begins with zeros, weights
of branches that are alike. With 8 bits it takes any range. Layers that read the same scores get the coarser grid too.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_quant.simulation.callsites.tied_ranges import rounded_before
from lightning_quant.simulation.fixed_ranges import fixed_range

# In units of the scores: that of the output.
_RANGE = 1.0


def widen_narrow_scores(sim: Any) -> None:
    """Give 16-bit ranges of less than 1 that length where a softmax takes what they round; zero stays in its place.

    Args:
        sim: AIMET's simulation, its ranges calibrated.
    """
    for op in sim.connected_graph.ordered_ops:
        if not isinstance(sim._get_qmodule(op), (nn.Softmax, nn.Softmax2d)):
            continue
        quantizer, factor = rounded_before(sim, op)
        if quantizer is None or quantizer.bitwidth != 16 or not quantizer.is_initialized():
            continue
        low, high = quantizer.get_min().item(), quantizer.get_max().item()
        length = (high - low) * abs(factor)
        if not 0 < length < _RANGE or fixed_range(quantizer) is not None:
            continue
        free = [quantizer.is_overwrite_allowed(end) for end in ("min", "max")]
        if all(free):
            quantizer.set_range(low * _RANGE / length, high * _RANGE / length)
        elif any(free):  # 0 behind a ReLU stays
            missing = (_RANGE - length) / abs(factor)
            quantizer.set_range(*((low - missing, None) if free[0] else (None, high + missing)))
