"""Functions that ONNX writes as several operations, between which nothing would be rounded: as those operations."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of the differences that distances between all pairs are computed from.
_MOST_DIFFERENCES = 2**22
# Numbers along an axis that are multiplied one by one.
_MOST_FACTORS = 64


# ---- functions of one number -----------------------------------------------------------------------------------------
def expm1(input: Tensor) -> Tensor:
    """Compute ``torch.expm1``."""
    return torch.exp(input) - 1.0


def sinh(input: Tensor) -> Tensor:
    """Compute ``torch.sinh``."""
    return (torch.exp(input) - torch.exp(-input)) * 0.5


def cosh(input: Tensor) -> Tensor:
    """Compute ``torch.cosh``."""
    return (torch.exp(input) + torch.exp(-input)) * 0.5


def tan(input: Tensor) -> Tensor:
    """Compute ``torch.tan``."""
    return torch.sin(input) / torch.cos(input)


def acos(input: Tensor) -> Tensor:
    """Compute ``torch.acos``, which the NPU does not have."""
    return math.pi / 2 - torch.asin(input)


def softsign(input: Tensor) -> Tensor:
    """Compute ``F.softsign``."""
    return input / (torch.abs(input) + 1.0)


def log_sigmoid(input: Tensor) -> Tensor:
    """Compute ``F.logsigmoid``, without the logarithm of a rounded 0."""
    return -F.softplus(-input)


def selu(input: Tensor, inplace: bool = False) -> Tensor:
    """Compute ``F.selu``."""
    return F.elu(input, 1.6732632423543772) * 1.0507009873554805


def celu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """Compute ``F.celu``."""
    return F.elu(input / alpha) * alpha


def remainder(input: Tensor, other: Any) -> Tensor:
    """Compute ``torch.remainder``."""
    return input - torch.floor_divide(input, other) * other


def softshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """Compute ``F.softshrink``."""
    return input - input.clamp(-lambd, lambd)


def tanhshrink(input: Tensor) -> Tensor:
    """Compute ``F.tanhshrink``."""
    return input - torch.tanh(input)


def threshold(input: Tensor, threshold: float, value: float, inplace: bool = False) -> Tensor:
    """Compute ``F.threshold``; of a network's input, the compiler refuses one that chooses the values first."""
    return input.masked_fill(input <= threshold, value)


def log2(input: Tensor) -> Tensor:
    """Compute ``torch.log2``."""
    return torch.log(input) * (1 / math.log(2))


def log10(input: Tensor) -> Tensor:
    """Compute ``torch.log10``."""
    return torch.log(input) * (1 / math.log(10))


def exp2(input: Tensor) -> Tensor:
    """Compute ``torch.exp2``."""
    return torch.exp(input * math.log(2))


OF_ONE_NUMBER = (
    acos, celu, cosh, exp2, expm1, log10, log2, log_sigmoid, selu, sinh, softshrink, softsign, tan, tanhshrink,
    threshold,
)  # fmt: skip


def softmin(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Tensor:
    """Compute ``F.softmin``."""
    return F.softmax(-input, dim, _stacklevel, dtype)


def raised(input: Tensor, other: float) -> Tensor:
    """Compute ``other ** input`` for a number above 0."""
    return torch.exp(input * math.log(other))


def supports_raised(input: Any, other: Any) -> bool:
    """Return whether a number above 0 is raised to the power of a tensor of floats."""
    is_number = isinstance(other, int | float) and other > 0 and other != 1
    return is_number and isinstance(input, Tensor) and input.is_floating_point()


def hypotenuse(input: Tensor, other: Tensor) -> Tensor:
    """Compute ``torch.hypot``, which ONNX does not have."""
    return torch.sqrt(input * input + other * other)


# ---- sums and products along an axis ---------------------------------------------------------------------------------
def logsumexp(input: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    """Compute ``torch.logsumexp`` of the largest value and what a log-softmax makes of it.

    The NPU gets logarithms with 16-bit activations wrong, log-softmax right.
    """
    axes = [dim % input.dim()] if isinstance(dim, int) else sorted(axis % input.dim() for axis in dim)
    others = [axis for axis in range(input.dim()) if axis not in axes]
    flat = input if len(axes) == 1 else input.permute([*others, *axes]).flatten(len(others))
    axis = axes[0] if len(axes) == 1 else -1
    result = flat.amax(axis, keepdim=True) - torch.log_softmax(flat, axis).amax(axis, keepdim=True)
    return result.reshape([1 if i in axes else int(n) for i, n in enumerate(input.shape) if keepdim or i not in axes])


def product(input: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    """Compute ``torch.prod`` along an axis: of halves, of the halves of these, and so on."""
    while (size := int(input.shape[dim])) > 1:
        half = size // 2
        joined = input.narrow(dim, 0, half) * input.narrow(dim, half, half)
        input = joined if size % 2 == 0 else torch.cat([joined, input.narrow(dim, size - 1, 1)], dim)
    return input if keepdim else input.select(dim, 0)


def supports_product(input: Tensor, dim: Any = None, keepdim: bool = False, *_: Any, **kwargs: Any) -> bool:
    """Return whether it is along one axis, and not of too many numbers."""
    return isinstance(dim, int) and not kwargs and 1 <= int(input.shape[dim]) <= _MOST_FACTORS


# ---- statistics ------------------------------------------------------------------------------------------------------
def variance(
    input: Tensor, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *, correction: Any = None
) -> Tensor:
    """Compute ``torch.var``."""
    return _moments(input, dim, unbiased, keepdim, correction)[0]


def deviation(
    input: Tensor, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *, correction: Any = None
) -> Tensor:
    """Compute ``torch.std``."""
    return torch.sqrt(variance(input, dim, unbiased, keepdim, correction=correction))


def variance_and_mean(
    input: Tensor, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *, correction: Any = None
) -> tuple[Tensor, Tensor]:
    """Compute ``torch.var_mean``."""
    return _moments(input, dim, unbiased, keepdim, correction)


def deviation_and_mean(
    input: Tensor, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *, correction: Any = None
) -> tuple[Tensor, Tensor]:
    """Compute ``torch.std_mean``."""
    squared, mean = _moments(input, dim, unbiased, keepdim, correction)
    return torch.sqrt(squared), mean


def _moments(input: Tensor, dim: Any, unbiased: Any, keepdim: bool, correction: Any) -> tuple[Tensor, Tensor]:
    if isinstance(dim, bool):  # x.var(False)
        dim, unbiased = None, dim
    axes = list(range(input.dim())) if dim is None or dim in ([], ()) else [dim] if isinstance(dim, int) else list(dim)
    left_out = correction if correction is not None else 1 if unbiased is None else int(unbiased)
    count = math.prod(int(input.shape[axis]) for axis in axes)
    mean = input.mean(axes, keepdim=True)
    squares = torch.square(input - mean).mean(axes, keepdim=keepdim)
    result = squares if left_out == 0 else squares * (count / (count - left_out))
    kept = [int(size) for axis, size in enumerate(input.shape) if axis not in {one % input.dim() for one in axes}]
    return result, mean if keepdim else mean.reshape(kept)


def local_response_norm(input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    """Compute ``F.local_response_norm``: the mean over neighboring channels is a pooling along them."""
    squares = F.pad(torch.square(input).flatten(2).unsqueeze(1), (0, 0, size // 2, (size - 1) // 2))
    means = F.avg_pool2d(squares, (size, 1), 1).reshape(input.shape)
    root = torch.sqrt(means * alpha + k)
    return input / (root if beta == 0.5 else root * torch.sqrt(root))


def supports_local_response_norm(
    input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> bool:
    """Return whether the exponent is made of square roots."""
    return beta in (0.5, 0.75)


def lp_pool2d(input: Tensor, norm_type: float, kernel_size: Any, stride: Any = None, ceil_mode: bool = False) -> Tensor:
    """Compute ``F.lp_pool2d`` for the Euclidean length."""
    height, width = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    means = F.avg_pool2d(torch.square(input), (height, width), stride, 0, ceil_mode)
    return torch.sqrt(means * float(height * width))


def supports_lp_pool2d(
    input: Tensor, norm_type: float, kernel_size: Any, stride: Any = None, ceil_mode: bool = False
) -> bool:
    """Return whether it is the Euclidean length of whole blocks."""
    return float(norm_type) == 2 and not ceil_mode


# ---- vectors ---------------------------------------------------------------------------------------------------------
def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """Compute ``F.cosine_similarity``; the axis is one of both operands broadcast."""
    axes = max(x1.dim(), x2.dim())
    x1, x2 = (one.reshape([1] * (axes - one.dim()) + list(one.shape)) for one in (x1, x2))
    dim = dim % axes
    if x1.shape[dim] != x2.shape[dim]:
        x1, x2 = torch.broadcast_tensors(x1, x2)
    first, second = (one / torch.sqrt((one * one).sum(dim, keepdim=True)).clamp(min=eps) for one in (x1, x2))
    return (first * second).sum(dim)


def matrix_by_vector(input: Tensor, vec: Tensor) -> Tensor:
    """Compute ``torch.mv``."""
    return torch.matmul(input, vec)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``F.linear`` with a weight that the network computes of its input: as a product of two activations."""
    product = torch.matmul(input, weight.transpose(-1, -2))
    return product if bias is None else product + bias


def dot(input: Tensor, other: Tensor) -> Tensor:
    """Compute ``torch.dot``."""
    return (input * other).sum()


def outer(input: Tensor, vec2: Tensor) -> Tensor:
    """Compute ``torch.outer``."""
    return input[:, None] * vec2


def cross(input: Tensor, other: Tensor, dim: int | None = None) -> Tensor:
    """Compute ``torch.cross``."""
    axis = next(axis for axis, size in enumerate(input.shape) if size == 3) if dim is None else dim
    (ahead, behind), (other_ahead, other_behind) = ((one.roll(-1, axis), one.roll(1, axis)) for one in (input, other))
    return ahead * other_behind - behind * other_ahead


def linalg_cross(input: Tensor, other: Tensor, *, dim: int = -1) -> Tensor:
    """Compute ``torch.linalg.cross``."""
    return cross(input, other, dim)


def distances(x1: Tensor, x2: Tensor, p: float = 2.0, *_: Any, **__: Any) -> Tensor:
    """Compute ``torch.cdist``."""
    difference = x1.unsqueeze(-2) - x2.unsqueeze(-3)
    if p == 1:
        return torch.abs(difference).sum(-1)
    return torch.sqrt((difference * difference).sum(-1))


def supports_distances(x1: Tensor, x2: Tensor, p: float = 2.0, *_: Any, **__: Any) -> bool:
    """Return whether they are Euclidean or sums of differences, of which there are not too many."""
    return p in (1, 2) and x1.numel() * int(x2.shape[-2]) <= _MOST_DIFFERENCES
