"""Which layers suffer most from their bit widths: the output's signal-to-noise ratio, one layer quantized at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.precision import Precision
from lightning_quant.simulation.conversions import widths
from lightning_quant.simulation.inputs import NetworkInputs, take_samples, tensors_in
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.precisions import layer_precision, planned_widths, quantized_layers
from lightning_quant.utilities.full_precision import full_precision


@dataclass(frozen=True)
class LayerSensitivity:
    """What one layer's bit widths do to the output of the network, everything else in float.

    Args:
        layer: name of the layer.
        part: ``"weights"``, or ``"activations"`` that go into it.
        bits: bits they have now.
        sqnr_db: signal-to-quantization-noise ratio of the output in dB: 10·log10(Σ y² / Σ (y − y_q)²). Infinite if
            nothing changed.
        share: part of all weights that are the layer's (``weights``), or part of all multiply-accumulate operations
            that are done at the same bit width with it (``activations``), 0 to 1.
        quantizers: names of the quantizers concerned: those that get finer with it.
        shares: the share by layer; others that are raised may have layers in common with this one.
    """

    layer: str
    part: str
    bits: int
    sqnr_db: float
    share: float
    quantizers: tuple[str, ...]
    shares: Mapping[str, float] = field(default_factory=dict)


def layer_sensitivity(
    network: QuantizedNetwork, samples: Iterable[NetworkInputs], count: int = 8
) -> list[LayerSensitivity]:
    """Measure each layer's weights, and its activations, alone; most sensitive first.

    Costs one pass of ``count`` samples for each layer and part, and leaves the network as it was.

    Args:
        network: the quantized network, calibrated.
        samples: calibration samples.
        count: how many of them to use.
    """
    calls = list(take_samples(samples, count))
    layers = quantized_layers(network)
    parts = _parts(network, layers)
    names = {module: name for name, module in network.network.named_modules()}
    exact = full_precision() if network.has_fine_grids else nullcontext()
    with torch.no_grad(), exact, _all_quantizers_off(layers) as quantizers:
        expected, operations = _float_pass(network, layers, calls)
        signal = sum(float(value[value.isfinite()].double().square().sum()) for value in expected)
        weights = {name: layer.weight.numel() for name, layer in layers.items() if _has_weight(layer)}
        found = []
        noises: dict[tuple[Any, ...], float] = {}
        for one in parts:
            if one.quantizers not in noises:
                with quantizers.on(one.quantizers):
                    noises[one.quantizers] = _noise(network, calls, expected)
            sizes = weights if one.part == "weights" else operations
            shares = {name: sizes[name] / max(sum(sizes.values()), 1) for name in one.computed if name in sizes}
            found.append(
                LayerSensitivity(
                    layer=one.layer,
                    part=one.part,
                    bits=min(quantizer.bitwidth for quantizer in one.quantizers),
                    sqnr_db=_decibels(signal, noises[one.quantizers]),
                    share=sum(shares.values()),
                    quantizers=tuple(names[quantizer] for quantizer in one.quantizers),
                    shares=shares,
                )
            )
    return sorted(found, key=lambda one: one.sqnr_db)


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 and math.isfinite(noise) else -math.inf


def next_finer(part: str, now: Precision) -> Precision | None:
    """Return the next finer precision of a layer's weights or activations; ``None`` if there is none."""
    if part == "weights":
        return Precision(8, now.activation_bits) if now.weight_bits < 8 else None
    return Precision(now.weight_bits, 16) if now.activation_bits < 16 else None


@dataclass(frozen=True)
class _Part:
    """What raising one layer makes finer.

    Args:
        layer: its name.
        part: ``"weights"`` or ``"activations"``.
        quantizers: of it.
        computed: the layers that compute at another bit width then, or the one that has the weights.
    """

    layer: str
    part: str
    quantizers: tuple[Any, ...]
    computed: tuple[str, ...]


def _parts(network: QuantizedNetwork, layers: dict[str, Any]) -> Iterable[_Part]:
    """Return the weights of each layer, and what goes into it, with all that gets finer with that."""
    found: dict[Any, _Part] = {}
    for name, layer in layers.items():
        if _has_weight(layer) and layer.param_quantizers["weight"] is not None:
            found["weights", name] = _Part(name, "weights", (layer.param_quantizers["weight"],), (name,))
        gained, computed = _finer(network, name, layers)
        if gained:  # the same for a layer and what the hardware computes with it
            known = found.get((gained, computed))
            if known is None or (_has_weight(layer) and not _has_weight(layers[known.layer])):
                found[gained, computed] = _Part(name, "activations", gained, computed)
    return found.values()


def _finer(network: QuantizedNetwork, name: str, layers: dict[str, Any]) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    """Return the quantizers of what a layer is given finer if it is raised, and the layers that are computed so."""
    flow, layer = network.dataflow, layers[name]
    if (raised := next_finer("activations", layer_precision(network, name))) is None:
        return tuple(one for one in layer.input_quantizers if one is not None), (name,)
    now, then = widths(network.network, flow), planned_widths(network, {name: raised})
    finer = {group for group, bits in then.items() if bits > now[group]}
    # what every layer that takes it converts back is none finer there
    taken = dict.fromkeys(flow.sources.values(), False)
    for (taker, _), source in flow.sources.items():
        group = flow.group_of[source]
        taken[source] |= then.get(flow.group_of[taker], then[group]) == then[group]
    gained = tuple(
        network.network.get_submodule(one)
        for group in sorted(finer)
        for one in flow.quantizers[group]
        if taken.get(one, True)
    )
    return gained, tuple(one for one in layers if flow.group_of.get(one) in finer)


class _Switchboard:
    """Every quantizer of a network, which can be switched on one by one."""

    def __init__(self, layers: dict[str, Any]) -> None:
        self._places: dict[Any, list[tuple[Any, Any]]] = {}
        for layer in layers.values():
            for holder in (layer.input_quantizers, layer.output_quantizers, layer.param_quantizers):
                keys = range(len(holder)) if isinstance(holder, nn.ModuleList) else list(holder.keys())
                for key in keys:
                    if holder[key] is not None:
                        self._places.setdefault(holder[key], []).append((holder, key))

    def off(self) -> None:
        for places in self._places.values():
            for holder, key in places:
                holder[key] = None

    @contextmanager
    def on(self, quantizers: Iterable[Any] | None = None) -> Iterator[None]:
        for quantizer in self._places if quantizers is None else quantizers:
            for holder, key in self._places[quantizer]:
                holder[key] = quantizer
        try:
            yield
        finally:
            self.off()

    def restore(self) -> None:
        for quantizer, places in self._places.items():
            for holder, key in places:
                holder[key] = quantizer


@contextmanager
def _all_quantizers_off(layers: dict[str, Any]) -> Iterator[_Switchboard]:
    from lightning_quant.simulation.fast.biases import unrounded_biases  # imports AIMET

    board = _Switchboard(layers)
    board.off()
    try:
        with unrounded_biases(layers.values()):
            yield board
    finally:
        board.restore()


def _float_pass(
    network: QuantizedNetwork, layers: dict[str, Any], calls: list[NetworkInputs]
) -> tuple[list[Tensor], dict[str, int]]:
    """Return the outputs without any rounding, and how many multiply-accumulate operations each layer does."""
    operations: dict[str, int] = {}

    def count(name: str, layer: Any, args: Any, output: Any) -> None:
        transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)  # there, each input value meets all weights
        values = (args[0] if transposed else output).numel()
        operations[name] = operations.get(name, 0) + values * layer.weight.numel() // layer.weight.shape[0]

    with ExitStack() as hooks:
        for name, layer in layers.items():
            if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
                hooks.callback(layer.register_forward_hook(partial(count, name)).remove)
        outputs = [value for call in calls for value in _outputs(network, call)]
    return outputs, operations


def _noise(network: QuantizedNetwork, calls: list[NetworkInputs], expected: list[Tensor]) -> float:
    outputs = (value for call in calls for value in _outputs(network, call))
    noise = 0.0
    for output, wanted in zip(outputs, expected, strict=True):
        finite = wanted.isfinite()  # masked scores are -inf in either
        noise += float((output[finite].double() - wanted[finite].double()).square().sum())
    return noise if math.isfinite(noise) else math.inf


def _outputs(network: QuantizedNetwork, call: NetworkInputs) -> list[Tensor]:
    return [value.detach() for value in tensors_in(call.call(network.network)) if value.is_floating_point()]


def _has_weight(layer: Any) -> bool:
    return isinstance(getattr(layer, "weight", None), Tensor) and "weight" in layer.param_quantizers
