"""AdaRound: round each weight up or down so that the layer's output stays, not to the nearest."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import torch
from typing_extensions import override

from lightning_quant.errors import ConfigurationError
from lightning_quant.ladder.rung import LEARNING_STEP, Cost, Rung, RungContext, calibration
from lightning_quant.ladder.rungs.seq_mse import TensorBatches, call_flat
from lightning_quant.simulation import aimet
from lightning_quant.simulation.calibrate import weight_quantizers
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.precisions import quantized_layers

# Of AIMET's AdaRound.
_BATCH = 32


class AdaptiveRounding(Rung):
    """Learn for each weight whether to round up or down, layer by layer, by reconstructing the layer's output.

    Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", 2020; AIMET's implementation. Weights
    that pass through it lie on the grid of their range. The dearest rung before training: its time grows with layers
    times iterations.

    Args:
        iterations: optimization steps for each layer. AIMET's own default is 15000 for 4-bit weights.
        samples: calibration samples to reconstruct outputs of.

    Raises:
        ConfigurationError: for a number below 1.
    """

    name = "adaround"

    def __init__(self, iterations: int = 1000, samples: int = 8) -> None:
        for argument, value in {"iterations": iterations, "samples": samples}.items():
            if not isinstance(value, int) or value < 1:
                raise ConfigurationError(f"adaround: {argument}={value!r}: expected a whole number of at least 1.")
        self.iterations = iterations
        self.samples = samples

    @override
    def skip_reason(self, network: QuantizedNetwork, context: RungContext) -> str | None:
        at_sites = [name for name, layer in quantized_layers(network).items() if "_takes_weights" in vars(layer)]
        if not at_sites:
            return None
        return (
            "AIMET's AdaRound learns the weights of layers, not those that the network's code passes to a function "
            f"({', '.join(at_sites[:3])}{', …' if len(at_sites) > 3 else ''}); take 'rounding'"
        )

    @override
    def cost(self, network: QuantizedNetwork, context: RungContext) -> Cost:
        # each layer: two passes up to it, in float and rounded, and its steps
        in_a_step = min(_BATCH, self.samples)
        learned = len(weight_quantizers(network)) * self.samples + LEARNING_STEP * self.iterations * in_a_step
        return Cost(learned + calibration(network))

    @override
    def apply(self, network: QuantizedNetwork, context: RungContext) -> str:
        batches = TensorBatches(context.samples(), self.samples)
        device = next(iter(batches))[0].device
        example = tuple(tensor.to(device) for tensor in network.inputs.tensors)
        rounded = copy.deepcopy(network.sim.model)
        original = _without_quantizers(copy.deepcopy(network.sim.model))
        parameters = aimet.AdaroundParameters(
            batches,
            num_batches=len(batches),
            default_num_iterations=self.iterations,
            forward_fn=call_flat,
        )
        layers = [module for module in rounded.modules() if isinstance(module, aimet.BaseQuantizationMixin)]
        # AdaRound asks for a simulation, and uses its network alone
        simulation = copy.copy(network.sim)
        simulation.model = rounded
        with (
            aimet.quiet(),
            aimet.failing_as("AdaRound"),
            aimet.remove_activation_quantizers(layers),
            torch.enable_grad(),
            tempfile.TemporaryDirectory() as folder,
        ):
            result = aimet.Adaround._apply_adaround(simulation, original, example, parameters, folder, "adaround")
        mine = quantized_layers(network)
        weights = {name: value for name, value in result.network.named_parameters() if name.endswith(".weight")}
        changed = 0
        with torch.no_grad():
            for name, value in weights.items():
                layer: Any = mine.get(name.removesuffix(".weight"))
                if layer is not None and not torch.equal(layer.weight, value):
                    layer.weight.copy_(value)  # decided softly; onto the grid:
                    layer.weight.copy_(layer.param_quantizers["weight"](layer.weight).as_subclass(torch.Tensor))
                    changed += 1
        context.calibrate(network, weights=False)
        return f"rounded the weights of {changed} layers adaptively"


def _without_quantizers(network: torch.nn.Module) -> torch.nn.Module:
    """The float layers inside a quantized network."""
    aimet.Adaround._remove_quantization_wrappers(network)
    return network
