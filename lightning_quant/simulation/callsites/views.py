"""Views of one tensor, kept alike: what is computed out of place for one of them is joined to the others.

``y[:, :4].mul_(2)`` changes ``y`` too. A call site computes a new tensor instead, as does every node of a graph: here
it is put in the place of the old one in ``y``, and the other views are taken of that again. PyTorch calls this
functionalization. It is done for the tensors alone of which the recorder saw that a change is read through another
view; all else is computed as the network's code says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_quant.simulation.callsites.decompositions.indexed_writes import (
    FILLED_WITH,
    set_item,
    supports_set_item,
)
from lightning_quant.simulation.callsites.decompositions.table import TRACE_SUBSTITUTES
from lightning_quant.simulation.callsites.functions import LIKE_ANOTHER, base_name, tensors_among
from lightning_quant.simulation.callsites.passes import Pass, replace
from lightning_quant.simulation.callsites.places import Place, PlacedSite
from lightning_quant.simulation.callsites.traces import tracing_state, untraced

# A block of a tensor: a slice for each axis.
Box = tuple[slice, ...]


@dataclass(frozen=True)
class Step:
    """How a view is taken of a tensor, and a tensor made that has another one there.

    Args:
        take: from the whole to the part.
        put: from the whole and a part to the whole with that part in it; ``None`` if several places share a value.
        key: what the whole was indexed with, if it was.
        shape: that of the part.
        box: the block of the whole that it takes, if it is one and not all of it.
        detaches: whether a change of the part has no part in the gradient of the whole.
    """

    take: Callable[[Tensor], Tensor]
    shape: torch.Size
    put: Callable[[Tensor, Tensor], Tensor] | None = None
    key: Any = None
    box: Box | None = None
    detaches: bool = False


class View:
    """A tensor of those that share their values, or what it has become."""

    def __init__(self, tensor: Tensor, whole: View | None = None, step: Step | None = None) -> None:
        self.tensor = tensor
        self.whole = whole
        self.step = step
        self.parts: list[View] = []


def is_followed(func: Any, args: Any, kwargs: Any, result: Any) -> bool:
    """Return whether views that a function returned can be taken again of what they are views of."""
    return all(step is not None for step in _steps(func, args, kwargs, result))


def is_put_back(func: Any, args: Any, kwargs: Any, result: Any) -> bool:
    """Return whether the changes of such views can be brought to what they are views of, too."""
    return all(step is not None and step.put is not None for step in _steps(func, args, kwargs, result))


def link(running: Pass, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    """Let the views that a function returned, and the tensor they are views of, follow each other's changes."""
    whole = args[0]
    made, steps = tensors_among(result), _steps(func, args, kwargs, result)
    if any(step is None for step in steps):
        return
    of = running.views.setdefault(id(whole), View(whole))
    for one, step in zip(made, steps, strict=True):
        if id(one) not in running.views:
            running.views[id(one)] = part = View(one, of, step)
            of.parts.append(part)


def _steps(func: Any, args: Any, kwargs: Any, result: Any) -> list[Step | None]:
    indices = range(len(result)) if isinstance(result, (tuple, list)) else [None]
    return [_step(func, args, kwargs, index) for index in indices]


def changed_into(running: Pass, tensor: Tensor, result: Tensor, at: Place) -> None:
    """Record that an operation in place made ``tensor`` what ``result`` is, for all who hold it or a view of it.

    Args:
        running: the pass.
        tensor: what the operation was called with.
        result: what was computed instead.
        at: the place of the operation.
    """
    view = running.views.get(id(tensor)) if running.views else None
    if result is tensor:
        return
    if view is None:
        replace(running, tensor, as_written(tensor, result))
        return
    if id(result) in running.views:
        result = result.clone()
    with _within(running, at):
        view = _become(running, view, as_written(tensor, result))
        while view.whole is not None:
            assert view.step is not None
            assert view.step.put is not None
            with torch.set_grad_enabled(torch.is_grad_enabled() and not view.step.detaches):
                above = as_written(view.whole.tensor, view.step.put(view.whole.tensor, view.tensor))
            view = _become(running, view.whole, above, but=view)


def writes_itself(running: Pass, args: Any) -> bool:
    """Return whether ``y[key] = value`` writes what is there: the second half of ``y[key] *= 2``."""
    whole, key, value = args
    view = running.views.get(id(value))
    if tensors_among(key) or view is None or view.whole is None or view.whole is not running.views.get(id(whole)):
        return False
    assert view.step is not None
    return type(view.step.key) is type(key) and bool(view.step.key == key)


class ViewSite(PlacedSite):
    """A place where a view is taken that is changed in place, or whose whole is."""

    def compute(self, running: Pass, func: Any, args: Any, kwargs: Any) -> Any:
        """Take the view."""
        called = TRACE_SUBSTITUTES.get(func, func) if tracing_state() is not None else func
        result = called(*args, **kwargs)
        link(running, func, args, kwargs, result)
        return result


def _become(running: Pass, view: View, tensor: Tensor, but: View | None = None) -> View:
    """Let a view be another tensor, and the parts of it but for one be taken of that."""
    replace(running, view.tensor, tensor)
    running.kept.append(view.tensor)  # its number stays its own
    view.tensor = tensor
    running.views[id(tensor)] = view
    for part in view.parts:
        assert part.step is not None
        if part is not but and (but is None or not _are_apart(part.step, but.step)):
            _become(running, part, part.step.take(tensor))
    return view


def _are_apart(one: Step, other: Step | None) -> bool:
    """Return whether two views are known to share no value."""
    if other is None or one.box is None or other.box is None:
        return False
    return any(a.stop <= b.start or b.stop <= a.start for a, b in zip(one.box, other.box, strict=True))


class _Written(torch.autograd.Function):
    """The values of a tensor as they were written where nothing is recorded: its gradient goes on to what it was."""

    @staticmethod
    def forward(ctx: Any, before: Tensor, written: Tensor) -> Tensor:
        return written.view_as(written)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def as_written(before: Tensor, written: Tensor) -> Tensor:
    """Return what was written in place of a tensor, with the gradient that the tensor had where none is recorded."""
    if torch.is_grad_enabled() or not before.requires_grad:
        return written
    with torch.enable_grad():
        return _Written.apply(before, written)


@contextmanager
def _within(running: Pass, at: Place) -> Iterator[None]:
    """Let operations of our own stand at a place."""
    before = running.parent, running.paused
    running.parent, running.paused = at, False
    try:
        with running.mode:
            yield
    finally:
        running.parent, running.paused = before


def box_taken(func: Any, args: Any, kwargs: Any) -> tuple[Box, torch.Size] | None:
    """Return which block of its first argument a function takes, and the shape of that; ``None`` if it is none."""
    step = _step(func, args, kwargs, None)
    return None if step is None or step.box is None else (step.box, step.shape)


def _step(func: Any, args: Any, kwargs: Any, index: int | None) -> Step | None:
    """Return how a function takes a view of a tensor; ``None`` if that depends on values, or is not of the like."""
    whole, *rest = args

    def take(tensor: Tensor) -> Tensor:
        made = func(tensor, *rest, **kwargs)
        return made if index is None else made[index]

    if tensors_among((rest, kwargs)) and base_name(func) not in LIKE_ANOTHER:
        return None
    lengths = tuple(int(size) for size in whole.shape)
    with untraced():
        like = torch.empty(lengths, dtype=whole.dtype, device="meta")
        try:
            part = take(like)
        except (RuntimeError, TypeError, ValueError):  # code that looks at values, or at devices
            return None
    if part.dtype != whole.dtype:  # the same bytes, read as other numbers
        return None
    if part.numel() == like.numel():
        if part.is_contiguous():
            return Step(take, part.shape, lambda _, values: values.reshape(lengths), detaches=func is Tensor.detach)
        order = _order(part, lengths, like.stride())
        if order is not None:
            return Step(take, part.shape, lambda _, values: values.permute(order))
    key = rest[0] if rest and func is Tensor.__getitem__ else None
    if (box := _box(part, lengths, like.stride())) is not None:
        sizes = [one.stop - one.start for one in box]

        def put(tensor: Tensor, values: Tensor) -> Tensor:
            number = values.__dict__.get(FILLED_WITH)
            return set_item(tensor, box, values.reshape(sizes) if number is None else number)

        return Step(take, part.shape, put, key, box)
    if key is not None and supports_set_item(whole, key, whole):
        return Step(take, part.shape, lambda tensor, values: set_item(tensor, key, values), key)
    return Step(take, part.shape)


def _order(part: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> list[int] | None:
    """Return the permutation that brings the axes of a view back into the order of the whole."""
    left = list(range(part.dim()))
    order = []
    for size, stride in zip(shape, strides, strict=True):
        found = [axis for axis in left if part.shape[axis] == size and (size == 1 or part.stride(axis) == stride)]
        if not found:
            return None
        left.remove(found[0])
        order.append(found[0])
    return None if left else order


def _box(part: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> Box | None:
    """Return the slices of the whole that a view has, axis by axis; ``None`` if it has not all in between them."""
    if not part.numel():
        return None
    first = part.storage_offset()
    last = first + sum((size - 1) * stride for size, stride in zip(part.shape, part.stride(), strict=True))
    box = []
    for size, stride in zip(shape, strides, strict=True):
        begin, end = (first // stride) % size, (last // stride) % size
        if end < begin:
            return None
        box.append(slice(begin, end + 1))
    inside = [(one.stop - one.start, stride) for one, stride in zip(box, strides, strict=True)]
    kept = [(size, stride) for size, stride in inside if size > 1]
    return tuple(box) if kept == [axis for axis in zip(part.shape, part.stride(), strict=True) if axis[0] > 1] else None
