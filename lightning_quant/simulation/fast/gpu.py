"""Fake quantization on a GPU: how the Triton kernels are launched, and their gradients."""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import os
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from lightning_quant.simulation.fast.kernels import Activation

log = logging.getLogger(__name__)

TYPES = (torch.float32, torch.bfloat16, torch.float16)
# What the kernels round to; see `NO_FRACTION` there.
MOST_STEPS = 2**20
# Numbers a program takes at a time, where it adds up and where not; and the most programs that add up.
_BLOCK, _SUMMED_BLOCK, MOST_PROGRAMS = 2048, 1024, 1024
_ROW = 1024


class Kept(IntEnum):
    """What a forward pass keeps for its backward pass."""

    NOTHING = 0
    INPUT = 1  # kept anyway, or more than a mask is needed
    CODES = 2  # a byte per value: its rounding error, or on which side of the range it is
    BITS = 3  # a bit per value: whether its gradient passes


@functools.cache
def unavailable() -> str | None:
    """Load the kernels, once per process, and return why there are none, or ``None``.

    Called where a tensor on a GPU is to be quantized.
    """
    reason = _reason()
    if reason is not None:
        log.info("Fake quantization runs on AIMET's own kernels, which is slower on a GPU: %s.", reason)
    return reason


def _reason() -> str | None:
    if os.environ.get("LIGHTNING_QUANT_STOCK") == "1":
        return "LIGHTNING_QUANT_STOCK=1 is set"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:  # Triton compiles at the first launch, for which it needs a C compiler
        some = torch.zeros(16, device="cuda" if torch.cuda.is_available() else "cpu")
        _forward(some, some[0], some[1], (0.0, 255.0, 1e-8, False), Activation.NONE, False, Kept.NOTHING, some.dtype)
    except Exception as error:  # none, or a Triton of another version: AIMET's own kernels do the work
        return f"running them failed: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None


def fake_quantize(
    x: Tensor,
    low: Tensor,
    high: Tensor,
    qmin: int,
    qmax: int,
    symmetric: bool,
    smallest: float,
    activation: Activation = Activation.NONE,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Fake-quantize ``activation(x)``, differentiable once.

    Args:
        x: numbers of any shape, float32, bfloat16 or float16; channels last or not, the result is like it.
        low: the lower end of the range, float32: one number, or one for each place on one axis of ``x``.
        high: the upper end.
        qmin: the lowest integer.
        qmax: the highest integer.
        symmetric: whether zero is in the middle of the grid.
        smallest: the smallest scale there is.
        activation: what is computed before, in the same pass; for one range only.
        dtype: type of the result, if it is not that of ``x``.
    """
    records = torch.is_grad_enabled()
    learned = records and (low.requires_grad or high.requires_grad)
    grid = (float(qmin), float(qmax), smallest, symmetric)
    dtype = x.dtype if dtype is None else dtype
    axis = _axis(x, low)
    if axis is not None:
        assert activation is Activation.NONE, activation
        rows = x if axis == 0 and _is_dense(x) and _rows_are_dense(x) else x.movedim(axis, 0).contiguous()
        made = _Rows.apply(rows, low, high, grid, learned, dtype)
        return made if rows is x else made.movedim(0, axis)
    if not _is_dense(x):
        x = x.contiguous()
    if not (learned or (records and x.requires_grad)):
        return _forward(x, low, high, grid, activation, False, Kept.NOTHING, dtype)[0]
    stays = x.is_leaf or activation is Activation.HARDSWISH or activation is Activation.SILU
    kept = Kept.INPUT if stays else Kept.CODES if learned else Kept.BITS
    return _Whole.apply(x, low, high, grid, activation, learned, kept, dtype)


def round_bias(
    bias: Tensor, input_low: Tensor, input_high: Tensor, weight_low: Tensor, weight_high: Tensor, *grids: float
) -> Tensor:
    """Round a bias: see :func:`lightning_quant.simulation.fast.biases.round_bias`."""
    # autograd takes it for a copy, whose gradient passes straight through: a function of Python would cost the host
    # several times as much, once for every layer
    rounded = bias.clone()
    if bias.numel():
        _kernels().round_bias(
            -(-bias.numel() // _ROW), (bias, rounded.detach(), input_low, input_high, weight_low, weight_high),
            (bias.numel(), weight_low.numel()), grids, (_ROW,),
        )  # fmt: skip
    return rounded


def _axis(x: Tensor, low: Tensor) -> int | None:
    """Return the axis of ``x`` that has a range per index; ``None`` with one range."""
    if low.numel() == 1:
        return None
    missing = x.dim() - low.dim()
    axes = [axis for axis, size in enumerate(low.shape) if size != 1]
    if missing < 0 or len(axes) != 1 or low.shape[axes[0]] != x.shape[axes[0] + missing]:
        raise ValueError(
            f"Ranges of shape {tuple(low.shape)} do not fit a tensor of shape {tuple(x.shape)}: expected one range, or "
            "one for each place on one axis."
        )
    return axes[0] + missing


def _is_dense(x: Tensor) -> bool:
    """Return whether a tensor is dense in memory, in any order of its axes."""
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return True
    expected = 1
    for size, stride in sorted(zip(x.shape, x.stride(), strict=True), key=lambda one: one[1]):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _rows_are_dense(x: Tensor) -> bool:
    return x.shape[0] == 1 or x.stride(0) * x.shape[0] == x.numel()


def _check_first_derivative() -> None:
    if torch.is_grad_enabled():  # as it is in a backward pass that is recorded
        raise RuntimeError(
            "The fake quantization of lightning_quant has no second derivative: expected backward() without "
            "create_graph=True. Set LIGHTNING_QUANT_STOCK=1 to use AIMET's."
        )


class _Whole(torch.autograd.Function):
    """One range for the whole tensor."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        low: Tensor,
        high: Tensor,
        grid: tuple[Any, ...],
        activation: Activation,
        learned: bool,
        kept: Kept,
        dtype: torch.dtype,
    ) -> Tensor:
        y, keep = _forward(x, low, high, grid, activation, learned, kept, dtype)
        ctx.save_for_backward(x if keep is None else keep, low, high)
        ctx.like = x.stride(), x.dtype
        ctx.how = grid, activation, learned, kept
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        _check_first_derivative()
        keep, low, high = ctx.saved_tensors
        strides, dtype = ctx.like
        if grad.stride() != strides:
            grad = torch.empty_strided(grad.shape, strides, dtype=grad.dtype, device=grad.device).copy_(grad)
        return (*_backward(grad, keep, low, high, dtype, *ctx.how), None, None, None, None, None)


class _Rows(torch.autograd.Function):
    """A range for each index of the first axis."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, low: Tensor, high: Tensor, grid: tuple[Any, ...], learned: bool, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(x, low, high)
        ctx.how = grid, learned
        return _forward_rows(x, low, high, grid, learned, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        _check_first_derivative()
        x, low, high = ctx.saved_tensors
        if grad.stride() != x.stride():
            grad = torch.empty_like(x, dtype=grad.dtype).copy_(grad)
        return (*_backward_rows(grad, x, low, high, *ctx.how), None, None, None)


# ---- launches --------------------------------------------------------------------------------------------------------
def _forward(
    x: Tensor, low: Tensor, high: Tensor, grid: tuple[Any, ...], activation: int, learned: bool, kept: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return the result, and what is saved for the backward pass other than the input."""
    y, n = torch.empty_like(x, dtype=dtype), x.numel()
    keep = None
    if kept == Kept.CODES:
        keep = torch.empty(n, dtype=torch.int8, device=x.device)
    elif kept == Kept.BITS:
        keep = torch.empty((n + 7) // 8, dtype=torch.uint8, device=x.device)
    if n:
        *numbers, symmetric = grid
        _kernels().forward(
            -(-n // _BLOCK), (x, y, y if keep is None else keep, low, high), (n,), tuple(numbers),
            (symmetric, learned, int(activation), int(kept), _BLOCK),
        )  # fmt: skip
    return y, keep


def _backward(
    grad: Tensor, keep: Tensor, low: Tensor, high: Tensor, dtype: torch.dtype, grid: tuple[Any, ...], activation: int,
    learned: bool, kept: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of the values and of both ends of the range."""
    out, n, kernels = torch.empty_like(grad, dtype=dtype), grad.numel(), _kernels()
    if not learned and kept == Kept.BITS:
        if n:
            kernels.backward_bits(-(-n // _BLOCK), (grad, keep, out), (n,), (), (_BLOCK,))
        return out, None, None
    *numbers, symmetric = grid
    if n:
        blocks = -(-n // _SUMMED_BLOCK)
        programs = min(blocks, _programs(grad.device))
        sums = torch.empty(2 * programs, dtype=torch.float32, device=grad.device)
        given: tuple[Any, ...] = (grad, keep, out, sums, low, high)
        sizes = n, -(-blocks // programs)
        if kept == Kept.CODES:
            kernels.backward_codes(programs, given, sizes, tuple(numbers), (symmetric, _SUMMED_BLOCK))
        else:
            settings = (symmetric, learned, int(activation), _SUMMED_BLOCK)
            kernels.backward_input(programs, given, sizes, tuple(numbers), settings)
    if not learned:
        return out, None, None
    if not n:
        return out, torch.zeros_like(low), torch.zeros_like(high)
    by_low, by_high = torch.empty_like(low), torch.empty_like(high)
    kernels.finish(1, (sums, low, high, by_low, by_high), (programs,), tuple(numbers), (symmetric, MOST_PROGRAMS))
    return out, by_low, by_high


def _forward_rows(
    x: Tensor, low: Tensor, high: Tensor, grid: tuple[Any, ...], learned: bool, dtype: torch.dtype
) -> Tensor:
    y, rows = torch.empty_like(x, dtype=dtype), low.numel()
    if x.numel():
        length, (*numbers, symmetric) = x.numel() // rows, grid
        settings = (symmetric, learned, _row_block(length))
        _kernels().forward_rows(rows, (x, y, low, high), (length,), tuple(numbers), settings)
    return y


def _backward_rows(
    grad: Tensor, x: Tensor, low: Tensor, high: Tensor, grid: tuple[Any, ...], learned: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    out, rows = torch.empty_like(x), low.numel()
    if not x.numel():
        return (out, torch.zeros_like(low), torch.zeros_like(high)) if learned else (out, None, None)
    length, (*numbers, symmetric) = x.numel() // rows, grid
    # where ranges do not learn nothing is written there
    by_low, by_high = (torch.empty_like(low), torch.empty_like(high)) if learned else (low, high)
    settings = (symmetric, learned, _row_block(length))
    given = (grad, x, out, low, high, by_low, by_high)
    _kernels().backward_rows(rows, given, (length,), tuple(numbers), settings)
    return (out, by_low, by_high) if learned else (out, None, None)


def _row_block(length: int) -> int:
    return min(_ROW, max(16, 1 << math.ceil(math.log2(max(length, 1)))))


@functools.cache
def _programs(device: torch.device) -> int:
    """Return how many programs keep a device busy."""
    if device.type != "cuda":
        return 3
    return min(8 * torch.cuda.get_device_properties(device).multi_processor_count, MOST_PROGRAMS)


class _Launcher:
    """A kernel with what was compiled of it, found by what decides about its code.

    Triton's own launcher finds that out by inspecting every argument on every call, which takes longer than small
    tensors take on the device.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[Any, Any] = {}

    def __call__(
        self,
        programs: int,
        given: tuple[Any, ...],
        sizes: tuple[int, ...],
        numbers: tuple[float, ...],
        settings: tuple[Any, ...],
    ) -> None:
        """Launch it.

        Args:
            programs: how many.
            given: tensors; the first two may be of the user's making, the others are as PyTorch allocates them.
            sizes: whole numbers of which the first decides how memory is read.
            numbers: those that decide nothing.
            settings: what is compiled in.
        """
        one, other, size = given[0], given[1], sizes[0]
        key = (
            settings, one.device, one.dtype, other.dtype, given[2].dtype,
            one.data_ptr() % 16 == 0, other.data_ptr() % 16 == 0, size % 16 == 0, size == 1, size >= 2**31,
        )  # fmt: skip
        arguments = (*given, *sizes, *numbers, *settings)
        if one.is_cuda and one.get_device() != torch.cuda.current_device():  # Triton launches on the current one
            with torch.cuda.device(one.device):
                self._launch(programs, key, arguments)
        else:
            self._launch(programs, key, arguments)

    def _launch(self, programs: int, key: Any, arguments: tuple[Any, ...]) -> None:
        compiled = self._compiled.get(key)
        if compiled is None:  # a product and a sum are rounded as they are on the CPU, each for itself
            self._compiled[key] = self._kernel[(programs,)](*arguments, enable_fp_fusion=False)
        else:
            compiled[(programs, 1, 1)](*arguments)


class _Kernels:
    def __init__(self) -> None:
        from lightning_quant.simulation.fast import triton_kernels as triton

        self.forward = _Launcher(triton.forward_kernel)
        self.backward_bits = _Launcher(triton.backward_bits_kernel)
        self.backward_codes = _Launcher(triton.backward_codes_kernel)
        self.backward_input = _Launcher(triton.backward_input_kernel)
        self.finish = _Launcher(triton.finish_kernel)
        self.forward_rows = _Launcher(triton.forward_rows_kernel)
        self.backward_rows = _Launcher(triton.backward_rows_kernel)
        self.round_bias = _Launcher(triton.round_bias_kernel)


@functools.cache
def _kernels() -> _Kernels:
    return _Kernels()
