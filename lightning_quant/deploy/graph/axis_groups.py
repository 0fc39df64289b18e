"""Axes of a tensor put together: other forms of the same values in the same order, and how these are transposed."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import chain

# The axes of a form, each made of neighboring axes of a tensor; axes of size one may be in none of them.
Groups = list[list[int]]


@dataclass(frozen=True)
class Move:
    """A transposition of a form.

    Args:
        groups: the form before it; of the axes by their number before all moves.
        perm: which axis of that form each axis is afterwards.
    """

    groups: Groups
    perm: list[int]


def form_of(size: Sequence[int], groups: Groups) -> list[int]:
    """Return the sizes of a form of a tensor."""
    return [math.prod(size[axis] for axis in group) for group in groups]


def separate(size: Sequence[int], most: int, also: Collection[int] = ()) -> Groups | None:
    """Return each axis that is larger than one or in ``also`` for itself; ``None`` if there are more than ``most``."""
    groups = [[axis] for axis, length in enumerate(size) if length != 1 or axis in also]
    return groups if len(groups) <= most else None


def joined(size: Sequence[int], kinds: Sequence[object] | None = None) -> Groups:
    """Return neighbors of one kind as one; without ``kinds``, all axes. Those of size one are left out."""
    groups: Groups = []
    for axis, length in enumerate(size):
        if length == 1:
            continue
        if groups and (kinds is None or kinds[groups[-1][-1]] == kinds[axis]):
            groups[-1].append(axis)
        else:
            groups.append([axis])
    return groups


def alone(size: Sequence[int], axes: Collection[int]) -> Groups:
    """Return some axes for themselves, whatever their size, and what is between them as one."""
    groups: Groups = []
    for axis, length in enumerate(size):
        if axis in axes:
            groups.append([axis])
        elif length != 1:
            if groups and groups[-1][-1] not in axes:
                groups[-1].append(axis)
            else:
                groups.append([axis])
    return groups


def is_made_of(groups: Groups, parts: Groups) -> bool:
    """Return whether each of some groups is a part of one of others, and none is missing."""
    axes, others = sorted(chain.from_iterable(groups)), sorted(chain.from_iterable(parts))
    return axes == others and all(any(set(group) <= set(part) for part in parts) for group in groups)


def moving_together(size: Sequence[int], order: Sequence[int]) -> Groups:
    """Return the fewest groups of axes, in their order, that a transposition moves as they are.

    Args:
        size: of the tensor.
        order: for each axis afterwards which one it was.
    """
    place = {axis: index for index, axis in enumerate(axis for axis in order if size[axis] != 1)}
    groups: Groups = []
    for axis in sorted(place):
        if groups and place[axis] == place[groups[-1][-1]] + 1:
            groups[-1].append(axis)
        else:
            groups.append([axis])
    return groups


def moves(size: Sequence[int], order: Sequence[int]) -> list[Move]:
    """Return transpositions of at most four axes, one after the other, that come to one of any number of axes."""
    current = moving_together(size, order)
    wanted = sorted(current, key=lambda group: list(order).index(group[0]))
    found = []
    for place, group in enumerate(wanted):
        at = current.index(group)
        if at == place:
            continue
        stop = at + 1
        while stop < len(current) and current[stop] == wanted[place + stop - at]:
            stop += 1
        parts = [current[:place], current[place:at], current[at:stop], current[stop:]]
        kept = [index for index, part in enumerate(parts) if part]
        groups = [list(chain.from_iterable(parts[index])) for index in kept]
        found.append(Move(groups, [kept.index(index) for index in (0, 2, 1, 3) if index in kept]))
        current = parts[0] + parts[2] + parts[1] + parts[3]
    return found
