"""16-bit grids that the NPU gets wrong, made coarser: what softmax and ELU take, and what ELU returns.

With 16 bits the emulated NPU returns garbage of a range of an eighth and less: of a softmax about half of each value.
Attention that is hardly trained, routing that begins with zeros, weights of branches that are alike, residuals that
begin small. With 8 bits it takes any range. Layers that read the same tensor get the coarser grid too.

A softmax is at most a quarter as steep as what it is given, and its outputs lie on a grid from 0 to 1: a range of 1 of
the scores shows in them all that they can show. The outputs of an ELU, CELU or SELU are off by about 3e-5 there
whatever their range: on one of a quarter, rounding adds a tenth of that. On a much finer one, ONNX Runtime's ELU (an
exponential minus one, in float32) is off by steps.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_quant.simulation.callsites.tied_ranges import outputs, rounded_before
from lightning_quant.simulation.fixed_ranges import fixed_range

# The least length of a range, in units of the tensor.
_OF_SCORES = 1.0
_OF_UNITS = 0.25


def widen_narrow_ranges(sim: Any) -> None:
    """Give 16-bit ranges of what the NPU computes wrongly on a finer grid a length it takes; zero stays in its place.

    Args:
        sim: AIMET's simulation, its ranges calibrated.
    """
    for op in sim.connected_graph.ordered_ops:
        module = sim._get_qmodule(op)
        if isinstance(module, (nn.Softmax, nn.Softmax2d)):
            _widen(*rounded_before(sim, op), _OF_SCORES)
        elif isinstance(module, (nn.ELU, nn.CELU, nn.SELU)):
            _widen(*rounded_before(sim, op), _OF_UNITS)
            for quantizer in outputs(sim, op):
                _widen(quantizer, 1.0, _OF_UNITS)


def _widen(quantizer: Any, factor: float, least: float) -> None:
    """Give a range, of values that are multiplied with a factor, a length of at least that behind the product."""
    if quantizer is None or quantizer.bitwidth != 16 or not quantizer.is_initialized():
        return
    low, high = quantizer.get_min().item(), quantizer.get_max().item()
    length = (high - low) * abs(factor)
    if not 0 < length < least or fixed_range(quantizer) is not None:
        return
    free = [quantizer.is_overwrite_allowed(end) for end in ("min", "max")]
    if all(free):
        quantizer.set_range(low * least / length, high * least / length)
    elif any(free):  # 0 behind a ReLU stays
        missing = (least - length) / abs(factor)
        quantizer.set_range(*((low - missing, None) if free[0] else (None, high + missing)))
