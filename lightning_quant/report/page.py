"""Reports as one HTML file each, which opens from disk without a network: of a run, and of a sweep."""

from __future__ import annotations

import base64
import dataclasses
import io
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from lightning_quant.deploy.blame.result import BLAME_NAME, Against, Blame, read_blames
from lightning_quant.deploy.edges.contract import CONTRACT_NAME, Contract
from lightning_quant.deploy.hosts.write import feeding
from lightning_quant.errors import DataError
from lightning_quant.report.app_table import app_table
from lightning_quant.report.device_table import Candidate, device_notes, device_table, dominated
from lightning_quant.report.layers import LAYERS_NAME, LayerFigures
from lightning_quant.report.pictures import read_comparisons
from lightning_quant.report.record import RECORD_NAME, RunRecord
from lightning_quant.report.summary import rung_table, table
from lightning_quant.report.verdict import sweep_verdict, verdict
from lightning_quant.simulation.quantized_tensors import QuantizedTensor
from lightning_quant.utilities.files import atomic_write
from lightning_quant.utilities.images import open_image

with warnings.catch_warnings():  # Bokeh adds filters to a program's own
    from lightning_quant.report import charts

REPORT_NAME = "report.html"

# What the simulation is compared with, as a heading and as the name of a band.
_AGAINST = {Against.FLOAT: "float", Against.FILE: "exported file", Against.EMULATOR: "NPU, emulated"}
# What a run's page need not repeat in every row.
_IN_THE_TITLE = ("model", "precision")
# Widest a picture is embedded: wider than a phone or a column of the page, and a few dozen kB.
_WIDEST = 640
# Of a model, counted over the process; of documents and elements, random.
_BOKEH_ID = re.compile(r"\bp\d{4,}\b|\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b")


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` of a run from what is in its folder; what the run has not made is left out.

    Args:
        folder: with ``results.json``, and if they were made ``layers.json``, ``blame.json`` and ``overlays/``; the
            bundle is where ``results.json`` says.

    Raises:
        DataError: if one of these files is damaged, or there is no ``results.json``.
        ExportError: if the bundle's ``io.json`` is damaged.
    """
    folder = Path(folder)
    record = RunRecord.read(folder / RECORD_NAME)
    figures = LayerFigures.read(folder) if (folder / LAYERS_NAME).is_file() else LayerFigures()
    blames = read_blames(folder / BLAME_NAME) if (folder / BLAME_NAME).is_file() else []
    contract = _contract(folder, record)
    header, (row,) = _shortened(*table([record]))
    drawn = {
        "ladder": charts.ladder(record),
        **{f"classes{index}": chart for index, chart in enumerate(charts.classes(record))},
        "confusion": charts.confusion(record),
        "blame": charts.layer_errors([(_AGAINST[one.against], one) for one in blames]),
        "sensitivity": charts.sensitivity(figures.sensitivity),
        "histogram": charts.histogram(figures.tensors),
        "drift": charts.drift(figures),
        "oscillation": charts.oscillation(figures),
    }
    return _write(
        folder,
        "run.html",
        drawn,
        title=f"{record.model} in {str(record.precision).upper()}",
        verdict=verdict(record),
        record=record,
        summary=list(zip(header, row, strict=True)),
        rungs=_shortened(*rung_table([record]), without=_IN_THE_TITLE),
        devices=record.device,
        device_table=_shortened(*device_table([record]), without=_IN_THE_TITLE),
        device_notes=device_notes([record]),
        pictures=[
            {name: _data_url(path) for name, path in panels.items()} for panels in read_comparisons(folder / "overlays")
        ],
        contract=contract,
        app_table=None if contract is None else _shortened(*app_table(contract)),
        feeding="" if contract is None else feeding(contract),
        blames=[_layers_of(one) for one in blames],
        tensors=[_described(one) for one in figures.tensors],
        histograms=[_histogram(one) for one in figures.tensors],
        configuration=_yaml(record.config),
    )


def _contract(folder: Path, record: RunRecord) -> Contract | None:
    """What an app hands to the run's bundle and gets from it; ``None`` where there is no such bundle any more."""
    bundle = folder / record.artifacts.get("bundle", "none")
    try:
        return Contract.read(bundle) if (bundle / CONTRACT_NAME).is_file() else None
    except ValueError:  # no path at all
        return None


def write_sweep_report(folder: str | Path, runs: Mapping[Path, RunRecord]) -> Path:
    """Write ``report.html`` that compares the runs of a sweep.

    Args:
        folder: of the sweep.
        runs: the records by the folders of the runs, whose own reports are linked if they are there.
    """
    folder, records = Path(folder), list(runs.values())
    header, rows = _shortened(*table(records))
    places = [run / REPORT_NAME for run in runs]
    links = [os.path.relpath(place, folder) if place.is_file() else "" for place in places]
    drawn: dict[str, Any] = {"size": _by_size(records), "blame": charts.layer_errors(_against_float(runs))}
    drawn |= {f"latency{index}": chart for index, chart in enumerate(_by_latency(records))}
    return _write(
        folder,
        "sweep.html",
        drawn,
        title=f"Sweep of {len(records)} runs",
        verdict=sweep_verdict(records),
        header=header,
        rows=list(zip(links, rows, strict=True)),
        verdicts=[verdict(record) for record in records],
        rungs=_shortened(*rung_table(records)),
        device_table=_shortened(*device_table(records)),
        device_notes=device_notes(records),
    )


def _write(folder: Path, template: str, drawn: Mapping[str, Any], **values: Any) -> Path:
    from bokeh.embed import components
    from bokeh.resources import Resources
    from jinja2 import Environment, PackageLoader

    shown = {name: chart for name, chart in drawn.items() if chart is not None}
    script, places = _renumbered(*components(shown)) if shown else ("", {})
    environment = Environment(loader=PackageLoader("lightning_quant.report"), autoescape=True, trim_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}  # columns stay in their order
    files = resources.files("lightning_quant.report") / "templates"
    page = environment.get_template(template).render(
        **values,
        charts=places,
        bokeh=Resources(mode="inline", components=["bokeh"]).render() if shown else "",
        chart_script=script,
        style=(files / "report.css").read_text(),
        script=(files / "report.js").read_text(),
    )
    path = folder / REPORT_NAME
    with atomic_write(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return path


def _renumbered(script: str, places: dict[str, str]) -> tuple[str, dict[str, str]]:
    """Bokeh's output with ids counted from 1: the same figures make the same file, byte for byte."""
    known: dict[str, str] = {}

    def number(found: re.Match[str]) -> str:
        return known.setdefault(found[0], f"lq{len(known) + 1}")

    return _BOKEH_ID.sub(number, script), {name: _BOKEH_ID.sub(number, place) for name, place in places.items()}


def _shortened(
    header: list[str], rows: list[list[str]], without: Sequence[str] = ()
) -> tuple[list[str], list[list[str]]]:
    """Return a table without empty columns, and without some others."""
    kept = [index for index, name in enumerate(header) if name not in without and any(row[index] for row in rows)]
    return [header[index] for index in kept], [[row[index] for index in kept] for row in rows]


def _data_url(path: Path) -> str:
    picture = open_image(path)
    try:
        picture.thumbnail((_WIDEST, picture.height))
        data = io.BytesIO()
        picture.convert("RGB").save(data, "WEBP", quality=85)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a picture: {error}. Run again to draw it.") from error
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"


def _layers_of(found: Blame) -> dict[str, Any]:
    """One comparison of layers: what was found in words, the rows of the layers that are marked, and all rows."""
    return {
        "title": _AGAINST[found.against],
        "verdict": found.verdict(),
        "marked": _shortened(found.header, [found.row(one) for one in found.guilty]),
        "all": _shortened(found.header, [found.row(one) for one in found.layers]),
    }


def _described(tensor: QuantizedTensor) -> dict[str, str]:
    """One row of the table of encodings."""

    def span(values: Sequence[float], form: str) -> str:
        return " … ".join(dict.fromkeys(format(value, form) for value in values))

    return {
        "layer": tensor.layer,
        "tensor": tensor.tensor,
        "bits": str(tensor.bits),
        "grid": f"{tensor.qmin} … {tensor.qmax}{', symmetric' if tensor.symmetric else ''}",
        "scales": "1" if tensor.channels == 1 else f"{tensor.channels}, one per channel",
        "scale": span(tensor.scale, ".4g"),
        "zero point": span(sorted(-value for value in tensor.offset), "d"),
        "range": f"{tensor.low:.4g} … {tensor.high:.4g}",
        "clipped": f"{tensor.clipped:.3%}",
        "SQNR dB": "" if tensor.sqnr_db is None else f"{tensor.sqnr_db:.1f}",
    }


def _histogram(tensor: QuantizedTensor) -> dict[str, Any]:
    columns = charts.histogram_columns(tensor)
    rounded = {
        name: [round(value, 5) if isinstance(value, float) else value for value in values]
        for name, values in columns.items()
    }
    return {"ends": [tensor.qmin - 0.5, tensor.qmax + 0.5], "data": rounded}


def _by_size(records: Sequence[RunRecord]) -> Any:
    sized = [(one, Candidate(str(one.precision), 0.0, one.bytes["quantized"] / 1e6)) for one in records if one.bytes]
    return _tradeoff("size", "quantized model, MB", sized)


def _against_float(runs: Mapping[Path, RunRecord]) -> list[tuple[str, Blame]]:
    """Return what each run's rounding costs, by model and precision: the layers of a network under each other."""
    known = [(record, read_blames(run / BLAME_NAME)) for run, record in runs.items() if (run / BLAME_NAME).is_file()]
    several = len({record.model for record, _ in known}) > 1
    named = {f"{one.model} {one.precision}" if several else str(one.precision): found for one, found in known}
    return [(name, one) for name, found in named.items() for one in found if one.against is Against.FLOAT]


def _by_latency(records: Sequence[RunRecord]) -> list[Any]:
    """One chart for each device and runtime whose latency was measured."""
    timed: dict[str, list[tuple[RunRecord, Candidate]]] = {}
    for record in records:
        for report in record.device:
            if report.median_latency_us is not None:
                where = f"latency: {report.place}, {report.runtime}"
                candidate = Candidate(str(record.precision), 0.0, 0.0, report.median_latency_us / 1000)
                timed.setdefault(where, []).append((record, candidate))
    return [_tradeoff(where, "median latency, ms", pairs) for where, pairs in timed.items()]


def _tradeoff(what: str, label: str, pairs: Sequence[tuple[RunRecord, Candidate]]) -> Any:
    """The metric against one thing of which less is better."""
    measured = [(record, one) for record, one in pairs if record.exported in record.metric]
    several = len({record.model for record, _ in measured}) > 1
    candidates = [
        dataclasses.replace(
            one,
            name=f"{record.model} {one.name}" if several else one.name,
            metric=record.comparison.score(record.metric[str(record.exported)]),
        )
        for record, one in measured
    ]
    beaten = dominated(candidates)
    points = [
        (one.name, one.megabytes or one.latency_ms or 0.0, record.comparison.score(one.metric), one not in beaten)
        for (record, _), one in zip(measured, candidates, strict=True)
    ]
    metric = next((record.monitor for record, _ in measured if record.monitor), "metric")
    return charts.pareto(f"{metric} against {what}", label, metric, points)


def _yaml(values: Mapping[str, Any]) -> str:
    import yaml  # OmegaConf would read values as expressions of its own

    return yaml.safe_dump(dict(values), allow_unicode=True, sort_keys=False) if values else ""
