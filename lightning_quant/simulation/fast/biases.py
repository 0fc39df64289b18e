"""Biases as integer hardware adds them: 32-bit integers in units of the input's scale times the weight's.

The exported file holds them so (:mod:`lightning_quant.deploy.graph.biases`). Rounded in the simulation as well, both
compute the same numbers, and training sees what is lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.simulation.fast import gpu, in_graphs
from lightning_quant.simulation.fast.quantizer import is_fast, is_known, smallest_scale

# Name of what a layer with a bias remembers: the quantizer that rounds its input.
ROUNDED_BY = "_input_rounded_by"


def rounded_bias(layer: Any) -> Tensor | None:
    """Return the bias of a layer as the hardware adds it; as it is, where its input or weight has no grid.

    The gradient passes straight through the rounding.
    """
    bias: Tensor | None = layer.bias
    of_input = layer.__dict__.get(ROUNDED_BY)
    if bias is None or of_input is None:
        return bias
    of_weight = layer._modules["param_quantizers"]._modules.get("weight")
    if not (_has_grid(of_input) and _has_grid(of_weight)) or bias.dtype is not torch.float32:
        return bias
    grids = [(one, *one._parameters.values(), float(one.qmax - one.qmin)) for one in (of_input, of_weight)]
    ends = [end for _, low, high, _ in grids for end in (low, high)]
    steps = [(steps, smallest_scale(one.qmax - one.qmin)) for one, _, _, steps in grids]
    rounded: Tensor = _Rounded.apply(bias, *ends, *steps)
    return rounded


@contextmanager
def unrounded_biases(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Add biases as they are for the length of a block, whatever rounds the input."""
    known = {layer: layer.__dict__.pop(ROUNDED_BY) for layer in layers if ROUNDED_BY in layer.__dict__}
    try:
        yield
    finally:
        for layer, quantizer in known.items():
            layer.__dict__[ROUNDED_BY] = quantizer


def _has_grid(quantizer: Any) -> bool:
    if quantizer is None or not is_fast(quantizer) or quantizer.block_size or quantizer.zero_point_shift:
        return False
    if "forward" in quantizer.__dict__ or quantizer._parameters.get("min") is None:  # observes, or is without a range
        return False
    if in_graphs.is_tracing():
        return in_graphs.is_calibrated(quantizer)
    return is_known(quantizer, *quantizer._parameters.values())


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        bias: Tensor,
        input_low: Tensor,
        input_high: Tensor,
        weight_low: Tensor,
        weight_high: Tensor,
        input_grid: tuple[float, float],
        weight_grid: tuple[float, float],
    ) -> Tensor:
        if bias.is_cuda and not in_graphs.is_tracing() and gpu.unavailable() is None:
            return gpu.round_bias(bias, input_low, input_high, weight_low, weight_high, input_grid, weight_grid)
        scale = _scale(weight_low.flatten(), weight_high.flatten(), weight_grid)
        scale = scale * _scale(input_low, input_high, input_grid)
        if 1 < scale.numel() < bias.numel():  # a transposed convolution in groups: each group has the same scales
            scale = scale.repeat(bias.numel() // scale.numel())
        return torch.round(bias.double() / scale).float() * scale.float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return (grad, *[None] * 6)


def _scale(low: Tensor, high: Tensor, grid: tuple[float, float]) -> Tensor:
    steps, smallest = grid
    return ((high - low) / steps).abs().clamp_min(smallest).double()
