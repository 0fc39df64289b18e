"""Where the samples of a batch lie in the network's inputs, found by comparing batches of different size.

Sequences are often time first, masks have no samples, images come in lists, tiles of an image on the first axis.
None of that can be seen from one call. Two calls with two and with three times the same sample differ in nothing
but that.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence


class NoBatchAxisError(ValueError):
    """Two calls differ in more than the number of their samples, or in nothing."""


@dataclass(frozen=True)
class Along:
    """A tensor with samples along an axis, ``each`` entries per sample."""

    rank: int
    axis: int
    each: int


@dataclass(frozen=True)
class Whole:
    """A tensor without samples: a mask, a table, a step size."""

    rank: int


@dataclass(frozen=True)
class Items:
    """A list or tuple of ``each`` items per sample."""

    each: int


@dataclass(frozen=True)
class Packed:
    """A ``PackedSequence``, which knows its samples itself."""

    each: int = 1


Axes = Any
"""One of the above for each tensor or list of a structure, in dicts and tuples as nested as it; None for the rest."""


def find_axes(two: Any, three: Any) -> Axes:
    """Find the batch axes of a structure by comparing batches of two and of three times the same sample.

    Raises:
        NoBatchAxisError: if nothing depends on the number of samples, or it cannot be told apart from another size.
    """
    found = _compare(two, three)
    each = math.gcd(*(leaf.each for leaf in _batched(found)))
    if each == 0:
        raise NoBatchAxisError("nothing depends on the number of samples")
    return _map(found, each)


def first_axis(structure: Any) -> Axes:
    """Guess that samples lie along the first axis of the first tensor, and of those that are as long there."""
    size = _first_size(structure)
    return _describe(structure, lambda t: Along(t.dim(), 0, 1) if t.dim() and t.shape[0] == size else Whole(t.dim()))


def fit(structure: Any, axes: Axes) -> bool:
    """Return whether ``axes`` are those of such a structure; what is None in it may be a tensor in others."""
    if isinstance(structure, Tensor):
        if isinstance(axes, Along):
            return axes.rank == structure.dim() and structure.shape[axes.axis] % axes.each == 0
        return isinstance(axes, Whole) and axes.rank == structure.dim()
    if isinstance(axes, Packed) or isinstance(structure, PackedSequence):
        return structure is None or (isinstance(axes, Packed) and isinstance(structure, PackedSequence))
    if isinstance(axes, Items):
        return isinstance(structure, (list, tuple)) and len(structure) % axes.each == 0
    children = _children(structure)
    if children is None:
        return structure is None or axes is None
    expected = _children(axes)
    return (
        expected is not None
        and children.keys() == expected.keys()
        and all(fit(value, expected[key]) for key, value in children.items())
    )


def samples_in(structure: Any, axes: Axes) -> int:
    """Return how many samples a structure holds; 1 where nothing in it depends on them."""
    for value, leaf in _pairs(structure, axes):
        if isinstance(leaf, Along):
            return int(value.shape[leaf.axis]) // leaf.each
        if isinstance(leaf, Packed):
            return int(value.batch_sizes[0])
        return len(value) // leaf.each
    return 1


def cut(structure: Any, axes: Axes, start: int, stop: int) -> Any:
    """Return the structure with samples ``start`` to ``stop`` alone."""
    if isinstance(axes, Along):
        if not isinstance(structure, Tensor):
            return structure
        return structure[(slice(None),) * axes.axis + (slice(start * axes.each, stop * axes.each),)]
    if isinstance(axes, Items):
        return structure[start * axes.each : stop * axes.each]
    if isinstance(axes, Packed):
        if not isinstance(structure, PackedSequence):
            return structure
        return pack_sequence(unpack_sequence(structure)[start:stop], enforce_sorted=structure.sorted_indices is None)
    children, inner = _children(structure), _children(axes)
    if children is None or inner is None:
        return structure
    return _with_children(structure, {key: cut(value, inner[key], start, stop) for key, value in children.items()})


def _compare(two: Any, three: Any) -> Axes:
    if isinstance(two, Tensor) and isinstance(three, Tensor) and two.dim() == three.dim():
        axes = [axis for axis, sizes in enumerate(zip(two.shape, three.shape, strict=True)) if sizes[0] != sizes[1]]
        if not axes:
            return Whole(two.dim())
        small, large = two.shape[axes[0]], three.shape[axes[0]]
        if len(axes) == 1 and 3 * small == 2 * large:
            return Along(two.dim(), axes[0], large - small)
        raise NoBatchAxisError(f"shapes {tuple(two.shape)} of two samples and {tuple(three.shape)} of three")
    if isinstance(two, PackedSequence) and isinstance(three, PackedSequence):
        return Packed()
    if isinstance(two, (list, tuple)) and isinstance(three, (list, tuple)) and len(two) != len(three):
        if 3 * len(two) == 2 * len(three):
            return Items(len(three) - len(two))
        raise NoBatchAxisError(f"{len(two)} entries of two samples and {len(three)} of three")
    mine, others = _children(two), _children(three)
    if mine is None and others is None and type(two) is type(three):
        return None
    if mine is None or others is None or mine.keys() != others.keys():
        raise NoBatchAxisError(f"{type(two).__name__} of two samples and {type(three).__name__} of three")
    return _like(two, {key: _compare(value, others[key]) for key, value in mine.items()})


def _describe(structure: Any, leaf: Any) -> Axes:
    if isinstance(structure, Tensor):
        return leaf(structure)
    if isinstance(structure, PackedSequence):
        return Packed()
    children = _children(structure)
    return None if children is None else _like(structure, {k: _describe(v, leaf) for k, v in children.items()})


def _map(axes: Axes, divisor: int) -> Axes:
    """Count entries per sample in units of ``divisor``: tiles of one image are samples to the network."""
    if isinstance(axes, (Along, Items, Packed)):
        return dataclasses.replace(axes, each=axes.each // divisor)
    children = _children(axes) if isinstance(axes, (dict, tuple)) else None
    return axes if children is None else _like(axes, {key: _map(value, divisor) for key, value in children.items()})


def _batched(axes: Axes) -> Iterator[Any]:
    if isinstance(axes, (Along, Items, Packed)):
        yield axes
    elif isinstance(axes, (dict, tuple)):
        for value in (_children(axes) or {}).values():
            yield from _batched(value)


def _pairs(structure: Any, axes: Axes) -> Iterator[tuple[Any, Any]]:
    """Yield each batched part of a structure with its leaf."""
    if isinstance(axes, (Along, Items, Packed)):
        if structure is not None:
            yield structure, axes
    elif (children := _children(structure)) is not None and (inner := _children(axes)) is not None:
        for key, value in children.items():
            yield from _pairs(value, inner[key])


def _first_size(structure: Any) -> int | None:
    if isinstance(structure, Tensor):
        return int(structure.shape[0]) if structure.dim() else None
    sizes = (_first_size(value) for value in (_children(structure) or {}).values())
    return next((size for size in sizes if size is not None), None)


def _children(structure: Any) -> dict[Any, Any] | None:
    """Return what a container holds, by key or position; None for anything else."""
    if isinstance(structure, Mapping):
        return dict(structure)
    if isinstance(structure, (list, tuple)) and not isinstance(structure, PackedSequence):
        return dict(enumerate(structure))
    if dataclasses.is_dataclass(structure) and not isinstance(structure, (type, Along, Whole, Items, Packed)):
        return {one.name: getattr(structure, one.name) for one in dataclasses.fields(structure) if one.init}
    return None


def _like(structure: Any, children: dict[Any, Any]) -> Axes:
    return tuple(children.values()) if isinstance(structure, (list, tuple)) else children


def _with_children(structure: Any, children: dict[Any, Any]) -> Any:
    if hasattr(structure, "_fields"):
        return type(structure)(*children.values())
    if isinstance(structure, (list, tuple)):
        return type(structure)(children.values())
    if isinstance(structure, dict):
        made = structure.copy()
        made.update(children)
        return made
    if isinstance(structure, Mapping):
        return type(structure)(children)  # type: ignore[call-arg]
    return dataclasses.replace(structure, **children)
