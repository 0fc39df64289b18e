"""Folders as runs leave them: real layers of a real network, pictures, and a record with everything in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_quant.deploy.blame.blame import blame
from lightning_quant.deploy.blame.result import BLAME_NAME, write_blames
from lightning_quant.deploy.device_report import DeviceReport
from lightning_quant.deploy.parity import Parity
from lightning_quant.domains.segmentation.cityscapes import CLASS_NAMES
from lightning_quant.domains.segmentation.images import normalize_images
from lightning_quant.domains.segmentation.overlay import compare_class_maps
from lightning_quant.domains.segmentation.scenes import draw_scene
from lightning_quant.ladder.gate import Ladder
from lightning_quant.precision import Precision
from lightning_quant.report.confusion import Confusion
from lightning_quant.report.layers import LayerFigures
from lightning_quant.report.pictures import legend_of, write_comparisons
from lightning_quant.report.record import RunRecord
from lightning_quant.simulation.inputs import NetworkInputs
from tests.helpers.handmade_bundles import write_app
from tests.helpers.networks import calibrated, call

DEVICE = DeviceReport(
    tier="aihub",
    device="Samsung Galaxy S24",
    precision=Precision(4, 16),
    runtime="qnn_dlc",
    latency_us=[2100, 2000, 2200],
    float_latency_us=[8000],
    memory_bytes=[1 << 20, 24 << 20],
    layers={"NPU": ["conv_1", "conv_2"], "GPU": [], "CPU": ["resize"]},
    fallen_back={"resize": "not said by AI Hub"},
    samples=8,
    against_simulation=Parity(66.0, 1.0, 1.0, 8),
    against_float=Parity(31.25, 0.98, 0.99, 8),
    bytes={"float": 55_600_000, "quantized": 7_500_000, "compiled": 7_600_000},
    jobs={"compile": "https://hub.example/jobs/j1/"},
)


def record(**values: object) -> RunRecord:
    """Make a record of a run that has only what every run has."""
    given: dict[str, object] = {
        "status": "finished",
        "model": "ffnet_nano",
        "data": "scenes",
        "precision": "w8a8",
        "config_hash": "abc",
    }
    given |= values
    return RunRecord(**{**given, "precision": Precision.parse(str(given["precision"]))})  # type: ignore[arg-type]


def full_record(**values: Any) -> RunRecord:
    """A run that climbed three rungs, trained and was measured on a phone."""
    ladder = Ladder("val_miou", "max", 0.01, 0.7)
    ladder.judge("ptq", 0.66, "min_max ranges", 12.0)
    ladder.judge("cle", 0.61, "4 pairs of layers equalized", 9.0)
    ladder.judge("qat", 0.696, "trained for 300 steps", 240.0)
    given = {
        "model": "ffnet_40s",
        "precision": "w4a16",
        "monitor": "val_miou",
        "metric": {"float": 0.7, "ptq": 0.66, "cle": 0.61, "qat": 0.696},
        "exported": "qat",
        "ladder": ladder,
        "bytes": {"float": 55_600_000, "quantized": 7_500_000},
        "parity": Parity(101.5, 1.0, 1.0, 8),
        "device": [DEVICE],
        "class_figures": {
            "float": {"IoU": dict.fromkeys(CLASS_NAMES[:5], 0.7)},
            "qat": {"IoU": dict.fromkeys(CLASS_NAMES[:5], 0.69)},
        },
        "confusion": {
            "float": Confusion.of(CLASS_NAMES[:5], 70 * np.eye(5) + 30 * np.eye(5, k=1)),
            "qat": Confusion.of(CLASS_NAMES[:5], 69 * np.eye(5) + 31 * np.eye(5, k=1)),
        },
        "versions": {"torch": "2.14.1"},
        "config": {"model": {"name": "<b>not bold</b> & </script>"}, "seed": 3},
        "reproduce": "lightning-quant precision=w4a16 'ladder.rungs=[ptq,cle]'",
    }
    return record(**{**given, **values})


def run_folder(
    folder: Path, network: nn.Module, image: torch.Tensor, size: tuple[int, int] = (64, 128), **values: Any
) -> Path:
    """Fill a folder: record, figures of the layers of ``network`` in W4A16, overlays of drawn scenes of that size."""
    samples = [call(image)] * 2
    quantized = calibrated(network.eval(), NetworkInputs((image,)), precision="w4a16").eval()
    figures = LayerFigures.of(quantized, samples, 1)
    write_blames(folder / BLAME_NAME, [blame(quantized, samples, against="float"), blame(quantized, samples)])
    figures.drift = {"a.weight": [0.0, 0.1, 0.3], "b.output": [0.0, -0.2, -0.1]}
    figures.drift_steps = [0, 50, 100]
    figures.write(folder)
    scenes = [draw_scene(*size, seed=1, split="val", index=index)[0] for index in range(4)]
    photos = torch.stack([torch.from_numpy(np.asarray(scene).copy()).permute(2, 0, 1) for scene in scenes])
    road = torch.zeros(size, dtype=torch.uint8)
    other = road.clone()
    other[: size[0] // 4] = 13
    comparisons = [compare_class_maps(photo, road, other) for photo in normalize_images()(photos)]
    write_comparisons(folder / "overlays", comparisons)
    write_app(folder / "app", "top_k", name="image <1>")
    full_record(legend=legend_of(comparisons), artifacts={"bundle": "app"}, **values).write(folder)
    return folder
