"""The figures of devices: one table, and which networks another one beats in all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_quant.deploy.device_report import GOOD_PSNR, DeviceReport
from lightning_quant.report.record import RunRecord


@dataclass(frozen=True)
class Candidate:
    """One network on one device, by what is traded off.

    Args:
        name: e.g. ``"w8a8"``.
        metric: higher is better.
        megabytes: size of the quantized file.
        latency_ms: median on the device; ``None`` where it was not measured.
    """

    name: str
    metric: float
    megabytes: float
    latency_ms: float | None = None


def dominated(candidates: Sequence[Candidate]) -> dict[Candidate, Candidate]:
    """Find the candidates that another one beats: at least as good in everything, and better in something.

    Returns:
        For each dominated candidate one that dominates it. The others are the Pareto front.
    """
    found = {}
    for one in candidates:
        for other in candidates:
            pairs = [(other.metric, one.metric), (-other.megabytes, -one.megabytes)]
            if other.latency_ms is not None and one.latency_ms is not None:
                pairs.append((-other.latency_ms, -one.latency_ms))
            if all(a >= b for a, b in pairs) and any(a > b for a, b in pairs):
                found[one] = other
                break
    return found


def device_table(records: Sequence[RunRecord]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of what each device reported, as text; a figure that its tier cannot measure is empty."""
    monitor = next((record.monitor for record in records if record.monitor), "metric").removeprefix("val_")
    header = ["model", "precision", "device", "tier", "runtime", "latency ms", "× float", "peak MB", "NPU/GPU/CPU"]
    header += ["PSNR dB", monitor, "MB float → quantized", "Pareto"]
    reports = [(record, report) for record in records for report in record.device]
    rows = [[*_figures(record, report), _standing(record, report, reports)] for record, report in reports]
    if any(report.size for _, report in reports):
        for row, size in zip([header, *rows], ["size", *(report.size or "" for _, report in reports)], strict=True):
            row.insert(2, size)
    return header, rows


def device_notes(records: Sequence[RunRecord]) -> list[str]:
    """Return every warning of the devices, a line each, and what the figures are."""
    reports = [(record, report) for record in records for report in record.device]
    notes = [
        f"{record.precision} on {report.place}: {warning}" for record, report in reports for warning in report.warnings
    ]
    notes += [f"{record.precision} on {report.place}: {report.error}" for record, report in reports if report.error]
    notes += [
        f"{record.precision} on {report.device}: one file of {report.bytes['compiled'] / 1e6:.2f} MB for all sizes, "
        f"{report.saved:.0%} less than a file each."
        for record, report in _first_of_sizes(reports)
        if report.saved is not None
    ]
    if any(report.against_float for _, report in reports):
        notes.append(f"PSNR against the float network: above {GOOD_PSNR:.0f} dB is typically good.")
    tiers = dict.fromkeys((report.tier, report.statement) for _, report in reports if report.statement)
    return notes + [f"{tier}: {statement}." for tier, statement in tiers]


def _figures(record: RunRecord, report: DeviceReport) -> list[str]:
    latency = "" if report.median_latency_us is None else f"{report.median_latency_us / 1000:.2f}"
    memory = "" if report.memory_bytes is None else "–".join(f"{value / 2**20:.0f}" for value in report.memory_bytes)
    layers = "" if report.layers is None else "/".join(str(len(report.layers[u])) for u in ("NPU", "GPU", "CPU"))
    psnr = "" if report.against_float is None else str(report.against_float).removesuffix(" dB")
    metric = f"{report.metric['device']:.4f} of {report.samples}" if "device" in report.metric else ""
    size = " → ".join(f"{report.bytes[name] / 1e6:.2f}" for name in ("float", "quantized") if name in report.bytes)
    return [
        record.model,
        str(record.precision),
        report.device,
        report.tier,
        report.runtime or "",
        latency or ("" if report.status == "finished" else report.status),
        f"{report.speedup:.1f}" if report.speedup else "",
        memory,
        layers,
        psnr,
        metric,
        size,
    ]


def _first_of_sizes(reports: Sequence[tuple[RunRecord, DeviceReport]]) -> list[tuple[RunRecord, DeviceReport]]:
    """Return one report for each network on a device with a runtime."""
    found: dict[tuple[int, str, str, str | None], tuple[RunRecord, DeviceReport]] = {}
    for record, report in reports:
        found.setdefault((id(record), report.tier, report.device, report.runtime), (record, report))
    return list(found.values())


def _standing(record: RunRecord, report: DeviceReport, reports: Sequence[tuple[RunRecord, DeviceReport]]) -> str:
    """Say whether a network is on the Pareto front of those of the same model on the same device and runtime."""
    this = _candidate(record, report)
    candidates = [
        candidate
        for other_record, other in reports
        if (other_record.model, other.tier, other.device, other.runtime, other.size)
        == (record.model, report.tier, report.device, report.runtime, report.size)
        and (candidate := _candidate(other_record, other)) is not None
    ]
    if len(candidates) < 2 or this is None:
        return ""
    by = dominated(candidates).get(this)
    if by is None:
        return "on the front"
    return f"dominated by {by.name if by.name != this.name else 'another ' + by.name}"


def _candidate(record: RunRecord, report: DeviceReport) -> Candidate | None:
    metric = record.metric.get(record.exported or "")
    if metric is None or "quantized" not in report.bytes or report.status != "finished":
        return None
    latency = report.median_latency_us
    return Candidate(
        str(record.precision),
        record.comparison.score(metric),
        report.bytes["quantized"] / 1e6,
        None if latency is None else latency / 1000,
    )
