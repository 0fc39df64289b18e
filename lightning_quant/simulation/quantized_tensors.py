"""What every quantizer of a network sees: its integer grid, and how the values lie on it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.simulation.aimet import QuantizedLayer, Quantizer
from lightning_quant.simulation.callsites.attributes import WEIGHT
from lightning_quant.simulation.inputs import NetworkInputs, take_samples
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.precisions import quantized_layers

# Within the grid: enough for the shape of a distribution, few enough for the tensors of a hundred layers in one page.
_MOST_BINS = 64
# Share of the grid's length that is shown beyond each of its ends, where values are clipped.
_MARGIN = 1 / 16


@dataclass(frozen=True)
class QuantizedTensor:
    """One weight or activation: the grid of integers it is rounded to, and where its values lie.

    Args:
        layer: name of the layer.
        tensor: ``"weight"``, ``"input"`` or ``"output"``, with a number where there are several.
        bits: bit width.
        symmetric: whether the grid has zero in its middle.
        channels: how many scales there are: 1 per tensor, or C per channel.
        qmin: smallest integer.
        qmax: largest integer.
        scale: smallest and largest scale, in units of the tensor; equal with one channel.
        offset: smallest and largest integer that is added so that zero is an integer.
        low: the grid's lowest number in units of the tensor, the least of all channels.
        high: the grid's highest number, the greatest of all channels.
        counts: how many values fell into each of equally wide bins over :attr:`bins`, numbers beyond in the
            first and last.
        bins: first and last edge of the bins, in integers of the grid (not rounded, and beyond ``qmin`` and ``qmax``).
        clipped: share of the values beyond the grid's ends, 0 to 1.
        sqnr_db: signal-to-quantization-noise ratio in dB: 10·log10(Σ x² / Σ (x − x_q)²); ``None`` if nothing was
            lost, or there was no signal.
    """

    layer: str
    tensor: str
    bits: int
    symmetric: bool
    channels: int
    qmin: int
    qmax: int
    scale: tuple[float, float]
    offset: tuple[int, int]
    low: float
    high: float
    counts: list[int]
    bins: tuple[float, float]
    clipped: float
    sqnr_db: float | None


def quantized_tensors(
    network: QuantizedNetwork, samples: Iterable[NetworkInputs], count: int = 4
) -> list[QuantizedTensor]:
    """Describe all weights, and the activations of some samples, in the order of the layers.

    Costs one pass of ``count`` samples, and leaves the network as it was. Quantizers that no sample reached are left
    out.

    Args:
        network: the quantized network, calibrated.
        samples: calls of the network.
        count: how many samples to run.
    """
    watched: dict[Quantizer, _Watched] = {}
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as hooks:
        for name, layer in quantized_layers(network).items():
            for tensor, quantizer in quantizers_of(layer):
                if quantizer is not None and quantizer.is_initialized() and quantizer not in watched:
                    watched[quantizer] = _Watched(name, tensor, quantizer)
                    hooks.callback(quantizer.register_forward_hook(partial(_see, watched[quantizer])).remove)
        for call in take_samples(samples, count):
            call.call(network.network)
    return [one.result() for one in watched.values() if one.seen]


def quantizers_of(layer: QuantizedLayer) -> list[tuple[str, Quantizer | None]]:
    """Return the quantizers of a layer by what they round: ``"weight"``, ``"input"``, ``"output 1"``; some ``None``."""
    parameters = list(layer.param_quantizers.items())
    for what, quantizers in (("input", layer.input_quantizers), ("output", layer.output_quantizers)):
        alone = len(quantizers) == 1
        parameters += [(what if alone else f"{what} {index}", one) for index, one in enumerate(quantizers)]
    return parameters


def weight_parameters(network: QuantizedNetwork) -> dict[str, str]:
    """Return the names of the parameters that are rounded as weights, by the layer that computes with them.

    Where the network's own code passes a parameter to a function, that is the layer at the call site, and a parameter
    of another module. Weights that are computed in each pass are not among them.
    """
    known = dict(network.network.named_parameters(remove_duplicate=False))
    found = {
        name: vars(layer).get(WEIGHT, f"{name}.weight")
        for name, layer in quantized_layers(network).items()
        if "weight" in layer.param_quantizers and layer.param_quantizers["weight"] is not None
    }
    return {name: parameter for name, parameter in found.items() if parameter in known}


def rounded_weights(network: QuantizedNetwork) -> dict[str, tuple[nn.Parameter, Quantizer]]:
    """Return the parameters that are rounded as weights, by their names, each once, with what rounds them."""
    layers = quantized_layers(network)
    found: dict[nn.Parameter, tuple[str, Quantizer]] = {}
    for name, parameter in weight_parameters(network).items():
        quantizer = layers[name].param_quantizers["weight"]
        if quantizer is not None and quantizer.is_initialized():
            found.setdefault(network.network.get_parameter(parameter), (parameter, quantizer))
    return {name: (weight, quantizer) for weight, (name, quantizer) in found.items()}


def _see(watched: _Watched, quantizer: Any, args: tuple[Tensor], output: Tensor) -> None:
    # a weight is the same in every call
    if isinstance(args[0], Tensor) and not (watched.tensor == "weight" and watched.seen):
        watched.see(args[0].detach().as_subclass(Tensor), output.detach().as_subclass(Tensor))


@dataclass
class _Watched:
    layer: str
    tensor: str
    quantizer: Quantizer
    seen: int = 0
    clipped: int = 0
    signal: float = 0.0
    noise: float = 0.0
    counts: Tensor = field(init=False)

    def __post_init__(self) -> None:
        levels = self.quantizer.qmax - self.quantizer.qmin + 1
        # the grid ends between two bins, half a step behind its last integers
        within = min(_MOST_BINS, levels)
        beyond = max(1, round(within * _MARGIN))
        margin = beyond * levels / within
        self.bins = (self.quantizer.qmin - 0.5 - margin, self.quantizer.qmax + 0.5 + margin)
        self.counts = torch.zeros(within + 2 * beyond, dtype=torch.float64)
        self.scale, self.offset = (
            value.detach().float() for value in (self.quantizer.get_scale(), self.quantizer.get_offset())
        )

    def see(self, values: Tensor, rounded: Tensor) -> None:
        finite = values.isfinite()
        places = (values.float() / self.scale - self.offset)[finite]
        low, high = self.bins
        within = places.clamp(low, high - 1e-3 * (high - low) / len(self.counts))
        self.counts += torch.histc(within.cpu().float(), len(self.counts), low, high).double()
        self.seen += places.numel()
        self.clipped += int(((places < self.quantizer.qmin - 0.5) | (places > self.quantizer.qmax + 0.5)).sum())
        self.signal += float(values[finite].double().square().sum())
        self.noise += float((values[finite].double() - rounded[finite].double()).square().sum())

    def result(self) -> QuantizedTensor:
        quantizer = self.quantizer
        lows = (self.offset + quantizer.qmin) * self.scale
        highs = (self.offset + quantizer.qmax) * self.scale
        measurable = self.signal > 0 and self.noise > 0
        return QuantizedTensor(
            layer=self.layer,
            tensor=self.tensor,
            bits=int(quantizer.bitwidth),
            symmetric=bool(quantizer.symmetric),
            channels=self.scale.numel(),
            qmin=int(quantizer.qmin),
            qmax=int(quantizer.qmax),
            scale=(float(self.scale.min()), float(self.scale.max())),
            offset=(int(self.offset.min()), int(self.offset.max())),
            low=float(lows.min()),
            high=float(highs.max()),
            counts=[int(count) for count in self.counts],
            bins=self.bins,
            clipped=self.clipped / max(self.seen, 1),
            sqnr_db=round(10 * math.log10(self.signal / self.noise), 2) if measurable else None,
        )
