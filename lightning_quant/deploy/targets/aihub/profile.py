"""The profile of a run on a device, read from what AI Hub's client returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_quant.utilities.parsing import check, parse_as


@dataclass(frozen=True)
class Profile:
    """The figures that are reported, as the client's own formatting implies their units.

    Args:
        latency_us: every measured inference, in microseconds.
        load_us: time to load, in microseconds: ``first`` and ``warm``.
        memory_bytes: lower and upper estimate of the peak during inference.
        layers: names by compute unit; ``None`` where the runtime does not name them.
    """

    latency_us: list[int]
    load_us: dict[str, int]
    memory_bytes: list[int] | None
    layers: dict[str, list[str]] | None

    @classmethod
    def from_json(cls, value: Any, where: str = "") -> Profile:
        """Read a profile. What it holds beyond these figures is ignored.

        Raises:
            FieldError: naming the place that is missing or cannot be.
        """
        at = f"{where}.execution_summary"
        content = parse_as(value, dict[str, Any], where)
        summary = parse_as(content.get("execution_summary"), dict[str, Any], at)
        times = summary.get("all_inference_times") or [summary.get("estimated_inference_time")]
        loads = {"first": summary.get("first_load_time"), "warm": summary.get("warm_load_time")}
        memory = summary.get("inference_memory_peak_range") or None
        return cls(
            parse_as(times, list[int], f"{at}.all_inference_times"),
            parse_as({name: time for name, time in loads.items() if time}, dict[str, int], f"{at}.load_time"),
            parse_as(memory, list[int] | None, f"{at}.inference_memory_peak_range"),
            _layers(content.get("execution_detail") or [], f"{where}.execution_detail"),
        )


def _layers(detail: Any, where: str) -> dict[str, list[str]] | None:
    layers: dict[str, list[str]] = {"NPU": [], "GPU": [], "CPU": []}
    rows = parse_as(detail, list[dict[str, Any]], where)
    for index, row in enumerate(rows):
        for name in ("compute_unit", "name"):
            check(isinstance(row.get(name), str), f"{where}.{index}.{name}", row.get(name), "text")
        layers.setdefault(row["compute_unit"], []).append(row["name"])
    return layers if rows else None
