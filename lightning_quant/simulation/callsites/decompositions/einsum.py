"""``torch.einsum`` as matrix products of two tensors, one after the other."""

from __future__ import annotations

import math
import string
from typing import Any

import torch
from torch import Tensor


def einsum(equation: str, *operands: Any) -> Tensor:
    """Compute ``torch.einsum`` as matrix products between changes of the axes."""
    tensors = list(_tensors(operands))
    letters, output = _letters(equation)
    while len(tensors) > 2:
        needed = {one for part in (*letters[2:], output) for one in part}
        joined = "".join(one for one in dict.fromkeys(letters[0] + letters[1]) if one in needed)
        tensors[:2] = [_product(tensors[0], tensors[1], letters[0], letters[1], joined)]
        letters[:2] = [joined]
    if len(tensors) == 2:
        return _product(tensors[0], tensors[1], letters[0], letters[1], output)
    tensor, kept = _summed(tensors[0], letters[0], output)
    order = [kept.index(one) for one in output]
    return tensor if order == sorted(order) else tensor.permute(order)


def tensordot(a: Tensor, b: Tensor, dims: Any = 2, out: None = None) -> Tensor:
    """Compute ``torch.tensordot`` as a matrix product."""
    of_a, of_b = (range(-dims, 0), range(dims)) if isinstance(dims, int) else dims
    names = iter(string.ascii_letters)
    left, right = ([next(names) for _ in range(tensor.dim())] for tensor in (a, b))
    for axis, other in zip(of_a, of_b, strict=True):
        right[other] = left[axis]
    output = "".join(one for one in (*left, *right) if (one in left) != (one in right))
    return einsum(f"{''.join(left)},{''.join(right)}->{output}", a, b)


def supports_tensordot(a: Tensor, b: Tensor, dims: Any = 2, out: None = None) -> bool:
    """Return whether the axes are given as numbers, and there are letters for all."""
    return not isinstance(dims, Tensor) and a.dim() + b.dim() <= len(string.ascii_letters)


def _product(left: Tensor, right: Tensor, of_left: str, of_right: str, output: str) -> Tensor:
    left, of_left = _summed(left, of_left, of_right + output)
    right, of_right = _summed(right, of_right, of_left + output)
    batch = [one for one in of_left if one in of_right and one in output]
    shared = [one for one in of_left if one in of_right and one not in output]
    rows = [one for one in of_left if one not in of_right]
    columns = [one for one in of_right if one not in of_left]
    sizes = dict(zip(of_left, left.shape, strict=True)) | dict(zip(of_right, right.shape, strict=True))
    left = _grouped(left, of_left, batch, rows, shared, sizes)
    right = _grouped(right, of_right, batch, shared, columns, sizes)
    product = torch.matmul(left, right).reshape([sizes[one] for one in (*batch, *rows, *columns)])
    order = [(*batch, *rows, *columns).index(one) for one in output]
    return product if order == sorted(order) else product.permute(order)


def supports_einsum(equation: Any, *operands: Any) -> bool:
    """Return whether it has no ellipses, diagonals or new letters in the output."""
    if not isinstance(equation, str) or "." in equation or equation.count(",") != len(_tensors(operands)) - 1:
        return False
    letters, output = _letters(equation)
    return all(len(set(part)) == len(part) for part in (*letters, output)) and set(output) <= set("".join(letters))


def _tensors(operands: Any) -> Any:
    return operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands


def _letters(equation: str) -> tuple[list[str], str]:
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    if not arrow:
        output = "".join(sorted(one for one in set(inputs) - {","} if inputs.count(one) == 1))
    return inputs.split(","), output


def _summed(tensor: Tensor, letters: str, needed: str) -> tuple[Tensor, str]:
    gone = [index for index, one in enumerate(letters) if one not in needed]
    return (tensor.sum(gone) if gone else tensor), "".join(one for one in letters if one in needed)


def _grouped(
    tensor: Tensor, letters: str, batch: list[str], first: list[str], second: list[str], sizes: dict[str, int]
) -> Tensor:
    """Return a tensor as (batch…, first, second), the last two flattened."""
    order = [letters.index(one) for one in (*batch, *first, *second)]
    tensor = tensor if order == sorted(order) else tensor.permute(order)
    ends = [math.prod(sizes[one] for one in part) for part in (first, second)]
    return tensor.reshape([*(sizes[one] for one in batch), *ends])
