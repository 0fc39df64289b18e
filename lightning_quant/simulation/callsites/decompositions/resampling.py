"""Resampling and padding that ONNX or the NPU does not have, as products with matrices, pooling and convolutions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_quant.simulation.callsites.passes import paused
from lightning_quant.simulation.callsites.traces import untraced

# How far from a whole number a size may be: factors are floats.
_WHOLE = 1e-4
# From here on numbers are written for infinity.
_LIKE_INFINITY = 1e4


def interpolate(input: Tensor, size: Any = None, scale_factor: Any = None, *args: Any, **kwargs: Any) -> Tensor:
    """Compute ``F.interpolate``.

    It is linear along each axis: (N, C, H, W) between two matrices, (N, C, L) before one. Of areas, it is adaptive
    pooling.
    """
    if _takes_areas(*args, **kwargs):
        return _areas(input, size, scale_factor, *args, **kwargs)
    if not supports_interpolate(input, size, scale_factor, *args, **kwargs):
        return F.interpolate(input, size, scale_factor, *args, **kwargs)
    *rows, columns = (
        _along(input, axis, _of(size, axis), _of(scale_factor, axis), *args, **kwargs).to(input)
        for axis in range(input.dim() - 2)
    )
    result = torch.matmul(input, columns.T)
    return torch.matmul(rows[0], result) if rows else result


def supports_interpolate(input: Tensor, size: Any = None, scale_factor: Any = None, *args: Any, **kwargs: Any) -> bool:
    """Return whether it is of areas, of images with antialiasing, or linear by a factor that the NPU does not take.

    That is one by which a size is no whole number: PyTorch's grid of samples, and ONNX's, is that of the factor, the
    NPU's that of the two sizes.
    """
    given = dict(zip(("mode", "align_corners", "recompute_scale_factor", "antialias"), args, strict=False)) | kwargs
    by_factor = scale_factor is not None and not given.get("align_corners") and not given.get("recompute_scale_factor")
    if by_factor and given.get("mode") in ("linear", "bilinear"):
        sizes = [float(old) * float(_of(scale_factor, axis)) for axis, old in enumerate(input.shape[2:])]
        if any(abs(size - round(size)) > _WHOLE for size in sizes):
            return True
    return _takes_areas(*args, **kwargs) or (input.dim() == 4 and bool(given.get("antialias")))


def _takes_areas(mode: Any = "nearest", *args: Any, **kwargs: Any) -> bool:
    return bool(mode == "area")


def _areas(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    with paused(), untraced(), torch.no_grad():  # only to know the size
        resized = F.interpolate(torch.empty(input.shape, device="meta"), *args, **kwargs)
    sizes: Any = [int(size) for size in resized.shape[2:]]
    pool: Any = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[len(sizes) - 1]
    result: Tensor = pool(input, sizes)
    return result


def _of(value: Any, axis: int) -> Any:
    return value[axis] if isinstance(value, (tuple, list)) else value


def _along(input: Tensor, axis: int, size: Any, scale: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Return the matrix that resizes an axis: (new size, old size)."""
    given = dict(zip(("mode",), args, strict=False)) | kwargs
    mode = "bilinear" if given["mode"] == "linear" else given["mode"]  # of an image of one column
    others = {name: value for name, value in kwargs.items() if name != "mode"}
    with paused(), untraced(), torch.no_grad():
        old = int(input.shape[2 + axis])
        each = torch.eye(old)[None, None]
        wanted = (None if size is None else (int(size), old)), (None if scale is None else (float(scale), 1.0))
        return F.interpolate(each, *wanted, mode, *args[1:], **others)[0, 0]


def pad(input: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> Tensor:
    """Compute ``F.pad`` with a number: a concatenation, as its range has to hold the number.

    The NPU puts 0 among channels, whatever the number (by its emulator, QAIRT 2.51).
    """
    for axis, ends in zip(range(-1, -len(pad), -1), zip(pad[::2], pad[1::2], strict=True), strict=False):
        parts = [input]
        for count, place in zip(map(int, ends), (0, len(parts) + 1), strict=True):
            if count:
                with paused(), untraced(), torch.no_grad():
                    shape = [int(size) for size in input.shape]
                    shape[axis] = count
                    number = torch.full(shape, float(value or 0), dtype=input.dtype, device=input.device)
                parts.insert(place, number)
        if len(parts) > 1:
            input = torch.cat(parts, axis)
    return input


def supports_pad(input: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> bool:
    """Return whether it adds a number other than 0, not one that stands for infinity, and cuts nothing off.

    A range that holds the latter leaves everything else no step. Cut off at the end of the range, as a plain padding
    is, it still loses in every maximum.
    """
    return mode == "constant" and 0 < abs(value or 0) < _LIKE_INFINITY and min(map(int, pad)) >= 0


def unfold(input: Tensor, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1) -> Tensor:
    """Compute ``F.unfold``, (N, C, H, W) to (N, C * kernel, blocks): a convolution that picks values."""
    channels = input.shape[1]
    weight = _picking(input, _pair(kernel_size)).repeat(channels, 1, 1, 1)
    return F.conv2d(input, weight, None, stride, padding, dilation, channels).flatten(2)


def supports_unfold(input: Tensor, *args: Any, **kwargs: Any) -> bool:
    """Return whether it is that of images, not ``Tensor.unfold(dimension, size, step)``."""
    return input.dim() == 4 and len(args) != 3 and not kwargs.keys() & {"dimension", "size", "step"}


def windows(input: Tensor, dimension: int, size: int, step: int) -> Tensor:
    """Compute ``Tensor.unfold``; windows side by side are a reshape, of which ONNX gets a slice for each otherwise."""
    dimension %= input.dim()  # PyTorch's exporter joins windows of the last axis along another
    if size != step:
        return input.unfold(dimension, size, step)
    count = input.shape[dimension] // size
    side_by_side = input.narrow(dimension, 0, count * size).unflatten(dimension, (count, size))
    return side_by_side.movedim(dimension + 1, -1)


def _picking(like: Tensor, kernel: tuple[int, int]) -> Tensor:
    size = math.prod(kernel)
    return torch.eye(size, dtype=like.dtype, device=like.device).reshape(size, 1, *kernel)


def fold(
    input: Tensor, output_size: Any, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1
) -> Tensor:
    """Compute ``F.fold``, (N, C * kernel, blocks) to (N, C, *output_size): a transposed convolution sums them."""
    if input.dim() == 2:
        return fold(input[None], output_size, kernel_size, dilation, padding, stride)[0]
    kernel, dilation, padding, stride = map(_pair, (kernel_size, dilation, padding, stride))
    output = _pair(output_size)
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    room = [o + 2 * p - span for o, p, span in zip(output, padding, spans, strict=True)]
    blocks = [r // s + 1 for r, s in zip(room, stride, strict=True)]
    left = [r % s for r, s in zip(room, stride, strict=True)]
    channels = input.shape[1] // math.prod(kernel)
    one = input.reshape(-1, math.prod(kernel), *blocks)  # the NPU takes no groups here
    added = F.conv_transpose2d(one, _picking(input, kernel), None, stride, padding, left, 1, dilation)
    return added.reshape(-1, channels, *output)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def affine_grid(theta: Tensor, size: Sequence[int], align_corners: bool | None = None) -> Tensor:
    """Compute ``F.affine_grid``: the places of a plain grid, as constants, times matrices (N, 2, 3) or (N, 3, 4)."""
    axes = len(size) - 2
    with paused(), untraced(), torch.no_grad():
        same = torch.eye(axes, axes + 1, dtype=theta.dtype, device=theta.device).unsqueeze(0)
        plain = F.affine_grid(same, [1, 1, *map(int, size[2:])], bool(align_corners)).flatten(1, -2)
        places = torch.cat([plain, torch.ones_like(plain[..., :1])], -1)
    return (places @ theta.transpose(1, 2)).reshape(theta.shape[0], *size[2:], axes)
