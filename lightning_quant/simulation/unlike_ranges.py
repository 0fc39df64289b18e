"""Concatenations of unlike values: with one range for all, the small ones are left few integers.

A detector that returns boxes in pixels and scores between 0 and 1 in one tensor is the common case: in 8 bits, steps of
640 / 255 = 2.5 pixels round every score to 0. It shows in calibration only, so this part of the preflight comes last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_quant.precision import Precision
from lightning_quant.simulation.callsites.tied_ranges import joins
from lightning_quant.simulation.inputs import tensors_in
from lightning_quant.simulation.precisions import layer_precision, quantized_layers
from lightning_quant.simulation.preflight import Finding, FindingKind

if TYPE_CHECKING:
    from lightning_quant.simulation.network import QuantizedNetwork

Ends = list[tuple[float, float]]
"""The least and the greatest value of each tensor that a concatenation joins."""

# Three bits: what is left of 8 where ranges differ by a factor of 32.
_FEWEST_STEPS = 8


@contextmanager
def noting_joined(network: QuantizedNetwork) -> Iterator[dict[str, Ends]]:
    """Note what concatenations join, for the length of a block: the ends of each tensor, by the name of the layer."""
    seen: dict[str, Ends] = {}

    def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [one.detach() for one in tensors_in((args, kwargs)) if one.is_floating_point() and one.numel()]
        ends: Ends = [(float(low), float(high)) for low, high in (one.as_subclass(Tensor).aminmax() for one in tensors)]
        known = seen.get(name, ends)
        if len(known) == len(ends):
            pairs = zip(known, ends, strict=True)
            seen[name] = [(min(one[0], other[0]), max(one[1], other[1])) for one, other in pairs]

    handles = [
        layer.register_forward_pre_hook(_noting(note, name), with_kwargs=True)
        for name, layer in quantized_layers(network).items()
        if joins(layer)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def unlike_ranges(network: QuantizedNetwork, joined: Mapping[str, Ends]) -> list[Finding]:
    """Find concatenations whose one range leaves one of their parts fewer than 8 steps.

    Args:
        network: quantized and calibrated.
        joined: what calibration saw of them, see :func:`noting_joined`.
    """
    layers = quantized_layers(network)
    findings = []
    for name, ends in joined.items():
        quantizers = (*layers[name].output_quantizers, *layers[name].input_quantizers)
        quantizer: Any = next((one for one in quantizers if one is not None and one.is_initialized()), None)
        varying = sorted((high - low, low, high) for low, high in ends if high > low)
        if quantizer is None or len(varying) < 2:
            continue
        step = float((quantizer.max - quantizer.min).detach().max()) / (2**quantizer.bitwidth - 1)
        (least, *small), (_, *large) = varying[0], varying[-1]
        if step > 0 and least / step < _FEWEST_STEPS:
            problem = (
                f"joins values from {small[0]:.3g} to {small[1]:.3g} with values from {large[0]:.3g} to {large[1]:.3g} "
                f"in one range of {quantizer.bitwidth} bits, of whose {2**quantizer.bitwidth - 1} steps the former are "
                f"left {least / step:.1f}"
            )
            finer = Precision(layer_precision(network, name).weight_bits, 16)
            remedy = f'return or use them separately, or give it 16 bits: overrides={{"{name}": "{finer}"}}'
            findings.append(Finding(name, problem, remedy, kind=FindingKind.UNLIKE_RANGES))
    return findings


def _noting(note: Any, name: str) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with torch.no_grad():
            note(name, args, kwargs)

    return hook
