"""The result of a comparison: all facts, as JSON, as a table and in sentences."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from lightning_quant.deploy.compare.bounds import MEASURED, Bound, Part
from lightning_quant.deploy.compare.cells import (
    Row,
    constant_row,
    encoding_row,
    exceeded_sentence,
    figure_row,
    moved_rows,
    operation_row,
    shortened,
)
from lightning_quant.deploy.compare.changes import (
    ConstantChange,
    EncodingChange,
    Exceeded,
    Figure,
    How,
    Known,
    LayersMoved,
    OperationChange,
    Stated,
)

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 160
_TITLES = {
    Part.VERSIONS: "versions",
    Part.RECIPE: "recipe",
    Part.FLOAT_WEIGHTS: "float weights",
    Part.IO: "what an app gives and gets",
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
# Measured in the run, not only on devices.
_OF_NETWORKS = (Part.METRIC, Part.CLASS)


@dataclass(frozen=True)
class Changes:
    """How one network differs from an earlier one.

    Args:
        old: name of the earlier bundle.
        new: name of the later one.
        stated: versions first, then the recipe and the float weights; only what is another one.
        figures: all of them.
        layers: which layers are on other units of a device.
        operations: of the graphs.
        encodings: the largest changes first.
        weights: likewise; biases and other constants among them.
        unfinished: the devices without a result now: ``"pending"`` or ``"failed"``.
        known: what the two have in common.
        bounds: how much worse each thing may become.
        exceeded: the bounds that are not kept.
        unchecked: the bounds for which neither of the two has a figure.
    """

    old: str
    new: str
    stated: tuple[Stated, ...]
    figures: tuple[Figure, ...]
    layers: tuple[LayersMoved, ...]
    operations: tuple[OperationChange, ...]
    encodings: tuple[EncodingChange, ...]
    weights: tuple[ConstantChange, ...]
    unfinished: dict[str, str]
    known: Known
    bounds: tuple[Bound, ...]
    exceeded: tuple[Exceeded, ...] = ()
    unchecked: tuple[Part, ...] = ()

    @property
    def within_bounds(self) -> bool:
        """Whether every bound is kept."""
        return not self.exceeded

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; infinite ones as text."""
        return {"within_bounds": self.within_bounds, **_plain(self)}

    def __str__(self) -> str:
        """Return the tables, as text of 160 columns."""
        from rich.console import Console

        file = io.StringIO()
        print_changes(self, Console(file=file, width=WIDTH))
        return file.getvalue()


def _plain(value: Any) -> Any:
    if isinstance(value, Bound):
        return {"part": value.part.value, "bound": str(value)}
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value):
        return {one.name: _plain(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


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

    for part in (Part.VERSIONS, Part.RECIPE, Part.FLOAT_WEIGHTS, Part.IO):
        stated = [one for one in changes.stated if one.part is part]
        yield _TITLES[part], part, [(mark(part, s.name), s.name, s.old or "–", s.new or "–", "") for s in stated]
    for part in Part:
        shown = [one for one in changes.figures if one.part is part]
        if part in _ONLY_CHANGED:
            shown = [one for one in shown if one.old != one.new]
        if shown:
            yield _TITLES[part], part, [(mark(part, one.name), *figure_row(one)) for one in shown]
    yield (
        "moved layers",
        None,
        [(mark(one.part, name) if one.part else "", *cells) for one, name, cells in moved_rows(changes.layers)],
    )
    operations = [(mark(Part.OPERATIONS, one.name), *operation_row(one)) for one in changes.operations]
    yield "operations", Part.OPERATIONS, shortened(operations)
    encodings = [(mark(Part.ENCODINGS, one.tensor), *encoding_row(one)) for one in changes.encodings]
    yield "encodings", Part.ENCODINGS, shortened(encodings)
    lost = [one for one in changes.weights if one.how is How.LOST]
    others = [one for one in changes.weights if one.how is not How.LOST]
    rows = [(mark(Part.PARAMETERS_LOST, one.name) or mark(Part.WEIGHTS, one.name), *constant_row(one)) for one in lost]
    yield "parameters lost", Part.PARAMETERS_LOST, shortened(rows)
    yield "weights", Part.WEIGHTS, shortened([(mark(Part.WEIGHTS, one.name), *constant_row(one)) for one in others])


def sentences(changes: Changes) -> list[str]:
    """Return what follows: the causes that are known, what is not comparable, and which bounds are exceeded."""
    said = [*_causes(changes), *(f"{device}: {status}." for device, status in changes.unfinished.items())]
    if not changes.known.samples:
        said.append("Agreement was measured on other numbers of samples before and now.")
    if changes.unchecked:
        said.append(f"Not checked, since neither has a figure: {', '.join(part.value for part in changes.unchecked)}.")
    if changes.within_bounds:
        return [*said, f"Within the {len(changes.bounds) - len(changes.unchecked)} bounds that were checked."]
    return [*said, *(f"✗ {exceeded_sentence(one)}" for one in changes.exceeded)]


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
