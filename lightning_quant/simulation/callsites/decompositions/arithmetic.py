"""Powers, activations and sums of products as plain arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_quant.simulation.callsites.attributes import INFINITE
from lightning_quant.simulation.callsites.decompositions import composed


def power(input: Any, exponent: Any) -> Tensor:
    """Compute ``x ** n`` for exponents that are products and roots: the NPU has no power in integers."""
    if isinstance(exponent, Tensor):
        return composed.raised(exponent, input)
    if exponent < 0:
        return 1.0 / power(input, -exponent)
    if exponent == 1:
        return input
    if exponent in (2, 4):
        square = torch.square(input)
        return square if exponent == 2 else torch.square(square)
    if exponent == 3:
        return torch.square(input) * input
    root = torch.sqrt(input)
    return root if exponent == 0.5 else input * root


def supports_power(input: Any, exponent: Any) -> bool:
    """Return whether it is made of squares and square roots, or one over these, or is a number to a tensor's power."""
    if isinstance(exponent, Tensor) and not isinstance(input, Tensor):
        return composed.supports_raised(exponent, input)
    is_number = isinstance(input, Tensor) and not isinstance(exponent, Tensor)
    return is_number and abs(exponent) in (0.5, 1, 1.5, 2, 3, 4)


def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """Compute ``F.prelu``, which the NPU computes in float."""
    slopes = weight if weight.numel() == 1 else weight.reshape(-1, *[1] * (input.dim() - 2))
    return F.relu(input) - F.relu(-input) * slopes


def rsqrt(input: Tensor) -> Tensor:
    """Compute ``torch.rsqrt``."""
    return 1.0 / torch.sqrt(input)


def reciprocal(input: Tensor) -> Tensor:
    """Compute ``torch.reciprocal``."""
    return 1.0 / input


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """Compute ``F.silu``."""
    return input * torch.sigmoid(input)


def mish(input: Tensor, inplace: bool = False) -> Tensor:
    """Compute ``F.mish``."""
    return input * torch.tanh(F.softplus(input))


def glu(input: Tensor, dim: int = -1) -> Tensor:
    """Compute ``F.glu``."""
    value, gate = input.chunk(2, dim)
    return value * torch.sigmoid(gate)


def softplus(input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """Compute ``F.softplus``: of a multiple, and divided by it."""
    return F.softplus(input * beta, 1.0, threshold) / beta


def supports_softplus(input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> bool:
    """Return whether it is of a multiple."""
    return beta != 1


def floor_divide(input: Any, other: Any) -> Tensor:
    """Compute ``x // y``: PyTorch's exporter rounds it to zero."""
    return torch.floor(input / other)


def supports_floor_divide(input: Any, other: Any) -> bool:
    """Return whether it is of floating-point values."""
    return any(isinstance(one, Tensor) and one.is_floating_point() for one in (input, other))


def selected(input: Any, other: Any) -> Tensor:
    """Compute the product of values with a mask of truth values as a choice, which needs no numbers of them."""
    values, mask = (other, input) if input.dtype == torch.bool else (input, other)
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))


def supports_selected(input: Any, other: Any, **kwargs: Any) -> bool:
    """Return whether one of both is such a mask, and the other is not."""
    if kwargs or not isinstance(input, Tensor) or not isinstance(other, Tensor):
        return False
    return {input.dtype == torch.bool, other.dtype == torch.bool} == {True, False} and (
        input.is_floating_point() or other.is_floating_point()
    )


def cumsum(input: Tensor, dim: int, **kwargs: Any) -> Tensor:
    """Compute ``torch.cumsum`` along the last axis: along others the NPU has only the first value right in 8 bits."""
    return input.transpose(dim, -1).cumsum(-1).transpose(dim, -1)


def supports_cumsum(input: Tensor, dim: int, **kwargs: Any) -> bool:
    """Return whether it is along another axis."""
    return input.is_floating_point() and not kwargs and dim % input.dim() != input.dim() - 1


def join(tensors: Sequence[Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Compute ``torch.cat`` with inputs of the network, each by an operation that is given it and rounds it first.

    An input keeps its own range where others read it as well: the NPU converts what is joined from that.
    """
    return torch.cat([torch.movedim(one, 0, 0) for one in tensors], *args, **kwargs)


def stack(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Compute ``torch.stack``."""
    dim = dim if dim >= 0 else dim + tensors[0].dim() + 1
    return torch.cat([tensor.unsqueeze(dim) for tensor in tensors], dim)


def addcmul(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    """Compute ``torch.addcmul``."""
    product = tensor1 * tensor2
    return input + (product if value == 1 else product * value)


def addcdiv(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    """Compute ``torch.addcdiv``."""
    ratio = tensor1 / tensor2
    return input + (ratio if value == 1 else ratio * value)


def lerp(input: Tensor, end: Tensor, weight: Any) -> Tensor:
    """Compute ``torch.lerp``."""
    return input + (end - input) * weight


def addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """Compute ``torch.addmm``: as a linear layer where it is the sum of one, a bias for each column, nothing scaled."""
    if beta == 1 and alpha == 1 and input.dim() == 1:
        return F.linear(mat1, mat2.transpose(0, 1), input)
    return baddbmm(input, mat1, mat2, beta=beta, alpha=alpha)


def baddbmm(input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """Compute ``torch.baddbmm``, of matrices too."""
    product = torch.matmul(batch1, batch2)
    product = product if alpha == 1 else product * alpha
    return product if beta == 0 else product + (input if beta == 1 else input * beta)


def masked_fill(input: Tensor, mask: Tensor, value: Any) -> Tensor:
    """Compute ``Tensor.masked_fill`` with a number for minus infinity as a choice, whose range leaves it out."""
    lowest = max(float(value), torch.finfo(input.dtype).min)
    return torch.where(mask, torch.full((), lowest, dtype=input.dtype, device=input.device), input)


def supports_masked_fill(input: Tensor, mask: Tensor, value: Any) -> bool:
    """Return whether what is filled in stands for minus infinity."""
    return not isinstance(value, Tensor) and float(value) <= -INFINITE


def triangle(name: str) -> Callable[..., Tensor]:
    """Return what computes ``tril`` or ``triu``: a choice between the input and zero, since ONNX's has no grid."""

    def compute(input: Tensor, diagonal: int = 0) -> Tensor:
        ones = torch.ones(input.shape[-2:], dtype=torch.bool, device=input.device)
        return torch.where(
            getattr(ones, name)(diagonal), input, torch.zeros((), dtype=input.dtype, device=input.device)
        )

    return compute


def diff(
    input: Tensor, n: int = 1, dim: int = -1, prepend: Tensor | None = None, append: Tensor | None = None
) -> Tensor:
    """Compute ``torch.diff``, which ONNX does not have."""
    parts = [part for part in (prepend, input, append) if part is not None]
    x = torch.cat(parts, dim) if len(parts) > 1 else input
    for _ in range(n):
        x = x.narrow(dim, 1, x.shape[dim] - 1) - x.narrow(dim, 0, x.shape[dim] - 1)
    return x
