"""ultralytics: the YAML networks of YOLO v5 to v12. The package is AGPL-3.0: used from outside, never a dependency."""

from __future__ import annotations

import os
import tempfile
from functools import partial
from typing import Any

from torch import nn

from benchmarks.zoo.catalogue.entry import Entry, images

_NETWORKS = {
    "yolov5n": "DetectionModel",
    "yolov6n": "DetectionModel",
    "yolov8n": "DetectionModel",
    "yolov9t": "DetectionModel",
    "yolov10n": "DetectionModel",
    "yolo11n": "DetectionModel",
    "yolo12n": "DetectionModel",
    "yolov8n-seg": "SegmentationModel",
    "yolov8n-pose": "PoseModel",
    "yolo11n-seg": "SegmentationModel",
    "yolo11n-pose": "PoseModel",
}


def _make(name: str, kind: str) -> nn.Module:
    # It writes settings on import and would ask for updates.
    os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp(prefix="zoo-ultralytics-"))
    os.environ.setdefault("YOLO_OFFLINE", "true")
    os.environ.setdefault("YOLO_AUTOINSTALL", "false")
    from ultralytics.nn import tasks

    network: nn.Module = getattr(tasks, kind)(f"{name}.yaml", ch=3, nc=4, verbose=False)
    head: Any = network.model[-1]  # type: ignore[index]
    if getattr(head, "end2end", False):
        head.end2end = False  # else it picks the best boxes, as its export with end2end=False leaves to the app
    return network


def entries() -> list[Entry]:
    """The networks of ultralytics."""
    note = "without choosing the best boxes"
    return [
        Entry(f"ultralytics/{name}", partial(_make, name, kind), images(64), note if "v10" in name else "")
        for name, kind in _NETWORKS.items()
    ]
