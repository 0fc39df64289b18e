"""The small detector of this package on cars and people in street photographs, trained here."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import lightning.pytorch as pl
from torch import Tensor, nn

from benchmarks.showcase.domain import CALIBRATION, Domain, trained
from lightning_quant.domains.detection.datamodule import MaskBoxesDataModule
from lightning_quant.domains.detection.network import fcos_nano
from lightning_quant.domains.detection.task import DetectionTask

CLASSES = ("person", "car")
# Of an object, in photographs of 192×256.
FEWEST_PIXELS = 40
FLOAT_EPOCHS = 60


class Pair(nn.Module):
    """A detector that returns a pair of tensors: plain AIMET takes no dict."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores and distances."""
        maps = self.detector(images)
        return maps["scores"], maps["distances"]


def fit(task: pl.LightningModule, data: pl.LightningDataModule) -> None:
    """Train it in float, in place."""
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=FLOAT_EPOCHS, gradient_clip_val=1.0, limit_val_batches=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(task, datamodule=data)


def build(camvid: Path) -> tuple[pl.LightningModule, pl.LightningDataModule]:
    """Return the detector, and photographs with boxes around the connected parts of a class."""
    data = MaskBoxesDataModule(
        str(camvid), classes=CLASSES, min_area=FEWEST_PIXELS, batch_size=8, calibration_samples=CALIBRATION
    )
    detector = fcos_nano(len(CLASSES))
    task = DetectionTask(Pair(detector), class_names=CLASSES)
    trained("detection", detector, partial(fit, task, data))
    task.eval()
    return task, data


DOMAIN = Domain("detection", "fcos_nano", build, "val_map50", "AP at IoU 0.5", epochs=2, seeds=3)
