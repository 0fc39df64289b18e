"""Cityscapes: its classes, its folder layout, and a data set that reads any folder in that layout.

Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding", 2016. The identifiers and
colors are those of the benchmark's own ``labels.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from lightning_quant.domains.segmentation.images import normalize_images
from lightning_quant.errors import DataError
from lightning_quant.utilities.images import open_image

__all__ = [
    "CLASSES",
    "CLASS_NAMES",
    "IGNORE_INDEX",
    "NUM_CLASSES",
    "PALETTE",
    "CityscapesClass",
    "CityscapesDataset",
    "list_images",
    "read_labels",
    "to_train_ids",
]


class CityscapesClass(NamedTuple):
    """One of the classes that the benchmark evaluates.

    Args:
        name: e.g. ``"road"``.
        label_id: what the files ``*_gtFine_labelIds.png`` store.
        train_id: what the network predicts: its output channel.
        color: red, green and blue, 0 to 255.
    """

    name: str
    label_id: int
    train_id: int
    color: tuple[int, int, int]


CLASSES = (
    CityscapesClass("road", 7, 0, (128, 64, 128)),
    CityscapesClass("sidewalk", 8, 1, (244, 35, 232)),
    CityscapesClass("building", 11, 2, (70, 70, 70)),
    CityscapesClass("wall", 12, 3, (102, 102, 156)),
    CityscapesClass("fence", 13, 4, (190, 153, 153)),
    CityscapesClass("pole", 17, 5, (153, 153, 153)),
    CityscapesClass("traffic light", 19, 6, (250, 170, 30)),
    CityscapesClass("traffic sign", 20, 7, (220, 220, 0)),
    CityscapesClass("vegetation", 21, 8, (107, 142, 35)),
    CityscapesClass("terrain", 22, 9, (152, 251, 152)),
    CityscapesClass("sky", 23, 10, (70, 130, 180)),
    CityscapesClass("person", 24, 11, (220, 20, 60)),
    CityscapesClass("rider", 25, 12, (255, 0, 0)),
    CityscapesClass("car", 26, 13, (0, 0, 142)),
    CityscapesClass("truck", 27, 14, (0, 0, 70)),
    CityscapesClass("bus", 28, 15, (0, 60, 100)),
    CityscapesClass("train", 31, 16, (0, 80, 100)),
    CityscapesClass("motorcycle", 32, 17, (0, 0, 230)),
    CityscapesClass("bicycle", 33, 18, (119, 11, 32)),
)
CLASS_NAMES = tuple(c.name for c in CLASSES)
NUM_CLASSES = len(CLASSES)
IGNORE_INDEX = 255
"""The train id of everything that is neither trained on nor counted."""
PALETTE: NDArray[np.uint8] = np.array([c.color for c in CLASSES], dtype=np.uint8)
"""The color of every train id, uint8 [19, 3]."""

_HIGHEST_LABEL_ID = 33
_ILLEGAL = 254
# Indexed by the stored byte. The license plate's id, -1, is stored as 255.
_TRAIN_ID_OF: NDArray[np.uint8] = np.full(256, _ILLEGAL, dtype=np.uint8)
_TRAIN_ID_OF[: _HIGHEST_LABEL_ID + 1] = IGNORE_INDEX
_TRAIN_ID_OF[255] = IGNORE_INDEX
_TRAIN_ID_OF[[c.label_id for c in CLASSES]] = [c.train_id for c in CLASSES]


def to_train_ids(label_ids: NDArray[np.integer], name: str | Path = "labels") -> NDArray[np.uint8]:
    """Translate Cityscapes label ids to train ids.

    Args:
        label_ids: whole numbers of any shape: 0..33, or -1 (license plate; 255 in an 8-bit file).
        name: what to call the labels in an error, usually the file.

    Returns:
        uint8 of the same shape: 0..18, or 255 for what is ignored.

    Raises:
        DataError: when another id occurs; the message names the file and the ids.
    """
    in_byte = (label_ids >= -1) & (label_ids <= 255)
    train_ids = _TRAIN_ID_OF[label_ids.astype(np.uint8)]
    illegal = ~in_byte | (train_ids == _ILLEGAL)
    if illegal.any():
        found = np.unique(label_ids[illegal]).tolist()
        raise DataError(
            f"{name} holds label ids that Cityscapes does not have: {found}. Expected labelIds, "
            f"0..{_HIGHEST_LABEL_ID} or 255 for unlabeled, neither instanceIds nor colors."
        )
    return train_ids


def read_labels(path: Path) -> NDArray[np.uint8]:
    """Read a ``*_gtFine_labelIds.png``: train ids, uint8 [H, W].

    Raises:
        DataError: when the file is damaged, has more than one channel, or holds an id Cityscapes does not have.
    """
    label_ids = np.asarray(open_image(path))
    if label_ids.ndim != 2:
        raise DataError(
            f"{path} has {label_ids.shape[-1]} channels; labels need one. Is it the *_color.png? "
            "Expected *_labelIds.png."
        )
    return to_train_ids(label_ids, path)


def list_images(root: str | Path, split: str) -> list[Path]:
    """Return the photographs ``leftImg8bit/<split>/<city>/*_leftImg8bit.png`` under ``root``, ordered by path.

    Raises:
        DataError: when there are none. The message says what was found and what was expected.
    """
    root = Path(root)
    expected = "leftImg8bit/<split>/<city>/<name>_leftImg8bit.png"
    if not root.is_dir():
        raise DataError(f"There is no folder {root}. Expected a data set in Cityscapes layout: {expected}.")
    folder = root / "leftImg8bit" / split
    images = sorted(folder.glob("*/*_leftImg8bit.png"))
    if not images:
        # The deepest folder that exists is where the layout departs from what is expected.
        place = next(p for p in (folder, folder.parent, root) if p.is_dir())
        raise DataError(
            f"No images of the split {split!r} under {root}: expected {expected} there, "
            f"but {place} holds {_contents(place)}."
        )
    return images


class CityscapesDataset(Dataset[tuple[Tensor, Tensor]]):
    """Photographs and their labels, from a folder in Cityscapes layout.

    ``leftImg8bit/<split>/<city>/<name>_leftImg8bit.png`` belongs to
    ``gtFine/<split>/<city>/<name>_gtFine_labelIds.png``. Labels without a photograph are ignored.

    An item is ``(image, target)``: float32 [3, H, W] normalized with ImageNet's mean and standard deviation,
    and int64 [H, W] of train ids with :data:`IGNORE_INDEX` where nothing is to be learned.

    Args:
        root: the folder that holds ``leftImg8bit`` and ``gtFine``.
        split: ``"train"``, ``"val"`` or ``"test"``.
        size: (height, width) in pixels of the items; ``None`` keeps the size of the files, which must then
            be the same for all.
        augment: vary the items: random scale and crop, horizontal flip, color. Draws from torch's random
            generator.

    Attributes:
        images: the photographs' paths, in order.
        labels: the labels' paths, in the same order.
        size: (height, width) of every item.

    Raises:
        DataError: when built: the folder is missing, empty or laid out differently, or a photograph has no
            labels. When read: a file is damaged, holds an illegal label id, or has an unexpected size.
    """

    def __init__(
        self, root: str | Path, split: str, size: tuple[int, int] | None = None, augment: bool = False
    ) -> None:
        self.images = list_images(root, split)
        self.labels = [_labels_of(image) for image in self.images]
        missing = [path for path in self.labels if not path.is_file()]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(self.images)} images of the split {split!r} have no labels; "
                f"the first that is missing: {missing[0]}. Add the labels or remove the images."
            )
        self._resized = size is not None
        width, height = open_image(self.images[0]).size
        self.size = size or (height, width)
        self._transform = _augmentation(self.size) if augment else normalize_images(size)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path, labels_path = self.images[index], self.labels[index]
        photo = open_image(path).convert("RGB")
        labels = read_labels(labels_path)
        height, width = labels.shape
        if (photo.height, photo.width) != (height, width):
            raise DataError(
                f"{path} is {photo.height}x{photo.width} (height x width) but its labels {labels_path} are "
                f"{height}x{width}. Expected the same size."
            )
        if not self._resized and (height, width) != self.size:
            raise DataError(
                f"{path} is {height}x{width} (height x width) but {self.images[0]} is "
                f"{self.size[0]}x{self.size[1]}. Pass size=(height, width) to bring all images to one size."
            )
        image, target = self._transform(v2.functional.to_image(photo), tv_tensors.Mask(torch.from_numpy(labels)))
        return image.as_subclass(Tensor), target.as_subclass(Tensor).long()


def _labels_of(image: Path) -> Path:
    """``gtFine/<split>/<city>/<name>_gtFine_labelIds.png`` for a path below ``leftImg8bit``."""
    split, city = image.parts[-3:-1]
    name = image.name.removesuffix("_leftImg8bit.png")
    return image.parents[3] / "gtFine" / split / city / f"{name}_gtFine_labelIds.png"


def _augmentation(size: tuple[int, int]) -> v2.Transform:
    aspect = size[1] / size[0]
    return v2.Compose(
        [
            # Cutting first and resizing after gives random scale and crop without padding, whose constant
            # color would show up in the activation ranges of quantization-aware training.
            v2.RandomResizedCrop(size, scale=(0.3, 1.0), ratio=(0.85 * aspect, 1.15 * aspect), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3),
            normalize_images(),
        ]
    )


def _contents(folder: Path, most: int = 8) -> str:
    names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "nothing"
