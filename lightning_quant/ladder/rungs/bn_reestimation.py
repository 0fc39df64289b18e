"""Batch norm re-estimation: restore the mean and the scale of each channel, which rounded weights shift."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from lightning_quant.errors import ConfigurationError
from lightning_quant.ladder.rung import Cost, Rung, RungContext, calibration
from lightning_quant.ladder.rungs.layer_outputs import (
    channel_scales,
    hooked,
    per_channel,
    statistics,
)
from lightning_quant.simulation.batch_norms import output_factors
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.precisions import quantized_layers
from lightning_quant.simulation.switched_off import weights_only


class BatchNormReestimation(Rung):
    """Measure the statistics of every batch norm again, behind quantized weights.

    What Jacob et al. 2018 and AIMET do with batch norms that are left in the simulation, done here with the folded
    ones: a layer that holds a batch norm (weight γ, bias β, ε, and g = γ / √(running variance + ε)) outputs
    z = g·(y − μ) + β. With mean m and variance v of z over a batch, the batch norm in training mode would have
    output a·(z − m) + β, where a = √(running variance + ε) / √(v/g² + ε). The mean over the batches goes into the
    weights, the bias and — since a is positive, exactly — into the ranges of the weights, so that every integer
    stays as it was. Where equalization (``cle``) gave z another scale, γ, β and g are scaled alike.
    """

    name = "bn_reestimation"
    is_correction = True

    @override
    def check(self, network: QuantizedNetwork) -> None:
        per_tensor = [
            name
            for name, layer in quantized_layers(network).items()
            if isinstance(layer, nn.modules.conv._ConvNd) and _is_per_tensor(layer)
        ]
        if per_tensor:
            raise ConfigurationError(
                f"Rung 'bn_reestimation' with hardware={network.recipe.hardware!r}: {per_tensor[0]!r} has one range "
                "for all its channels; expected a range for each, as htp_v68 and later have. Use bias_correction."
            )

    @override
    def skip_reason(self, network: QuantizedNetwork, context: RungContext) -> str | None:
        layers = quantized_layers(network)
        found = [name for name in context.prepared.batch_norms if not _is_per_tensor(layers[name])]
        return None if found else "no batch norm was folded into a layer with a range for each channel"

    @override
    def float_reference(self, context: RungContext) -> nn.Module | None:
        """The float network with its own batch norms re-estimated on the same samples."""
        network = copy.deepcopy(context.float_network).eval()
        for module in network.modules():
            if isinstance(module, _BatchNorm) and module.track_running_stats:
                module.reset_running_stats()
                module.momentum = None  # the plain mean over all batches
                module.train()
        for batch in context.samples():
            with suppress(ValueError):  # a last batch of one sample, with one value per channel: no variance
                batch.call(network)
        return network.eval()

    @override
    def cost(self, network: QuantizedNetwork, context: RungContext) -> Cost:
        return Cost(2 * network.recipe.calibration_samples + calibration(network), validations=2)

    @override
    def apply(self, network: QuantizedNetwork, context: RungContext) -> str:
        norms = context.prepared.batch_norms
        known = quantized_layers(network).items()
        layers = {name: layer for name, layer in known if name in norms and not _is_per_tensor(layer)}
        scales = channel_scales(layers, context) if network.equalized else {}
        means: dict[str, list[Tensor]] = defaultdict(list)
        variances: dict[str, list[Tensor]] = defaultdict(list)

        def normalize(name: str, output: Tensor) -> Tensor:
            mean, variance = statistics(output, 1)
            means[name].append(mean)
            count = output.numel() / len(variance)
            variances[name].append(variance * count / max(count - 1, 1))  # unbiased, as PyTorch keeps it
            factor = _correction(norms[name], variance, scales.get(name))
            return (output - per_channel(mean, 1, output)) * per_channel(factor, 1, output) + per_channel(
                _target(norms[name], scales.get(name)), 1, output
            )

        with weights_only(network), hooked(layers, normalize):
            for batch in context.samples():
                batch.call(network.network)
        for name, values in means.items():
            mean, variance = torch.stack(values).mean(0), torch.stack(variances[name]).mean(0)
            factor = _correction(norms[name], variance, scales.get(name))
            _rescale(layers[name], factor, mean, _target(norms[name], scales.get(name)))
        context.calibrate(network, weights=False)
        return f"re-estimated {len(means)} folded batch norms"


def _is_per_tensor(layer: Any) -> bool:
    quantizer = layer.param_quantizers["weight"]
    return quantizer is not None and math.prod(quantizer.shape) == 1 and layer.weight.shape[0] > 1


def _target(norm: _BatchNorm, scale: Tensor | None) -> Tensor:
    """The mean that each channel should have, (C,)."""
    assert norm.running_mean is not None
    bias = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias.detach()
    return bias if scale is None else bias * scale


def _correction(norm: _BatchNorm, variance: Tensor, scale: Tensor | None) -> Tensor:
    """The factor a of :class:`BatchNormReestimation`, (C,); 1 for channels that are constant."""
    assert norm.running_var is not None
    g = output_factors(norm) if scale is None else output_factors(norm) * scale
    before = variance / g.square()
    factor = ((norm.running_var + norm.eps) / (before + norm.eps)).sqrt()
    return torch.where((g != 0) & (variance > 0), factor, torch.ones_like(factor))


def _rescale(layer: Any, factor: Tensor, mean: Tensor, target: Tensor) -> None:
    """Make the layer output ``factor · (z − mean) + target`` instead of ``z``; its integers stay as they are."""
    quantizer = layer.param_quantizers["weight"]
    layer.weight.copy_(layer.weight * per_channel(factor, 0, layer.weight))
    layer.bias.copy_(factor * (layer.bias - mean) + target)
    if quantizer is not None:
        minimum, maximum = quantizer.get_min(), quantizer.get_max()
        quantizer.set_range(minimum * factor.reshape(minimum.shape), maximum * factor.reshape(maximum.shape))
