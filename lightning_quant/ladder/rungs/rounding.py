"""Learned rounding: each weight up or down, so that what a block of layers computes stays."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_quant.errors import CalibrationError, ConfigurationError
from lightning_quant.ladder.rung import LEARNING_STEP, Cost, Rung, RungContext, calibration
from lightning_quant.ladder.rungs.blocks import (
    Block,
    find_blocks,
    inputs_of,
    learnable_layers,
    outputs_in,
    passed_through,
    pieces,
)
from lightning_quant.ladder.rungs.layer_outputs import channel_axis
from lightning_quant.ladder.rungs.learned_blocks import LearnedBlocks
from lightning_quant.ladder.rungs.soft_weight import SoftWeight
from lightning_quant.simulation import aimet
from lightning_quant.simulation.inputs import NetworkInputs, take_samples
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.switched_off import unrounded

# Of the penalty on weights between two integers, as in 2004.10568: its weight, its exponent from the first to the last
# iteration, and the share of iterations before it begins.
_PENALTY, _EXPONENTS, _WARM_UP = 0.01, (20.0, 2.0), 0.2
# A step takes as many samples as put about so many numbers into and out of a block's layers: where feature maps are
# large, one sample has enough of them.
_NUMBERS = 1_500_000
# Layers in a block: a bottleneck with squeeze and excitation has five, a transformer's layer six.
_MOST_LAYERS = 6


class LearnedRounding(Rung):
    """Learn for each weight whether to round up or down, block by block, from what the block computes in float.

    The rounding is that of Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization" (2004.10568),
    the block the unit of Li et al., "BRECQ" (2102.05426), and activations are rounded with a chance of one half as in
    Wei et al., "QDrop" (2203.05740). A block gets what the network before it computes, its weights already rounded;
    its target is what it computes in float.

    Args:
        iterations: optimization steps for each block.
        samples: calibration samples that it learns from.
        batch: samples in a step; fewer where the block's feature maps are large.
        unit: ``"block"``, or ``"layer"`` as in 2004.10568.
        drop: the share of activations that are not rounded while it learns; 1 learns for weights alone.
        learning_rate: of Adam.
        memory_gb: the most that inputs and outputs of a block may take, in 10^9 bytes; fewer samples then.

    Raises:
        ConfigurationError: for a value out of range.
    """

    name = "rounding"

    def __init__(
        self,
        iterations: int = 500,
        samples: int = 64,
        batch: int = 8,
        unit: Literal["block", "layer"] = "block",
        drop: float = 0.5,
        learning_rate: float = 0.01,
        memory_gb: float = 2.0,
    ) -> None:
        for argument, value in {"iterations": iterations, "samples": samples, "batch": batch}.items():
            if not isinstance(value, int) or value < 1:
                raise ConfigurationError(f"rounding: {argument}={value!r}: expected a whole number of at least 1.")
        if unit not in ("block", "layer"):
            raise ConfigurationError(f"rounding: unit={unit!r}: expected 'block' or 'layer'.")
        if not 0 <= drop <= 1:
            raise ConfigurationError(f"rounding: drop={drop!r}: expected a share from 0 to 1.")
        for argument, number in {"learning_rate": learning_rate, "memory_gb": memory_gb}.items():
            if not number > 0:
                raise ConfigurationError(f"rounding: {argument}={number!r}: expected a number above 0.")
        self.iterations = iterations
        self.samples = samples
        self.batch = batch
        self.unit = unit
        self.drop = drop
        self.learning_rate = learning_rate
        self.memory_gb = memory_gb

    @override
    def skip_reason(self, network: QuantizedNetwork, context: RungContext) -> str | None:
        return None if learnable_layers(network) else "no convolution or linear layer has rounded weights"

    @override
    def cost(self, network: QuantizedNetwork, context: RungContext) -> Cost:
        device = next(network.parameters()).device
        blocks = list(self._blocks(network, [network.inputs.first(1).to(device)]))
        numbers = sum(block.numbers for block in blocks)
        in_a_step = sum(self._batch(block) * block.numbers for block in blocks) / max(numbers, 1)
        # each block: two passes up to it, in float and rounded, and its steps
        learned = len(blocks) * self.samples + LEARNING_STEP * self.iterations * in_a_step
        return Cost(learned + calibration(network))

    @override
    def apply(self, network: QuantizedNetwork, context: RungContext) -> str:
        layers = learnable_layers(network)
        calls = list(pieces(take_samples(context.samples(), self.samples), self.batch))
        blocks = self._blocks(network, calls)
        float_network = copy.deepcopy(network)
        learned = None if context.cache is None else LearnedBlocks(context.cache, network, calls, self.options)
        turned = total = 0
        for index, (block, own_calls) in enumerate(blocks.items()):
            weights = {name: SoftWeight(network.network.get_submodule(name)) for name in block.layers}
            if learned is None or not learned.recall(index, weights):
                samples = self._samples(network, float_network, block, list(pieces(own_calls, self._batch(block))))
                self._learn(network, block, layers, weights, samples, torch.Generator().manual_seed(index))
                if learned is not None:
                    learned.keep(index, weights)
            for name, weight in weights.items():
                turned += weight.turned()
                total += weight.logits.numel()
                network.network.get_parameter(layers[name]).copy_(weight.hard())
        context.calibrate(network, weights=False)
        return f"turned {turned / max(total, 1):.1%} of the roundings in {len(blocks)} blocks"

    def _blocks(self, network: QuantizedNetwork, calls: Sequence[NetworkInputs]) -> dict[Block, list[NetworkInputs]]:
        most = _MOST_LAYERS if self.unit == "block" else 1
        return find_blocks(network.network, learnable_layers(network), calls, most)

    def _batch(self, block: Block) -> int:
        """Return the samples in a step of a block."""
        return min(max(1, _NUMBERS // max(block.numbers, 1)), self.batch)

    def _samples(
        self, network: QuantizedNetwork, float_network: QuantizedNetwork, block: Block, calls: Sequence[NetworkInputs]
    ) -> list[_Sample]:
        """Return what a block is given and should compute, of as many samples as there is memory for."""
        samples: list[_Sample] = []
        with unrounded(float_network):
            module = float_network.network.get_submodule(block.name)
            for call in calls:
                exact, wanted = passed_through(float_network.network, module, call)
                samples.append(_Sample(exact, exact, wanted))
                if samples[0].bytes * (len(samples) + 1) > self.memory_gb * 1e9:
                    break
        module = network.network.get_submodule(block.name)
        for sample, call in zip(samples, calls, strict=False):
            sample.rounded = inputs_of(network.network, module, call)
        return samples

    def _learn(
        self,
        network: QuantizedNetwork,
        block: Block,
        parameters: Mapping[str, str],
        weights: Mapping[str, SoftWeight],
        samples: Sequence[_Sample],
        generator: torch.Generator,
    ) -> None:
        module = network.network.get_submodule(block.name)
        start = len(block.name) + 1 if block.name else 0
        layers = [network.network.get_submodule(name) for name in block.layers]
        learned = [weight.logits for weight in weights.values()]
        optimizer = torch.optim.Adam(learned, self.learning_rate)
        order: list[int] = []
        with _weights_as_given(layers), _dropped(module, self.drop, generator), torch.enable_grad():
            for iteration in range(self.iterations):
                order = order or torch.randperm(len(samples), generator=generator).tolist()
                sample = samples[order.pop()]
                soft = {parameters[name][start:]: weight.soft() for name, weight in weights.items()}
                given = sample.mixed(self.drop, generator)
                output = torch.func.functional_call(module, soft, given.args, given.kwargs)
                loss = _difference(outputs_in(output), sample.wanted, layers[-1])
                progress = (iteration / self.iterations - _WARM_UP) / (1 - _WARM_UP)
                if progress >= 0:
                    first, last = _EXPONENTS
                    exponent = last + (first - last) * (1 + math.cos(math.pi * progress)) / 2
                    loss = loss + _PENALTY * sum(weight.penalty(exponent) for weight in weights.values())
                for parameter, gradient in zip(learned, torch.autograd.grad(loss, learned), strict=True):
                    parameter.grad = gradient
                optimizer.step()
        if not all(bool(logits.isfinite().all()) for logits in learned):
            raise CalibrationError(
                f"rounding: {block.name or 'the network'} has no finite gradient on the calibration samples: expected "
                "finite values in it. Leave this rung out, or look for what divides by zero there."
            )


@dataclass
class _Sample:
    """What a block is called with in float and with what is before it rounded, and what it should compute."""

    exact: NetworkInputs
    rounded: NetworkInputs
    wanted: list[Tensor]

    @property
    def bytes(self) -> int:
        """Memory of all three."""
        kept = [*self.exact.tensors, *self.exact.tensors, *self.wanted]
        return sum(tensor.nbytes for tensor in kept)

    def mixed(self, drop: float, generator: torch.Generator) -> NetworkInputs:
        """Return its inputs, with the share ``drop`` of the values as in float."""
        if drop == 0 or drop == 1:  # layer by layer, it is given what it will be given
            return self.rounded.map(torch.clone)
        both = zip(self.rounded.tensors, self.exact.tensors, strict=True)
        return self.rounded.with_tensors(
            [_chosen(a, b, drop, generator) if a.is_floating_point() else a.clone() for a, b in both]
        )


def _chosen(rounded: Tensor, exact: Tensor, drop: float, generator: torch.Generator) -> Tensor:
    """Return a tensor with the share ``drop`` of the values exact, others each time."""
    if drop == 1:
        return exact
    # drawn on the CPU, so that every device learns alike, a byte for each value: `bernoulli_` takes ten times as long
    drawn = torch.empty(rounded.numel() // 8 + 1, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    is_exact = torch.empty_like(rounded, device="cpu")
    in_memory = is_exact.as_strided((rounded.numel(),), (1,))  # as dense as `empty_like` makes it
    in_memory.copy_(drawn.view(torch.uint8)[: rounded.numel()] < round(drop * 256))
    is_exact = is_exact.to(rounded.device)
    if not bool((rounded.detach().sum() + exact.detach().sum()).isfinite()):  # a mask of -inf: its blend would be NaN
        return torch.where(is_exact.bool(), exact, rounded)
    return torch.lerp(rounded, exact, is_exact)  # `where` takes three times as long, forward and backward


def _difference(outputs: Sequence[Tensor], wanted: Sequence[Tensor], last: nn.Module) -> Tensor:
    """Return the squared difference, summed over channels and averaged over everything else, as in the papers.

    Args:
        outputs: of a block.
        wanted: the same in float; what is infinite there, as scores behind a mask are, does not count.
        last: the layer that is called last, which says where the channels are.
    """
    total = outputs[0].new_zeros(())
    for output, target in zip(outputs, wanted, strict=True):
        finite = target.isfinite()
        difference = output - target if bool(finite.all()) else torch.where(finite, output - target, 0)
        channels = target.shape[min(channel_axis(last, target), target.dim() - 1)] if target.dim() else 1
        total = total + difference.square().mean() * channels
    return total


@contextmanager
def _weights_as_given(layers: Iterable[Any]) -> Iterator[None]:
    """Compute with the weights as they are for the length of a block: what learns them puts them on their grid."""
    known = {layer: layer.param_quantizers["weight"] for layer in layers}
    for layer in known:
        layer.param_quantizers["weight"] = None
    try:
        yield
    finally:
        for layer, quantizer in known.items():
            layer.param_quantizers["weight"] = quantizer


@contextmanager
def _dropped(module: nn.Module, drop: float, generator: torch.Generator) -> Iterator[None]:
    """Leave a share of the activations in a module as they are, others each time."""

    def choose(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        return _chosen(output, args[0], drop, generator)

    quantizers = {
        quantizer
        for layer in module.modules()
        if isinstance(layer, aimet.BaseQuantizationMixin)
        for quantizer in (*layer.input_quantizers, *layer.output_quantizers)
        if quantizer is not None
    }
    handles = [quantizer.register_forward_hook(choose) for quantizer in quantizers] if drop else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
