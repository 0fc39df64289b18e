"""Adaptive pooling into blocks of unequal size, and means with a divisor of their own: ONNX does not have them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_AXES: dict[type[nn.Module], int] = {
    nn.AdaptiveAvgPool1d: 1,
    nn.AdaptiveAvgPool2d: 2,
    nn.AdaptiveAvgPool3d: 3,
    nn.AdaptiveMaxPool1d: 1,
    nn.AdaptiveMaxPool2d: 2,
    nn.AdaptiveMaxPool3d: 3,
}


def is_uneven(module: nn.Module, args: Sequence[Any]) -> bool:
    """Return whether a layer is adaptive pooling, and called with an input that it cannot divide into equal blocks."""
    axes = _AXES.get(type(module))
    return axes is not None and len(args) > 0 and _is_uneven(args[0], axes, getattr(module, "output_size", None))


def mean(axes: int) -> Callable[..., Tensor]:
    """Return what computes ``F.adaptive_avg_pool1d``, ``2d`` or ``3d``, (N, C, ..., L)."""

    def compute(input: Tensor, output_size: Any) -> Tensor:
        return _pooled(input, axes, output_size, Tensor.mean)

    return compute


def maximum(axes: int) -> Callable[..., Tensor]:
    """Return what computes ``F.adaptive_max_pool1d``, ``2d`` or ``3d``, (N, C, ..., L)."""

    def compute(input: Tensor, output_size: Any, return_indices: bool = False) -> Tensor:
        return _pooled(input, axes, output_size, Tensor.amax)

    return compute


def supports(axes: int) -> Callable[..., bool]:
    """Return what tells whether the blocks are of unequal size, and no one asks where the largest values were."""

    def supported(input: Tensor, output_size: Any, return_indices: bool = False) -> bool:
        return not return_indices and _is_uneven(input, axes, output_size)

    return supported


def with_divisor(axes: int) -> Callable[..., Tensor]:
    """Return what computes ``F.avg_pool2d`` or ``3d`` with ``divisor_override``: PyTorch's exporter leaves it out."""
    pool = getattr(F, f"avg_pool{axes}d")

    def compute(
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Tensor:
        sizes = kernel_size if isinstance(kernel_size, (tuple, list)) else [kernel_size] * axes
        means: Tensor = pool(input, kernel_size, stride, padding)
        return means * (math.prod(sizes) / (divisor_override or 1))

    return compute


def supports_divisor(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> bool:
    """Return whether there is such a divisor, and every window has as many values."""
    return divisor_override is not None and not ceil_mode


def _pooled(input: Tensor, axes: int, output_size: Any, reduce: Callable[..., Tensor]) -> Tensor:
    """Reduce each block along one axis after the other: products with a matrix are less exact on the NPU."""
    for axis, count in zip(range(-axes, 0), _counts(input, axes, output_size), strict=True):
        length = int(input.shape[axis])
        if count != length:
            ends = [(length * i // count, -(-length * (i + 1) // count)) for i in range(count)]
            blocks = [input.narrow(axis, start, end - start) for start, end in ends]
            input = torch.cat([reduce(block, axis, keepdim=True) for block in blocks], axis)
    return input


def _is_uneven(input: Tensor, axes: int, output_size: Any) -> bool:
    sizes = [int(size) for size in input.shape[-axes:]]
    return any(size % count for size, count in zip(sizes, _counts(input, axes, output_size), strict=True))


def _counts(input: Tensor, axes: int, output_size: Any) -> list[int]:
    """Return the number of blocks along each axis; ``None`` stands for as many as there are values."""
    given = output_size if isinstance(output_size, (tuple, list)) else [output_size] * axes
    sizes = input.shape[-axes:]
    return [int(size if count is None else count) for size, count in zip(sizes, given, strict=True)]
