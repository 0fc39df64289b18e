"""Calibration with unlabeled images, in the one batch size that looks like an (image, label) pair."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lightning_quant as lq
from lightning_quant.domains.segmentation.datamodule import SyntheticScenesDataModule
from lightning_quant.domains.segmentation.ffnet import ffnet_nano
from lightning_quant.domains.segmentation.task import SegmentationTask
from lightning_quant.simulation.network import QuantizedNetwork
from tests.helpers.trainers import quiet_trainer


def calibrated(data: SyntheticScenesDataModule, tmp_path: Path) -> QuantizedNetwork:
    torch.manual_seed(0)
    task = SegmentationTask(ffnet_nano())
    callback = lq.PostTrainingQuantization("w8a8", calibration_samples=4)
    quiet_trainer(tmp_path, callback).validate(task, datamodule=data, verbose=False)
    assert QuantizedNetwork.of(task.model) is not None
    return task.model


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [2, *(pytest.param(size, marks=pytest.mark.torture) for size in (1, 4))])
def test_bare_images_give_the_ranges_of_the_same_images_with_labels(tmp_path: Path, batch_size: int) -> None:
    common = {"train": 4, "val": 4, "height": 32, "width": 64, "batch_size": batch_size, "calibration_samples": 4}
    labeled = SyntheticScenesDataModule(str(tmp_path / "scenes"), **common)
    images = tmp_path / "scenes/leftImg8bit/train"
    unlabeled = SyntheticScenesDataModule(str(tmp_path / "scenes"), calibration_images=str(images), **common)
    expected = calibrated(labeled, tmp_path).range_parameters()
    found = calibrated(unlabeled, tmp_path).range_parameters()
    assert len(expected) == len(found) > 20
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
