"""What was found as a table, and what follows from it in sentences."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lightning_quant.deploy.compare.bounds import COUNTS, MEASURED, Part, Unit
from lightning_quant.deploy.compare.changes import (
    Changes,
    ConstantChange,
    EncodingChange,
    Exceeded,
    Figure,
    How,
    LayersMoved,
    OperationChange,
)
from lightning_quant.deploy.compare.snapshot import Constant, Grid

if TYPE_CHECKING:
    from rich.console import Console

# More rows of one kind are in the JSON.
_SHOWN = 8
_NAMED = 3
WIDTH = 160
_TITLES = {
    Part.VERSIONS: "versions",
    Part.RECIPE: "recipe",
    Part.FLOAT_WEIGHTS: "float weights",
    Part.METRIC: "metric",
    Part.CLASS: "classes",
    Part.PARITY: "agreement of the file",
    Part.PSNR: "agreement of devices",
    Part.AGREEMENT: "same class",
    Part.LATENCY: "latency",
    Part.MEMORY: "memory",
    Part.SIZE: "size",
    Part.LAYERS_CPU: "layers on the CPU",
    Part.LAYERS_FLOAT: "layers in float",
}
# Shown only where they are others: there may be many of them.
_ONLY_CHANGED = (Part.CLASS, Part.AGREEMENT, Part.LAYERS_CPU, Part.LAYERS_FLOAT)
# A bias has as many, and no offset.
_BIAS_BITS = 32
# Measured in the run, not only on devices.
_OF_NETWORKS = (Part.METRIC, Part.CLASS)

Row = tuple[str, ...]


def as_text(changes: Changes) -> str:
    """Return all that :func:`print_changes` prints, as plain text."""
    from rich.console import Console

    file = io.StringIO()
    print_changes(changes, Console(file=file, width=WIDTH))
    return file.getvalue()


def print_changes(changes: Changes, console: Console) -> None:
    """Print the table of what is different, and the sentences below it."""
    from rich.table import Table
    from rich.text import Text

    bounds = {one.part: str(one) for one in changes.bounds}
    view = Table(title=f"{changes.old} → {changes.new}", title_justify="left")
    for name in ("", "what", "before", "now", "change", "bound"):
        view.add_column(name, justify="left", overflow="fold", no_wrap=name in ("", "bound"))
    for title, part, rows in _sections(changes):
        if rows:
            view.add_section()
            view.add_row("", title, "", "", "", bounds.get(part, "") if part else "", style="bold")
            for mark, name, *cells in rows:
                view.add_row(mark, Text(f"  {name}"), *map(Text, cells))
    if view.row_count:
        console.print(view)
    for sentence in sentences(changes):
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)


def _sections(changes: Changes) -> Iterator[tuple[str, Part | None, list[Row]]]:
    """Yield the parts of the table: title, whose bound stands there, rows. A further part is one more line here."""
    exceeded = {(one.bound.part, name) for one in changes.exceeded for name in one.names}

    def mark(part: Part, name: str) -> str:
        return "✗" if (part, name) in exceeded else ""

    for part in (Part.VERSIONS, Part.RECIPE, Part.FLOAT_WEIGHTS):
        stated = [one for one in changes.stated if one.part is part]
        yield _TITLES[part], part, [(mark(part, s.name), s.name, s.old or "–", s.new or "–", "") for s in stated]
    for part in Part:
        shown = [one for one in changes.figures if one.part is part]
        if part in _ONLY_CHANGED:
            shown = [one for one in shown if one.old != one.new]
        if shown:
            yield _TITLES[part], part, [(mark(part, one.name), *_figure(one)) for one in shown]
    yield (
        "moved layers",
        None,
        [(mark(one.part, name) if one.part else "", *cells) for one, name, cells in _moved(changes)],
    )
    operations = [(mark(Part.OPERATIONS, one.name), *_operation(one)) for one in changes.operations]
    yield "operations", Part.OPERATIONS, _shortened(operations)
    encodings = [(mark(Part.ENCODINGS, one.tensor), *_encoding(one)) for one in changes.encodings]
    yield "encodings", Part.ENCODINGS, _shortened(encodings)
    lost = [one for one in changes.weights if one.how is How.LOST]
    others = [one for one in changes.weights if one.how is not How.LOST]
    rows = [(mark(Part.PARAMETERS_LOST, one.name) or mark(Part.WEIGHTS, one.name), *_constant(one)) for one in lost]
    yield "parameters lost", Part.PARAMETERS_LOST, _shortened(rows)
    yield "weights", Part.WEIGHTS, _shortened([(mark(Part.WEIGHTS, one.name), *_constant(one)) for one in others])


def _shortened(rows: list[Row]) -> list[Row]:
    if len(rows) <= _SHOWN:
        return rows
    return [*rows[:_SHOWN], ("", f"… and {len(rows) - _SHOWN} more, all in the JSON", "", "", "")]


def _figure(one: Figure) -> Row:
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


def _moved(changes: Changes) -> Iterator[tuple[LayersMoved, str, Row]]:
    for one in changes.layers:
        place = "in float" if one.unit == "float" else f"on the {one.unit}"
        for name in one.came:
            yield one, name, (name, "–", place, one.device)
        for name in one.left:
            yield one, "", (name, place, "–", one.device)


def _operation(one: OperationChange) -> Row:
    old, new = ("–" if node is None else node.kind for node in (one.old, one.new))
    change = one.how.value
    if one.how is How.CHANGED:
        change = "another operation" if old != new else "other attributes or inputs"
    return _named(one.name, one.graphs), old, new, change


def _encoding(one: EncodingChange) -> Row:
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


def _constant(one: ConstantChange) -> Row:
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


def sentences(changes: Changes) -> list[str]:
    """Return what follows: the causes that are known, what is not comparable, and which bounds are exceeded."""
    said = [*_causes(changes), *(f"{device}: {status}." for device, status in changes.unfinished.items())]
    if not changes.known.samples:
        said.append("Agreement was measured on other numbers of samples before and now.")
    if changes.unchecked:
        said.append(f"Not checked, since neither has a figure: {', '.join(part.value for part in changes.unchecked)}.")
    if changes.within_bounds:
        return [*said, f"Within the {len(changes.bounds) - len(changes.unchecked)} bounds that were checked."]
    return [*said, *(f"✗ {_exceeded(one)}" for one in changes.exceeded)]


def _causes(changes: Changes) -> Iterator[str]:
    known = changes.known
    if not (changes.encodings or changes.weights or changes.operations):
        same = "The files are the same to the bit."
        if not known.files:
            same = "Operations, encodings and weights are the same."
        on_devices = [one for one in changes.figures if one.part in MEASURED and one.part not in _OF_NETWORKS]
        if changes.layers or any(one.old != one.new for one in on_devices):
            same += " What differs on a device comes from the device, its tools or its samples."
        yield same
        return
    others = {
        "versions": not known.versions,
        "recipe": not known.recipe,
        "float weights": known.float_weights is False,
        "training or configuration": known.trained,
    }
    causes = ", ".join(name for name, differs in others.items() if differs)
    what = "What differs in the files"
    if not causes:
        yield f"{what} is explained by nothing that is recorded. Calibration and training data are not recorded."
    else:
        yield f"{what} can come from other {causes}, or from other data, which is not recorded."


def _exceeded(one: Exceeded) -> str:
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
