"""A part of a tensor that was written into, read from where it came from.

``y[..., :2] = boxes`` joins boxes with the rest of ``y``, in one range. ``y[..., 2:4]`` behind it is of the old ``y``,
which has steps of its own: it is taken from there, and where all is written over, part by part, the tensors in between
are computed by nobody.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_quant.simulation.callsites.decompositions.indexed_writes import box_of
from lightning_quant.simulation.callsites.decompositions.table import TRACE_SUBSTITUTES
from lightning_quant.simulation.callsites.passes import Pass
from lightning_quant.simulation.callsites.places import PlacedSite
from lightning_quant.simulation.callsites.traces import tracing_state
from lightning_quant.simulation.callsites.views import Box, as_written, box_taken

# Functions that take a part of a tensor.
TAKE = frozenset(("getitem", "narrow", "select"))


@dataclass(frozen=True)
class Join:
    """How a tensor came about.

    Args:
        made: the tensor, alive, so that its number stays its own.
        whole: what was written into.
        box: where.
        part: what was written.
    """

    made: Tensor
    whole: Tensor
    box: Box
    part: Any


@dataclass(frozen=True)
class Source:
    """Where a part of a tensor comes from.

    Args:
        tensor: what holds it, without a join.
        part: the part.
    """

    tensor: Tensor
    part: Tensor


def note_join(running: Pass, whole: Tensor, key: Any, part: Any, result: Tensor) -> None:
    """Remember how a tensor came about for the rest of the pass, if what was written is a block of it."""
    box = box_of(key, whole)
    if box is None or result is whole:
        return
    if isinstance(part, Tensor) and list(part.shape) == _sizes(box) and not torch.is_grad_enabled():
        with torch.enable_grad():
            before = whole[box]
        part = as_written(before, part)  # what is read there has the gradient of what was there
    running.joined[id(result)] = Join(result, whole, box, part)


def source_of(running: Pass, func: Any, args: Any, kwargs: Any) -> Source | None:
    """Return where the part comes from that a function takes of a tensor; ``None`` if several were joined there."""
    tensor: Tensor = args[0]
    if id(tensor) not in running.joined or (taken := box_taken(func, args, kwargs)) is None:
        return None
    box, shape = taken
    offset = [0] * len(box)
    while (join := running.joined.get(id(tensor))) is not None:
        here = [slice(one.start - by, one.stop - by) for one, by in zip(box, offset, strict=True)]
        if any(a.stop <= b.start or b.stop <= a.start for a, b in zip(here, join.box, strict=True)):
            tensor = join.whole
        elif _is_inside(here, join) and isinstance(join.part, Tensor):
            tensor = join.part
            offset = [by + one.start for by, one in zip(offset, join.box, strict=True)]
        else:
            break
    if tensor is args[0]:
        return None
    here = [slice(one.start - by, one.stop - by) for one, by in zip(box, offset, strict=True)]
    called = TRACE_SUBSTITUTES.get(Tensor.__getitem__, Tensor.__getitem__) if tracing_state() else Tensor.__getitem__
    part = called(tensor, tuple(here))
    return Source(tensor, part if part.shape == shape else part.reshape(shape))


def _sizes(box: Box) -> list[int]:
    return [one.stop - one.start for one in box]


def _is_inside(box: list[slice], join: Join) -> bool:
    part = join.part
    fits = isinstance(part, Tensor) and list(part.shape) == _sizes(join.box) and part.dtype == join.whole.dtype
    return fits and all(b.start <= a.start and a.stop <= b.stop for a, b in zip(box, join.box, strict=True))


class SourceSite(PlacedSite):
    """A place where a part is read of what was written into."""

    def compute(self, running: Pass, func: Any, args: Any, kwargs: Any) -> Any:
        """Take the part from where it came from."""
        source = source_of(running, func, args, kwargs)
        return NotImplemented if source is None else source.part
