"""MobileNetV2 with ImageNet weights and a linear probe: what most of a part of a street photograph shows."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.io import decode_image

from benchmarks.rounding import NETWORKS, prepared, square
from benchmarks.showcase.domain import Domain, Tensors, trained
from lightning_quant.domains.classification.task import ClassificationTask
from lightning_quant.domains.segmentation.cityscapes import NUM_CLASSES, read_labels

FEATURES = 1280
# Parts of each photograph.
PARTS = {"train": 3, "val": 4}
# On the squares of the probe's weights.
DECAY = 1e-3


def parts(camvid: Path, split: str) -> tuple[Tensor, Tensor]:
    """Return parts of photographs, and of each the class with most pixels."""
    generator = torch.Generator().manual_seed(0)
    images, classes = [], []
    for path in sorted((camvid / "leftImg8bit" / split).rglob("*.png")):
        labels = str(path).replace("leftImg8bit", "gtFine", 1).replace("leftImg8bit", "gtFine_labelIds")
        both = torch.cat([decode_image(str(path))[:3], torch.from_numpy(read_labels(Path(labels)))[None]])
        for _ in range(PARTS[split]):
            part = square(both, 0.3, 0.7, generator)
            known = part[3][part[3] < NUM_CLASSES]
            images.append(prepared(part[:3]))
            classes.append(int(known.bincount(minlength=NUM_CLASSES).argmax()))
    return torch.stack(images), torch.tensor(classes)


def fit(probe: nn.Linear, network: nn.Module, images: Tensor, classes: Tensor) -> None:
    """Fit the probe to the features of a network: multinomial regression, to its minimum."""
    with torch.no_grad():
        features = torch.cat([network(batch) for batch in images.split(32)])
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(probe(features), classes) + DECAY * probe.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)


def build(camvid: Path) -> tuple[pl.LightningModule, pl.LightningDataModule]:
    """Return the network with its probe, and the parts of photographs."""
    network = NETWORKS["MobileNetV2"]()
    network.classifier = nn.Identity()
    probe = nn.Linear(FEATURES, NUM_CLASSES)
    calibration, validation = parts(camvid, "train"), parts(camvid, "val")
    trained("probe", probe, partial(fit, probe, network, *calibration))
    task = ClassificationTask(nn.Sequential(network, probe).eval(), num_classes=NUM_CLASSES)
    return task, Tensors(calibration, validation, batch_size=16, shuffle=True)


DOMAIN = Domain("scenes", "MobileNetV2 with a probe", build, "val_acc", "class of most pixels", epochs=2, seeds=3)
