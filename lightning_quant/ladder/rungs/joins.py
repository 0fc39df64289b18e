"""16 bits for concatenations of unlike values: boxes in pixels and scores of 0 to 1."""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import override

from lightning_quant.ladder.rung import Cost, Rung, RungContext, calibration
from lightning_quant.precision import Precision
from lightning_quant.simulation.callsites.tied_ranges import joins
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.precisions import layer_precision, quantized_layers, set_precisions
from lightning_quant.simulation.preflight import FindingKind


class JoinedPrecision(Rung):
    """Give 16 bits to the concatenations whose one range leaves a part of what they join fewer than 8 steps.

    Those that the preflight names after calibration. They compute nothing, so it costs the device two bytes a value
    instead of one there, and what takes the tensor a conversion.
    """

    name = "joins"
    refines: ClassVar[bool] = True

    @override
    def skip_reason(self, network: QuantizedNetwork, context: RungContext) -> str | None:
        if network.recipe.precision.activation_bits == 16:
            return "activations have 16 bits"
        return None if _unlike(network) else "no concatenation joins values of unlike size"

    @override
    def cost(self, network: QuantizedNetwork, context: RungContext) -> Cost:
        return Cost(calibration(network))

    @override
    def apply(self, network: QuantizedNetwork, context: RungContext) -> str:
        finer = {name: Precision(layer_precision(network, name).weight_bits, 16) for name in _unlike(network)}
        set_precisions(network, finer)
        network.promoted = {**network.promoted, **finer}
        context.calibrate(network, weights=False)
        return f"16 bits for {', '.join(finer)}"


def _unlike(network: QuantizedNetwork) -> list[str]:
    layers = quantized_layers(network)
    named = dict.fromkeys(one.module for one in network.findings if one.kind is FindingKind.UNLIKE_RANGES)
    return [
        name
        for name in named
        if name in layers and joins(layers[name]) and layer_precision(network, name).activation_bits < 16
    ]
