"""Tensors as a compiled model takes and gives them: integers by its scales, and its layout."""

from __future__ import annotations

from typing import Any

import numpy as np


def specs_of(io_spec: dict[Any, list[Any]]) -> dict[str, Any]:
    """Return the specifications of the tensors of a model's only graph, by name."""
    return {spec.name: spec for specs in (io_spec or {}).values() for spec in specs}


def as_specified(value: np.ndarray, spec: Any) -> np.ndarray:
    """Quantize and transpose a float tensor as its specification asks for."""
    if spec is None:
        return value
    if spec.shape:
        value = in_layout(value, tuple(spec.shape))
    kind = np.dtype(spec.dtype)
    if np.issubdtype(kind, np.integer) and spec.scale and np.issubdtype(value.dtype, np.floating):
        limits = np.iinfo(kind)
        return np.clip(np.rint(value / spec.scale) + (spec.zero_point or 0), limits.min, limits.max).astype(kind)
    return value


def dequantized(value: np.ndarray, spec: Any) -> np.ndarray:
    """Return a tensor in float32 if its specification has a scale."""
    if spec is not None and spec.scale and np.issubdtype(value.dtype, np.integer):
        return ((value.astype(np.float64) - (spec.zero_point or 0)) * spec.scale).astype(np.float32)
    return value


def in_layout(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Move the channels first or last, whichever ``shape`` has; runtimes move them to the end."""
    if value.shape == shape or value.ndim != len(shape) or value.ndim < 3:
        return value
    for moved in (np.moveaxis(value, -1, 1), np.moveaxis(value, 1, -1)):
        if moved.shape == shape:
            return np.ascontiguousarray(moved)
    return value
