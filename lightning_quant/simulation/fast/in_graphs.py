"""Fake quantization in PyTorch's own operations, for graphs that are compiled.

A compiler fuses them with the bias before and the operation after; it could not fuse a kernel of ours. While a
graph is traced (:mod:`lightning_quant.simulation.compiled`), quantizers on the short path come here.

The arithmetic is that of ``fake_quantize.cpp``, in float32 whatever comes in.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_quant.simulation.fast.kernels import Activation
from lightning_quant.simulation.inputs import tensors_in


class _Local(threading.local):
    def __init__(self) -> None:
        self.calibrated: set[Any] | None = None
        self.foreign: list[Tensor] = []


_local = _Local()

_ACTIVATIONS = {
    Activation.RELU: torch.relu,
    Activation.RELU6: torch.nn.functional.relu6,
    Activation.HARDSWISH: torch.nn.functional.hardswish,
    Activation.SILU: torch.nn.functional.silu,
}


@contextmanager
def tracing(calibrated: Iterable[Any]) -> Iterator[list[Tensor]]:
    """Trace a graph in a block.

    Args:
        calibrated: the quantizers whose ranges are set.

    Yields:
        The tensors that something is computed with and that are neither inputs of the graph nor computed from any: it
        would keep their values, and give them no gradient.
    """
    _local.calibrated, _local.foreign = set(calibrated), []
    try:
        with _NoteForeign():
            yield _local.foreign
    finally:
        _local.calibrated = None


class _NoteForeign(TorchFunctionMode):
    """Sees the arguments of operations while a graph is traced, where inputs and results have types of their own."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        note_foreign(args)
        return func(*args, **(kwargs or {}))


def note_foreign(given: Any) -> None:
    """Note the tensors among the arguments of an operation, or of a layer, that are foreign to the graph."""
    _local.foreign += [tensor for tensor in tensors_in(given) if type(tensor) in (Tensor, nn.Parameter)]


def is_tracing() -> bool:
    """Return whether a graph is traced in this thread."""
    return _local.calibrated is not None


def is_calibrated(quantizer: Any) -> bool:
    """Return whether a quantizer's range was set when the trace began, in which the compiler's tensors replace it."""
    return _local.calibrated is not None and quantizer in _local.calibrated


def fake_quantize(
    x: Tensor, low: Tensor, high: Tensor, qmin: int, qmax: int, symmetric: bool, smallest: float, activation: Activation
) -> Tensor:
    """Fake-quantize ``activation(x)``: as :func:`lightning_quant.simulation.fast.gpu.fake_quantize`."""
    records = torch.is_grad_enabled()
    learned = records and (low.requires_grad or high.requires_grad)
    grid = (float(qmin), float(qmax), symmetric, smallest)
    if low.numel() == 1 and activation in _CUTS and _saves_bytes(x):
        if learned:
            return _Coded.apply(x, low, high, grid, activation)
        if records and x.requires_grad:
            return _Masked.apply(x, low, high, grid, activation)
    value = x if activation is Activation.NONE else _ACTIVATIONS[activation](x.float())
    return _FakeQuantize.apply(value, low, high, grid, learned).to(x.dtype)


def _saves_bytes(x: Tensor) -> bool:
    """Return whether a byte per value is saved instead of the value: on a GPU, whose memory is scarce."""
    return x.is_cuda


def _grid_of(low: Tensor, high: Tensor, grid: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return scale and offset, and both before they are clamped."""
    qmin, qmax, symmetric, smallest = grid
    raw = (high - low) / (qmax - qmin)
    scale = raw.abs().clamp_min(smallest)
    free = torch.round(low / scale) - qmin
    offset = torch.full_like(low, -round((qmin + qmax) / 2)) if symmetric else free.clamp(-qmax, -qmin)
    return scale, offset, raw, free


def _rounded(
    x: Tensor, scale: Tensor, offset: Tensor, grid: tuple[Any, ...], learned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the clipped integer plus offset, its rounding error in units of the scale, and whether it was inside."""
    scaled = x / scale if learned else x * (1 / scale)
    rounded = torch.round(scaled)
    exact = rounded - offset
    q = exact.clamp(grid[0], grid[1])
    return q + offset, rounded - scaled, q == exact


# Activations that pass a gradient unchanged or not at all, and where they do.
_CUTS: dict[Activation, Callable[[Tensor], Tensor] | None] = {
    Activation.NONE: None,
    Activation.RELU: lambda x: x > 0,
    Activation.RELU6: lambda x: (x > 0) & (x < 6),
}
# As in `triton_kernels.py`.
_ABOVE, _BELOW, _CUT_OFF, _CODE_SCALE = 127, -128, 126, 240.0


class _Masked(torch.autograd.Function):
    """On a GPU, where the range does not learn: one byte per value is saved, whether its gradient passes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, low: Tensor, high: Tensor, grid: tuple[Any, ...], activation: Activation
    ) -> Tensor:
        scale, offset, _, _ = _grid_of(low, high, grid)
        passes = _CUTS[activation]
        value = x.float() if passes is None else _ACTIVATIONS[activation](x.float())
        q, _, inside = _rounded(value, scale, offset, grid, False)
        ctx.save_for_backward(inside if passes is None else inside & passes(x))
        ctx.dtype = x.dtype
        return (q * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (mask,) = ctx.saved_tensors
        return torch.where(mask, grad, 0).to(ctx.dtype), None, None, None, None


class _Coded(torch.autograd.Function):
    """On a GPU: one byte per value is saved, from which one pass computes all three gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, low: Tensor, high: Tensor, grid: tuple[Any, ...], activation: Activation
    ) -> Tensor:
        qmin, qmax, _, _ = grid
        scale, offset, _, _ = _grid_of(low, high, grid)
        passes = _CUTS[activation]
        value = x.float() if passes is None else _ACTIVATIONS[activation](x.float())
        scaled = value / scale
        rounded = torch.round(scaled)
        exact = rounded - offset
        q = exact.clamp(qmin, qmax)
        code = torch.round((rounded - scaled) * _CODE_SCALE)
        if passes is not None:
            code = torch.where(passes(x), code, _CUT_OFF)
        code = torch.where(q == exact, code, torch.where(exact > qmax, _ABOVE, _BELOW)).to(torch.int8)
        ctx.save_for_backward(code, low, high)
        ctx.how = grid, x.dtype
        return ((q + offset) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        code, low, high = ctx.saved_tensors
        grid, dtype = ctx.how
        qmin, qmax, _, _ = grid
        scale, offset, raw, free = _grid_of(low, high, grid)
        above, below, cut = code == _ABOVE, code == _BELOW, code == _CUT_OFF
        inside = ~(above | below)
        out = torch.where(inside & ~cut, grad, 0).to(dtype)
        given = grad.float()
        error = torch.where(cut, 0, code.float() * (1 / _CODE_SCALE))
        q = torch.where(above, qmax + offset, qmin + offset)
        by_scale = _sum_like(low, given * torch.where(inside, error, q), code)
        by_offset = _sum_like(low, torch.where(inside, 0, given), code)
        return (out, *_range_gradients(by_scale, by_offset, low, scale, raw, free, grid), None, None)


# Enough for the sums of rows to be little beside the rows.
_LEAST_ROW = 64


def _sum_like(low: Tensor, values: Tensor, x: Tensor) -> Tensor:
    """Sum values that are computed from ``x`` and lie in memory as it does, to one or one for each range.

    One is summed in two stages, of which the first is in the pass that makes the gradient of ``x``: the compiler fuses
    a sum with it only where both go over the same rows.
    """
    return values.sum(_rows_of(x)).sum() if low.numel() == 1 else values.sum_to_size(low.shape)


def _rows_of(x: Tensor) -> list[int]:
    """Return the axes along which a tensor's memory is divided into rows of at least ``_LEAST_ROW`` values."""
    rows, length = [], 1
    for axis in sorted(range(x.dim()), key=lambda axis: (x.stride(axis), -axis)):
        if length >= _LEAST_ROW:
            break
        rows.append(axis)
        length *= x.shape[axis]
    return rows


def _range_gradients(
    by_scale: Tensor, by_offset: Tensor, low: Tensor, scale: Tensor, raw: Tensor, free: Tensor, grid: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    """Return the gradients of both ends of a range from the sums over its values.

    scale = |max - min| / steps; offset = round(min / scale) - qmin, straight through the rounding.
    """
    qmin, qmax, symmetric, smallest = grid
    if symmetric:
        by_offset = torch.zeros_like(low)
    else:
        # a bound gives no gradient to what lies on it
        by_offset = torch.where((free > -qmax) & (free < -qmin), by_offset * scale, 0)
        by_scale = by_scale - by_offset * low / scale.square()
    sign = torch.where(raw.abs() > smallest, raw.sign(), 0)
    by_high = by_scale * sign / (qmax - qmin)
    return by_offset / scale - by_high, by_high


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor, grid: tuple[Any, ...], learned: bool) -> Tensor:
        scale, offset, _, _ = _grid_of(low, high, grid)
        q, _, _ = _rounded(x.float(), scale, offset, grid, learned)
        ctx.save_for_backward(x, low, high)
        ctx.how = grid, learned
        return (q * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, low, high = ctx.saved_tensors
        grid, learned = ctx.how
        scale, offset, raw, free = _grid_of(low, high, grid)
        q, error, inside = _rounded(x.float(), scale, offset, grid, learned)
        out = torch.where(inside, grad, 0)
        if not learned:
            return out, None, None, None, None
        given = grad.float()
        by_scale = _sum_like(low, given * torch.where(inside, error, q), x)
        by_offset = _sum_like(low, torch.where(inside, 0, given), x)
        return (out, *_range_gradients(by_scale, by_offset, low, scale, raw, free, grid), None, None)
