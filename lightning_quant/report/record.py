"""The results record: one JSON file per run, from which every table and figure is made."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightning_quant.deploy.device_report import DeviceReport
from lightning_quant.deploy.parity import Parity, of_export
from lightning_quant.errors import DataError
from lightning_quant.ladder.gate import Ladder
from lightning_quant.precision import Precision
from lightning_quant.report.confusion import Confusion
from lightning_quant.utilities.files import atomic_write
from lightning_quant.utilities.hashing import short_hash
from lightning_quant.utilities.monitor import Monitor
from lightning_quant.utilities.parsing import check, check_version, parse_as, read_json

RECORD_NAME = "results.json"
_FORMAT_VERSION = 3
# In a style attribute of the page.
_COLOR = re.compile("#[0-9a-f]{6}")


@dataclass
class RunRecord:
    """What one run of the app did and found. Figures that were not measured are absent, never filled in.

    Args:
        status: whether it is still running, and how it ended.
        model: name of the network's configuration.
        data: name of the data's configuration.
        precision: bit widths of the network.
        config_hash: identifies the configuration, see :func:`config_hash`.
        monitor: name of the metric.
        mode: ``"max"`` or ``"min"``, whichever is better.
        metric: the metric of ``float`` and after each rung, as logged in validation.
        exported: the rung that was exported: the best one.
        ladder: what each rung did, cost and gained; ``None`` where none was tried.
        seconds: wall time of each stage.
        export: identifies the files that were exported: ``BundleManifest.files_sha256``; empty in older records.
        bytes: size of the ``float`` and the ``quantized`` ONNX file.
        parity: agreement of the exported file, run by ONNX Runtime, with the simulation.
        device: what each device reported.
        class_figures: figures of single classes, of ``float`` and of what was exported: by their kind, such as
            ``"IoU"``, and by class, see :mod:`lightning_quant.callbacks.visualizer`.
        confusion: which classes ``float`` and what was exported take for each other, where the task counts that;
            empty in older records.
        legend: what the colors in the pictures stand for: ``#rrggbb`` by name.
        artifacts: where things are, relative to the record.
        error: the message, if it failed.
        versions: packages the run used.
        config: the whole configuration.
        reproduce: what to type to run the same again.
    """

    status: Literal["running", "finished", "failed"]
    model: str
    data: str
    precision: Precision
    config_hash: str
    monitor: str = ""
    mode: Literal["max", "min"] = "max"
    metric: dict[str, float] = field(default_factory=dict)
    exported: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    ladder: Ladder | None = None
    export: str = ""
    bytes: dict[str, int] = field(default_factory=dict)
    parity: Parity | None = None
    device: list[DeviceReport] = field(default_factory=list)
    class_figures: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    confusion: dict[str, Confusion] = field(default_factory=dict)
    legend: dict[str, str] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    reproduce: str = ""

    @property
    def comparison(self) -> Monitor:
        """The metric with its direction."""
        return Monitor(self.monitor, self.mode)

    @property
    def reference(self) -> float | None:
        """The metric of float that drops are measured from: the ladder's, whose batch norms may be re-estimated."""
        if self.ladder is not None and self.ladder.float_metric is not None:
            return self.ladder.reference
        return self.metric.get("float")

    @property
    def is_reestimated(self) -> bool:
        """Whether drops are measured from float with its batch norms re-estimated, which is better then."""
        ladder = self.ladder
        return ladder is not None and ladder.float_metric is not None and ladder.reference != ladder.float_metric

    @property
    def drop(self) -> float | None:
        """The drop: how much worse what was exported is than float, in units of the metric; negative if better."""
        if self.exported is None or self.reference is None or self.exported not in self.metric:
            return None
        return self.comparison.drop(self.metric[self.exported], self.reference)

    def write(self, folder: str | Path) -> Path:
        """Write ``results.json`` into ``folder``, whole or not at all."""
        path = Path(folder) / RECORD_NAME
        with atomic_write(path) as partial:
            partial.write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        return path

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        values = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        values["precision"] = str(self.precision)
        values["ladder"] = {} if self.ladder is None else self.ladder.to_dict()
        values["parity"] = {} if self.parity is None else of_export(self.parity)
        values["confusion"] = {rung: found.to_json() for rung, found in self.confusion.items()}
        values["device"] = [report.to_dict() for report in self.device]
        return {"format_version": _FORMAT_VERSION, **values, "drop": self.drop}

    @classmethod
    def read(cls, path: str | Path) -> RunRecord:
        """Read a record.

        Raises:
            DataError: when the file is missing, damaged or of another format.
        """
        try:
            values = _from_version_2(read_json(Path(path)))
            check_version(values, _FORMAT_VERSION)
            given = {name: value for name, value in values.items() if name not in ("format_version", "drop")}
            given |= {name: None for name in ("ladder", "parity") if given.get(name) == {}}
            record: RunRecord = parse_as(given, cls)
            record._check()
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is not a results record: {error}. Run again to write it.") from error
        return record

    def _check(self) -> None:
        """Refuse what the tables and charts could not show."""
        measured = self.exported is None or "float" not in self.metric or self.exported in self.metric
        check(measured, "exported", self.exported, "one of those in metric")
        sizes = not self.bytes or {"float", "quantized"} <= self.bytes.keys()
        check(
            sizes and all(size > 0 for size in self.bytes.values()), "bytes", self.bytes, "sizes of float and quantized"
        )
        if self.ladder is not None:
            names = [rung.rung for rung in self.ladder.rungs]
            check(len({"float", *names}) == len(names) + 1, "ladder.rungs", names, "each rung once")
        for name, color in self.legend.items():
            check(_COLOR.fullmatch(color) is not None, f"legend.{name}", color, "#rrggbb")


def _from_version_2(values: Any) -> Any:
    """Return the values of a record; version 2 knew of one kind of figures only."""
    if not isinstance(values, dict) or values.get("format_version") != 2:
        return values
    iou = parse_as(values.pop("per_class_iou", {}), dict[str, dict[str, float]], "per_class_iou")
    return {**values, "format_version": 3, "class_figures": {rung: {"IoU": found} for rung, found in iou.items()}}


def config_hash(config: dict[str, Any]) -> str:
    """Compute a short hash of plain configuration values, the same whatever the order of their keys."""
    return short_hash(json.dumps(config, sort_keys=True))
