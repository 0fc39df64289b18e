"""Sequential MSE: narrower ranges of 4-bit weights, chosen by what they do to the layer's output."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_quant.errors import ConfigurationError
from lightning_quant.ladder.rung import Cost, Rung, RungContext, calibration
from lightning_quant.simulation import aimet
from lightning_quant.simulation.calibrate import weight_quantizers
from lightning_quant.simulation.inputs import NetworkInputs, take_samples
from lightning_quant.simulation.network import QuantizedNetwork


class SequentialMse(Rung):
    """Per channel, take the weight range whose rounded weights change the layer's output least (AIMET's SeqMSE).

    Args:
        candidates: how many ranges are tried for each channel, from a ``1/candidates`` part of it up to all.
        samples: calibration samples to compare outputs on.

    Raises:
        ConfigurationError: for a number below 1.
    """

    name = "seq_mse"

    def __init__(self, candidates: int = 20, samples: int = 16) -> None:
        for argument, value in {"candidates": candidates, "samples": samples}.items():
            if not isinstance(value, int) or value < 1:
                raise ConfigurationError(f"seq_mse: {argument}={value!r}: expected a whole number of at least 1.")
        self.candidates = candidates
        self.samples = samples

    @override
    def skip_reason(self, network: QuantizedNetwork, context: RungContext) -> str | None:
        coarse = [quantizer for quantizer in weight_quantizers(network) if quantizer.bitwidth <= 4]
        return None if coarse else "AIMET's SeqMSE is for weights of at most 4 bits"

    @override
    def cost(self, network: QuantizedNetwork, context: RungContext) -> Cost:
        # each layer: two passes up to it, in float and rounded, and its output for each candidate
        learned = (len(weight_quantizers(network)) + self.candidates) * self.samples
        return Cost(learned + calibration(network))

    @override
    def apply(self, network: QuantizedNetwork, context: RungContext) -> str:
        quantizers = weight_quantizers(network)
        trainable = {p: p.requires_grad for quantizer in quantizers for p in quantizer.parameters()}
        before = [quantizer.get_max().clone() for quantizer in quantizers]
        batches = TensorBatches(context.samples(), self.samples)
        hooks = {module: set(module._forward_hooks) for module in network.sim.model.modules()}
        try:
            with aimet.quiet(), aimet.failing_as("SeqMSE"):
                aimet.apply_seq_mse(network.sim, batches, num_candidates=self.candidates, forward_fn=call_flat)
        finally:
            for module, known in hooks.items():  # AIMET leaves the hook of a pass that failed
                for added in module._forward_hooks.keys() - known:
                    del module._forward_hooks[added]
            for quantizer in quantizers:  # and what it chose frozen
                quantizer.allow_overwrite(True)
            for parameter, requires_grad in trainable.items():
                parameter.requires_grad_(requires_grad)
        context.calibrate(network, weights=False)
        changed = sum(not q.get_max().equal(old) for q, old in zip(quantizers, before, strict=True))
        return f"narrowed the weight ranges of {changed} layers"


class TensorBatches:
    """Calibration samples the way AIMET's loaders give them: tuples of tensors, with a length."""

    def __init__(self, samples: Iterator[NetworkInputs], count: int) -> None:
        self._batches = [tuple(batch.tensors) for batch in take_samples(samples, count)]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return iter(self._batches)


def call_flat(network: nn.Module, tensors: Any) -> Any:
    """Call a flat network with what :class:`TensorBatches` gives."""
    return network(*tensors)
