"""Everything that is compared of a bundle and its run, small enough to be kept in git: a baseline."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightning_quant.deploy.parity import Parity
from lightning_quant.errors import DataError
from lightning_quant.utilities.files import atomic_write
from lightning_quant.utilities.parsing import check, check_version, is_finite, parse_fields, read_json

_FORMAT_VERSION = 1
_MOST_BITS = 32
# The two networks in a bundle, and how they are called in what is printed.
GRAPHS = ("aimet", "qdq")


@dataclass(frozen=True)
class Grid:
    """The integers that a tensor is rounded to.

    Args:
        bits: of an integer.
        channels: how many scales there are.
        scale: the smallest and the largest.
        offset: the smallest and the largest, in AIMET's convention: the integer 0 of an unsigned grid stands for
            ``scale * offset``.
        hash: of all scales and offsets.
    """

    bits: int
    channels: int
    scale: tuple[float, float]
    offset: tuple[float, float]
    hash: str


@dataclass(frozen=True)
class Constant:
    """A parameter of a graph, or another constant that it computes with.

    Args:
        kind: type of the values, e.g. ``"int8"``.
        shape: lengths of its axes.
        low: the smallest value.
        high: the largest value.
        mean: of all values.
        hash: of all values.
    """

    kind: str
    shape: tuple[int, ...]
    low: float
    high: float
    mean: float
    hash: str

    @property
    def is_zero(self) -> bool:
        """Whether all values are 0: what is added of it is nothing."""
        return self.low == self.high == 0


@dataclass(frozen=True)
class Operation:
    """A node of a graph.

    Args:
        kind: its type, e.g. ``"Conv"``.
        hash: of its attributes, of which tensors it takes, and of sizes and positions that are constant.
    """

    kind: str
    hash: str


@dataclass(frozen=True)
class Graph:
    """One ONNX file.

    Args:
        sha256: of the file, and of the encodings that belong to it.
        operations: by name, without those that round.
        encodings: by the name of the tensor.
        constants: by name, without those of the encodings.
    """

    sha256: list[str]
    operations: dict[str, Operation]
    encodings: dict[str, Grid]
    constants: dict[str, Constant]


@dataclass(frozen=True)
class RunFigures:
    """What was measured in the run that a bundle is of.

    Args:
        monitor: name of the metric; empty where none was measured.
        mode: ``"max"`` or ``"min"``, whichever is better.
        metric: the metric of ``float`` and of the ``simulation`` that was exported.
        classes: figures of single classes of the latter: by their kind and by class.
        rung: the one that was exported.
        config_hash: identifies the configuration of the run; empty where there is none.
    """

    monitor: str = ""
    mode: Literal["max", "min"] = "max"
    metric: dict[str, float] = field(default_factory=dict)
    classes: dict[str, dict[str, float]] = field(default_factory=dict)
    rung: str = ""
    config_hash: str = ""


@dataclass(frozen=True)
class DeviceFigures:
    """What one device reported; what it cannot measure is ``None``.

    Args:
        tier: name of the target.
        device: name of the device.
        runtime: what the network was compiled to.
        status: ``"finished"``, ``"pending"`` or ``"failed"``.
        versions: of the tools, by name.
        samples: how many were compared.
        latency_us: median, in microseconds.
        memory_bytes: upper estimate of the peak.
        compiled_bytes: size of what was compiled.
        npu_layers: how many layers are on the NPU.
        layers: names of those on other units, by unit.
        float_layers: names of those that compute in float on the NPU.
        against_float: agreement of its outputs with those of the float network.
        against_simulation: the same with the simulation's.
        metric: the user's metric of its outputs.
        monitor: name of that metric; empty where it is not known.
        mode: ``"max"`` or ``"min"``, whichever is better of it.
    """

    tier: str
    device: str
    runtime: str
    status: str
    versions: dict[str, str]
    samples: int
    latency_us: float | None = None
    memory_bytes: float | None = None
    compiled_bytes: float | None = None
    npu_layers: int | None = None
    layers: dict[str, list[str]] | None = None
    float_layers: list[str] | None = None
    against_float: Parity | None = None
    against_simulation: Parity | None = None
    metric: float | None = None
    monitor: str = ""
    mode: Literal["max", "min"] = "max"

    @property
    def key(self) -> str:
        """What two results have in common that are compared."""
        return ", ".join(filter(None, (self.device, self.tier, self.runtime)))


@dataclass(frozen=True)
class Snapshot:
    """Everything that is compared.

    Args:
        name: of the bundle.
        versions: of the packages that made it, by name.
        recipe: how it was quantized, as text by name.
        float_sha256: hash of the weights of the float network.
        inputs: of the graphs by name: lengths of the axes.
        outputs: likewise.
        graphs: the networks in the bundle: :data:`GRAPHS`.
        parity: agreement of the file with the simulation.
        bytes: sizes of the ``float`` and the ``quantized`` file.
        run: what was measured in its run, where that is known.
        devices: what devices made of it.
        io: what ``io.json`` says of each input and output, as text by tensor and field.
    """

    name: str
    versions: dict[str, str]
    recipe: dict[str, str]
    float_sha256: str | None
    inputs: dict[str, list[int]]
    outputs: dict[str, list[int]]
    graphs: dict[str, Graph]
    parity: Parity
    bytes: dict[str, int]
    run: RunFigures = field(default_factory=RunFigures)
    devices: list[DeviceFigures] = field(default_factory=list)
    io: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        values = {**vars(self), "graphs": {name: asdict(graph) for name, graph in self.graphs.items()}}
        values["parity"], values["run"] = self.parity.to_dict(), asdict(self.run)
        values["devices"] = [_device_dict(one) for one in self.devices]
        return {"format_version": _FORMAT_VERSION, **values}

    @classmethod
    def from_json(cls, value: Any, where: str = "") -> Snapshot:
        """Read what :meth:`to_dict` returned.

        Raises:
            ValueError: when it is of another format, or a value is not what its field asks for.
        """
        check_version(value, _FORMAT_VERSION)
        given = {name: one for name, one in value.items() if name != "format_version"}
        made: Snapshot = parse_fields(given, cls, where)
        made._check()
        return made

    def write(self, path: str | Path) -> Path:
        """Write it as JSON, one line for each entry so that git shows what changed; whole or not at all."""
        path = Path(path)
        with atomic_write(path) as partial:
            partial.write_text(_lines(self.to_dict(), depth=4) + "\n")
        return path

    @classmethod
    def read(cls, path: str | Path) -> Snapshot:
        """Read a baseline.

        Raises:
            DataError: when it is missing, damaged or of another format.
        """
        try:
            return cls.from_json(read_json(Path(path)))
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path} is not a baseline: {error}. Write it again with lightning-quant compare NEW --write-baseline."
            ) from error

    def _check(self) -> None:
        """Refuse what could not be compared."""
        check(set(self.graphs) == set(GRAPHS), "graphs", list(self.graphs), " and ".join(GRAPHS))
        for part, graph in self.graphs.items():
            for name, grid in graph.encodings.items():
                at = f"graphs.{part}.encodings.{name[:60]}"
                check(0 < grid.bits <= _MOST_BITS, f"{at}.bits", grid.bits, f"1 to {_MOST_BITS}")
                check(grid.channels > 0, f"{at}.channels", grid.channels, "at least 1")
                check(is_finite(*grid.scale) and grid.scale[0] <= grid.scale[1], f"{at}.scale", grid.scale, "a range")
                check(is_finite(*grid.offset), f"{at}.offset", grid.offset, "finite numbers")
            for name, one in graph.constants.items():
                at = f"graphs.{part}.constants.{name[:60]}"
                check(min(one.shape, default=0) >= 0, f"{at}.shape", one.shape, "lengths of at least 0")
                check(is_finite(one.low, one.high, one.mean), f"{at}.low", (one.low, one.high, one.mean), "numbers")
        check(min(self.bytes.values(), default=1) > 0, "bytes", self.bytes, "sizes above 0")
        figures = {f"run.metric.{name}": value for name, value in self.run.metric.items()}
        for kind, classes in self.run.classes.items():
            figures |= {f"run.classes.{kind[:60]}.{name[:60]}": value for name, value in classes.items()}
        for number, device in enumerate(self.devices):
            known = ("latency_us", "memory_bytes", "compiled_bytes", "metric")
            figures |= {f"devices.{number}.{name}": getattr(device, name) or 0.0 for name in known}
            latency = device.latency_us
            check(latency is None or latency > 0, f"devices.{number}.latency_us", latency, "a time above 0")
        for name, figure in figures.items():
            check(is_finite(figure), name, figure, "a finite number")


def _device_dict(device: DeviceFigures) -> dict[str, Any]:
    """Return JSON values; what is unknown is left out."""
    known = {name: value for name, value in vars(device).items() if value is not None}
    return {name: value.to_dict() if isinstance(value, Parity) else value for name, value in known.items()}


def _lines(value: Any, depth: int, indent: str = "") -> str:
    """Return JSON with what lies deeper than ``depth`` on one line."""
    if not isinstance(value, dict) or not value or depth == 0:
        return json.dumps(value, allow_nan=False)
    inner = f"{indent}  "
    entries = [f"{inner}{json.dumps(name)}: {_lines(one, depth - 1, inner)}" for name, one in value.items()]
    return "{\n" + ",\n".join(entries) + f"\n{indent}}}"
