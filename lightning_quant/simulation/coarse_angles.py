"""Sines and cosines of angles that are rounded to large steps: time steps of diffusion, Fourier features, positions.

An angle from 0 to 1000 has steps of 4 radians with 8 bits, two thirds of a turn. It shows in calibration only, as
:mod:`lightning_quant.simulation.unlike_ranges` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_quant.precision import Precision
from lightning_quant.simulation.dataflow import quantizer_at
from lightning_quant.simulation.precisions import layer_precision, quantized_layers
from lightning_quant.simulation.preflight import Finding, FindingKind

if TYPE_CHECKING:
    from lightning_quant.simulation.network import QuantizedNetwork

# In radians: rounding errors up to half of it, 0.03 on average, are 28 dB below a sine.
_LARGEST_STEP = 0.1


def coarse_angles(network: QuantizedNetwork) -> list[Finding]:
    """Find sines and cosines whose angles are rounded to steps of more than 0.1 radians.

    Args:
        network: quantized and calibrated.
    """
    from lightning_quant.simulation.aimet import custom

    findings = []
    for name, layer in quantized_layers(network).items():
        if not isinstance(layer, (custom.Sin, custom.Cos)):
            continue
        source = network.dataflow.sources.get((name, 0), quantizer_at((name, 0)))
        quantizer: Any = _at(network, source)
        if quantizer is None or not quantizer.is_initialized():
            continue
        low, high = float(quantizer.min.detach().min()), float(quantizer.max.detach().max())
        step = (high - low) / (2**quantizer.bitwidth - 1)
        if step > _LARGEST_STEP:
            finer = Precision(layer_precision(network, name).weight_bits, 16)
            layers = dict.fromkeys((source.rpartition(".")[0].rpartition(".")[0], name))
            overrides = ", ".join(f'"{one}": "{finer}"' for one in layers)
            remedy = f"reduce the angles to one turn, or give them 16 bits: overrides={{{overrides}}}"
            problem = f"takes angles from {low:.3g} to {high:.3g} radians in steps of {step:.2g}"
            findings.append(Finding(name, problem, remedy, kind=FindingKind.COARSE_ANGLES))
    return findings


def _at(network: QuantizedNetwork, name: str) -> Any:
    layer, _, place = name.rpartition(".")
    return network.network.get_submodule(layer)[int(place)]  # type: ignore[index]
