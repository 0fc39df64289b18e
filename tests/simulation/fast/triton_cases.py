"""What the kernels for GPUs are tried with, in Triton's interpreter here and on a GPU in `tests/gpu`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_quant.simulation.fast.kernels import Activation

# qmin, qmax, symmetric, lower and upper end. Of the last but one and the last, a bound and the smallest scale give
# their ends no gradient.
GRIDS = {
    "8 bits": (0, 255, False, -0.7, 1.9),
    "8 bits from zero": (0, 255, False, 0.0, 2.0),
    "16 bits": (0, 65535, False, -0.7, 1.9),
    "4 bits": (-8, 7, True, -1.0, 7 / 8),
    "too narrow": (0, 255, False, 0.0, 1e-9),
}
COMMON = (Activation.NONE, Activation.RELU, Activation.RELU6, Activation.HARDSWISH)  # to both kernels
SHAPES = ((), (1,), (7,), (8,), (2, 3, 5, 7), (0, 3), (9001,))


class Results(NamedTuple):
    """What comes out, and the gradients of what went in."""

    output: Tensor
    x: Tensor
    low: Tensor | None
    high: Tensor | None


def run(
    kernel: Callable[..., Tensor], x: Tensor, low: Tensor, high: Tensor, grid: Any, grad: Tensor,
    *, learned: bool, leaf: bool = False, **more: Any,
) -> Results:  # fmt: skip
    """Forward and backward; of a leaf, such as a weight, the kernels keep the numbers, of others codes or bits."""
    x, low, high = (tensor.detach().clone() for tensor in (x, low, high))
    x.requires_grad_()
    low.requires_grad_(learned)
    high.requires_grad_(learned)
    output = kernel(x if leaf else x.clone(), low, high, *grid, 1e-8, **more)
    output.backward(grad)
    assert x.grad is not None
    return Results(output.detach(), x.grad, low.grad, high.grad)


def on_cpu(*args: Any, activation: Activation = Activation.NONE) -> Tensor:
    """The C++ kernel."""
    return torch.ops.lightning_quant.fake_quantize(*args, activation)


def numbers(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Numbers in and around the ranges, NaN, infinities, ties and bounds among them where there is room; a gradient."""
    generator = torch.Generator().manual_seed(seed)
    x, grad = torch.randn(shape, generator=generator) * 2, torch.randn(shape, generator=generator)
    odd = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 6.0, 3.0, -3.0, 1e30, 1e-40])
    if x.numel() > 100:
        x.view(-1)[5 : 5 + len(odd)] = odd
    return x, grad


def equal(ours: Tensor, theirs: Tensor) -> bool:
    """Bit for bit, NaN for NaN."""
    return ours.dtype == theirs.dtype and torch.equal(ours.nan_to_num(12345.0), theirs.nan_to_num(12345.0))


def assert_alike(ours: Results, theirs: Results, grad: Tensor, *, codes: bool) -> None:
    """Output and gradient bit for bit; gradients of ranges up to the order of sums, and to the rounding of codes."""
    assert equal(ours.output, theirs.output)
    assert equal(ours.x, theirs.x)
    for mine, other in ((ours.low, theirs.low), (ours.high, theirs.high)):
        assert (mine is None) == (other is None)
        if mine is not None and other is not None:
            # a code is at most 1/480 of a step off the rounding error, up or down
            noise = (grad.square().sum().sqrt() / 100 if codes else grad.abs().sum() * 1e-5) + 1e-6
            assert ((mine - other).abs() <= noise + 1e-4 * other.abs()).all() or equal(mine, other)
