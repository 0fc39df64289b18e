"""Biases as integer hardware adds them: 32-bit integers in units of the input's scale times the weight's.

The exported file holds them so (:mod:`lightning_quant.deploy.graph.biases`). Rounded in the simulation as well, both
compute the same numbers, and training sees what is lost.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_quant.simulation.batch_norms import WEIGHT_BITS, ends_on_device, output_factors, sums
from lightning_quant.simulation.callsites.attributes import ROUNDED_BY
from lightning_quant.simulation.fast import gpu, in_graphs, kernels
from lightning_quant.simulation.fast.quantizer import is_fast, is_known, smallest_scale


def rounded_bias(layer: Any) -> Tensor | None:
    """Return the bias of a layer as the hardware adds it; as it is, where its input or weight has no grid.

    The gradient passes straight through the rounding.
    """
    bias: Tensor | None = layer.bias
    of_input = layer.__dict__.get(ROUNDED_BY)
    if bias is None or of_input is None or bias.dtype is not torch.float32:
        return bias
    of_weight = layer._modules["param_quantizers"]._modules.get("weight")
    input_ends, weight_ends = _ends(of_input), _ends(of_weight)
    if input_ends is None or weight_ends is None:
        return bias
    grids = _grids(of_input.qmax - of_input.qmin, of_weight.qmax - of_weight.qmin)
    return round_bias(bias, *input_ends, *weight_ends, *grids)


def rounded_sums(norm: Any) -> Tensor | None:
    """Return what a batch norm in eval mode adds, as the depthwise convolution that it is on the device adds it.

    The gradient passes straight through the rounding.

    Returns:
        One value for each channel; ``None`` where its input has no grid.
    """
    of_input, added = norm.__dict__.get(ROUNDED_BY), sums(norm)
    ends = _ends(of_input)
    if ends is None or added.dtype is not torch.float32:
        return None
    grids = _grids(of_input.qmax - of_input.qmin, 2**WEIGHT_BITS - 1)
    return round_bias(added, *ends, *ends_on_device(output_factors(norm).detach()), *grids)


@functools.cache
def _grids(input_steps: int, weight_steps: int) -> tuple[float, float, float, float]:
    """Return the steps and the smallest scale of both grids."""
    return float(input_steps), smallest_scale(input_steps), float(weight_steps), smallest_scale(weight_steps)


def round_bias(
    bias: Tensor,
    input_low: Tensor,
    input_high: Tensor,
    weight_low: Tensor,
    weight_high: Tensor,
    input_steps: float,
    input_smallest: float,
    weight_steps: float,
    weight_smallest: float,
) -> Tensor:
    """Round a bias to whole multiples of two scales' product; the gradient passes straight through.

    Args:
        bias: float32, one value for each output channel.
        input_low: lower end of the input's range.
        input_high: its upper end.
        weight_low: lower end of the weight's range, one or one for each channel.
        weight_high: its upper end.
        input_steps: the number of steps from one end of the input's grid to the other.
        input_smallest: the smallest scale there is on it.
        weight_steps: the number of steps of the weight's grid.
        weight_smallest: the smallest scale there.
    """
    given = (input_low, input_high, weight_low, weight_high, input_steps, input_smallest, weight_steps, weight_smallest)
    if not in_graphs.is_tracing():
        if bias.is_cpu and kernels.unavailable() is None:
            rounded: Tensor = torch.ops.lightning_quant.round_bias(bias, *given)
            return rounded
        if bias.is_cuda and gpu.unavailable() is None:
            return gpu.round_bias(bias, *given)
    return _Rounded.apply(bias, *given)


@contextmanager
def unrounded_biases(layers: Iterable[Any]) -> Iterator[None]:
    """Add biases as they are for the length of a block, whatever rounds the input."""
    known = {layer: layer.__dict__.pop(ROUNDED_BY) for layer in layers if ROUNDED_BY in layer.__dict__}
    try:
        yield
    finally:
        for layer, quantizer in known.items():
            layer.__dict__[ROUNDED_BY] = quantizer


def _ends(quantizer: Any) -> tuple[Tensor, Tensor] | None:
    """Return both ends of a quantizer's range, or ``None`` where it rounds to no grid of its own."""
    if quantizer is None or not is_fast(quantizer):
        return None
    if "forward" in quantizer.__dict__ or quantizer.block_size or quantizer.zero_point_shift:  # the first observes
        return None
    low, high = quantizer._parameters.get("min"), quantizer._parameters.get("max")
    if low is None or high is None:
        return None
    known = in_graphs.is_calibrated(quantizer) if in_graphs.is_tracing() else is_known(quantizer, low, high)
    return (low, high) if known else None


class _Rounded(torch.autograd.Function):
    """In compiled graphs, and where there are no kernels."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor, *given: Any) -> Tensor:
        input_low, input_high, weight_low, weight_high, *grids = given
        scale = _scale(weight_low.flatten(), weight_high.flatten(), *grids[2:]) * _scale(
            input_low, input_high, *grids[:2]
        )
        if 1 < scale.numel() < bias.numel():  # a transposed convolution in groups: each group has the same scales
            scale = scale.repeat(bias.numel() // scale.numel())
        return torch.round(bias.double() / scale).float() * scale.float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return (grad, *[None] * 8)


def _scale(low: Tensor, high: Tensor, steps: float, smallest: float) -> Tensor:
    return ((high - low) / steps).abs().clamp_min(smallest).double()
