"""The results record: one JSON file a run, from which every table and figure is made."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_quant.deploy.device_report import DeviceReport
from lightning_quant.errors import DataError
from lightning_quant.ladder.gate import Ladder
from lightning_quant.utilities.files import replacing
from lightning_quant.utilities.parsing import check, check_version, fitting, read_json

RECORD_NAME = "results.json"
_FORMAT_VERSION = 3
# In a style attribute of the page.
_COLOR = re.compile("#[0-9a-f]{6}")


@dataclass
class RunRecord:
    """What one run of the app did and found. Figures that were not measured are absent, never filled in.

    Args:
        status: ``"running"``, ``"finished"`` or ``"failed"``.
        model: name of the network's configuration.
        data: name of the data's configuration.
        precision: e.g. ``"w8a8"``.
        config_hash: identifies the configuration, see :func:`config_hash`.
        monitor: name of the metric.
        mode: ``"max"`` or ``"min"``, whichever is better.
        metric: the metric of ``float`` and after each rung, as logged in validation.
        exported: the rung that was exported: the best one.
        ladder: what each rung did, cost and brought, see :class:`~lightning_quant.ladder.gate.Ladder`.
        seconds: wall time of each stage.
        bytes: size of the ``float`` and the ``quantized`` ONNX file.
        parity: agreement of the exported file with the simulation, and the tier it was run on.
        device: what each device reported, see :class:`~lightning_quant.deploy.device_report.DeviceReport`.
        class_figures: figures of single classes, of ``float`` and of what was exported: by their kind, such as
            ``"IoU"``, and by class, see :mod:`lightning_quant.callbacks.visualizer`.
        legend: what the colors in the pictures stand for: ``#rrggbb`` by name.
        artifacts: where things are, relative to the record.
        error: the message, if it failed.
        versions: packages the run used.
        config: the whole configuration.
        reproduce: what to type to run the same again.
    """

    status: str
    model: str
    data: str
    precision: str
    config_hash: str
    monitor: str = ""
    mode: str = "max"
    metric: dict[str, float] = field(default_factory=dict)
    exported: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    ladder: dict[str, Any] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    parity: dict[str, Any] = field(default_factory=dict)
    device: list[dict[str, Any]] = field(default_factory=list)
    class_figures: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    legend: dict[str, str] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    reproduce: str = ""

    @property
    def drop(self) -> float | None:
        """How much worse what was exported is than float, in units of the metric; negative if better."""
        if self.exported is None or "float" not in self.metric:
            return None
        lost = self.metric["float"] - self.metric[self.exported]
        return lost if self.mode == "max" else -lost

    def write(self, folder: str | Path) -> Path:
        """Write ``results.json`` into ``folder``, whole or not at all."""
        path = Path(folder) / RECORD_NAME
        values = {"format_version": _FORMAT_VERSION, **dataclasses.asdict(self), "drop": self.drop}
        with replacing(path) as partial:
            partial.write_text(json.dumps(values, indent=2) + "\n")
        return path

    @classmethod
    def read(cls, path: str | Path) -> RunRecord:
        """Read a record.

        Raises:
            DataError: when the file is missing, damaged or of another format.
        """
        try:
            values = _from_version_2(read_json(Path(path)))
            check_version(values, _FORMAT_VERSION)
            record: RunRecord = fitting(
                {name: value for name, value in values.items() if name not in ("format_version", "drop")}, cls
            )
            record._check()
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is no results record: {error}. Run again to write it anew.") from error
        return record

    def _check(self) -> None:
        """Refuse what the tables and charts could not show."""
        check(self.status in ("running", "finished", "failed"), "status", self.status, "running, finished or failed")
        check(self.mode in ("max", "min"), "mode", self.mode, "max or min")
        measured = self.exported is None or "float" not in self.metric or self.exported in self.metric
        check(measured, "exported", self.exported, "one of those in metric")
        sizes = not self.bytes or {"float", "quantized"} <= self.bytes.keys()
        check(
            sizes and all(size > 0 for size in self.bytes.values()), "bytes", self.bytes, "sizes of float and quantized"
        )
        if self.parity:
            check("psnr_db" in self.parity, "parity", self.parity, "psnr_db and tier")
            fitting(self.parity["psnr_db"], float | None, "parity.psnr_db")
        if self.ladder:
            names = [rung.rung for rung in fitting(self.ladder, Ladder, "ladder").rungs]
            check(len({"float", *names}) == len(names) + 1, "ladder.rungs", names, "each rung once")
            check(
                self.ladder.get("mode", "max") in ("max", "min"), "ladder.mode", self.ladder.get("mode"), "max or min"
            )
        for name, color in self.legend.items():
            check(_COLOR.fullmatch(color) is not None, f"legend.{name}", color, "#rrggbb")
        for values in self.device:
            DeviceReport.from_dict(values)


def _from_version_2(values: Any) -> Any:
    """The values of a record; version 2 knew of one kind of figures only."""
    if not isinstance(values, dict) or values.get("format_version") != 2:
        return values
    iou = fitting(values.pop("per_class_iou", {}), dict[str, dict[str, float]], "per_class_iou")
    return {**values, "format_version": 3, "class_figures": {rung: {"IoU": found} for rung, found in iou.items()}}


def config_hash(config: dict[str, Any]) -> str:
    """A short hash of plain configuration values, the same whatever the order of their keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]
