"""The table of the showcase, from the records that are there."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.measure import table
from benchmarks.showcase.catalogue import DOMAINS
from benchmarks.showcase.domain import Domain
from lightning_quant.deploy.device_report import DeviceReport
from lightning_quant.ladder.gate import Ladder

RESULTS = Path(__file__).parents[1] / "results" / "showcase"
PRECISIONS = ("w8a8", "w8a16", "w4a16", "w4a8")
HEADS = (
    "domain", "network", "", "figure", "float", "AIMET min-max", "AIMET AdaRound", "PTQ", "ladder", "rung", "QAT",
    "16 samples: emulated · simulated · float", "NPU / float / CPU",
)  # fmt: skip


def path_of(domain: str, part: str, precision: str = "", seed: int = 0) -> Path:
    """Where a record is kept; the float network has no precision."""
    return RESULTS / f"{'-'.join(one for one in (domain, part, precision) if one)}-{seed}.json"


def read(domain: str, part: str, precision: str = "", seed: int = 0) -> dict[str, Any] | None:
    """Return a record, or ``None`` where there is none."""
    path = path_of(domain, part, precision, seed)
    return json.loads(path.read_text()) if path.is_file() else None


def has_trained(line: dict[str, Any]) -> bool:
    """Whether a run of ours went on to train, rather than stop at a rung before."""
    return any(rung.rung == "qat" for rung in Ladder.from_dict(line["ladder"]).rungs) if "ladder" in line else False


def rows() -> Iterator[list[str]]:
    """Yield a row for each domain and precision of which anything is known: figures in percent, seconds in brackets."""
    for domain in DOMAINS.values():
        in_float = read(domain.name, "float")
        if in_float is None:
            continue
        for precision in PRECISIONS:
            seeds = [read(domain.name, "ours", precision, seed) for seed in range(domain.seeds)]
            known = [one for one in seeds if one is not None]
            plain = [_plain(read(domain.name, part, precision)) for part in ("aimet", "aimet_adaround")]
            if known or any(plain):
                start = [domain.name, domain.network, precision.upper(), domain.figure, _percent(in_float["figure"])]
                yield [*start, *plain, *(_ours(domain, known) if known else [""] * 6)]


def markdown() -> str:
    """Return the table."""
    return table(HEADS, list(rows()))


def _ours(domain: Domain, seeds: list[dict[str, Any]]) -> list[str]:
    line = seeds[0]
    if "ladder" not in line:
        return [_error(line), *[""] * 5]
    ladder = Ladder.from_dict(line["ladder"])
    first = ladder.rungs[0]
    rungs = [rung for rung in ladder.rungs if rung.rung != "qat"]
    best = next((rung for rung in reversed(rungs) if rung.kept), first)
    figures = [_percent(first.metric, first.seconds), _percent(best.metric, sum(rung.seconds for rung in rungs))]
    figures += [best.rung, _over_seeds(seeds)]
    if "device" not in line:
        return [*figures, _error(line), ""]
    report = DeviceReport.from_json(line["device"])
    assert report.layers is not None
    counts = (len(report.layers["NPU"]), len(report.float_islands or ()), len(report.fallen_back or ()))
    metric = report.metric or {}
    same = f"{_percent(metric.get('device'))} · {_percent(metric.get('simulation'))} · {_percent(metric.get('float'))}"
    return [*figures, same, " / ".join(map(str, counts))]


def _over_seeds(seeds: list[dict[str, Any]]) -> str:
    ladders = [Ladder.from_dict(one["ladder"]) for one in seeds if "ladder" in one]
    trained = [rung for ladder in ladders for rung in ladder.rungs if rung.rung == "qat" and rung.metric is not None]
    if not trained:
        return "–"
    found = [rung.metric for rung in trained if rung.metric is not None]
    spread = f" ± {100 * statistics.stdev(found):.1f}" if len(found) > 1 else ""
    return f"{100 * statistics.mean(found):.1f}{spread} ({statistics.mean(rung.seconds for rung in trained):.0f})"


def _plain(line: dict[str, Any] | None) -> str:
    if line is None:
        return ""
    return _percent(line["figure"], line["seconds_until"]) if "figure" in line else _error(line)


def _percent(value: float | None, seconds: float | None = None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f}" + ("" if seconds is None else f" ({seconds:.0f})")


def _error(line: dict[str, Any]) -> str:
    """Return what ended a part: after an earlier error it went on without that stage."""
    stage, error = next(reversed(line["errors"].items()), ("", {"type": "unknown", "message": ""}))
    return error["message"] if error["type"] == "TimeLimit" else f"{error['type']} in {stage}"
