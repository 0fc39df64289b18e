"""16 bits for what lies between the layers of a transformer: sums, normalizations, softmax, activation functions."""

from __future__ import annotations

from torch import nn
from typing_extensions import override

from lightning_quant.ladder.rung import RungContext
from lightning_quant.ladder.rungs.mixed import MixedPrecision
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.sensitivity import LayerSensitivity


class AttentionPrecision(MixedPrecision):
    """Raise the fewest activations between layers with weights (A8 → A16) that restore the metric.

    A few channels of the residual sums of transformers are a hundred times as large as the others (Bondarenko et al.
    2021, https://arxiv.org/abs/2109.12948): 8 bits leave the others a few steps. Layers that only take such a tensor,
    to multiply it with weights, convert it back to 8 bits: one of those before a sum has to compute at 16.

    Args:
        budget: part of all multiply-accumulate operations that may be computed at 16 bits, above 0 to 1.
        samples: calibration samples for the sensitivity.

    Raises:
        ConfigurationError: for a value out of range.
    """

    name = "attention"

    def __init__(self, budget: float = 0.5, samples: int = 8) -> None:
        super().__init__(budget, samples)

    @override
    def skip_reason(self, network: QuantizedNetwork, context: RungContext) -> str | None:
        if network.recipe.precision.activation_bits == 16:
            return "activations have 16 bits"
        return None

    @override
    def _may_be_raised(self, network: QuantizedNetwork, one: LayerSensitivity) -> bool:
        layer = network.network.get_submodule(one.layer)
        return one.part == "activations" and not isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd))
