"""MobileNetV2 with ImageNet weights on crops of street photographs: how often its class is that of float."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor

from benchmarks.rounding import NETWORKS, VALIDATION, crops
from benchmarks.showcase.domain import CALIBRATION, Domain, Judged, Tensors


class Classes(Judged):
    """The labels are the classes of the float network."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        same = (self.model(images).argmax(1) == labels).float().mean()
        self.log("val_same", same, batch_size=len(images))


def build(camvid: Path) -> tuple[pl.LightningModule, pl.LightningDataModule]:
    """Return the network and its crops."""
    network = NETWORKS["MobileNetV2"]()
    images = crops(str(camvid), "val", VALIDATION)
    with torch.no_grad():
        labels = torch.cat([network(batch).argmax(1) for batch in images.split(20)])
    return Classes(network), Tensors((crops(str(camvid), "train", CALIBRATION),), (images, labels), batch_size=16)


DOMAIN = Domain("classification", "MobileNetV2", build, "val_same", "class of float")
