"""What a target found out about an exported network: one dataclass, written as JSON."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_quant.deploy.parity import LOWEST_PSNR
from lightning_quant.errors import DataError
from lightning_quant.utilities.files import replacing
from lightning_quant.utilities.parsing import check, check_version, fitting, read_json

_FORMAT_VERSION = 1

# The tiers of a device figure, best first, and what may be said of each.
TIERS = {
    "aihub": "measured on a real device by Qualcomm AI Hub",
    "htp_emulator": "compiled for this SoC and emulated; not measured on hardware",
    "onnxruntime": "computed by ONNX Runtime on the host's CPU; says nothing about a phone's speed",
}

# PSNR in dB above which a quantized network's outputs are typically considered good (AI Hub's own rule of thumb).
GOOD_PSNR = 30.0


def closeness(agreement: Mapping[str, Any]) -> str:
    """An agreement in a few characters: its PSNR, or for outputs that are classes already the share of equal ones."""
    if agreement["psnr_db"] == LOWEST_PSNR:
        return "not comparable"
    if agreement["psnr_db"] is not None:
        return f"{agreement['psnr_db']:.1f} dB"
    share = agreement["argmax_agreement"]
    return "equal" if share in (None, 1.0) else f"{100 * share:.1f} % same"


@dataclass
class DeviceReport:
    """One network on one device with one runtime. What its tier cannot measure is absent, never filled in.

    Args:
        tier: ``"aihub"``, ``"htp_emulator"`` or ``"onnxruntime"``, see :data:`TIERS`.
        device: name of the device, e.g. ``"Samsung Galaxy S24"``, or ``"host CPU"``.
        precision: e.g. ``"w8a8"``.
        status: ``"finished"``; ``"pending"`` while jobs are queued; ``"failed"``.
        soc: the chip, e.g. ``"SM8650"``.
        runtime: what the network was compiled to, e.g. ``"qnn_dlc"``.
        versions: of the tools, by name.
        jobs: links to the jobs of a service, by what they did; ids are the last part.
        latency_us: every measured inference of the quantized network, in microseconds.
        float_latency_us: the same of the float network on the same device.
        load_us: time to load, in microseconds: ``first`` and ``warm``.
        memory_bytes: lower and upper estimate of the peak during inference.
        layers: names of the layers by compute unit, ``NPU``, ``GPU`` and ``CPU``.
        float_islands: layers on the NPU that compute in float between quantized ones.
        fallen_back: layers that are not on the NPU, with the reason if it is known.
        samples: on how many samples outputs were compared.
        against_simulation: agreement of the device's outputs with the simulation's: ``psnr_db`` (``None`` when
            equal), ``argmax_agreement`` and more, see :class:`~lightning_quant.deploy.parity.Parity`.
        against_float: the same with the float network's outputs.
        metric: the user's validation metric on the same samples: of ``float``, ``simulation`` and ``device``.
        bytes: sizes of the ``float`` and ``quantized`` ONNX file and of the ``compiled`` artifact.
        seconds: wall time on this machine, by step; nothing of the device.
        artifacts: files, relative to the report.
        warnings: what the user should know.
        error: why it failed.
    """

    tier: str
    device: str
    precision: str
    status: str = "finished"
    soc: str | None = None
    runtime: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    jobs: dict[str, str] = field(default_factory=dict)
    latency_us: list[int] = field(default_factory=list)
    float_latency_us: list[int] = field(default_factory=list)
    load_us: dict[str, int] = field(default_factory=dict)
    memory_bytes: list[int] | None = None
    layers: dict[str, list[str]] | None = None
    float_islands: list[str] | None = None
    fallen_back: dict[str, str] | None = None
    samples: int = 0
    against_simulation: dict[str, Any] | None = None
    against_float: dict[str, Any] | None = None
    metric: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    error: str | None = None

    @property
    def median_latency_us(self) -> float | None:
        """Median over :attr:`latency_us`."""
        return statistics.median(self.latency_us) if self.latency_us else None

    @property
    def speedup(self) -> float | None:
        """How many times faster the quantized network is than the float one on this device, by medians."""
        if not self.latency_us or not self.float_latency_us:
            return None
        return statistics.median(self.float_latency_us) / statistics.median(self.latency_us)

    def sentence(self) -> str:
        """The report in one line, for a log."""
        where = f"{self.precision} on {self.device} ({self.tier})"
        if self.status != "finished":
            return f"{where}: {self.status}{f', {self.error}' if self.error else ''}"
        parts = []
        if self.median_latency_us is not None:
            times = f", {self.speedup:.1f} times as fast as float" if self.speedup else ""
            parts.append(f"{self.median_latency_us / 1000:.2f} ms{times}")
        if self.layers is not None:
            parts.append(", ".join(f"{len(names)} layers on {unit}" for unit, names in self.layers.items() if names))
        for name, agreement in {"simulation": self.against_simulation, "float": self.against_float}.items():
            if agreement is not None:
                parts.append(f"{closeness(agreement)} against {name}")
        return f"{where}: {'; '.join(parts)}. {TIERS[self.tier][:1].upper()}{TIERS[self.tier][1:]}."

    def scalars(self) -> dict[str, float]:
        """The figures by which runs are compared, for a logger; what is unknown is left out."""
        values: dict[str, float | None] = {
            "latency_ms": None if self.median_latency_us is None else self.median_latency_us / 1000,
            "speedup": self.speedup,
            "peak_memory_mb": None if self.memory_bytes is None else self.memory_bytes[-1] / 2**20,
            "psnr_db_against_float": (self.against_float or {}).get("psnr_db"),
            "psnr_db_against_simulation": (self.against_simulation or {}).get("psnr_db"),
            **{f"layers_{unit}": float(len(names)) for unit, names in (self.layers or {}).items()},
            **{f"metric_{what}": value for what, value in self.metric.items()},
        }
        prefix = "/".join(filter(None, ("device", self.tier, self.device, self.runtime)))
        return {f"{prefix}/{name}": float(value) for name, value in values.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """JSON values; what is unknown is left out."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if value not in (None, {}, [])}
        kept_when_empty = {"layers": self.layers, "float_islands": self.float_islands, "fallen_back": self.fallen_back}
        values |= {name: value for name, value in kept_when_empty.items() if value is not None}
        summary = {"median_latency_us": self.median_latency_us, "speedup": self.speedup}
        return {
            "format_version": _FORMAT_VERSION,
            **values,
            "statement": TIERS[self.tier],
            **{name: value for name, value in summary.items() if value is not None},
            **({"min_latency_us": min(self.latency_us)} if self.latency_us else {}),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DeviceReport:
        """The report that :meth:`to_dict` wrote.

        Raises:
            DataError: when it is of another format, or a value is not what its field asks for.
        """
        try:
            check_version(values, _FORMAT_VERSION)
            names = {one.name for one in dataclasses.fields(cls)}
            report: DeviceReport = fitting({name: value for name, value in values.items() if name in names}, cls)
            report._check()
        except ValueError as error:
            raise DataError(f"A device report that cannot be read: {error}. Run or export again.") from error
        return report

    def _check(self) -> None:
        """Refuse what the tables could not show, and links that are none."""
        check(self.tier in TIERS, "tier", self.tier, f"one of {', '.join(TIERS)}")
        states = ("finished", "pending", "failed")
        check(self.status in states, "status", self.status, f"one of {', '.join(states)}")
        for name, times in {"latency_us": self.latency_us, "float_latency_us": self.float_latency_us}.items():
            check(all(time > 0 for time in times), name, times, "times above 0")
        if (memory := self.memory_bytes) is not None:
            check(len(memory) == 2 and 0 <= memory[0] <= memory[1], "memory_bytes", memory, "a lower and an upper size")
        if self.layers is not None:
            check({"NPU", "GPU", "CPU"} <= self.layers.keys(), "layers", list(self.layers), "NPU, GPU and CPU")
        for name, agreement in {
            "against_simulation": self.against_simulation,
            "against_float": self.against_float,
        }.items():
            for figure in ("psnr_db", "argmax_agreement") if agreement is not None else ():
                check(figure in (agreement or {}), f"{name}.{figure}", None, "the field to be there")
                fitting((agreement or {})[figure], float | None, f"{name}.{figure}")
        check(self.samples >= 0, "samples", self.samples, "at least 0")
        check(all(size >= 0 for size in self.bytes.values()), "bytes", self.bytes, "sizes of at least 0")
        for what, link in self.jobs.items():  # a report makes them links, and javascript: would be one
            check(link.startswith(("https://", "http://")), f"jobs.{what}", link, "a link that begins with https://")

    def write(self, path: str | Path) -> Path:
        """Write the report as JSON, whole or not at all."""
        path = Path(path)
        with replacing(path) as partial:
            partial.write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        return path

    @classmethod
    def read(cls, path: str | Path) -> DeviceReport:
        """Read a report.

        Raises:
            DataError: when it is missing, damaged or of another format.
        """
        try:
            return cls.from_dict(read_json(Path(path)))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is no device report: {error}") from error
