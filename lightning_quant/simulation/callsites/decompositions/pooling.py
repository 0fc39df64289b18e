"""Pooling that ONNX does not have, or the NPU: into blocks of unequal size, with a divisor, of volumes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.simulation.callsites.traces import untraced

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


def adaptive_max_pool3d(input: Tensor, output_size: Any, return_indices: bool = False) -> Tensor:
    """Compute ``F.adaptive_max_pool3d``: the NPU has no maxima of volumes, of equal blocks neither."""
    if input.dim() != 5 or _is_uneven(input, 3, output_size):
        return _pooled(input, 3, output_size, Tensor.amax)
    counts = _counts(input, 3, output_size)
    return F.max_pool3d(input, [int(size) // count for size, count in zip(input.shape[-3:], counts, strict=True)])


def supports_adaptive_max_pool3d(input: Tensor, output_size: Any, return_indices: bool = False) -> bool:
    """Return whether no one asks where the largest values were."""
    return not return_indices


def avg_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Compute ``F.avg_pool2d`` with ``divisor_override``, which PyTorch's exporter leaves out, or ``ceil_mode``.

    The NPU gets the windows wrong that reach over the end. They are means of zeros there, times a factor.
    """
    block = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
    if divisor_override is not None:
        return F.avg_pool2d(input, kernel_size, stride, padding) * (math.prod(block) / divisor_override)
    around = (padding, padding) if isinstance(padding, int) else tuple(padding)
    steps = block if stride in (None, []) else (stride, stride) if isinstance(stride, int) else tuple(stride)
    lengths = [int(length) for length in input.shape[-2:]]
    with untraced():
        ones = torch.ones(1, 1, *lengths, dtype=input.dtype, device=input.device)
        means = F.avg_pool2d(ones, kernel_size, stride, padding, True, count_include_pad)
        counts = [int(size) for size in means.shape[-2:]]
        behind = [
            (count - 1) * step + size - length - before
            for count, step, size, length, before in zip(counts, steps, block, lengths, around, strict=True)
        ]
        margins = (around[1], max(behind[1], 0), around[0], max(behind[0], 0))
        factors = means / F.avg_pool2d(F.pad(ones, margins), kernel_size, stride)[..., : counts[0], : counts[1]]
    pooled = F.avg_pool2d(F.pad(input, margins), kernel_size, stride)[..., : counts[0], : counts[1]]
    return pooled if bool((factors == 1).all()) else pooled * factors


def supports_avg_pool2d(*args: Any, **kwargs: Any) -> bool:
    """Return whether there is a divisor and every window has as many values, or windows reach over the end."""
    given = inspect.signature(avg_pool2d).bind(*args, **kwargs).arguments
    return bool(given.get("ceil_mode")) != (given.get("divisor_override") is not None)


def avg_pool1d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """Compute ``F.avg_pool1d`` whose last window reaches over the end: it is a mean of its own."""
    size, step, around = (
        int(one[0]) if isinstance(one, (tuple, list)) and one else one for one in (kernel_size, stride, padding)
    )
    length = int(input.shape[-1])
    whole = F.avg_pool1d(input, size, step or size, around, False, count_include_pad)
    with untraced():
        means = F.avg_pool1d(torch.ones(1, 1, length), size, step or size, around, True, count_include_pad)
    count = int(whole.shape[-1])
    if means.shape[-1] == count:
        return whole
    last = input.narrow(-1, start := count * (step or size) - around, length - start).mean(-1, keepdim=True)
    share = float(means[0, 0, -1])  # of the values in the window that are none of padding
    return torch.cat([whole, last if share == 1 else last * share], -1)


def supports_avg_pool1d(*args: Any, **kwargs: Any) -> bool:
    """Return whether windows may reach over the end."""
    return bool(inspect.signature(avg_pool1d).bind(*args, **kwargs).arguments.get("ceil_mode"))


def max_pool3d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    """Compute ``F.max_pool3d`` of (N, C, D, H, W) by images, then along the depth: the NPU has none of volumes."""
    depth, image = _parted(kernel_size, stride or kernel_size, padding, dilation)
    return _by_images(
        input,
        lambda maps: F.max_pool2d(maps, image[0], image[1], image[2], image[3], ceil_mode),
        lambda maps: F.max_pool2d(maps, (depth[0], 1), (depth[1], 1), (depth[2], 0), (depth[3], 1), ceil_mode),
    )


def supports_max_pool3d(*args: Any, **kwargs: Any) -> bool:
    """Return whether there is a batch of volumes, and no one asks where the largest values were."""
    given = inspect.signature(max_pool3d).bind(*args, **kwargs).arguments
    return given["input"].dim() == 5 and not given.get("return_indices")


def avg_pool3d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Compute ``F.avg_pool3d`` of (N, C, D, H, W) by images, then along the depth: the NPU gets it wrong."""
    depth, image = _parted(kernel_size, stride or kernel_size, padding)
    means = _by_images(
        input,
        lambda maps: F.avg_pool2d(maps, image[0], image[1], image[2], ceil_mode, count_include_pad),
        lambda maps: F.avg_pool2d(maps, (depth[0], 1), (depth[1], 1), (depth[2], 0), ceil_mode, count_include_pad),
    )
    return means if divisor_override is None else means * (depth[0] * math.prod(image[0]) / divisor_override)


def supports_avg_pool3d(*args: Any, **kwargs: Any) -> bool:
    """Return whether there is a batch of volumes, and every window has as many values where there is a divisor."""
    given = inspect.signature(avg_pool3d).bind(*args, **kwargs).arguments
    return given["input"].dim() == 5 and not (given.get("ceil_mode") and given.get("divisor_override") is not None)


def _parted(*settings: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Return what the settings of a pooling say of the depth, and of height and width."""
    full = [(one,) * 3 if isinstance(one, int) else tuple(one) * (3 if len(one) == 1 else 1) for one in settings]
    return [one[0] for one in full], [(one[1], one[2]) for one in full]


def _by_images(input: Tensor, pool: Callable[[Tensor], Tensor], along_depth: Callable[[Tensor], Tensor]) -> Tensor:
    batch, channels, depth = (int(size) for size in input.shape[:3])
    images = pool(input.flatten(1, 2))
    height, width = (int(size) for size in images.shape[-2:])
    volumes = along_depth(images.reshape(batch, channels, depth, height * width))
    return volumes.reshape(batch, channels, -1, height, width)


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
