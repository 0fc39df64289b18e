"""From a detector's maps to boxes and back: what is done on the host, outside of the network.

Boxes are ``(x1, y1, x2, y2)`` in pixels of the network's input, x to the right and y down.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

import torch
from torch import Tensor
from torchvision.ops import batched_nms, clip_boxes_to_image

from lightning_quant.errors import ConfigurationError


class Boxes(TypedDict):
    """Labeled boxes of one image, as torchvision and torchmetrics take them: float (K, 4) and int64 (K)."""

    boxes: Tensor
    labels: Tensor


class Detections(Boxes):
    """Detected boxes of one image, best first, with ``scores``: float (K), 0 to 1."""

    scores: Tensor


def raw_maps(output: object, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return scores and distances in what a network returned: a dict with these names, or a pair of them.

    Raises:
        ConfigurationError: there are none, or of other shapes than ``(N, num_classes, h, w)`` and ``(N, 4, h, w)``.
    """
    found = [output.get("scores"), output.get("distances")] if isinstance(output, Mapping) else output
    maps = [one for one in found if isinstance(one, Tensor)] if isinstance(found, list | tuple) else []
    shapes = [tuple(one.shape) for one in maps]
    if (
        len(maps) != 2
        or [len(shape) for shape in shapes] != [4, 4]
        or [shape[1] for shape in shapes] != [num_classes, 4]
        or shapes[0][2:] != shapes[1][2:]
    ):
        given = f"tensors of shapes {shapes}" if maps else type(output).__name__
        raise ConfigurationError(
            f"The detector returned {given}; expected scores (N, {num_classes}, h, w) and distances (N, 4, h, w), as a "
            f"dict with these names or a pair. Build it with num_classes={num_classes}, one for each name in "
            "class_names, and return both maps apart."
        )
    # A quantized network returns a subclass of Tensor, which should not leave the task.
    scores, distances = (one.as_subclass(Tensor) for one in maps)
    return scores, distances


def stride_of(maps: Tensor, size: tuple[int, int]) -> int:
    """Return how many pixels of an image lie between two positions of maps ``(N, C, h, w)``.

    Raises:
        ConfigurationError: the height and width of the image are not the same whole multiple of those of the maps.
    """
    (height, width), (rows, columns) = size, maps.shape[-2:]
    stride = height // max(rows, 1)
    if (rows * stride, columns * stride) != (height, width):
        raise ConfigurationError(
            f"The detector made maps of {rows}x{columns} (height x width) of images of {height}x{width}: expected "
            "images whose sides are the same whole multiple of the maps'. Pass size=(height, width), both multiples "
            "of 32, to the data module."
        )
    return stride


def centers(maps: Tensor, stride: int) -> Tensor:
    """Return the centers of all positions of maps ``(N, C, h, w)``, row by row: x and y in pixels, float (h * w, 2)."""
    rows, columns = (
        (torch.arange(count, device=maps.device, dtype=torch.float32) + 0.5) * stride for count in maps.shape[-2:]
    )
    return torch.cartesian_prod(rows, columns).flip(1)


def to_boxes(points: Tensor, distances: Tensor, stride: int) -> Tensor:
    """Return the boxes around points.

    Args:
        points: x and y in pixels, (K, 2).
        distances: to the left, top, right and bottom edge in units of ``stride``, (..., K, 4).
        stride: in pixels.

    Returns:
        (..., K, 4), in pixels.
    """
    left_top, right_bottom = (distances.float() * stride).split(2, dim=-1)
    return torch.cat((points - left_top, points + right_bottom), dim=-1)


def decode(
    scores: Tensor,
    distances: Tensor,
    size: tuple[int, int],
    score_threshold: float,
    iou_threshold: float,
    most: int,
) -> list[Detections]:
    """Return what the maps of a batch detect.

    Of each position and class whose score is above the threshold, the best ``10 * most`` are kept; of those of one
    class that overlap, the best (non-maximum suppression).

    Args:
        scores: logits, (N, C, h, w).
        distances: (N, 4, h, w), in units of the stride.
        size: height and width of the images, in pixels.
        score_threshold: 0 to 1.
        iou_threshold: intersection over union above which the lower of two boxes of one class is dropped.
        most: how many boxes of one image are returned at most.
    """
    stride = stride_of(scores, size)
    points = centers(scores, stride)
    boxes = clip_boxes_to_image(to_boxes(points, distances.flatten(2).mT, stride), size)
    probabilities = scores.float().sigmoid().flatten(2).mT
    found: list[Detections] = []
    for own_boxes, own_scores in zip(boxes, probabilities, strict=True):
        places, labels = torch.nonzero(own_scores > score_threshold, as_tuple=True)
        best = own_scores[places, labels].sort(descending=True, stable=True)
        values, order = best.values[: 10 * most], best.indices[: 10 * most]
        places, labels = places[order], labels[order]
        kept = batched_nms(own_boxes[places], values, labels, iou_threshold)[:most]
        found.append({"boxes": own_boxes[places[kept]], "labels": labels[kept], "scores": values[kept]})
    return found
