"""Data modules for segmentation: a folder in Cityscapes layout, real or synthetic."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from typing_extensions import override

from lightning_quant.domains.loading import check_least, loader, training_loader
from lightning_quant.domains.segmentation.cityscapes import (
    IGNORE_INDEX,
    CityscapesDataset,
    list_images,
    read_labels,
)
from lightning_quant.domains.segmentation.images import UnlabeledImages, choose, find_images
from lightning_quant.domains.segmentation.scenes import generate_scenes
from lightning_quant.errors import ConfigurationError


class CityscapesDataModule(LightningDataModule):
    """Cityscapes, or any folder in its layout, for training, evaluation and calibration.

    Training, validation and test batches are ``(images, targets)``: float32 [N, 3, H, W] normalized with
    ImageNet's mean and standard deviation, and int64 [N, H, W] of train ids (255 = ignored). Prediction
    batches are bare images, those of the test split where there is one, else of the validation split.

    Cityscapes publishes no labels for its test split. Testing therefore uses the validation split unless
    ``gtFine/test`` holds real labels.

    The order of training batches and the augmentation follow torch's random generator:
    ``seed_everything(…, workers=True)`` makes them reproducible.

    Example::

        data = CityscapesDataModule("cityscapes", size=(512, 1024), batch_size=8, num_workers=4)
        trainer.fit(model, datamodule=data)

    Args:
        root: the folder that holds ``leftImg8bit`` and ``gtFine``.
        size: (height, width) in pixels of every image; ``None`` keeps the size of the files.
        batch_size: images in a batch, for every loader.
        num_workers: processes that load images; 0 loads in the main process.
        calibration_samples: how many images :meth:`calibration_dataloader` yields (fewer if there are fewer).
        calibration_images: calibrate with these unlabeled images instead of training images: a folder, or a
            Hugging Face data set, see :func:`~lightning_quant.domains.segmentation.images.find_images`.
        calibration_pattern: which files of that Hugging Face data set to take, such as ``"rgb/*_00*.png"``.
        held_out: how many more images of the calibration source to keep away from calibration, for
            :meth:`held_out_dataloader`.
        augment: vary the training images (scale, crop, flip, color).
        seed: decides which images calibrate and which are held out.

    Raises:
        ConfigurationError: when an argument is out of range.
        DataError: when the folder is missing or laid out differently, in :meth:`setup`.
    """

    def __init__(
        self,
        root: str,
        size: Sequence[int] | None = None,
        batch_size: int = 8,
        num_workers: int = 0,
        calibration_samples: int = 256,
        calibration_images: str | None = None,
        calibration_pattern: str | None = None,
        held_out: int = 0,
        augment: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_least(
            batch_size=(batch_size, 1),
            num_workers=(num_workers, 0),
            calibration_samples=(calibration_samples, 1),
            held_out=(held_out, 0),
            seed=(seed, 0),
        )
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ConfigurationError(f"size={tuple(size)}: expected (height, width) in pixels.")
        if calibration_pattern is not None and calibration_images is None:
            raise ConfigurationError(
                f"calibration_pattern={calibration_pattern!r} without calibration_images. "
                "Name the data set whose files it selects."
            )
        self.root = Path(root)
        self.size = None if size is None else (int(size[0]), int(size[1]))
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.calibration_samples = calibration_samples
        self.calibration_images = calibration_images
        self.calibration_pattern = calibration_pattern
        self.held_out = held_out
        self.augment = augment
        self.seed = seed
        self._datasets: dict[str, CityscapesDataset] = {}
        self._calibration_source: Dataset[Any] | None = None

    @override
    def setup(self, stage: str) -> None:
        """Read the folder's listing for ``stage``, so that a wrong folder is reported before any work."""
        if stage == "fit":
            self._labeled("train", self.augment)
        if stage in ("fit", "validate"):
            self._labeled("val")
        if stage == "test":
            self._labeled(self._test_split())
        if stage == "predict":
            self._unlabeled()

    @override
    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return shuffled, augmented batches of equal size; the incomplete last one is dropped.

        Raises:
            ConfigurationError: when ``batch_size`` is larger than the split, so that no batch would be left.
        """
        return training_loader(self._labeled("train", self.augment), self.batch_size, self.num_workers)

    @override
    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return batches of the validation split, in order."""
        return self._loader(self._labeled("val"))

    @override
    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return batches of the test split if it has labels, else of the validation split, in order."""
        return self._loader(self._labeled(self._test_split()))

    @override
    def predict_dataloader(self) -> DataLoader[Tensor]:
        """Return bare images [N, 3, H, W], in order, of the test split if there is one, else of validation."""
        return self._loader(self._unlabeled())

    def calibration_dataloader(self) -> DataLoader[Any]:
        """Return the images that quantization ranges are measured with: chosen by ``seed``, never augmented.

        Works before and after :meth:`setup` of any stage. Batches are ``(images, targets)`` from the training
        split, or bare images [N, 3, H, W] if ``calibration_images`` was given.
        """
        return self._loader(Subset(self._calibration(), self._chosen()[0]))

    def held_out_dataloader(self) -> DataLoader[Any]:
        """Return the ``held_out`` images of the same source that :meth:`calibration_dataloader` never yields."""
        return self._loader(Subset(self._calibration(), self._chosen()[1]))

    def _loader(self, dataset: Dataset[Any]) -> DataLoader[Any]:
        return loader(dataset, self.batch_size, self.num_workers)

    def _labeled(self, split: str, augment: bool = False) -> CityscapesDataset:
        # Built once and on demand: calibration needs the training split in every stage.
        key = f"{split}, augmented" if augment else split
        if key not in self._datasets:
            self._datasets[key] = CityscapesDataset(self.root, split, self.size, augment)
        return self._datasets[key]

    def _unlabeled(self) -> UnlabeledImages:
        split = "test" if (self.root / "leftImg8bit" / "test").is_dir() else "val"
        return UnlabeledImages.from_files(list_images(self.root, split), self.size)

    def _test_split(self) -> str:
        # The official archive does hold files for the test split, but void is all that is in them.
        first = min((self.root / "gtFine" / "test").glob("*/*_gtFine_labelIds.png"), default=None)
        return "test" if first is not None and (read_labels(first) != IGNORE_INDEX).any() else "val"

    def _calibration(self) -> Dataset[Any]:
        if self._calibration_source is None:
            self._calibration_source = (
                self._labeled("train")
                if self.calibration_images is None
                else find_images(self.calibration_images, self.calibration_pattern, self.size)
            )
        return self._calibration_source

    def _chosen(self) -> tuple[list[int], list[int]]:
        total = len(self._calibration())  # type: ignore[arg-type]
        return choose(total, self.calibration_samples, self.held_out, self.seed)


class SyntheticScenesDataModule(CityscapesDataModule):
    """Synthetic street scenes that are drawn on first use and kept in ``root``.

    They need no download and no license, and have the layout, the classes and the batches of
    :class:`CityscapesDataModule`, so that anything tried on them runs on Cityscapes unchanged.

    Args:
        root: where to keep the scenes.
        train: scenes in the training split.
        val: scenes in the validation split.
        height: height of a scene in pixels.
        width: width of a scene in pixels.
        seed: decides what the scenes show, and which of them calibrate.
        **loading: the other arguments of :class:`CityscapesDataModule`.
    """

    def __init__(
        self,
        root: str,
        train: int = 600,
        val: int = 120,
        height: int = 128,
        width: int = 256,
        seed: int = 0,
        **loading: Any,
    ) -> None:
        super().__init__(root, seed=seed, **loading)
        self.train = train
        self.val = val
        self.height = height
        self.width = width

    @override
    def prepare_data(self) -> None:
        """Draw the scenes that are not there yet."""
        generate_scenes(self.root, train=self.train, val=self.val, height=self.height, width=self.width, seed=self.seed)
