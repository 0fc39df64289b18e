"""The sensitivity of every layer, as a picture and a table."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

from lightning_quant.simulation.sensitivity import LayerSensitivity

# The worst are what matters, and more bars than these cannot be read.
SHOWN = 40
_COLORS = {"weights": "#2f6fb0", "activations": "#d98032"}


def write_sensitivity(found: Sequence[LayerSensitivity], folder: str | Path, title: str) -> tuple[Path, Path]:
    """Write ``sensitivity.png`` and ``sensitivity.csv`` into ``folder``; return both paths.

    Args:
        found: what :func:`~lightning_quant.simulation.sensitivity.layer_sensitivity` returned.
        folder: made if it is not there.
        title: says what was measured, e.g. the network and its precision.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "sensitivity.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["layer", "part", "bits", "sqnr_db", "share"])
        writer.writerows([one.layer, one.part, one.bits, round(one.sqnr_db, 2), round(one.share, 6)] for one in found)
    picture = folder / "sensitivity.png"
    _draw(found[:SHOWN], len(found), picture, title)
    return picture, table


def print_sensitivity(found: Sequence[LayerSensitivity], title: str, rows: int = 15) -> None:
    """Print the most sensitive layers as a table."""
    from rich.console import Console
    from rich.table import Table

    view = Table(title=title, title_justify="left", caption=f"{min(rows, len(found))} of {len(found)}, worst first")
    for name, justify in {
        "layer": "left",
        "part": "left",
        "bits": "right",
        "SQNR dB": "right",
        "share": "right",
    }.items():
        view.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for one in found[:rows]:
        view.add_row(one.layer, one.part, str(one.bits), f"{one.sqnr_db:.1f}", f"{one.share:.1%}")
    Console().print(view)


def _draw(shown: Sequence[LayerSensitivity], total: int, path: Path, title: str) -> None:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    finite = [one for one in shown if math.isfinite(one.sqnr_db)]
    figure = Figure(figsize=(9, 1.6 + 0.24 * len(finite)), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(finite))
    axes.barh(places, [one.sqnr_db for one in finite], color=[_COLORS[one.part] for one in finite], height=0.75)
    axes.set_yticks(places, [one.layer for one in finite], fontsize=8)
    axes.set_ylim(len(finite) - 0.4, -0.6)  # worst on top
    axes.bar_label(axes.containers[0], fmt="%.1f", padding=3, fontsize=7)  # type: ignore[arg-type]
    axes.set_xlabel("SQNR of the network's output with this part alone quantized, dB (less is worse)")
    axes.set_title(f"{title}: {len(finite)} of {total}, most sensitive first", fontsize=10)
    parts = {one.part: one.bits for one in reversed(finite)}
    handles = [Patch(color=_COLORS[part], label=f"{part}, {bits} bits") for part, bits in sorted(parts.items())]
    axes.legend(handles=handles, fontsize=8, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
