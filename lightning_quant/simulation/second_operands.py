"""What a product of two activations multiplies with: of 16 bits the NPU takes grids with zero in their middle alone.

Before Hexagon v73 it takes no 16 bits: the product converts what it multiplies with to 8
(:mod:`lightning_quant.simulation.conversions`), as ONNX Runtime's QNN provider does. From v73 on, where both ends of a
range are free, its grid is symmetric while the product has 16 bits. Where one is fixed, 0 behind a ReLU, or where the
tensor has other bits, the product converts what it takes to such a grid. The files have these integers with a sign
(:mod:`lightning_quant.deploy.graph.second_operands`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning_quant.simulation.callsites.tied_ranges import rounding
from lightning_quant.simulation.fixed_ranges import fixed_range

# The bits of activations that the NPU multiplies with symmetric grids alone.
SYMMETRIC_BITS = 16
# The NPU computes with two signed bytes, which hold no more than 127 · 256 + 127 of the 32767 steps.
ROOM = 32768 / 32639
# From this version of the Hexagon NPU on it multiplies 16-bit activations by 16 bits: AIMET's exception for MatMul,
# ``_base/quantsim.py``.
_HEXAGON_WITH_INT16_PRODUCTS = 73


def multiplies_by_int16(hexagon: int | None) -> bool:
    """Return whether a version of the NPU multiplies 16-bit activations by 16 bits; ``None`` is no NPU."""
    return hexagon is not None and hexagon >= _HEXAGON_WITH_INT16_PRODUCTS


def hexagon_simulated(sim: Any) -> int | None:
    """Return the version of the NPU that a simulation is of, as its hardware config has it; ``None`` for others."""
    version = str(sim._hw_version or "").upper().removeprefix("V")  # e.g. "V75"
    return int(version) if version.isdecimal() else None


def second_operands(sim: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the products of a simulation of an NPU, and what rounds their second operand."""
    from lightning_quant.simulation.aimet import custom

    for op in () if hexagon_simulated(sim) is None else sim.connected_graph.ordered_ops:
        module: Any = sim._get_qmodule(op)
        if not isinstance(module, custom.MatMul) or len(op.inputs) < 2:
            continue
        own = module.input_quantizers[1]
        quantizer = own if own is not None else rounding(sim, op.inputs[1].producer)
        if quantizer is not None:
            yield module, quantizer


def undo_exceptions(sim: Any) -> None:
    """Let no activation be symmetric that AIMET's exception for products made so.

    It does that for the bits that the network is built with, and to ranges with a fixed end, half of which it cuts off.

    Args:
        sim: AIMET's simulation, newly built; of hardware without a version all activations may be symmetric.
    """
    if sim._hw_version is None:
        return
    is_ours = multiplies_by_int16(hexagon_simulated(sim))
    known = {quantizer for _, quantizer in second_operands(sim) if is_ours}
    for module in sim.model.modules():
        for quantizer in (*getattr(module, "input_quantizers", ()), *getattr(module, "output_quantizers", ())):
            if quantizer is not None and quantizer.symmetric and (quantizer in known or not is_free(quantizer)):
                quantizer.symmetric = quantizer.signed = False


def is_free(quantizer: Any) -> bool:
    """Return whether both ends of a range are calibrated."""
    return bool(
        fixed_range(quantizer) is None
        and quantizer.is_overwrite_allowed("min")
        and quantizer.is_overwrite_allowed("max")
    )
