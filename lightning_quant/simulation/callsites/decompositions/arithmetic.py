"""Powers, activations and sums of products as plain arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_quant.simulation.callsites.decompositions.attention import MASKED

# What is written for minus infinity: the least number of float16 and all below it, and what BERT's masks began with.
# Others may be units, which a product has to keep.
_LEAST, _OF_BERT = torch.finfo(torch.float16).min, -10000.0


def power(input: Tensor, exponent: float) -> Tensor:
    """Compute ``x ** n`` for exponents that are products and roots: the NPU has no power in integers."""
    if exponent < 0:
        return 1.0 / power(input, -exponent)
    if exponent == 0.5:
        return torch.sqrt(input)
    if exponent == 1:
        return input
    return torch.square(input) if exponent == 2 else torch.square(input) * input


def supports_power(input: Any, exponent: Any) -> bool:
    """Return whether it is 1, 2, 3, a square root, or one over these."""
    return isinstance(input, Tensor) and not isinstance(exponent, Tensor) and abs(exponent) in (0.5, 1, 2, 3)


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
    """Compute ``torch.addmm`` as a linear layer."""
    return F.linear(mat1, mat2.transpose(0, 1), input)


def supports_addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> bool:
    """Return whether it is a linear layer's sum: a bias for each column, nothing scaled."""
    return beta == 1 and alpha == 1 and input.dim() == 1


def baddbmm(input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """Compute ``torch.baddbmm``."""
    product = torch.matmul(batch1, batch2)
    product = product if alpha == 1 else product * alpha
    return product if beta == 0 else product + (input if beta == 1 else input * beta)


def masked_fill(input: Tensor, mask: Tensor, value: Any) -> Tensor:
    """Compute ``Tensor.masked_fill`` as a choice between two values, the lowest of which a range can hold."""
    return torch.where(mask, torch.full((), max(float(value), MASKED), dtype=input.dtype, device=input.device), input)


def supports_masked_fill(input: Tensor, mask: Tensor, value: Any) -> bool:
    """Return whether what is filled in is minus infinity, or the most negative number instead."""
    return not isinstance(value, Tensor) and float(value) < -1e4


def masked_by_product(input: Any, other: Any) -> Tensor:
    """Compute the product of a mask with a number that is written for minus infinity, a lower one than it takes.

    ``(1 - mask) * torch.finfo(dtype).min``, which is added to scores: with its range they are left no step.
    """
    mask: Tensor = other if isinstance(input, int | float) else input
    return mask * MASKED


def supports_masked_by_product(input: Any, other: Any, **kwargs: Any) -> bool:
    """Return whether one of both is such a number."""
    numbers = [one for one in (input, other) if isinstance(one, int | float)]
    return not kwargs and len(numbers) == 1 and (numbers[0] <= _LEAST or numbers[0] == _OF_BERT)


def diff(
    input: Tensor, n: int = 1, dim: int = -1, prepend: Tensor | None = None, append: Tensor | None = None
) -> Tensor:
    """Compute ``torch.diff``, which ONNX does not have."""
    parts = [part for part in (prepend, input, append) if part is not None]
    x = torch.cat(parts, dim) if len(parts) > 1 else input
    for _ in range(n):
        x = x.narrow(dim, 1, x.shape[dim] - 1) - x.narrow(dim, 0, x.shape[dim] - 1)
    return x
