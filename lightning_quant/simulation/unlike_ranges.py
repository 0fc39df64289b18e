"""Tensors of unlike values: with one range for all, the small ones are left few integers.

A detector that returns boxes in pixels and scores between 0 and 1 in one tensor is the common case: in 8 bits, steps of
640 / 255 = 2.5 pixels round every score to 0. An input that joins colors and distances is another. It shows in
calibration only, so this part of the preflight comes last.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_quant.precision import Precision
from lightning_quant.simulation.callsites.tied_ranges import joins, roundings_of_input
from lightning_quant.simulation.inputs import tensors_in
from lightning_quant.simulation.precisions import layer_precision, quantized_layers
from lightning_quant.simulation.preflight import Finding, FindingKind

if TYPE_CHECKING:
    from lightning_quant.simulation.network import QuantizedNetwork

Ends = list[tuple[float, float]]
"""The least and the greatest value of each tensor that a layer is given; 0 for tensors of other types."""

# Three bits: what is left of 8 where ranges differ by a factor of 32.
_FEWEST_STEPS = 8
# Five bits, for what other layers compute with: with a factor of 8 they lose 18 dB.
_FEWEST_TO_READ = 32


@contextmanager
def noting_joined(network: QuantizedNetwork) -> Iterator[dict[str, Ends]]:
    """Note what concatenations and readers of parts are given, for the length of a block, by the name of the layer."""
    seen: dict[str, Ends] = {}

    def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ends = [_ends(one) for one in tensors_in((args, kwargs))]
        known = seen.get(name, ends)
        if len(known) == len(ends):
            pairs = zip(known, ends, strict=True)
            seen[name] = [(min(one[0], other[0]), max(one[1], other[1])) for one, other in pairs]

    layers = quantized_layers(network)
    in_parts = {name for name, _ in _readers_of_parts(network)}
    handles = [
        layer.register_forward_pre_hook(_noting(note, name), with_kwargs=True)
        for name, layer in layers.items()
        if joins(layer) or name in in_parts
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def unlike_ranges(network: QuantizedNetwork, joined: Mapping[str, Ends]) -> list[Finding]:
    """Find tensors whose one range leaves one of their parts fewer than 8 steps.

    Args:
        network: quantized and calibrated.
        joined: what calibration saw of them, see :func:`noting_joined`.
    """
    layers = quantized_layers(network)
    findings = []
    for name, ends in joined.items():
        quantizers = (*layers[name].output_quantizers, *layers[name].input_quantizers)
        quantizer: Any = next((one for one in quantizers if one is not None and one.is_initialized()), None)
        if not joins(layers[name]):
            continue
        elsewhere = [index for index in range(len(ends)) if (name, index) in network.dataflow.read_elsewhere]
        problem = _problem(quantizer, ends)
        if not problem and elsewhere and (problem := _problem(quantizer, ends, elsewhere)):
            problem = f"{problem}, and other layers compute with them"
        if problem:
            finer = Precision(layer_precision(network, name).weight_bits, 16)
            remedy = f'return or use them separately, or give it 16 bits: overrides={{"{name}": "{finer}"}}'
            findings.append(Finding(name, f"joins {problem}", remedy, kind=FindingKind.UNLIKE_RANGES))
    parts: dict[Any, list[tuple[str, tuple[float, float]]]] = defaultdict(list)
    for (name, index), quantizer in _readers_of_parts(network).items():
        if index < len(joined.get(name, ())):
            parts[quantizer].append((name, joined[name][index]))
    for quantizer, read in parts.items():
        if problem := _problem(quantizer, [ends for _, ends in read]):
            remedy = "normalize the parts alike in front of the network, or give it an input for each"
            findings.append(Finding(read[0][0], f"reads a part of {problem}", remedy, kind=FindingKind.UNLIKE_RANGES))
    return findings


def _problem(quantizer: Any, ends: Ends, read: Sequence[int] = ()) -> str:
    """Say which values of a tensor are left fewer than 8 steps, or 32 of those that are read; nothing if none are."""
    varying = sorted(((low, high) for low, high in ends if high > low), key=_length)
    if quantizer is None or not quantizer.is_initialized() or not varying or len(ends) < 2:
        return ""
    fewest = _FEWEST_TO_READ if read else _FEWEST_STEPS
    step = float((quantizer.max - quantizer.min).detach().max()) / (2**quantizer.bitwidth - 1)
    small = min((ends[index] for index in read if ends[index] in varying), key=_length, default=varying[0])
    least = _length(small)
    # a constant, which needs no steps itself, may widen the range too
    large = varying[-1] if len(varying) > 1 else max(ends, key=lambda one: max(map(abs, one)))
    if not step > 0 or least / step >= fewest:
        return ""
    return (
        f"values from {small[0]:.3g} to {small[1]:.3g} with values from {large[0]:.3g} to {large[1]:.3g} "
        f"in one range of {quantizer.bitwidth} bits, of whose {2**quantizer.bitwidth - 1} steps the former are "
        f"left {least / step:.1f}"
    )


def _length(ends: tuple[float, float]) -> float:
    return ends[1] - ends[0]


def _readers_of_parts(network: QuantizedNetwork) -> dict[tuple[str, int], Any]:
    """Return what rounds an input of the network, or parts of it, by layer and place, where several layers read it."""
    of_input = set(roundings_of_input(network.sim))
    read = {
        (name, index): quantizer
        for name, layer in quantized_layers(network).items()
        if not joins(layer)
        for index, quantizer in enumerate(layer.input_quantizers)
        if quantizer in of_input
    }
    count = Counter(read.values())
    return {place: quantizer for place, quantizer in read.items() if count[quantizer] > 1}


def _ends(tensor: Tensor) -> tuple[float, float]:
    if not tensor.is_floating_point() or not tensor.numel():
        return 0.0, 0.0
    low, high = tensor.detach().as_subclass(Tensor).aminmax()
    return float(low), float(high)


def _noting(note: Any, name: str) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with torch.no_grad():
            note(name, args, kwargs)

    return hook
