"""The results record: one JSON file a run, from which every table and figure is made."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_quant.errors import DataError
from lightning_quant.files import replacing

RECORD_NAME = "results.json"
_FORMAT_VERSION = 2


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
        ladder: what each rung did, cost and brought, see :class:`~lightning_quant.ladder.Ladder`.
        seconds: wall time of each stage.
        bytes: size of the ``float`` and the ``quantized`` ONNX file.
        parity: agreement of the exported file with the simulation, and the tier it was run on.
        device: what each device reported, see :class:`~lightning_quant.deploy.device_report.DeviceReport`.
        per_class_iou: intersection over union by class, of ``float`` and of what was exported.
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
    per_class_iou: dict[str, dict[str, float]] = field(default_factory=dict)
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
            values = json.loads(Path(path).read_text())
            version = values.pop("format_version")
            values.pop("drop", None)
            record = cls(**values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is no results record: {error!r}. Run again to write it anew.") from error
        if version != _FORMAT_VERSION:
            raise DataError(f"{path} has format_version={version!r}; this version reads {_FORMAT_VERSION}.")
        return record


def config_hash(config: dict[str, Any]) -> str:
    """A short hash of plain configuration values, the same whatever the order of their keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]
