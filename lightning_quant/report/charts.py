"""The charts of the reports, as Bokeh figures; ``report.js`` gives them the colors of the page's scheme."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bokeh.models import BoxAnnotation, ColumnDataSource, FactorRange, HoverTool, LabelSet, Span
from bokeh.plotting import figure
from bokeh.transform import dodge

from lightning_quant.deploy.blame.result import Against, Blame, LayerBlame
from lightning_quant.report.layers import LayerFigures
from lightning_quant.report.record import RunRecord
from lightning_quant.report.sensitivity import SHOWN
from lightning_quant.simulation.quantized_tensors import QuantizedTensor
from lightning_quant.simulation.sensitivity import LayerSensitivity

# Between light and dark enough to be seen on white and on black.
BLUE, ORANGE, GRAY, GREEN, RED = "#3d8bd4", "#de7f26", "#8a8a8a", "#3fa35b", "#d9534f"
_HISTOGRAM = "histogram"
_LABEL = 22
# What is said of a cell of a confusion matrix under the pointer.
_CELL = ("is", "taken for", "samples", "share", "in float")
# dB of the faintest and of the strongest color.
_FAINT, _STRONG = 60.0, 15.0
# What is said of a layer under the pointer.
_TIPS = ("layer", "adds", "loses", "arrived", "why", "what helps")
# Bars of more classes make a page of their own; names of more classes than these stand on each other.
_BARS, _ROWS, _COLUMNS = 40, 40, 24
# Curves of more quantizers than these cannot be distinguished.
_CURVES = 8


def ladder(record: RunRecord) -> figure | None:
    """Draw the metric after each rung, with float and the bound; what was rolled back is hollow."""
    found = record.ladder
    rungs = [] if found is None else [rung for rung in found.rungs if rung.metric is not None]
    if found is None or found.float_metric is None or not rungs:
        return None
    names = ["float", *(rung.rung for rung in rungs)]
    source = ColumnDataSource(
        {
            "rung": names,
            "metric": [found.float_metric, *(rung.metric for rung in rungs)],
            "fill": [GRAY, *(BLUE if rung.kept else "rgba(0,0,0,0)" for rung in rungs)],
            "line": [GRAY, *(BLUE for _ in rungs)],
            "seconds": ["", *(f"{rung.seconds:.0f} s" for rung in rungs)],
            "reason": ["the network as it was trained", *(rung.reason for rung in rungs)],
            "changed": ["", *(rung.changed for rung in rungs)],
        }
    )
    chart = _figure("Accuracy ladder", x_range=FactorRange(*names), height=300)
    reference = found.reference
    if found.max_drop is not None:
        end = found.comparison.lowered(reference, found.max_drop)
        chart.add_layout(
            BoxAnnotation(bottom=min(reference, end), top=max(reference, end), fill_color=GREEN, fill_alpha=0.15)
        )
    chart.add_layout(Span(location=reference, dimension="width", line_color=GRAY, line_dash="dashed"))
    chart.line("rung", "metric", source=source, line_color=BLUE, line_alpha=0.5)
    dots = chart.scatter("rung", "metric", source=source, size=13, fill_color="fill", line_color="line", line_width=2)
    tips = [
        ("", "@rung"),
        (record.monitor, "@metric{0.0000}"),
        ("", "@reason"),
        ("changed", "@changed"),
        ("took", "@seconds"),
    ]
    chart.add_tools(HoverTool(renderers=[dots], tooltips=tips))
    chart.yaxis.axis_label = record.monitor
    return chart


def classes(record: RunRecord) -> list[figure]:
    """Draw a chart for each kind of figures of single classes, float beside exported where both were measured."""
    sides = {"float": record.class_figures.get("float", {})}
    sides["quantized"] = record.class_figures.get(record.exported or "", {})
    return [
        _classes(kind, {side: found[kind] for side, found in sides.items() if found.get(kind)})
        for kind, figures in sides["quantized"].items()
        if figures
    ]


def _classes(kind: str, sides: Mapping[str, Mapping[str, float]]) -> figure:
    known = [name for name in sides["quantized"] if all(name in found for found in sides.values())]
    names = _most_changed(known, sides)
    columns = {side: [found[name] for name in names] for side, found in sides.items()}
    source = ColumnDataSource({"class": names, **columns})
    shares = all(0 <= value <= 1 for values in columns.values() for value in values)
    which = "that change most" if "float" in sides else "with the least"
    chart = _figure(
        f"{kind} of each class" if names == known else f"{kind} of {len(names)} of {len(known)} classes, those {which}",
        y_range=FactorRange(*reversed(names)), height=80 + 30 * len(names),
        **({"x_range": (0, 1)} if shares else {}),
    )  # fmt: skip
    for side, place, color in (("float", 0.19, GRAY), ("quantized", -0.19, BLUE)):
        if side in columns:
            chart.hbar(
                y=dodge("class", place, range=chart.y_range),
                right=side,
                height=0.34,
                source=source,
                color=color,
                legend_label=side,
            )
    chart.add_tools(HoverTool(tooltips=[("", "@class"), *((side, f"@{side}{{0.000}}") for side in columns)]))
    chart.xaxis.axis_label = kind
    _legend_above(chart)
    return chart


def _most_changed(names: Sequence[str], sides: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return as many classes as a chart has room for, in their order: those furthest from float, else the lowest."""
    figures, reference = sides["quantized"], sides.get("float", {})
    changes = {name: -abs(figures[name] - reference[name]) if reference else figures[name] for name in names}
    shown = set(sorted(names, key=changes.__getitem__)[:_BARS])
    return [name for name in names if name in shown]


def confusion(record: RunRecord) -> figure | None:
    """Draw which classes what was exported takes for each other: the stronger a cell, the larger its share of the row.

    Blue is what was recognized, orange what was taken for something else. Cells without a sample are left out.
    """
    found, reference = record.confusion.get(record.exported or ""), record.confusion.get("float")
    if found is None:
        return None
    if reference is not None and reference.classes != found.classes:
        reference = None
    cells: dict[str, list[Any]] = {name: [] for name in ("label", "prediction", "alpha", "color", *_CELL)}
    for row, (label, counts) in enumerate(zip(found.classes, found.counts, strict=True)):
        total = sum(counts)
        for column, count in enumerate(counts):
            in_float = 0 if reference is None else reference.counts[row][column]
            if count or in_float:
                share = count / max(total, 1)
                told = (label, found.classes[column], count, f"{share:.1%} of {total}", in_float)
                cells["label"].append(row)
                cells["prediction"].append(column)
                # a single error is to be seen as well
                cells["alpha"].append(0.15 + 0.85 * share if count else 0.0)
                cells["color"].append(BLUE if row == column else ORANGE)
                for name, value in zip(_CELL, told, strict=True):
                    cells[name].append(value)
    size = len(found.classes)
    ends = (-0.5, size - 0.5)
    height = 140 + max(18 * min(size, _ROWS), min(30 * size, 600))
    chart = _figure("Confusion of classes", x_range=ends, y_range=ends[::-1], height=height)
    squares = chart.rect(
        x="prediction", y="label", width=1, height=1, source=ColumnDataSource(cells), fill_color="color",
        fill_alpha="alpha", line_color=None,
    )  # fmt: skip
    tips = [("is", "@is"), ("taken for", "@{taken for}"), ("samples", "@samples"), ("share", "@share")]
    chart.add_tools(
        HoverTool(renderers=[squares], tooltips=[*tips, *([] if reference is None else [("in float", "@{in float}")])])
    )
    names = {index: name if len(name) <= _LABEL else f"{name[:_LABEL]}…" for index, name in enumerate(found.classes)}
    for axis, most, title in ((chart.xaxis, _COLUMNS, "predicted"), (chart.yaxis, _ROWS, "label")):
        axis.ticker = list(range(0, size, -(-size // most)))
        axis.major_label_overrides = names
        axis.major_label_text_font_size = "11px"
        axis.axis_label = title
    chart.xaxis.major_label_orientation = "vertical" if size > 4 else "horizontal"
    chart.grid.visible = False
    return chart


def sensitivity(found: Sequence[LayerSensitivity], shown: int = SHOWN) -> figure | None:
    """Draw the most sensitive layers: the output's noise with that part alone quantized."""
    finite = [one for one in found if math.isfinite(one.sqnr_db)][:shown]
    if not finite:
        return None
    rows = list(range(len(finite), 0, -1))  # most sensitive on top
    source = ColumnDataSource(
        {
            "row": rows,
            "name": [f"{one.layer} · {one.part}" for one in finite],
            "sqnr": [one.sqnr_db for one in finite],
            "bits": [one.bits for one in finite],
            "share": [f"{one.share:.1%}" for one in finite],
            "part": [one.part for one in finite],
            "color": [ORANGE if one.part == "weights" else BLUE for one in finite],
        }
    )
    chart = _figure("Sensitivity of layers", height=110 + 19 * len(finite))
    chart.hbar(y="row", right="sqnr", height=0.7, source=source, color="color", legend_group="part")
    tips = [("", "@name"), ("SQNR", "@sqnr{0.0} dB"), ("bits", "@bits"), ("of all weights or operations", "@share")]
    chart.add_tools(HoverTool(tooltips=tips))
    chart.xaxis.axis_label = "SQNR of the output, dB (less is worse)"
    chart.x_range.start = min(0.0, finite[0].sqnr_db)
    chart.yaxis.ticker = rows
    # the ends of the names tell layers apart, and a phone has no room for more
    chart.yaxis.major_label_overrides = {
        row: one.layer if len(one.layer) <= _LABEL else f"…{one.layer[-_LABEL:]}"
        for row, one in zip(rows, finite, strict=True)
    }
    chart.yaxis.major_label_text_font_size = "11px"
    chart.ygrid.visible = False
    _legend_above(chart)
    return chart


def layer_errors(found: Sequence[tuple[str, Blame]]) -> figure | None:
    """Draw networks as bands of their layers, from input to output: the stronger the color, the larger the error.

    Args:
        found: comparisons of layers, each with a name of its own. Two bands for each: what a layer adds by itself
            (against float, what it loses by itself), and what has arrived behind it.
    """
    cells: dict[str, list[Any]] = {name: [] for name in ("row", "left", "right", "alpha", "line", *_TIPS)}
    bands = []
    for name, one in found:
        for what in ("loses" if one.against is Against.FLOAT else "adds", "arrived"):
            bands.append((name, what))
            for place, layer in enumerate(one.layers):
                decibels = {"adds": layer.own.psnr_db, "arrived": layer.arrived.psnr_db, "loses": _decibels(layer.lost)}
                strength = min(max((_FAINT - decibels[what]) / (_FAINT - _STRONG), 0.0), 1.0)
                cells["row"].append((name, what))
                cells["left"].append(place / len(one.layers))
                cells["right"].append((place + 1) / len(one.layers))
                cells["alpha"].append(0.05 + 0.95 * strength)
                cells["line"].append(RED if layer.guilty and what != "arrived" else "rgba(0,0,0,0)")
                for column, value in zip(_TIPS, _tips(one, layer), strict=True):
                    cells[column].append(value)
    if not cells["row"]:
        return None
    chart = _figure(None, y_range=FactorRange(*reversed(bands)), x_range=(0, 1), height=90 + 40 * len(bands))
    bars = chart.hbar(
        y="row", left="left", right="right", height=0.8, source=ColumnDataSource(cells), fill_color=ORANGE,
        fill_alpha="alpha", line_color="line", line_width=2,
    )  # fmt: skip
    chart.add_tools(HoverTool(renderers=[bars], tooltips=[(column, f"@{{{column}}}") for column in _TIPS]))
    chart.xaxis.axis_label = "layers, from the input to the output"
    chart.xaxis.ticker = []
    chart.grid.visible = False
    chart.y_range.range_padding = 0.05
    return chart


def _decibels(share: float | None) -> float:
    return -10 * math.log10(share) if share else math.inf


def _tips(found: Blame, layer: LayerBlame) -> tuple[str, ...]:
    cells = dict(zip(found.header, found.row(layer), strict=True))
    return tuple(cells.get(column, "") for column in _TIPS)


def histogram(tensors: Sequence[QuantizedTensor]) -> figure | None:
    """Draw the values of one tensor on its integer grid; ``report.js`` changes the tensor that is shown."""
    if not tensors:
        return None
    columns = histogram_columns(tensors[0])
    source = ColumnDataSource(columns, name=_HISTOGRAM)
    chart = _figure(None, height=320, name="histogram_figure")
    chart.quad(left="left", right="right", bottom=0, top="share", source=source, fill_color="color", line_color=None)
    for end in (tensors[0].qmin - 0.5, tensors[0].qmax + 0.5):
        chart.add_layout(
            Span(location=end, dimension="height", line_color=ORANGE, line_width=2, tags=["end of the grid"])
        )
    chart.add_tools(
        HoverTool(tooltips=[("integers", "@left{0.0} to @right{0.0}"), ("of the values", "@share{0.000} %")])
    )
    chart.xaxis.axis_label = "integer"
    chart.yaxis.axis_label = "of the values, %"
    chart.y_range.start = 0
    return chart


def histogram_columns(tensor: QuantizedTensor) -> dict[str, list[float] | list[str]]:
    """Return the columns of :func:`histogram` for one tensor: edges in integers, shares in percent, colors."""
    first, last = tensor.bins
    width = (last - first) / len(tensor.counts)
    left = [first + index * width for index in range(len(tensor.counts))]
    total = max(sum(tensor.counts), 1)
    middle = [edge + width / 2 for edge in left]
    inside = [tensor.qmin - 0.5 <= place <= tensor.qmax + 0.5 for place in middle]
    return {
        "left": left,
        "right": [edge + width for edge in left],
        "share": [100 * count / total for count in tensor.counts],
        "color": [BLUE if within else ORANGE for within in inside],
    }


def drift(figures: LayerFigures) -> figure | None:
    """Draw how the ranges that moved most did so during training."""
    moved = sorted(figures.drift.items(), key=lambda item: -max(map(abs, item[1]), default=0))[:_CURVES]
    if not moved or len(figures.drift_steps) < 2:
        return None
    source = ColumnDataSource(
        {
            "steps": [figures.drift_steps for _ in moved],
            "values": [values for _, values in moved],
            "name": [name for name, _ in moved],
            "color": [BLUE, ORANGE, GREEN, "#b56bd0", "#c9a227", RED, "#35a7a7", GRAY][: len(moved)],
        }
    )
    chart = _figure("Drift of ranges in training", height=320)
    chart.multi_line("steps", "values", source=source, color="color", line_width=2)
    chart.add_tools(HoverTool(tooltips=[("", "@name")], line_policy="nearest"))
    chart.xaxis.axis_label = "training step"
    chart.yaxis.axis_label = "log2 of the scale, relative to calibration"
    return chart


def oscillation(figures: LayerFigures) -> figure | None:
    """Draw which share of the weights turned back and forth between two integers during training."""
    if len(figures.oscillation_steps) < 2:
        return None
    chart = _figure("Weights that oscillate in training", height=260)
    for label, shares, color in (
        ("oscillating", figures.oscillating, ORANGE),
        ("frozen", figures.frozen, BLUE),
    ):
        if any(shares) or label == "oscillating":
            percent = [100 * share for share in shares]
            chart.line(figures.oscillation_steps, percent, color=color, line_width=2, legend_label=label)
    _legend_above(chart)
    chart.xaxis.axis_label = "training step"
    chart.yaxis.axis_label = "% of the weights"
    return chart


def pareto(title: str, x_label: str, y_label: str, points: Sequence[tuple[str, float, float, bool]]) -> figure | None:
    """Draw the runs of a sweep by what is traded off; those that no other one beats are joined by a line.

    Args:
        title: of the chart.
        x_label: less is better.
        y_label: of the metric.
        points: name, x, y, and whether it is on the front.
    """
    if not points:
        return None
    source = ColumnDataSource(
        {
            "name": [name for name, *_ in points],
            "x": [x for _, x, _, _ in points],
            "y": [y for _, _, y, _ in points],
            "color": [BLUE if front else GRAY for *_, front in points],
        }
    )
    chart = _figure(title, height=340)
    front = sorted((x, y) for _, x, y, is_front in points if is_front)
    chart.line([x for x, _ in front], [y for _, y in front], line_color=BLUE, line_alpha=0.5)
    dots = chart.scatter("x", "y", source=source, size=13, color="color")
    chart.add_tools(
        HoverTool(renderers=[dots], tooltips=[("", "@name"), (x_label, "@x{0.00}"), (y_label, "@y{0.0000}")])
    )
    chart.add_layout(LabelSet(x="x", y="y", text="name", source=source, x_offset=9, y_offset=6, text_font_size="12px"))
    chart.x_range.range_padding = chart.y_range.range_padding = 0.25
    chart.xaxis.axis_label, chart.yaxis.axis_label = x_label, y_label
    return chart


def _figure(title: str | None, **options: object) -> figure:
    chart = figure(title=title, sizing_mode="stretch_width", toolbar_location=None, tools="", **options)
    # the page shows through, and scrolling it on a phone must not zoom a chart
    chart.background_fill_color = chart.border_fill_color = None
    chart.outline_line_color = None
    chart.grid.grid_line_alpha = 0.35
    return chart


def _legend_above(chart: figure) -> None:
    legend = chart.legend[0]
    legend.orientation = "horizontal"
    legend.background_fill_alpha = 0
    legend.border_line_alpha = 0
    chart.add_layout(legend, "above")
