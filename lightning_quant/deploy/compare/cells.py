"""Single facts of a comparison as cells of a table, or as a sentence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from lightning_quant.deploy.compare.bounds import COUNTS, Part, Unit
from lightning_quant.deploy.compare.changes import (
    ConstantChange,
    EncodingChange,
    Exceeded,
    Figure,
    How,
    LayersMoved,
    OperationChange,
)
from lightning_quant.deploy.compare.snapshot import Constant, Grid

# More rows of one kind are in the JSON.
_SHOWN = 8
_NAMED = 3
# A bias has as many, and no offset.
_BIAS_BITS = 32

Row = tuple[str, ...]


def shortened(rows: list[Row]) -> list[Row]:
    """Return the first rows, and how many more there are."""
    if len(rows) <= _SHOWN:
        return rows
    return [*rows[:_SHOWN], ("", f"… and {len(rows) - _SHOWN} more, all in the JSON", "", "", "")]


def figure_row(one: Figure) -> Row:
    """Return name, both figures and the change."""
    old, new = (_number(one.part, value) for value in (one.old, one.new))
    return one.name, old, new, _change(one)


def _number(part: Part, value: float | None) -> str:
    if value is None:
        return "–"
    match part:
        case Part.PARITY | Part.PSNR:
            return "equal" if value == math.inf else f"{value:.1f} dB"
        case Part.AGREEMENT:
            return f"{100 * value:.2f} %"
        case Part.LATENCY:
            return f"{value / 1000:.3f} ms"
        case Part.MEMORY:
            return f"{value / 2**20:.1f} MB"
        case Part.SIZE:
            return f"{value / 1e6:.3f} MB" if value >= 1e5 else f"{value / 1e3:.2f} kB"
        case Part.LAYERS_CPU | Part.LAYERS_FLOAT:
            return f"{value:.0f}"
    return f"{value:.4f}"


def _change(one: Figure) -> str:
    if one.new is None:
        return "not measured any more"
    if one.old is None:
        return "was not measured"
    if one.old == one.new:
        return ""
    moved = one.new - one.old
    if math.isinf(moved):
        return "above 100 dB in both" if not one.worse else "worse" if one.worse > 0 else "better"
    if one.part in (Part.LATENCY, Part.MEMORY, Part.SIZE) and one.old:
        return f"{100 * moved / one.old:+.2f} %"
    if one.part in (Part.PARITY, Part.PSNR):
        return f"{moved:+.1f} dB"
    if one.part in (Part.METRIC, Part.CLASS, Part.AGREEMENT):
        return f"{100 * moved:+.2f} pt"
    return f"{moved:+.0f}"


def moved_rows(layers: Sequence[LayersMoved]) -> Iterator[tuple[LayersMoved, str, Row]]:
    """Yield a row for each layer, with its unit and the name by which it may exceed a bound."""
    for one in layers:
        place = "in float" if one.unit == "float" else f"on the {one.unit}"
        for name in one.came:
            yield one, name, (name, "–", place, one.device)
        for name in one.left:
            yield one, "", (name, place, "–", one.device)


def operation_row(one: OperationChange) -> Row:
    """Return name, both types and the change."""
    old, new = ("–" if node is None else node.kind for node in (one.old, one.new))
    change = one.how.value
    if one.how is How.CHANGED:
        change = "another operation" if old != new else "other attributes or inputs"
    return _named(one.name, one.graphs), old, new, change


def encoding_row(one: EncodingChange) -> Row:
    """Return tensor, both grids and how far they are apart."""
    return _named(one.tensor, one.graphs), _grid(one.old), _grid(one.new), _grid_change(one)


def _grid(grid: Grid | None) -> str:
    if grid is None:
        return "–"
    scale, offset = (_range(pair, digits) for pair, digits in ((grid.scale, 6), (grid.offset, 10)))
    return f"{grid.bits} bits, scale {scale}" + (f", offset {offset}" if grid.bits < _BIAS_BITS else "")


def _grid_change(one: EncodingChange) -> str:
    if one.old is None or one.new is None:
        return "rounded now" if one.old is None else "not rounded any more"
    said = []
    if one.old.bits != one.new.bits:
        said.append(f"{one.old.bits} → {one.new.bits} bits")
    if one.old.channels != one.new.channels:
        said.append(f"{one.old.channels} → {one.new.channels} channels")
    if one.ratio is not None and one.ratio != (1.0, 1.0):
        said.append(f"scale ×{_range(one.ratio, 5)}")
    if one.offset is not None and any(one.offset):
        low, high = one.offset
        said.append(f"offset {low:+g}" if low == high else f"offset {low:+g} to {high:+g}")
    if one.old.channels > 1 and one.old.channels == one.new.channels:
        said.append("some channels" if one.channels is None else f"{one.channels} of {one.old.channels} channels")
    return ", ".join(said)


def constant_row(one: ConstantChange) -> Row:
    """Return name, both summaries and how much is different."""
    return _named(one.name, one.graphs), _values(one.old), _values(one.new), _constant_change(one)


def _values(constant: Constant | None) -> str:
    if constant is None:
        return "–"
    return f"{constant.kind} {list(constant.shape)}, {_range((constant.low, constant.high), 5)}"


def _constant_change(one: ConstantChange) -> str:
    if one.old is None or one.new is None:
        return one.how.value
    if one.how is How.LOST:
        return "all 0"
    if (one.old.kind, one.old.shape) != (one.new.kind, one.new.shape):
        return "another type or size"
    if one.share is None or one.steps is None:
        step = one.new.mean - one.old.mean
        return f"changed; the mean moved by {step:+.4g} (a baseline has no single values)"
    unit = "steps" if "int" in one.old.kind else "of the largest value"
    amount = f"{one.steps:.0f} {unit}" if unit == "steps" else f"{one.steps:.2g} {unit}"
    return f"{_percent(one.share)} of the values, by up to {amount}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _range(pair: tuple[float, float], digits: int) -> str:
    low, high = (f"{value:.{digits}g}" for value in pair)
    return low if low == high else f"{low} to {high}"


def _named(name: str, graphs: tuple[str, ...]) -> str:
    return f"{name} · {', '.join(graphs)}"


def exceeded_sentence(one: Exceeded) -> str:
    """Say which bound is not kept, by what and by how much."""
    part, bound = one.bound.part, one.bound
    names = ", ".join(one.names[:_NAMED]) + (f" and {len(one.names) - _NAMED} more" if len(one.names) > _NAMED else "")
    if one.missing:
        return f"{part.value}: not measured any more: {names}. The bound is {bound}."
    if bound.unit is Unit.EXPLAINED:
        return f"{part.value}: changed, and nothing that is recorded explains it: {names}."
    if bound.unit is Unit.UNCHANGED:
        return f"{part.value}: expected unchanged: {names}."
    if part in COUNTS:
        return f"{part.value}: {one.worst or 0:.0f} more, at most {bound}: {names}."
    unit = f" {bound.unit.value}" if bound.unit.value else ""
    return f"{part.value}: worse by {one.worst or 0:.4g}{unit}, the bound is {bound}: {names}."
