"""Ranges of the outputs of sigmoid, hard sigmoid and tanh: with 16 bits, the NPU has a grid of its own for them.

ONNX Runtime's QNN provider writes scale 2⁻¹⁶ with zero point 0, and scale 2⁻¹⁵ with zero point 32768, over what a file
says of the output of a 16-bit Sigmoid and Tanh (``OverrideQuantParams`` in its public ``simple_op_builder.cc``). With
other bits the range is that of the hardware config, or calibrated. A hard sigmoid has the range that ONNX defines for
it, 0 to 1: with a narrower one the emulated NPU is off by as much as that is narrower.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_quant.simulation.callsites.tied_ranges import hands_on, inputs_of_one_grid, outputs, rounding

# Both ends in units of the tensor, from zero point and scale.
_ENDS: dict[type[nn.Module], tuple[float, float]] = {
    nn.Sigmoid: (0.0, 65535 * 2.0**-16),
    nn.Tanh: (-32768 * 2.0**-15, 32767 * 2.0**-15),
    nn.Hardsigmoid: (0.0, 1.0),
}
# Name of what a quantizer of such outputs remembers.
_RANGES = "_ranges_by_bits"


@dataclass(frozen=True)
class RangesByBits:
    """Both ends of the range of such an output, in units of the tensor.

    Args:
        of_16_bits: with 16 bits.
        otherwise: with other bits; ``None`` where it is calibrated.
    """

    of_16_bits: tuple[float, float]
    otherwise: tuple[float, float] | None


def note_fixed_ranges(sim: Any) -> None:
    """Let quantizers know which of them round outputs of one such function alone.

    A max pool or a resize of such an output has its grid. In a concatenation with other values all have the range of
    all: the NPU converts, and agrees as closely as with a rounding to either grid.

    Args:
        sim: AIMET's simulation, its ranges tied; of hardware without a name nothing is noted.
    """
    if sim._hw_version is None:
        return
    kinds: dict[Any, set[Any]] = {}
    for op in sim.connected_graph.ordered_ops:
        module = sim._get_qmodule(op)
        for quantizer in getattr(module, "input_quantizers", ()):  # of an image, a constant
            kinds.setdefault(quantizer, set()).add(None)
        for quantizer in outputs(sim, op):
            found = kinds.setdefault(quantizer, set())
            if not hands_on(sim, op):
                found.add(next((kind for kind in _ENDS if isinstance(module, kind)), None))
            elif any(
                rounding(sim, op.inputs[index].producer) is not quantizer for index in inputs_of_one_grid(sim, op)
            ):
                found.add(None)
    for quantizer, found in kinds.items():
        kind = next(iter(found)) if len(found) == 1 else None
        if quantizer is not None and kind is not None:
            is_fixed = not (quantizer.is_overwrite_allowed("min") or quantizer.is_overwrite_allowed("max"))
            ends = (quantizer.min.item(), quantizer.max.item()) if is_fixed else None
            quantizer.__dict__[_RANGES] = RangesByBits(_ENDS[kind], ends)
    set_fixed_ranges(kinds)


def set_fixed_ranges(quantizers: Iterable[Any]) -> None:
    """Give quantizers the ranges that follow from their bits, neither calibrated nor learned; others stay."""
    for quantizer in quantizers:
        known = vars(quantizer).get(_RANGES) if quantizer is not None else None
        if known is None:
            continue
        ends = fixed_range(quantizer)
        quantizer.allow_overwrite(ends is None)
        if ends is not None:
            quantizer.set_range(*ends)
            for parameter in quantizer.parameters():
                parameter.requires_grad_(False)


def forget_fixed_range(quantizer: Any) -> None:
    """Let a copy of a quantizer keep the range it is given, whatever its bits."""
    vars(quantizer).pop(_RANGES, None)


def fixed_range(quantizer: Any) -> tuple[float, float] | None:
    """Return both ends of a range that follows from the quantizer's bits; ``None`` for one that is calibrated."""
    known: RangesByBits | None = vars(quantizer).get(_RANGES)
    if known is None:
        return None
    return known.of_16_bits if quantizer.bitwidth == 16 else known.otherwise
