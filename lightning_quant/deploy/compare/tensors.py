"""Operations, encodings and constants of two bundles, compared by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from lightning_quant.deploy.compare.changes import ConstantChange, EncodingChange, How, OperationChange
from lightning_quant.deploy.compare.reading import Side
from lightning_quant.deploy.compare.snapshot import GRAPHS, Constant, Grid, Operation, Snapshot

# Scales that differ by less are the same range, computed on another CPU.
_SAME_SCALE = 1e-5

_Item = TypeVar("_Item")
_Change = TypeVar("_Change", OperationChange, EncodingChange, ConstantChange)


def operations(old: Snapshot, new: Snapshot) -> tuple[OperationChange, ...]:
    """Compare the nodes of the graphs."""

    def compared(graph: str, name: str, before: Operation | None, now: Operation | None) -> OperationChange:
        return OperationChange(name, (graph,), _how(before, now), before, now)

    found = _pairs(old, new, lambda graph: graph.operations, compared)
    return tuple(_merged(found, lambda one: (one.name, one.how, one.old, one.new)))


def encodings(old: Side, new: Side) -> tuple[EncodingChange, ...]:
    """Compare the grids of all tensors; the largest changes first."""

    def compared(graph: str, name: str, before: Grid | None, now: Grid | None) -> EncodingChange | None:
        change = EncodingChange(name, (graph,), _how(before, now), before, now)
        constants = [side.snapshot.graphs[graph].constants.keys() for side in (old, new)]
        if change.how is not How.CHANGED and name in constants[0] ^ constants[1]:  # said of the constant itself
            return None
        if before is None or now is None or before.bits != now.bits or before.channels != now.channels:
            return change
        exact = [side.exact.grids.get((graph, name)) for side in (old, new)]
        return _moved(change, before, now, exact)

    found = _pairs(old.snapshot, new.snapshot, lambda graph: graph.encodings, compared)
    merged = _merged(found, _move)
    return tuple(sorted(merged, key=_size_of_move, reverse=True))


def weights(old: Side, new: Side) -> tuple[ConstantChange, ...]:
    """Compare parameters and other constants; lost ones first, then the largest changes."""

    def compared(graph: str, name: str, before: Constant | None, now: Constant | None) -> ConstantChange:
        change = ConstantChange(name, (graph,), _how(before, now), before, now)
        nothing_left = now is None or now.is_zero
        if before is not None and not before.is_zero and nothing_left and is_parameter(name):
            change = replace(change, how=How.LOST)
        values = [side.exact.constants.get((graph, name)) for side in (old, new)]
        return _differing(change, values)

    found = _pairs(old.snapshot, new.snapshot, lambda graph: graph.constants, compared)
    merged = _merged(found, lambda one: (one.name, one.how))
    merged.sort(key=lambda one: (one.how is How.LOST, one.share or 0.0, one.steps or 0.0), reverse=True)
    return tuple(merged)


def is_parameter(name: str) -> bool:
    """Return whether a constant is named after a parameter of a module, not after an operation of the graph."""
    return not name.startswith("/")


def _how(old: Any, new: Any) -> How:
    return How.ADDED if old is None else How.GONE if new is None else How.CHANGED


def _pairs(
    old: Snapshot,
    new: Snapshot,
    part: Callable[[Any], Mapping[str, _Item]],
    compared: Callable[[str, str, _Item | None, _Item | None], _Change | None],
) -> Iterator[_Change]:
    """Yield what changed, graph by graph, in the order of the old graph."""
    for graph in GRAPHS:
        before, now = part(old.graphs[graph]), part(new.graphs[graph])
        for name in {**before, **now}:
            if before.get(name) != now.get(name):
                change = compared(graph, name, before.get(name), now.get(name))
                if change is not None:
                    yield change


def _merged(found: Iterator[_Change], key: Callable[[Any], Any]) -> list[_Change]:
    """Make one change of the same in both graphs; its figures are those of the file with integers."""
    groups: dict[Any, list[_Change]] = {}
    for one in found:
        groups.setdefault(key(one), []).append(one)
    return [replace(same[-1], graphs=tuple(one.graphs[0] for one in same)) for same in groups.values()]


def _moved(
    change: EncodingChange, before: Grid, now: Grid, exact: list[tuple[np.ndarray, np.ndarray] | None]
) -> EncodingChange | None:
    """Add how far a grid moved; ``None`` where it is the same but for the last digits."""
    first, second = exact
    whole = first is not None and second is not None
    if first is None or second is None:  # of one channel, the summary is the whole grid
        whole = before.channels == 1
        first, second = ((np.asarray(one.scale), np.asarray(one.offset)) for one in (before, now))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(first[0] == second[0], 1.0, second[0] / first[0])
    offsets = second[1] - first[1]
    differing = (np.abs(ratios - 1) > _SAME_SCALE) | (offsets != 0)
    if whole and not differing.any():
        return None
    return replace(
        change,
        ratio=(float(ratios.min()), float(ratios.max())),
        offset=(float(offsets.min()), float(offsets.max())),
        channels=min(int(differing.sum()), before.channels) if whole else None,
    )


def _move(change: EncodingChange) -> tuple[Any, ...]:
    """Return what is the same in both graphs if the tensor is rounded to another grid in both."""
    ratio = None if change.ratio is None else tuple(round(one / _SAME_SCALE) for one in change.ratio)
    bits = [None if grid is None else grid.bits for grid in (change.old, change.new)]
    return change.tensor, change.how, *bits, ratio, change.offset


def _size_of_move(change: EncodingChange) -> tuple[float, float]:
    if change.ratio is None or change.offset is None:
        return math.inf, math.inf
    return max(abs(math.log(one)) if one > 0 else math.inf for one in change.ratio), max(map(abs, change.offset))


def _differing(change: ConstantChange, values: list[np.ndarray | None]) -> ConstantChange:
    """Add how many values changed and by how much, where they are known and there are as many."""
    first, second = values
    if first is None or second is None or first.shape != second.shape or not first.size:
        return change
    apart = np.abs(second.astype(np.float64) - first.astype(np.float64))
    apart = np.where(first == second, 0.0, apart)
    unit = 1.0 if change.old is not None and "int" in change.old.kind else float(np.abs(first).max()) or 1.0
    return replace(change, share=float((apart != 0).mean()), steps=float(apart.max()) / unit)
