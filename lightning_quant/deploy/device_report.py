"""What a target found out about an exported network: one dataclass, written as JSON."""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightning_quant.deploy.parity import Parity
from lightning_quant.errors import DataError
from lightning_quant.precision import Precision
from lightning_quant.utilities.files import atomic_write
from lightning_quant.utilities.parsing import check, check_version, parse_fields, read_json

_FORMAT_VERSION = 1

# The tiers of this package, best first, and what may be said of the figures of each.
TIERS = {
    "aihub": "measured on a real device by Qualcomm AI Hub",
    "htp_emulator": "compiled for this SoC and emulated; not measured on hardware",
    "onnxruntime": "computed by ONNX Runtime on the host's CPU; says nothing about a phone's speed",
}

# PSNR in dB above which a quantized network's outputs are typically considered good (AI Hub's own rule of thumb).
GOOD_PSNR = 30.0


@dataclass
class DeviceReport:
    """One network on one device with one runtime. What its tier cannot measure is absent, never filled in.

    Args:
        tier: ``"aihub"``, ``"htp_emulator"`` or ``"onnxruntime"``, see :data:`TIERS`, or that of a target of your own.
        device: name of the device, e.g. ``"Samsung Galaxy S24"``, or ``"host CPU"``.
        precision: bit widths of the network.
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
        against_simulation: agreement of the device's outputs with the simulation's.
        against_float: the same with the float network's outputs.
        metric: the user's validation metric on the same samples: of ``float``, ``simulation`` and ``device``.
        monitor: name of that metric.
        mode: ``"max"`` or ``"min"``, whichever is better of it.
        bytes: sizes of the ``float`` and ``quantized`` ONNX file and of the ``compiled`` artifact; where that holds
            several input sizes, also of this one ``compiled_alone`` and of all ``compiled_apart``.
        seconds: wall time on this machine, by step; nothing of the device.
        artifacts: files, relative to the report.
        warnings: what the user should know.
        error: why it failed.
        statement: what may be said of the figures of this tier. Default: that of :data:`TIERS`.
        size: which graph it is, of a bundle with several: ``"256x512"`` for that input size, ``"app"`` with edges.
        edged: whether it is a graph with edges, whose outputs are classes, say, instead of the network's numbers.
    """

    tier: str
    device: str
    precision: Precision
    status: Literal["finished", "pending", "failed"] = "finished"
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
    against_simulation: Parity | None = None
    against_float: Parity | None = None
    metric: dict[str, float] = field(default_factory=dict)
    monitor: str | None = None
    mode: Literal["max", "min"] | None = None
    bytes: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    error: str | None = None
    statement: str = ""
    size: str | None = None
    edged: bool = False

    def __post_init__(self) -> None:
        self.statement = TIERS.get(self.tier, self.statement)

    @property
    def against(self) -> Parity | None:
        """The agreement with the float network, or with the simulation where the float network is not known."""
        return self.against_float or self.against_simulation

    @property
    def place(self) -> str:
        """The device, and the graph if there are several: ``"Samsung Galaxy S24 at 256x512"``, ``"…, app"``."""
        if self.edged:
            return f"{self.device}, {self.size}"
        return f"{self.device} at {self.size}" if self.size else self.device

    @property
    def saved(self) -> float | None:
        """The share of bytes that compiling all input sizes into one artifact saves; ``None`` where it is not one."""
        whole, apart = self.bytes.get("compiled"), self.bytes.get("compiled_apart")
        return 1 - whole / apart if whole is not None and apart else None

    @property
    def median_latency_us(self) -> float | None:
        """The median over :attr:`latency_us`."""
        return statistics.median(self.latency_us) if self.latency_us else None

    @property
    def speedup(self) -> float | None:
        """How many times faster the quantized network is than the float one on this device, by medians."""
        if not self.latency_us or not self.float_latency_us:
            return None
        return statistics.median(self.float_latency_us) / statistics.median(self.latency_us)

    def sentence(self) -> str:
        """Return the report in one line, for a log."""
        where = f"{self.precision} on {self.place} ({self.tier})"
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
                parts.append(f"{agreement} against {name}")
        if self.saved is not None:
            parts.append(f"{self.bytes['compiled'] / 1e6:.2f} MB for all graphs, {self.saved:.0%} less than apart")
        statement = f" {self.statement[:1].upper()}{self.statement[1:]}." if self.statement else ""
        return f"{where}: {'; '.join(parts)}.{statement}"

    def scalars(self) -> dict[str, float]:
        """Return the figures by which runs are compared, for a logger; what is unknown is left out."""
        values: dict[str, float | None] = {
            "latency_ms": None if self.median_latency_us is None else self.median_latency_us / 1000,
            "speedup": self.speedup,
            "peak_memory_mb": None if self.memory_bytes is None else self.memory_bytes[-1] / 2**20,
            "psnr_db_against_float": _decibels(self.against_float),
            "psnr_db_against_simulation": _decibels(self.against_simulation),
            **{f"layers_{unit}": float(len(names)) for unit, names in (self.layers or {}).items()},
            **{f"metric_{what}": value for what, value in self.metric.items()},
        }
        prefix = "/".join(filter(None, ("device", self.tier, self.device, self.runtime, self.size)))
        return {f"{prefix}/{name}": float(value) for name, value in values.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; what is unknown is left out."""
        values = {one.name: getattr(self, one.name) for one in dataclasses.fields(self) if one.name != "statement"}
        values["precision"] = str(self.precision)
        for name, agreement in self._agreements().items():
            values[name] = agreement.to_dict()
        kept_when_empty = ("layers", "float_islands", "fallen_back")
        summary = {
            "statement": self.statement,
            "median_latency_us": self.median_latency_us,
            "speedup": self.speedup,
            "min_latency_us": min(self.latency_us, default=None),
        }
        return {
            "format_version": _FORMAT_VERSION,
            **{name: value for name, value in values.items() if value not in (None, {}, [])},
            **{name: values[name] for name in kept_when_empty if values[name] is not None},
            **{name: value for name, value in summary.items() if value not in (None, "")},
        }

    @classmethod
    def from_json(cls, value: Any, where: str = "") -> DeviceReport:
        """Read what :meth:`to_dict` returned.

        Raises:
            ValueError: when it is of another format, or a value is not what its field asks for.
        """
        check_version(value, _FORMAT_VERSION)
        names = {one.name for one in dataclasses.fields(cls)}
        report: DeviceReport = parse_fields({name: one for name, one in value.items() if name in names}, cls, where)
        report.validate(where)
        return report

    def _agreements(self) -> dict[str, Parity]:
        known = {"against_simulation": self.against_simulation, "against_float": self.against_float}
        return {name: agreement for name, agreement in known.items() if agreement is not None}

    def validate(self, where: str = "") -> None:
        """Refuse what the tables could not show, and links that are not links.

        Raises:
            FieldError: naming the first field, below ``where``.
        """
        at = f"{where}." if where else ""
        check(self.tier.isidentifier(), f"{at}tier", self.tier, f"one of {', '.join(TIERS)}, or a target of your own")
        for name, times in {"latency_us": self.latency_us, "float_latency_us": self.float_latency_us}.items():
            check(all(time > 0 for time in times), f"{at}{name}", times, "times above 0")
        if (memory := self.memory_bytes) is not None:
            sizes = len(memory) == 2 and 0 <= memory[0] <= memory[1]
            check(sizes, f"{at}memory_bytes", memory, "a lower and an upper size")
        if self.layers is not None:
            units = {"NPU", "GPU", "CPU"} <= self.layers.keys()
            check(units, f"{at}layers", list(self.layers), "NPU, GPU and CPU")
        check(self.samples >= 0, f"{at}samples", self.samples, "at least 0")
        check(all(size >= 0 for size in self.bytes.values()), f"{at}bytes", self.bytes, "sizes of at least 0")
        for what, link in self.jobs.items():  # a report makes them links, and javascript: would be one
            is_link = link.startswith(("https://", "http://"))
            check(is_link, f"{at}jobs.{what}", link, "a link that begins with https://")

    def write(self, path: str | Path) -> Path:
        """Write the report as JSON, whole or not at all."""
        path = Path(path)
        with atomic_write(path) as partial:
            partial.write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        return path

    @classmethod
    def read(cls, path: str | Path) -> DeviceReport:
        """Read a report.

        Raises:
            DataError: when it is missing, damaged or of another format.
        """
        try:
            return cls.from_json(read_json(Path(path)))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is not a device report: {error}. Run or export again.") from error


def _decibels(agreement: Parity | None) -> float | None:
    return None if agreement is None or agreement.equal else agreement.psnr_db
