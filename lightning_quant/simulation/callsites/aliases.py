"""Tensors that share their values, and whether a change of one in place is read through another: as a network runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.simulation.callsites.functions import tensors_among
from lightning_quant.simulation.callsites.places import Place
from lightning_quant.simulation.callsites.traces import untraced
from lightning_quant.simulation.callsites.views import is_followed, is_put_back

# The number of a module, and a place in its code.
Spot = tuple[int, Place]


@dataclass(frozen=True, eq=False)
class _Taken:
    """How a view was taken."""

    at: Spot
    whole: int
    call: tuple[Any, ...]  # function, arguments and what it returned

    @property
    def key(self) -> Any:
        """What the whole was indexed with; ``None`` if it was not."""
        func, args, *_ = self.call
        return args[1] if func is Tensor.__getitem__ else None

    def follows(self, writes: bool) -> bool:
        """Return whether it can follow the changes of the whole, and if it is written to, the whole its own."""
        return is_put_back(*self.call) if writes else is_followed(*self.call)


@dataclass(frozen=True)
class _Change:
    """An operation in place on a tensor that shares its values with others."""

    at: Spot
    target: int


@dataclass
class Aliases:
    """Sees which tensors are views of others, and which operations in place are to be followed by them.

    Args:
        alive: the tensors of the pass.
    """

    alive: list[Any]
    not_ours: set[int] = field(default_factory=set)  # the caller's, or what the network keeps from pass to pass
    taken: dict[int, _Taken] = field(default_factory=dict)  # views
    seen_changed: dict[int, _Change] = field(default_factory=dict)  # by an operation in place on another
    followed: set[Spot] = field(default_factory=set)  # where views are taken that see such a change
    refused: set[Spot] = field(default_factory=set)  # such operations whose change cannot be followed
    parts: set[Spot] = field(default_factory=set)  # where a part is read of what was written into
    written: set[Spot] = field(default_factory=set)  # where a view is taken that is written to
    passed_by: set[Spot] = field(default_factory=set)  # where such a part is taken from where it came from
    by_memory: dict[int, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    indexed: int = 0  # of those that are alive, by their memory
    stale: dict[int, nn.Module] = field(default_factory=dict)  # what a layer in place was given
    layers: set[nn.Module] = field(default_factory=set)  # such layers of which others use the input too

    def begin(self, not_ours: set[int]) -> None:
        """Start a pass; these tensors may not be changed out of place."""
        self.not_ours = not_ours
        self.passed_by = self.parts - self.written - self.followed
        self.by_memory.clear()
        self.indexed = 0
        self.taken.clear()
        self.seen_changed.clear()
        self.stale.clear()

    def used(self, tensors: Iterable[Tensor]) -> None:
        """Record that something computes with these tensors."""
        for tensor in tensors if self.stale or self.seen_changed else ():
            if id(tensor) in self.stale:
                self.layers.add(self.stale[id(tensor)])
            if id(tensor) in self.seen_changed:
                self._follow(tensor, self.seen_changed[id(tensor)])

    def changed(self, tensor: Tensor, at: Spot) -> None:
        """Record that an operation in place changed a tensor, and with it all that share its values."""
        others = (id(one) for one in self._sharing_values(tensor) if one is not tensor and _overlap(one, tensor))
        self.seen_changed |= dict.fromkeys(others, _Change(at, id(tensor)))

    def wrote(self, tensor: Tensor) -> None:
        """Record that an operation in place writes to a tensor, and so to all that it is a view of."""
        number = id(tensor)
        while (taken := self.taken.get(number)) is not None:
            self.written.add(taken.at)
            number = taken.whole

    def changed_by_layer(self, module: nn.Module, tensor: Tensor) -> None:
        """Record that a layer works in place on a tensor."""
        self.wrote(tensor)
        self.stale |= dict.fromkeys((id(tensor), *map(id, self._sharing_values(tensor))), module)

    def taken_here(self, at: Spot, func: Any, args: Any, kwargs: Any, result: Any) -> bool:
        """Record which tensors are views of what was given, and return whether they are to follow each other."""
        whole = args[0] if args else None
        if not isinstance(whole, Tensor):
            return False
        memory = _memory(whole)
        made = [one for one in tensors_among(result) if one is not whole and _memory(one) == memory]
        if not made or memory is None:
            return False
        self.taken |= dict.fromkeys(map(id, made), _Taken(at, id(whole), (func, args, kwargs, result)))
        return at in self.followed

    def forget_first_half(self, args: Any) -> None:
        """Regard ``y[key] *= 2`` as one change of ``y``: Python calls ``y[key]``, ``*=`` and ``y[key] =``."""
        whole, key, value = args
        taken, change = self.taken.get(id(value)), self.seen_changed.get(id(whole))
        if taken is None or change is None or change.target != id(value) or taken.whole != id(whole):
            return
        if not tensors_among(key) and type(taken.key) is type(key) and taken.key == key:
            self.seen_changed = {one: other for one, other in self.seen_changed.items() if other != change}

    def _follow(self, tensor: Tensor, change: _Change) -> None:
        """Let a tensor and that which was changed follow each other from the next pass on, or refuse the change."""
        views, wholes = set(), set()
        for number, writes in ((id(tensor), False), (change.target, True)):
            while (taken := self.taken.get(number)) is not None and taken.follows(writes):
                views.add(taken.at)
                number = taken.whole
            wholes.add(number)
        if len(wholes) == 1 and wholes.isdisjoint(self.not_ours):
            self.followed |= views
        else:
            self.refused.add(change.at)

    def _sharing_values(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors that change with this one, and itself."""
        for one in self.alive[self.indexed :]:
            if (memory := _memory(one)) is not None:
                self.by_memory[memory].append(one)
        self.indexed = len(self.alive)
        own = _memory(tensor)
        return [tensor] if own is None else self.by_memory[own]


def _memory(tensor: Tensor) -> int | None:
    """Return a number that tensors have in common which hold the same values, or a part of them."""
    if tensor.layout is not torch.strided or not tensor.numel():
        return None
    return tensor.untyped_storage().data_ptr()


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Return whether two views of one tensor have an element in common; of other numbers in the same bytes: yes."""
    if one.dtype != other.dtype:
        return True
    with untraced():
        size = one.untyped_storage().nbytes() // one.element_size()
        held = torch.zeros(size, dtype=torch.bool)
        held.as_strided(one.shape, one.stride(), one.storage_offset()).fill_(True)
        return bool(held.as_strided(other.shape, other.stride(), other.storage_offset()).any())
