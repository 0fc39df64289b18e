"""One table over runs: in the terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable, Sequence
from itertools import compress
from pathlib import Path

from lightning_quant.errors import DataError
from lightning_quant.report.device_table import device_notes, device_table
from lightning_quant.report.record import RECORD_NAME, RunRecord
from lightning_quant.utilities.files import atomic_write

log = logging.getLogger(__name__)


def _metric(name: str) -> Callable[[RunRecord], str]:
    return lambda record: f"{record.metric[name]:.4f}" if name in record.metric else ""


def _float(record: RunRecord) -> str:
    """Return the metric that drops are measured from, and whether it is of the network as it was given."""
    if record.reference is None:
        return ""
    return f"{record.reference:.4f}{' (batch norms re-estimated)' if record.is_reestimated else ''}"


def _megabytes(name: str) -> Callable[[RunRecord], str]:
    return lambda record: f"{record.bytes[name] / 1e6:.2f}" if name in record.bytes else ""


def _parity(record: RunRecord) -> str:
    if record.parity is None:
        return ""
    return f"{'equal' if record.parity.equal else f'{record.parity.psnr_db:.1f} dB'} (onnxruntime)"


COLUMNS: dict[str, Callable[[RunRecord], str]] = {
    "model": lambda record: record.model,
    "precision": lambda record: str(record.precision),
    "{metric} float": _float,
    "{metric} PTQ": _metric("ptq"),
    "{metric} exported": lambda record: _metric(record.exported or "")(record),
    "drop": lambda record: "" if record.drop is None else f"{round(record.drop, 4) + 0:.4f}",
    "exported": lambda record: record.exported or record.status,
    "MB float": _megabytes("float"),
    "MB quantized": _megabytes("quantized"),
    "parity with simulation": _parity,
    "seconds": lambda record: f"{sum(record.seconds.values()):.0f}" if record.seconds else "",
}


def table(records: Sequence[RunRecord]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the summary, as text."""
    monitor = next((record.monitor for record in records if record.monitor), "metric")
    header = [name.format(metric=monitor.removeprefix("val_")) for name in COLUMNS]
    return header, [[column(record) for column in COLUMNS.values()] for record in records]


def rung_table(records: Sequence[RunRecord]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of what every rung of the runs' ladders gained and cost, as text."""
    monitor = next((record.monitor for record in records if record.monitor), "metric")
    header = ["model", "precision", "rung", monitor.removeprefix("val_"), "drop", "seconds", "peak MB", "kept"]
    rows = []
    for record in records:
        for rung in record.ladder.rungs if record.ladder is not None else []:
            metric = "" if rung.metric is None else f"{rung.metric:.4f}"
            drop = "" if rung.drop is None else f"{round(rung.drop, 4) + 0:.4f}"
            peak = "" if rung.peak_memory_bytes is None else f"{rung.peak_memory_bytes / 1e6:.0f}"
            verdict = f"{'yes' if rung.kept else 'no'}: {rung.reason}"
            figures = [metric, drop, f"{rung.seconds:.0f}", peak, verdict, rung.changed]
            rows.append([record.model, str(record.precision), rung.rung, *figures])
    return [*header, "what it changed"], rows


def write_summary(records: Sequence[RunRecord], folder: str | Path) -> tuple[Path, Path]:
    """Write ``summary.md`` and ``summary.csv`` into ``folder``."""
    header, rows = table(records)
    folder = Path(folder)
    path = folder / "summary.md"
    rung_header, rung_rows = rung_table(records)
    parts = [_markdown(header, rows)]
    device_header, device_rows = device_table(records)
    if device_rows:
        parts += [_markdown(device_header, device_rows), "".join(f"- {note}\n" for note in device_notes(records))]
    if rung_rows:
        parts.append(_markdown(rung_header, rung_rows))
    with atomic_write(path) as partial:
        partial.write_text("\n".join(parts))
    with atomic_write(folder / "summary.csv") as partial, partial.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path, folder / "summary.csv"


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [" | ".join(header), " | ".join("---" for _ in header), *(" | ".join(row) for row in rows)]
    return "".join(f"| {line} |\n" for line in lines)


def print_summary(records: Sequence[RunRecord], title: str) -> None:
    """Print the summary as a table as wide as the terminal allows."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:  # in a file nothing has to fit a window
        console = Console(width=200)
    rungs = rung_table(records)
    what = rungs[0].index("what it changed")  # long, and in summary.md
    rungs = rungs[0][:what], [row[:what] for row in rungs[1]]
    tables = {title: table(records), "Rungs of the accuracy ladder": rungs, "On the device": device_table(records)}
    for heading, (names, lines) in tables.items():
        told = [any(column) for column in zip(*lines, strict=True)]  # the terminal has no room for empty columns
        header, *rows = (list(compress(line, told)) for line in (names, *lines))
        view = Table(title=heading, title_justify="left")
        for index, name in enumerate(header):
            text = index < 2 or name in ("rung", "kept", "device", "tier", "runtime", "Pareto")
            view.add_column(name, justify="left" if text else "right", overflow="fold", no_wrap=index < 2)
        for row in rows:
            view.add_row(*row)
        if rows:
            console.print(view)
    for note in device_notes(records):
        console.print(f"  {note}", markup=False, highlight=False)


def print_artifacts(record: RunRecord, folder: Path) -> None:
    """Print where everything a run made is."""
    for name, place in {"record": RECORD_NAME, **record.artifacts}.items():
        print(f"  {record.precision} {name.replace('_', ' ')}: {folder / place}")


def gather(folder: str | Path) -> dict[Path, RunRecord]:
    """Read the records of all runs directly below a sweep's folder by their own folders, in the order of the runs."""
    paths = sorted(Path(folder).glob(f"*/{RECORD_NAME}"), key=lambda path: _run_order(path.parent.name))
    records = {}
    for path in paths:
        try:
            records[path.parent] = RunRecord.read(path)
        except DataError as error:
            log.warning("%s", error)
    return records


def _run_order(name: str) -> tuple[int, str]:
    number = name.partition("-")[0]
    return (int(number) if number.isdigit() else 10**9, name)
