"""Data modules for classification: a folder of images for each class, real or synthetic."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from typing_extensions import override

from lightning_quant.domains.classification.shapes import draw_shapes
from lightning_quant.domains.images import IMAGE_MEAN, IMAGE_STD
from lightning_quant.domains.loading import check_least, loader, training_loader
from lightning_quant.errors import ConfigurationError, DataError
from lightning_quant.utilities.images import open_image


class ImageFolderDataModule(LightningDataModule):
    """Images in a folder for each class, for training, evaluation and calibration.

    The layout is that of torchvision's ``ImageFolder``, once for each split: ``train/<class>/…``, ``val/<class>/…``
    and, where there is one, ``test/<class>/…``. Classes are numbered in the order of their names. Batches are
    ``(images, labels)``: float32 [N, 3, size, size] normalized with ImageNet's mean and standard deviation, and
    int64 [N].

    Images are resized and their middle is cropped; those to train with are cropped at random and flipped.
    Testing and prediction use the validation split where there is no ``test``.

    Example::

        data = ImageFolderDataModule("flowers", size=224, batch_size=64, num_workers=4)
        trainer.fit(model, datamodule=data)

    Args:
        root: the folder that holds ``train`` and ``val``.
        size: height and width in pixels of every image.
        crop_fraction: which part of the resized image its middle is, above 0 to 1; 0.875 resizes the shorter side
            to 256 pixels for a size of 224, as most published networks are evaluated.
        batch_size: images in a batch, for every loader.
        num_workers: processes that load images; 0 loads in the main process.
        calibration_samples: how many images :meth:`calibration_dataloader` yields (fewer if there are fewer).
        augment: crop and flip the training images at random.
        crop_scale: least and largest part of an image's area that a random crop keeps, each above 0 to 1.
        seed: decides which images calibrate.

    Raises:
        ConfigurationError: when an argument is out of range.
        DataError: when a folder is missing or empty, or the splits have different classes, in :meth:`setup`.
    """

    def __init__(
        self,
        root: str,
        size: int = 224,
        crop_fraction: float = 0.875,
        batch_size: int = 32,
        num_workers: int = 0,
        calibration_samples: int = 256,
        augment: bool = True,
        crop_scale: Sequence[float] = (0.08, 1.0),
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_least(
            size=(size, 1),
            batch_size=(batch_size, 1),
            num_workers=(num_workers, 0),
            calibration_samples=(calibration_samples, 1),
            seed=(seed, 0),
        )
        if not 0 < crop_fraction <= 1:
            raise ConfigurationError(f"crop_fraction={crop_fraction}: expected a part of the image, above 0 to 1.")
        if len(crop_scale) != 2 or not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise ConfigurationError(
                f"crop_scale={tuple(crop_scale)}: expected the least and the largest part of the area, above 0 to 1."
            )
        self.root = Path(root)
        self.size = size
        self.crop_fraction = crop_fraction
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.calibration_samples = calibration_samples
        self.augment = augment
        self.crop_scale = (float(crop_scale[0]), float(crop_scale[1]))
        self.seed = seed
        self._folders: dict[tuple[str, bool], ImageFolder] = {}

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, by label: the folders of the training split in their order.

        Raises:
            DataError: when there is no such folder.
        """
        return tuple(self._split("train").classes)

    @override
    def setup(self, stage: str) -> None:
        """Read the folders' listings for ``stage``, so that a wrong folder is reported before any work."""
        if stage == "fit":
            self._split("train", self.augment)
        if stage in ("fit", "validate"):
            self._split("val")
        if stage in ("test", "predict"):
            self._split(self._test_split())

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        """Return shuffled, augmented batches of equal size; the incomplete last one is dropped.

        Raises:
            ConfigurationError: when ``batch_size`` is larger than the split, so that no batch would be left.
        """
        return training_loader(self._split("train", self.augment), self.batch_size, self.num_workers)

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        """Return batches of the validation split, in order."""
        return loader(self._split("val"), self.batch_size, self.num_workers)

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        """Return batches of the test split if there is one, else of the validation split, in order."""
        return loader(self._split(self._test_split()), self.batch_size, self.num_workers)

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        """Return what :meth:`test_dataloader` returns."""
        return self.test_dataloader()

    def calibration_dataloader(self) -> DataLoader[Any]:
        """Return the images that quantization ranges are measured with: of the training split, never augmented.

        The classes take turns, so that each has as many images as the others while it has some left. ``seed``
        decides which; a larger ``calibration_samples`` begins with the images of a smaller one. Works before and
        after :meth:`setup` of any stage.
        """
        chosen = _balanced(np.asarray(self._split("train").targets), self.seed)[: self.calibration_samples]
        return loader(Subset(self._split("train"), chosen), self.batch_size, self.num_workers)

    def _test_split(self) -> str:
        return "test" if (self.root / "test").is_dir() else "val"

    def _split(self, name: str, augment: bool = False) -> ImageFolder:
        # Listed once and on demand: calibration needs the training split in every stage.
        if (name, augment) not in self._folders:
            found = _image_folder(self.root, name, self._transform(augment))
            if name != "train":
                _check_classes(self._split("train"), found)
            self._folders[name, augment] = found
        return self._folders[name, augment]

    def _transform(self, augment: bool) -> v2.Transform:
        middle = [v2.Resize(round(self.size / self.crop_fraction)), v2.CenterCrop(self.size)]
        varied = [v2.RandomResizedCrop(self.size, self.crop_scale), v2.RandomHorizontalFlip()]
        to_floats = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGE_MEAN, IMAGE_STD)]
        return v2.Compose([*(varied if augment else middle), *to_floats, v2.ToPureTensor()])


class SyntheticShapesDataModule(ImageFolderDataModule):
    """Synthetic shapes that are drawn on first use and kept in ``root``.

    They need no download and no license, and have the layout and the batches of :class:`ImageFolderDataModule`, so
    that anything tried on them runs on photographs unchanged.

    Args:
        root: where to keep the images.
        train: images in the training split.
        val: images in the validation split.
        size: height and width of an image in pixels.
        seed: decides what the images show, and which of them calibrate.
        **loading: the other arguments of :class:`ImageFolderDataModule`.
    """

    def __init__(
        self, root: str, train: int = 768, val: int = 192, size: int = 32, seed: int = 0, **loading: Any
    ) -> None:
        super().__init__(root, size=size, seed=seed, **loading)
        self.train = train
        self.val = val

    @override
    def prepare_data(self) -> None:
        """Draw the images that are not there yet."""
        draw_shapes(self.root, train=self.train, val=self.val, size=self.size, seed=self.seed)


def _image_folder(root: Path, split: str, transform: v2.Transform) -> ImageFolder:
    folder, expected = root / split, f"{split}/<class>/<image> there, one folder for each class"
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}. Expected a data set with {expected}.")
    try:
        return ImageFolder(str(folder), transform, loader=_open)
    except FileNotFoundError as error:  # no folder of a class, or one without images
        raise DataError(f"{folder} is no folder of classes: {error}. Expected {expected}.") from error


def _open(path: str) -> Image.Image:
    return open_image(Path(path)).convert("RGB")


def _check_classes(train: ImageFolder, other: ImageFolder) -> None:
    missing, unknown = (sorted(set(a.classes) - set(b.classes)) for a, b in ((train, other), (other, train)))
    if missing or unknown:
        raise DataError(
            f"{other.root} has other classes than {train.root}: missing are {missing[:8]}, unknown are {unknown[:8]}. "
            "Expected the same folders in each split, for labels are numbered in their order."
        )


def _balanced(labels: np.ndarray, seed: int) -> list[int]:
    """Return all indices in an order drawn at random in which the classes take turns."""
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(labels))
    classes = generator.permutation(np.unique(labels))
    rounds = zip_longest(*(shuffled[labels[shuffled] == one].tolist() for one in classes))
    return [index for turn in rounds for index in turn if index is not None]
