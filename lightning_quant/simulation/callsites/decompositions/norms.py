"""Norms of groups and vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Compute ``F.group_norm`` as an instance norm per group, an integer operation on the NPU, and an affine step."""
    shape = input.shape
    groups = input.reshape(shape[0], num_groups, shape[1] // num_groups, -1)
    normed = F.instance_norm(groups, eps=eps).reshape(shape)
    along = (1, -1, *[1] * (len(shape) - 2))
    if weight is not None:
        normed = normed * weight.reshape(along)
    return normed if bias is None else normed + bias.reshape(along)


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """Compute ``F.rms_norm``."""
    axes = list(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    normed = input * torch.rsqrt((input * input).mean(axes, keepdim=True) + eps)
    return normed if weight is None else normed * weight


def norm(
    input: Tensor, p: Any = "fro", dim: Any = None, keepdim: bool = False, dtype: Any = None, out: Any = None
) -> Tensor:
    """Compute ``torch.norm`` for p = 1 and p = 2."""
    axes = tuple(range(input.dim())) if dim is None else dim
    if p == 1:
        return torch.abs(input).sum(axes, keepdim=keepdim)
    return torch.sqrt((input * input).sum(axes, keepdim=keepdim))


def supports_norm(
    input: Tensor, p: Any = "fro", dim: Any = None, keepdim: bool = False, dtype: Any = None, out: Any = None
) -> bool:
    """Return whether it is the Euclidean length or a sum."""
    return p in ("fro", 1, 2, None) and dtype is None


def vector_norm(
    input: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None, out: Any = None
) -> Tensor:
    """Compute ``torch.linalg.vector_norm`` for the Euclidean length and for sums."""
    return norm(input, ord, dim, keepdim)


def supports_vector_norm(
    input: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None, out: Any = None
) -> bool:
    """Return whether it is the Euclidean length or a sum."""
    return ord in (1, 2) and dtype is None


def normalize(input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Any = None) -> Tensor:
    """Compute ``F.normalize`` for p = 1 and p = 2."""
    return input / norm(input, p, dim, keepdim=True).clamp(min=eps)


def supports_normalize(input: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: Any = None) -> bool:
    """Return whether it is by the Euclidean length or a sum."""
    return p in (1, 2) and out is None


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Compute ``F.layer_norm`` over several axes as one over a single axis, which the NPU has."""
    size = math.prod(normalized_shape)
    flat = input.flatten(-len(normalized_shape))
    factors, terms = (None if part is None else part.flatten() for part in (weight, bias))
    return F.layer_norm(flat, (size,), factors, terms, eps).reshape(input.shape)


def supports_layer_norm(input: Tensor, normalized_shape: Sequence[int], *_: Any, **__: Any) -> bool:
    """Return whether it is over several axes."""
    return not isinstance(normalized_shape, int) and len(normalized_shape) > 1
