"""Photographs and the boxes in them: as COCO annotates them, or cut from label maps in Cityscapes layout."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from typing_extensions import override

from lightning_quant.domains.detection.boxes import Boxes
from lightning_quant.domains.segmentation.cityscapes import CLASS_NAMES, CLASSES, CityscapesDataset, read_labels
from lightning_quant.domains.segmentation.images import normalize_images
from lightning_quant.errors import ConfigurationError, DataError
from lightning_quant.utilities.images import open_image
from lightning_quant.utilities.parsing import read_json

# The annotations of COCO's training split have 450 MB.
_MOST_ANNOTATION_BYTES = 2**30
_LABEL_ID = {one.name: one.label_id for one in CLASSES}
# From person to bicycle.
_FIRST_WITH_INSTANCES = 24
# Instance ids below this are label ids: of a group that nobody took apart, or of what has no instances.
_FIRST_INSTANCE = 1000


class BoxesDataset(Dataset[tuple[Tensor, Boxes]]):
    """Photographs with boxes.

    An item is ``(image, target)``: float32 [3, H, W] normalized with ImageNet's mean and standard deviation, and the
    boxes in it, in pixels of that image, with their classes as indices into ``class_names``. Boxes of less than a pixel
    are dropped.

    Args:
        images: the files.
        class_names: the classes, by index.
        size: (height, width) in pixels of the items; ``None`` keeps the size of the files, which must then be the same
            for all.
        augment: vary the items: horizontal flip and color. Draws from torch's random generator.

    Raises:
        DataError: when read: a file is damaged, or has an unexpected size.
    """

    def __init__(
        self, images: Sequence[Path], class_names: Sequence[str], size: tuple[int, int] | None, augment: bool
    ) -> None:
        self.images = list(images)
        self.class_names = tuple(class_names)
        self.size = size
        varied = [v2.RandomHorizontalFlip(), v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3)]
        self._transform = v2.Compose(
            [
                *(varied if augment else []),
                normalize_images(size),
                v2.ClampBoundingBoxes(),
                v2.SanitizeBoundingBoxes(),
            ]
        )
        self._first_size: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Boxes]:
        path = self.images[index]
        photo = open_image(path).convert("RGB")
        canvas = (photo.height, photo.width)
        if self.size is None:
            self._first_size = self._first_size or open_image(self.images[0]).size[::-1]
            if canvas != self._first_size:
                raise DataError(
                    f"{path} is {canvas[0]}x{canvas[1]} (height x width) but {self.images[0]} is "
                    f"{self._first_size[0]}x{self._first_size[1]}. Pass size=(height, width) to bring all images to "
                    "one size."
                )
        boxes, labels = self.annotations(index)
        item = {
            "image": v2.functional.to_image(photo),
            "boxes": tv_tensors.BoundingBoxes(
                torch.from_numpy(boxes), format=tv_tensors.BoundingBoxFormat.XYXY, canvas_size=canvas
            ),
            "labels": torch.from_numpy(labels),
        }
        item = self._transform(item)
        return item["image"].as_subclass(Tensor), {
            "boxes": item["boxes"].as_subclass(Tensor),
            "labels": item["labels"],
        }

    @abstractmethod
    def annotations(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return the boxes of a photograph in pixels of its file, (K, 4), and their classes, (K)."""


def collate(samples: Sequence[tuple[Tensor, Boxes]]) -> tuple[Tensor, list[Boxes]]:
    """Return a batch: images (N, 3, H, W), and a list of the N targets."""
    images, targets = zip(*samples, strict=True)
    return torch.stack(images), list(targets)


class CocoBoxes(BoxesDataset):
    """Boxes from a file of annotations as COCO has them (Lin et al., "Microsoft COCO", 2014), those of crowds left out.

    Read by hand: pycocotools prints, wants fields that boxes do not need, and names no file in its errors.

    Args:
        images: the folder with the photographs.
        annotations: the JSON file, with ``images``, ``annotations`` and ``categories``.
        classes: names of the categories to detect, in the order of their indices; ``None`` takes all, by their id.
        size: (height, width) in pixels of the items.
        augment: vary the items.

    Raises:
        DataError: when built: a file is missing or laid out differently.
        ConfigurationError: when built: a class is not among the categories.
    """

    def __init__(
        self,
        images: Path,
        annotations: Path,
        classes: Sequence[str] | None,
        size: tuple[int, int] | None,
        augment: bool = False,
    ) -> None:
        try:
            content = read_json(annotations, _MOST_ANNOTATION_BYTES)
        except (OSError, ValueError) as error:
            raise DataError(
                f"The annotations {annotations} cannot be read ({error}). Expected a JSON file in the layout of COCO's "
                "instances_*.json."
            ) from error
        try:
            files = {one["id"]: images / one["file_name"] for one in content["images"]}
            categories = {one["id"]: str(one["name"]) for one in content["categories"]}
            names = [categories[key] for key in sorted(categories)] if classes is None else list(classes)
            index_of = {key: names.index(name) for key, name in categories.items() if name in names}
            found: dict[Any, list[tuple[list[float], int]]] = {key: [] for key in files}
            for one in content["annotations"]:
                if one["category_id"] in index_of and not one.get("iscrowd", 0):
                    x, y, width, height = map(float, one["bbox"])
                    found[one["image_id"]].append(([x, y, x + width, y + height], index_of[one["category_id"]]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{annotations} is not laid out as COCO's instances_*.json ({type(error).__name__}: {error}). Expected "
                "images with id and file_name, categories with id and name, and annotations with image_id, category_id "
                "and bbox of x, y, width and height, each of an image and a category in the file."
            ) from error
        if missing := [name for name in names if name not in categories.values()]:
            raise ConfigurationError(
                f"classes: {', '.join(missing)} is no category of {annotations}. Expected some of "
                f"{', '.join(categories.values())}."
            )
        if not files:
            raise DataError(f"{annotations} lists no images: expected at least one.")
        gone = [path for path in files.values() if not path.is_file()]
        if gone:
            raise DataError(
                f"{len(gone)} of {len(files)} images that {annotations} lists are missing; the first: {gone[0]}. Add "
                "the images, or name the folder that holds them."
            )
        super().__init__(list(files.values()), names, size, augment)
        self._found = [
            (np.array([box for box, _ in own], np.float32).reshape(-1, 4), np.array([c for _, c in own], np.int64))
            for own in found.values()
        ]
        if not all(np.isfinite(boxes).all() for boxes, _ in self._found):
            raise DataError(f"{annotations} holds a bbox that is NaN or infinite: expected pixels.")

    @override
    def annotations(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        return self._found[index]


class MaskBoxes(BoxesDataset):
    """Boxes around what label maps in Cityscapes layout hold.

    Where ``gtFine/<split>/<city>/<name>_gtFine_instanceIds.png`` is there, its instances have a box each, and groups
    that nobody took apart have none. What has no instances, such as a traffic sign, or without that file everything,
    has a box for each connected region of its class; two cars that touch are then one.

    Args:
        root: the folder that holds ``leftImg8bit`` and ``gtFine``.
        split: ``"train"`` or ``"val"``.
        classes: names of Cityscapes' classes to detect, in the order of their indices.
        size: (height, width) in pixels of the items; ``None`` keeps the size of the files.
        augment: vary the items.
        min_area: smallest number of pixels of the label map that has a box.

    Raises:
        ConfigurationError: when built: a class is not one of Cityscapes.
        DataError: when built or read: as :class:`~lightning_quant.domains.segmentation.cityscapes.CityscapesDataset`.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        classes: Sequence[str],
        size: tuple[int, int] | None = None,
        augment: bool = False,
        min_area: int = 64,
    ) -> None:
        if missing := [name for name in classes if name not in CLASS_NAMES]:
            raise ConfigurationError(
                f"classes: {', '.join(missing)} is no class of Cityscapes. Expected some of {', '.join(CLASS_NAMES)}."
            )
        labeled = CityscapesDataset(root, split)
        super().__init__(labeled.images, classes, size, augment)
        self.labels = labeled.labels
        self.min_area = min_area

    @override
    def annotations(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        path = self.labels[index]
        train_ids = read_labels(path)
        instances = path.with_name(path.name.replace("_labelIds", "_instanceIds"))
        ids = np.asarray(open_image(instances)).astype(np.int64) if instances.is_file() else None
        if ids is not None and ids.shape != train_ids.shape:
            raise DataError(f"{instances} has shape {ids.shape}, but {path} {train_ids.shape}. Expected the same size.")
        return boxes_of_masks(train_ids, self.class_names, self.min_area, ids)


def boxes_of_masks(
    train_ids: NDArray[np.uint8], classes: Sequence[str], min_area: int, instances: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the boxes around instances or connected regions of a label map.

    Args:
        train_ids: Cityscapes' class of every pixel, (H, W).
        classes: names of those that are wanted.
        min_area: smallest number of pixels that has a box.
        instances: Cityscapes' instance ids, (H, W): 1000 times the label id, and a number; or the label id.

    Returns:
        Boxes in pixels, (K, 4), and the index of the class of each, (K). Pixels that touch at a corner are connected.
    """
    boxes: list[tuple[int, int, int, int]] = []
    labels: list[int] = []
    for index, name in enumerate(classes):
        own = train_ids == CLASS_NAMES.index(name)
        if instances is not None and _LABEL_ID[name] >= _FIRST_WITH_INSTANCES:
            taken_apart = np.where(own & (instances >= _FIRST_INSTANCE), instances, 0)
            values, regions = np.unique(taken_apart, return_inverse=True)
            regions = regions.reshape(own.shape) + (values[0] != 0)  # 0 is where there is none
        else:
            regions, _ = ndimage.label(own, structure=np.ones((3, 3)))
        areas = np.bincount(regions.ravel())
        for number, place in enumerate(ndimage.find_objects(regions), start=1):
            if place is not None and areas[number] >= min_area:
                rows, columns = place
                boxes.append((columns.start, rows.start, columns.stop, rows.stop))
                labels.append(index)
    return np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int64)
