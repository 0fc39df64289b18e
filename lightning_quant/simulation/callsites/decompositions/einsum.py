"""``torch.einsum`` of two tensors as a matrix product."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def einsum(equation: str, *operands: Any) -> Tensor:
    """Compute ``torch.einsum`` of two tensors as a matrix product between changes of the axes."""
    left, right = operands[0] if len(operands) == 1 else operands
    (of_left, of_right), output = _letters(equation)
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
    """Return whether it is a product of two tensors without ellipses, diagonals or new letters in the output."""
    tensors = operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    if not isinstance(equation, str) or "." in equation or len(tensors) != 2 or equation.count(",") != 1:
        return False
    (left, right), output = _letters(equation)
    return all(len(set(letters)) == len(letters) for letters in (left, right, output)) and set(output) <= set(
        left + right
    )


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
