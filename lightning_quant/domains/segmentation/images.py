"""Photographs: normalized for a network, and unlabeled ones to calibrate with.

Calibration needs images, not labels, so it can use pictures from the place where the network will work.
They come from a folder, or from a Hugging Face data set (the optional extra ``datasets``).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from lightning_quant.domains.images import IMAGE_MEAN, IMAGE_STD
from lightning_quant.errors import ConfigurationError, DataError
from lightning_quant.utilities.images import open_image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

# Files that `Dataset.save_to_disk` and `DatasetDict.save_to_disk` leave at the top of their folder.
_SAVED_DATASET_MARKERS = ("state.json", "dataset_dict.json")


def normalize_images(size: tuple[int, int] | None = None) -> v2.Transform:
    """Return the transform from a uint8 picture to what the network takes: resize, scale to 0..1, ImageNet mean/std.

    Args:
        size: (height, width) in pixels, or ``None`` to keep the size. Images are resized bilinearly with
            antialiasing; a ``tv_tensors.Mask`` with them takes the nearest label and is not normalized.
    """
    resize = [] if size is None else [v2.Resize(list(size), antialias=True)]
    return v2.Compose([*resize, v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGE_MEAN, IMAGE_STD)])


class UnlabeledImages(Dataset[Tensor]):
    """Pictures without labels, each a normalized float32 tensor [3, H, W].

    Build it with :meth:`from_files`, or with :func:`find_images` from a folder or a Hugging Face data set.

    Args:
        read: opens the picture with a given index.
        length: how many pictures there are.
        size: (height, width) in pixels to resize to; ``None`` keeps each picture's own size, which must then
            be the same for all pictures of a batch.
    """

    def __init__(self, read: Callable[[int], Image.Image], length: int, size: tuple[int, int] | None = None) -> None:
        self._read = read
        self._length = length
        self._transform = v2.Compose([v2.ToImage(), normalize_images(size)])

    @classmethod
    def from_files(cls, paths: list[Path], size: tuple[int, int] | None = None) -> UnlabeledImages:
        """Read the given image files, in the given order."""
        return cls(_FileReader(paths), len(paths), size)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Tensor:
        return self._transform(self._read(index).convert("RGB")).as_subclass(Tensor)


class _FileReader:
    """Reads the i-th of a list of files. A class, not a closure: worker processes may have to pickle it."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __call__(self, index: int) -> Image.Image:
        return open_image(self.paths[index])


class _ColumnReader:
    """Reads the i-th image of a Hugging Face data set whose image column is left encoded."""

    def __init__(self, rows: Any, column: str, source: str) -> None:
        self.rows = rows
        self.column = column
        self.source = source

    def __call__(self, index: int) -> Image.Image:
        cell = self.rows[index][self.column]
        if cell is None:
            raise DataError(f"Row {index} of {self.source} has no image in column {self.column!r}. Remove the row.")
        name = f"{cell['path'] or 'the image'} (row {index} of {self.source})"
        return open_image(cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]), name)


def find_images(source: str | Path, pattern: str | None = None, size: tuple[int, int] | None = None) -> UnlabeledImages:
    """Find unlabeled pictures in a folder or from a Hugging Face data set, always in the same order.

    Args:
        source: one of

            * a folder of image files, searched recursively, in order of their paths;
            * a folder written by ``datasets.save_to_disk``;
            * a data set with an image column: the id of one on the Hugging Face Hub, or a local copy of one.
        pattern: which files of the data set to take, as ``data_files`` of ``datasets.load_dataset``:
            ``find_images("UrbanSyn/UrbanSyn", "rgb/*_00*.png")`` downloads only these.
        size: (height, width) in pixels to resize to; ``None`` keeps the size.

    Raises:
        ConfigurationError: when the data set needs the package ``datasets``, which is not installed.
        DataError: when nothing is found under that name, or it holds no images.
    """
    folder = Path(source)
    if folder.is_dir() and pattern is None and not _is_saved_dataset(folder):
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if paths:
            return UnlabeledImages.from_files(paths, size)
    rows = _load_rows(str(source), pattern)
    column = _image_column(rows, str(source))
    rows = rows.cast_column(column, type(rows.features[column])(decode=False))
    return UnlabeledImages(_ColumnReader(rows, column, str(source)), len(rows), size)


def choose(total: int, samples: int, held_out: int = 0, seed: int = 0) -> tuple[list[int], list[int]]:
    """Draw ``samples`` of ``total`` indices at random, and ``held_out`` others to check the result with.

    The draw depends on ``seed`` only: a larger ``samples`` begins with the indices of a smaller one, and the
    held-out ones stay the same whatever ``samples`` is. Fewer than ``samples`` are returned when there are
    no more.

    Returns:
        The chosen indices and the held-out indices; they do not overlap.

    Raises:
        DataError: when nothing would be left to choose.
    """
    if held_out >= total:
        raise DataError(f"Holding out {held_out} of {total} images leaves none. Lower held_out or provide more images.")
    order = np.random.default_rng(seed).permutation(total).tolist()
    return order[held_out : held_out + samples], order[:held_out]


def _is_saved_dataset(folder: Path) -> bool:
    return any((folder / marker).is_file() for marker in _SAVED_DATASET_MARKERS)


def _load_rows(source: str, pattern: str | None) -> Any:
    """One table of rows: the split "train" where there are several, else the first."""
    try:
        import datasets
    except ImportError as error:
        raise ConfigurationError(
            f"Reading {source!r} as a Hugging Face data set needs the package `datasets`: "
            "pip install 'lightning-quant[datasets]'. (A folder of image files, given without a pattern, "
            "needs no extra package.)"
        ) from error
    wanted = f"{source!r}" + (f" with the pattern {pattern!r}" if pattern else "")
    try:
        if _is_saved_dataset(Path(source)):
            loaded = datasets.load_from_disk(source)
        else:
            loaded = datasets.load_dataset(source, data_files=pattern)
    # `datasets` raises its own errors, OSErrors, ValueErrors or those of the Hub, whatever is missing.
    except Exception as error:
        raise DataError(
            f"No images found in {wanted}: {error}. Expected a folder of images "
            f"({', '.join(IMAGE_SUFFIXES)}), a folder made by `save_to_disk`, or the id of a data set on the "
            "Hugging Face Hub."
        ) from error
    if not isinstance(loaded, dict):
        return loaded
    return loaded["train"] if "train" in loaded else next(iter(loaded.values()))


def _image_column(rows: Any, source: str) -> str:
    # `datasets.Image` is compared by name, so that this function needs no import of the optional package.
    for name, feature in rows.features.items():
        if type(feature).__name__ == "Image":
            return name
    raise DataError(f"{source!r} has no column of images: its columns are {dict(rows.features)}.")
