"""Bias correction: compensate the shift of each channel's mean that rounded weights cause."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_quant.ladder.rung import Cost, Rung, RungContext, calibration
from lightning_quant.ladder.rungs.layer_outputs import (
    channel_axis,
    channel_scales,
    hooked,
    per_channel,
    statistics,
)
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.precisions import quantized_layers
from lightning_quant.simulation.switched_off import weights_only

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


class BiasCorrection(Rung):
    """Move each bias until the mean output of the layer is that of the float layer.

    The empirical form of Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction",
    2019, section 4.2: every batch runs through both networks.
    """

    name = "bias_correction"
    is_correction = True

    @override
    def skip_reason(self, network: QuantizedNetwork, context: RungContext) -> str | None:
        return None if _correctable(network) else "no layer has a bias"

    @override
    def cost(self, network: QuantizedNetwork, context: RungContext) -> Cost:
        return Cost(2 * network.recipe.calibration_samples + calibration(network))

    @override
    def apply(self, network: QuantizedNetwork, context: RungContext) -> str:
        layers = _correctable(network)
        float_network = context.prepared.network
        originals = {name: float_network.get_submodule(name) for name in layers}
        scales = channel_scales(layers, context) if network.equalized else {}
        wanted: dict[str, list[Tensor]] = defaultdict(list)
        shifts: dict[str, list[Tensor]] = defaultdict(list)

        def remember(name: str, output: Tensor) -> None:
            mean = statistics(output, channel_axis(layers[name], output))[0]
            wanted[name].append(mean * scales[name] if name in scales else mean)

        def correct(name: str, output: Tensor) -> Tensor:
            axis = channel_axis(layers[name], output)
            # a layer that is called several times is corrected call by call, in the same order
            shift = wanted[name].pop(0) - statistics(output, axis)[0]
            shifts[name].append(shift)
            return output + per_channel(shift, axis, output)

        for batch in context.samples():
            with hooked(originals, remember):
                batch.call(float_network)
            with weights_only(network), hooked(layers, correct):
                batch.call(network.network)
        of_bias: dict[int, tuple[Tensor, list[Tensor]]] = {}
        for name, values in shifts.items():
            bias = layers[name].bias
            assert isinstance(bias, Tensor)
            of_bias.setdefault(bias.data_ptr(), (bias, []))[1].extend(values)  # several calls may add the same one
        for bias, values in of_bias.values():
            bias.add_(torch.stack(values).mean(0))
        context.calibrate(network, weights=False)
        return f"corrected {len(of_bias)} biases"


def _correctable(network: QuantizedNetwork) -> dict[str, nn.Module]:
    """Return the layers that add a parameter; one that is computed in each pass would be what it was in the next."""
    memory = {parameter.data_ptr() for parameter in network.network.parameters()}
    return {
        name: layer
        for name, layer in quantized_layers(network).items()
        if isinstance(layer, _LAYERS) and layer.bias is not None and layer.bias.data_ptr() in memory
    }
