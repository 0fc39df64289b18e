"""Data modules for detection: photographs with boxes in COCO layout, or cut from label maps in Cityscapes layout."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from typing_extensions import override

from lightning_quant.domains.detection.boxes import Boxes
from lightning_quant.domains.detection.datasets import BoxesDataset, CocoBoxes, MaskBoxes, collate
from lightning_quant.domains.loading import check_least, loader, training_loader
from lightning_quant.domains.segmentation.images import UnlabeledImages, choose
from lightning_quant.domains.segmentation.scenes import generate_scenes
from lightning_quant.errors import ConfigurationError

Batch = tuple[Tensor, list[Boxes]]
"""``(images, targets)``: normalized float32 (N, 3, H, W), and the boxes of each image with their classes."""


class BoxesDataModule(LightningDataModule):
    """Base of the data modules for detection, for training, evaluation and calibration.

    Training, validation and test batches are ``(images, targets)``: float32 [N, 3, H, W] normalized with ImageNet's
    mean and standard deviation, and a list of N dicts of ``boxes``, float32 [K, 4] as (x1, y1, x2, y2) in pixels of the
    image, and ``labels``, int64 [K]. Prediction batches are bare images. Testing and prediction use the validation
    split.

    Args:
        root: the folder of the data.
        classes: names of the classes to detect, in the order of their indices.
        size: (height, width) in pixels of every image, boxes included; ``None`` keeps the size of the files. A detector
            may want multiples of something, :class:`~lightning_quant.domains.detection.network.Detector` of 32.
        batch_size: images in a batch, for every loader.
        num_workers: processes that load images; 0 loads in the main process.
        calibration_samples: how many training images :meth:`calibration_dataloader` yields (fewer if there are fewer).
        augment: vary the training images (flip, color).
        seed: decides which images calibrate.

    Raises:
        ConfigurationError: when an argument is out of range.
        DataError: when files are missing or laid out differently, in :meth:`setup`.
    """

    def __init__(
        self,
        root: str,
        classes: Sequence[str] | None,
        size: Sequence[int] | None = None,
        batch_size: int = 8,
        num_workers: int = 0,
        calibration_samples: int = 256,
        augment: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_least(
            batch_size=(batch_size, 1),
            num_workers=(num_workers, 0),
            calibration_samples=(calibration_samples, 1),
            seed=(seed, 0),
        )
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ConfigurationError(f"size={tuple(size)}: expected (height, width) in pixels.")
        if classes is not None and (not classes or len(set(classes)) < len(classes)):
            raise ConfigurationError(f"classes={list(classes)}: expected at least one name, and each once.")
        self.root = Path(root)
        self.classes = None if classes is None else tuple(classes)
        self.size = None if size is None else (int(size[0]), int(size[1]))
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.calibration_samples = calibration_samples
        self.augment = augment
        self.seed = seed
        self._datasets: dict[tuple[str, bool], BoxesDataset] = {}

    @abstractmethod
    def dataset(self, split: str, augment: bool) -> BoxesDataset:
        """Return the images of a split, ``"train"`` or ``"val"``."""

    @override
    def setup(self, stage: str) -> None:
        """Read what files there are for ``stage``, so that a wrong folder is reported before any work."""
        if stage == "fit":
            self._labeled("train", self.augment)
        self._labeled("val")

    @override
    def train_dataloader(self) -> DataLoader[Batch]:
        """Return shuffled, augmented batches of equal size; the incomplete last one is dropped.

        Raises:
            ConfigurationError: when ``batch_size`` is larger than the split, so that no batch would be left.
        """
        dataset = self._labeled("train", self.augment)
        return training_loader(dataset, self.batch_size, self.num_workers, collate_fn=collate)

    @override
    def val_dataloader(self) -> DataLoader[Batch]:
        """Return batches of the validation split, in order."""
        return loader(self._labeled("val"), self.batch_size, self.num_workers, collate_fn=collate)

    @override
    def test_dataloader(self) -> DataLoader[Batch]:
        """Return batches of the validation split, in order."""
        return self.val_dataloader()

    @override
    def predict_dataloader(self) -> DataLoader[Tensor]:
        """Return bare images [N, 3, H, W] of the validation split, in order."""
        images = UnlabeledImages.from_files(self._labeled("val").images, self.size)
        return loader(images, self.batch_size, self.num_workers)

    def calibration_dataloader(self) -> DataLoader[Batch]:
        """Return the training images that ranges are measured with: chosen by ``seed``, never augmented.

        Works before and after :meth:`setup` of any stage.
        """
        dataset = self._labeled("train")
        chosen, _ = choose(len(dataset), self.calibration_samples, seed=self.seed)
        return loader(Subset(dataset, chosen), self.batch_size, self.num_workers, collate_fn=collate)

    def _labeled(self, split: str, augment: bool = False) -> BoxesDataset:
        # Built once and on demand: calibration needs the training split in every stage.
        if (split, augment) not in self._datasets:
            self._datasets[split, augment] = self.dataset(split, augment)
        return self._datasets[split, augment]


class CocoDataModule(BoxesDataModule):
    """COCO, or any data in its layout: folders of photographs, and a JSON file of annotations for each.

    Boxes of crowds are left out. For batches and arguments see :class:`BoxesDataModule`.

    Example::

        data = CocoDataModule("coco", classes=["person", "bicycle"], size=(320, 320), num_workers=4)
        trainer.fit(DetectionTask(fcos_nano(2), class_names=data.classes), datamodule=data)

    Args:
        root: the folder that the other four are in.
        classes: names of the categories to detect, in the order of their indices; ``None`` takes all, by their id.
        size: (height, width) in pixels of every image.
        train_images: folder with the training images.
        train_annotations: JSON file with their boxes.
        val_images: folder with the validation images.
        val_annotations: JSON file with theirs.
        **loading: the other arguments of :class:`BoxesDataModule`.
    """

    def __init__(
        self,
        root: str,
        classes: Sequence[str] | None = None,
        size: Sequence[int] | None = (320, 320),
        train_images: str = "train2017",
        train_annotations: str = "annotations/instances_train2017.json",
        val_images: str = "val2017",
        val_annotations: str = "annotations/instances_val2017.json",
        **loading: Any,
    ) -> None:
        super().__init__(root, classes, size, **loading)
        self.places = {"train": (train_images, train_annotations), "val": (val_images, val_annotations)}

    @override
    def dataset(self, split: str, augment: bool) -> CocoBoxes:
        images, annotations = self.places[split]
        return CocoBoxes(self.root / images, self.root / annotations, self.classes, self.size, augment)


class MaskBoxesDataModule(BoxesDataModule):
    """Boxes around what label maps in Cityscapes layout hold, see :class:`~.datasets.MaskBoxes`.

    Args:
        root: the folder that holds ``leftImg8bit`` and ``gtFine``.
        classes: names of Cityscapes' classes to detect, in the order of their indices.
        min_area: smallest number of pixels of the label map that has a box.
        **loading: the other arguments of :class:`BoxesDataModule`.
    """

    def __init__(
        self,
        root: str,
        classes: Sequence[str] = ("person", "rider", "car", "truck", "bus", "bicycle"),
        min_area: int = 64,
        **loading: Any,
    ) -> None:
        super().__init__(root, classes, **loading)
        if min_area < 1:
            raise ConfigurationError(f"min_area={min_area}: expected a number of pixels, 1 or more.")
        self.min_area = min_area

    @override
    def dataset(self, split: str, augment: bool) -> MaskBoxes:
        assert self.classes is not None
        return MaskBoxes(self.root, split, self.classes, self.size, augment, self.min_area)


class SceneBoxesDataModule(MaskBoxesDataModule):
    """Boxes in synthetic street scenes, which are drawn on first use and kept in ``root``: no download, no license.

    Args:
        root: where to keep the scenes.
        train: scenes in the training split.
        val: scenes in the validation split.
        height: height of a scene in pixels.
        width: width of a scene in pixels.
        seed: decides what the scenes show, and which of them calibrate.
        **loading: the other arguments of :class:`MaskBoxesDataModule`.
    """

    def __init__(
        self,
        root: str,
        train: int = 300,
        val: int = 100,
        height: int = 128,
        width: int = 256,
        seed: int = 0,
        **loading: Any,
    ) -> None:
        super().__init__(root, seed=seed, **loading)
        self.scenes = {"train": train, "val": val, "height": height, "width": width, "seed": seed}

    @override
    def prepare_data(self) -> None:
        """Draw the scenes that are not there yet."""
        generate_scenes(self.root, **self.scenes)
