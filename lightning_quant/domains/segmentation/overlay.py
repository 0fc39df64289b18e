"""What a segmentation network sees: class colours over the photograph, float beside quantized.

Pictures are uint8 RGB arrays ``(H, W, 3)``; class maps are whole numbers ``(H, W)``, the train ids of
Cityscapes or 255 for pixels without a class.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lightning_quant.domains.segmentation.cityscapes import (
    CLASSES,
    IGNORE_INDEX,
    IMAGE_MEAN,
    IMAGE_STD,
    NUM_CLASSES,
    PALETTE,
)
from lightning_quant.errors import ConfigurationError

Picture = NDArray[np.uint8]
ClassMap = NDArray[np.integer] | Tensor

_DIFFERENCE = np.array((255, 0, 0), dtype=np.uint8)
_CAPTION_HEIGHT = 18
_TEXT = 12
_GAP = 4
_ENTRY_WIDTH = 110
_NARROWEST = 256

PANELS = ("photo", "float", "quantized", "difference")
"""What is drawn of an image: as it is, both networks' classes over it, and where these differ."""


def denormalize(image: Tensor) -> Picture:
    """Undo the normalisation of the data module: float ``(3, H, W)`` to a picture ``(H, W, 3)``.

    Raises:
        ConfigurationError: ``image`` has another shape; a batch has to be taken apart first.
    """
    if image.ndim != 3 or image.shape[0] != 3:
        raise ConfigurationError(f"denormalize got shape {tuple(image.shape)}; expected one image (3, H, W).")
    values = image.detach().float().cpu().numpy().transpose(1, 2, 0) * IMAGE_STD + IMAGE_MEAN
    return np.clip(np.rint(values * 255), 0, 255).astype(np.uint8)


def colorize(class_map: ClassMap) -> Picture:
    """The colours of Cityscapes for a class map, black where there is no class (255).

    Raises:
        ConfigurationError: ``class_map`` is not two-dimensional, not of whole numbers, or holds a number that
            is no class.
    """
    classes = _classes(class_map)
    # One more colour than classes: the last one is for pixels without a class.
    colours = np.vstack((PALETTE, np.zeros((1, 3), np.uint8)))
    return colours[np.where(classes == IGNORE_INDEX, NUM_CLASSES, classes)]


def overlay(image: Picture, class_map: ClassMap, alpha: float = 0.5) -> Picture:
    """Lay the class colours over a photograph; it stays as it is where there is no class (255).

    Args:
        image: the photograph, uint8 ``(H, W, 3)``.
        class_map: the class of every pixel, ``(H, W)``.
        alpha: share of the class colour, 0 (photograph only) to 1 (colours only).

    Raises:
        ConfigurationError: the sizes differ, ``alpha`` is out of range, or :func:`colorize` refuses the map.
    """
    if not 0 <= alpha <= 1:
        raise ConfigurationError(f"alpha={alpha} was given; expected 0 to 1.")
    colours = colorize(class_map)
    _check_size(image, colours.shape[:2])
    mixed = np.rint((1 - alpha) * image + alpha * colours).astype(np.uint8)
    return np.where((_classes(class_map) == IGNORE_INDEX)[..., None], image, mixed)


def difference(image: Picture, float_map: ClassMap, quantized_map: ClassMap) -> Picture:
    """Red where two class maps disagree, over the photograph in faded grey.

    Raises:
        ConfigurationError: the sizes differ, or :func:`colorize` would refuse one of the maps.
    """
    first, second = _classes(float_map), _classes(quantized_map)
    _check_size(image, first.shape)
    _check_size(image, second.shape)
    grey = np.asarray(Image.fromarray(image).convert("L"))[..., None]
    faded = np.repeat(96 + grey // 2, 3, axis=2)
    return np.where((first != second)[..., None], _DIFFERENCE, faded)


def panels(image: Picture, float_map: ClassMap, quantized_map: ClassMap, alpha: float = 0.5) -> dict[str, Picture]:
    """The pictures of :data:`PANELS`, each as large as the photograph. Arguments as in :func:`overlay`."""
    pictures = (
        image,
        overlay(image, float_map, alpha),
        overlay(image, quantized_map, alpha),
        difference(image, float_map, quantized_map),
    )
    return dict(zip(PANELS, pictures, strict=True))


def comparison(image: Picture, float_map: ClassMap, quantized_map: ClassMap, alpha: float = 0.5) -> Picture:
    """Four captioned panels in a row, and the colours of the classes that occur below them.

    Photo, float, quantized, and the difference with its share of the pixels. Arguments as in :func:`overlay` and
    :func:`difference`. Photographs narrower than 256 pixels are enlarged by a whole number.
    """
    drawn = panels(image, float_map, quantized_map, alpha)
    share = float(np.mean(_classes(float_map) != _classes(quantized_map)))
    captions = {"difference": f"difference: {share:.2%} of pixels"}
    times = -(-_NARROWEST // image.shape[1])
    height, width = (times * side for side in image.shape[:2])
    total = 4 * width + 3 * _GAP
    occurring = np.union1d(_classes(float_map), _classes(quantized_map))
    entries = [one for one in CLASSES if one.train_id in occurring]
    font = ImageFont.load_default(size=_TEXT)
    a_row = max(1, total // _ENTRY_WIDTH)
    rows = -(-len(entries) // a_row)
    canvas = Image.new("RGB", (total, _CAPTION_HEIGHT + height + rows * _CAPTION_HEIGHT), "white")
    draw = ImageDraw.Draw(canvas)
    for column, (name, panel) in enumerate(drawn.items()):
        left = column * (width + _GAP)
        draw.text((left + 2, 2), captions.get(name, name), fill="black", font=font)
        enlarged = Image.fromarray(panel).resize((width, height), Image.Resampling.NEAREST)
        canvas.paste(enlarged, (left, _CAPTION_HEIGHT))
    for index, entry in enumerate(entries):
        left, top = index % a_row * _ENTRY_WIDTH, _CAPTION_HEIGHT * (1 + index // a_row) + height
        draw.rectangle((left + 2, top + 3, left + 2 + _TEXT, top + 3 + _TEXT), fill=entry.colour)
        draw.text((left + _TEXT + 8, top + 2), entry.name, fill="black", font=font)
    return np.asarray(canvas)


def save_overlays(
    directory: str | Path,
    images: Iterable[Tensor],
    float_maps: Iterable[ClassMap],
    quantized_maps: Iterable[ClassMap],
    alpha: float = 0.5,
    start: int = 0,
) -> list[Path]:
    """Write one :func:`comparison` an image, as ``<directory>/overlay_<number>.png``, and its panels beside it.

    The panels are ``photo.png``, ``float.png``, ``quantized.png`` and ``difference.png`` in a folder of the same name.
    The number has four digits and counts from ``start``: ``overlay_0000.png``, ``overlay_0001.png`` and so
    on. Files of the same name are overwritten.

    Args:
        directory: where the files go; created if missing.
        images: normalised images ``(3, H, W)``, or a batch ``(N, 3, H, W)`` of them.
        float_maps: the float network's class maps of these images, such as ``SegmentationTask`` predicts.
        quantized_maps: the quantized network's.
        alpha: share of the class colours, 0 to 1.
        start: number of the first image, to go on with the next batch.

    Returns:
        The paths of the files, in the order of the images.

    Raises:
        ConfigurationError: there are not as many maps as images, or they do not fit.
    """
    photos, floats, quantized = list(images), list(float_maps), list(quantized_maps)
    if not len(photos) == len(floats) == len(quantized):
        raise ConfigurationError(
            f"save_overlays got {len(photos)} images, {len(floats)} float maps and {len(quantized)} "
            "quantized maps; expected as many of each."
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, (photo, one, other) in enumerate(zip(photos, floats, quantized, strict=True), start):
        path = directory / f"overlay_{number:04d}.png"
        image = denormalize(photo)
        Image.fromarray(comparison(image, one, other, alpha)).save(path)
        path.with_suffix("").mkdir(exist_ok=True)
        for name, panel in panels(image, one, other, alpha).items():
            Image.fromarray(panel).save(path.with_suffix("") / f"{name}.png")
        paths.append(path)
    return paths


def overlay_folders(directory: str | Path) -> list[Path]:
    """The folders with panels that :func:`save_overlays` wrote into a directory, in order."""
    return sorted(path for path in Path(directory).glob("overlay_*") if path.is_dir())


def _classes(class_map: ClassMap) -> NDArray[np.integer]:
    classes = class_map.detach().cpu().numpy() if isinstance(class_map, Tensor) else class_map
    if classes.ndim != 2 or not np.issubdtype(classes.dtype, np.integer):
        raise ConfigurationError(
            f"A class map of shape {classes.shape} and type {classes.dtype} was given; expected whole "
            "numbers (H, W). Logits become class maps with .argmax(dim=1)."
        )
    wrong = np.unique(classes[(classes < 0) | ((classes >= NUM_CLASSES) & (classes != IGNORE_INDEX))])
    if wrong.size:
        raise ConfigurationError(
            f"A class map holds {wrong[:8].tolist()}; expected 0 to {NUM_CLASSES - 1}, or {IGNORE_INDEX} for no class."
        )
    return classes


def _check_size(image: Picture, size: tuple[int, ...]) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.shape[:2] != size:
        raise ConfigurationError(
            f"A picture of shape {image.shape} and type {image.dtype} was given with a class map of "
            f"{size}; expected uint8 {(*size, 3)}. denormalize() makes such a picture from a network's input."
        )
