"""What a product of two activations multiplies with: of 16 bits the NPU takes grids with zero in their middle alone.

AIMET makes such grids symmetric where it finds what rounds them; at call sites, and behind operations that move values,
it does not. Where an end of the range is fixed, 0 behind a ReLU, a symmetric grid would cut off the other half: the
product rounds what it takes once more there, as the device converts it. The files have these integers with a sign
(:mod:`lightning_quant.deploy.graph.second_operands`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning_quant.simulation.callsites.tied_ranges import rounding

# From this version of the Hexagon NPU on it multiplies 16-bit activations by 16 bits: AIMET's exception for MatMul,
# ``_base/quantsim.py``.
_HEXAGON_WITH_INT16_PRODUCTS = 73
# The NPU computes with two signed bytes, which hold no more than 127 · 256 + 127 of the 32767 steps.
_ROOM = 32768 / 32639


def multiplies_by_int16(hexagon: int | None) -> bool:
    """Return whether a version of the NPU multiplies 16-bit activations by 16 bits; ``None`` is no NPU."""
    return hexagon is not None and hexagon >= _HEXAGON_WITH_INT16_PRODUCTS


def hexagon_simulated(sim: Any) -> int | None:
    """Return the version of the NPU that a simulation is of, as its hardware config has it; ``None`` for others."""
    version = sim._hw_version  # e.g. "V75"
    return None if version is None else int(version.removeprefix("V"))


def make_symmetric(sim: Any) -> None:
    """Give the second operands of 16-bit products symmetric grids, where both ends of their range are free.

    Args:
        sim: AIMET's simulation, the quantizers of its tensors shared as they will be.
    """
    for _, quantizer in _second_operands(sim):
        if quantizer.bitwidth == 16 and _is_free(quantizer):
            quantizer.symmetric, quantizer.signed = True, True


def round_the_others(sim: Any) -> None:
    """Round second operands of 16 bits once more whose own grids cannot be symmetric.

    Args:
        sim: AIMET's simulation, those that can be made symmetric.
    """
    from lightning_quant.simulation.aimet import QuantizeDequantize

    for module, quantizer in _second_operands(sim):
        if quantizer.bitwidth == 16 and not quantizer.symmetric and module.input_quantizers[1] is None:
            module.input_quantizers[1] = QuantizeDequantize((), bitwidth=16, symmetric=True)


def leave_room(sim: Any) -> None:
    """Extend calibrated symmetric ranges of second operands by the 0.4 % that the NPU's integers lack.

    Args:
        sim: AIMET's simulation, its ranges calibrated.
    """
    for quantizer in {quantizer for _, quantizer in _second_operands(sim)}:
        if quantizer.bitwidth == 16 and quantizer.symmetric and quantizer.is_initialized() and _is_free(quantizer):
            quantizer.set_range(quantizer.get_min() * _ROOM, quantizer.get_max() * _ROOM)


def keep_fixed_ends(sim: Any) -> None:
    """Give activations with a fixed end of their range the grid of that range, which AIMET may have made symmetric.

    Args:
        sim: AIMET's simulation; on hardware without a version all activations may be symmetric, and stay it.
    """
    for module in sim.model.modules() if sim._hw_version is not None else ():
        for quantizer in (*getattr(module, "input_quantizers", ()), *getattr(module, "output_quantizers", ())):
            if quantizer is not None and quantizer.symmetric and not _is_free(quantizer):
                quantizer.symmetric, quantizer.signed = False, False


def _second_operands(sim: Any) -> Iterator[tuple[Any, Any]]:
    """Yield products and what rounds their second operand."""
    from lightning_quant.simulation.aimet import custom

    for op in sim.connected_graph.ordered_ops if multiplies_by_int16(hexagon_simulated(sim)) else ():
        module: Any = sim._get_qmodule(op)
        if not isinstance(module, custom.MatMul) or len(op.inputs) < 2:
            continue
        own = module.input_quantizers[1]
        quantizer = own if own is not None else rounding(sim, op.inputs[1].producer)
        if quantizer is not None:
            yield module, quantizer


def _is_free(quantizer: Any) -> bool:
    return bool(quantizer.is_overwrite_allowed("min") and quantizer.is_overwrite_allowed("max"))
