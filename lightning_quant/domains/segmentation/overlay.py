"""What a segmentation network sees: the colors of the classes over the photograph, float and quantized.

Pictures are uint8 RGB arrays ``(H, W, 3)``; class maps are whole numbers ``(H, W)``, the train ids of Cityscapes or 255
for pixels without a class.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_quant.domains.images import denormalize
from lightning_quant.domains.segmentation.cityscapes import CLASS_NAMES, IGNORE_INDEX, NUM_CLASSES, PALETTE
from lightning_quant.errors import ConfigurationError
from lightning_quant.report.pictures import Comparison

Picture = NDArray[np.uint8]
ClassMap = NDArray[np.integer] | Tensor


def compare_class_maps(
    image: Tensor, float_map: ClassMap, quantized_map: ClassMap, names: Sequence[str] = CLASS_NAMES, alpha: float = 0.5
) -> Comparison:
    """Draw what two networks see in an image.

    Args:
        image: the normalized image, float ``(3, H, W)``.
        float_map: the float network's class of every pixel, ``(H, W)``.
        quantized_map: the quantized network's.
        names: of the classes, for the legend of those that occur.
        alpha: share of the class colors, 0 to 1.

    Raises:
        ConfigurationError: when the sizes differ, or :func:`denormalize` or :func:`overlay` refuses its argument.
    """
    photo = denormalize(image)
    occurring = np.union1d(_classes(float_map), _classes(quantized_map))
    return Comparison(
        float=overlay(photo, float_map, alpha),
        quantized=overlay(photo, quantized_map, alpha),
        input=photo,
        legend={name: tuple(PALETTE[index].tolist()) for index, name in enumerate(names) if index in occurring},
    )


def colorize(class_map: ClassMap) -> Picture:
    """Return the colors of Cityscapes for a class map, black where there is no class (255).

    Raises:
        ConfigurationError: when ``class_map`` is not two-dimensional or not of whole numbers, or holds a number that
            is not a class.
    """
    classes = _classes(class_map)
    # One more color than classes: the last one is for pixels without a class.
    colors = np.vstack((PALETTE, np.zeros((1, 3), np.uint8)))
    return colors[np.where(classes == IGNORE_INDEX, NUM_CLASSES, classes)]


def overlay(image: Picture, class_map: ClassMap, alpha: float = 0.5) -> Picture:
    """Lay the class colors over a photograph, which stays as it is where there is no class (255).

    Args:
        image: the photograph, uint8 ``(H, W, 3)``.
        class_map: the class of every pixel, ``(H, W)``.
        alpha: share of the class color, 0 (photograph only) to 1 (colors only).

    Raises:
        ConfigurationError: when the sizes differ, ``alpha`` is out of range, or :func:`colorize` refuses the map.
    """
    if not 0 <= alpha <= 1:
        raise ConfigurationError(f"alpha={alpha}: expected 0 to 1.")
    colors = colorize(class_map)
    _check_size(image, colors.shape[:2])
    mixed = np.rint((1 - alpha) * image + alpha * colors).astype(np.uint8)
    return np.where((_classes(class_map) == IGNORE_INDEX)[..., None], image, mixed)


def _classes(class_map: ClassMap) -> NDArray[np.integer]:
    classes = class_map.detach().cpu().numpy() if isinstance(class_map, Tensor) else class_map
    if classes.ndim != 2 or not np.issubdtype(classes.dtype, np.integer):
        raise ConfigurationError(
            f"A class map has shape {classes.shape} and type {classes.dtype}: expected whole numbers (H, W). Logits "
            "become class maps with .argmax(dim=1)."
        )
    wrong = np.unique(classes[(classes < 0) | ((classes >= NUM_CLASSES) & (classes != IGNORE_INDEX))])
    if wrong.size:
        raise ConfigurationError(
            f"A class map holds {wrong[:8].tolist()}: expected 0 to {NUM_CLASSES - 1}, or {IGNORE_INDEX} for no class."
        )
    return classes


def _check_size(image: Picture, size: tuple[int, ...]) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.shape[:2] != size:
        raise ConfigurationError(
            f"A picture of shape {image.shape} and type {image.dtype} with a class map of {size}: expected uint8 "
            f"{(*size, 3)}. denormalize() makes such a picture from a network's input."
        )
