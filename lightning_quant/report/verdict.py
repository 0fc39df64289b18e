"""The result of a run in one sentence, for non-specialists."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_quant.deploy.device_report import DeviceReport
from lightning_quant.report.record import RunRecord


def verdict(record: RunRecord) -> str:
    """Say in one sentence what the precision needs, what it loses, how much smaller and faster it makes the network.

    For example ``"W4A16 needs QAT: 3.1 points lost by PTQ, 0.4 after it; 7.4x smaller."`` A point is a hundredth of a
    metric between 0 and 1.
    """
    name = str(record.precision).upper()
    if record.status != "finished":
        return f"{name} {record.status}: {record.error}" if record.error else f"{name}: {record.status}."
    measured = record.reference is not None and record.exported in record.metric
    parts = [f"{name} {_needs(record)}{_losses(record)}" if measured else f"{name} {_after(record)}"]
    if {"float", "quantized"} <= record.bytes.keys():
        parts.append(_ratio(record.bytes["float"] / record.bytes["quantized"], "smaller", "larger"))
    parts += [_speed(report) for report in record.device if report.speedup]
    if not measured:  # then the outputs have to do
        parts += [f"{one.against_float} to float on {one.place}" for one in record.device if one.against_float]
    return "; ".join(parts) + "."


def sweep_verdict(records: Sequence[RunRecord]) -> str:
    """Say in one sentence of a sweep which network loses least, and which is smallest."""
    finished = [one for one in records if one.status == "finished" and one.drop is not None]
    if not finished:
        return f"None of {len(records)} runs finished."
    best = min(finished, key=lambda one: (one.drop or 0.0, one.bytes.get("quantized", 0)))
    parts = [f"{_label(best, finished)} is closest to float ({amount(best, best.drop)})"]
    sized = [one for one in finished if "quantized" in one.bytes]
    if sized and (small := min(sized, key=lambda one: one.bytes["quantized"])) is not best:
        ratio = small.bytes["float"] / small.bytes["quantized"]
        size = _ratio(ratio, "smaller", "larger")
        parts.append(f"{_label(small, finished)} is smallest ({size}, {amount(small, small.drop)})")
    if failed := len(records) - len(finished):
        parts.append(f"{failed} of {len(records)} runs did not finish")
    return "; ".join(parts) + "."


def amount(record: RunRecord, drop: float | None) -> str:
    """Return a drop of the metric in words, e.g. ``"0.4 points lost"``."""
    if drop is None:
        return ""
    if record.mode == "max" and 0 <= (record.reference or 0.0) <= 1:
        points = round(100 * drop, 1) + 0.0
        unit = "point" if abs(points) == 1 else "points"
        return f"{abs(points):.1f} {unit} {'gained' if points < 0 else 'lost'}"
    return f"{record.monitor} {'better' if drop < 0 else 'worse'} by {abs(drop):.4g}"


def _needs(record: RunRecord) -> str:
    exported, bound = record.exported, None if record.ladder is None else record.ladder.max_drop
    short = bound is not None and record.drop is not None and record.drop > bound
    if short and bound is not None and bound < 0:  # better than float, which is rarely asked for
        return f"falls short of what it has to gain ({amount(record, bound)})"
    if short:
        return f"falls short of the {amount(record, bound).replace(' lost', '')} it may lose"
    if exported == "ptq":
        return "needs no training"
    if exported == "qat":
        return "needs QAT" if bound is not None else "is best after QAT"
    return f"needs {exported}, no training"


def _after(record: RunRecord) -> str:
    if record.exported is None:
        return "was not exported"
    return f"after {record.exported.upper() if record.exported in ('ptq', 'qat') else record.exported}"


def _losses(record: RunRecord) -> str:
    def lost(rung: str) -> str:
        assert record.reference is not None
        return amount(record, record.comparison.drop(record.metric[rung], record.reference))

    exported = str(record.exported)
    if exported == "ptq" or "ptq" not in record.metric:
        return f": {lost(exported)}"
    return f": {lost('ptq')} by PTQ, {lost(exported)} after {exported.upper() if exported == 'qat' else exported}"


def _speed(report: DeviceReport) -> str:
    assert report.speedup is not None
    return f"{_ratio(report.speedup, 'faster', 'slower')} on {report.place}"


def _ratio(value: float, more: str, less: str) -> str:
    return f"{value:.1f}x {more}" if value >= 1 else f"{1 / value:.1f}x {less}"


def _label(record: RunRecord, records: Sequence[RunRecord]) -> str:
    several = len({one.model for one in records}) > 1
    return f"{record.model} in {str(record.precision).upper()}" if several else str(record.precision).upper()
