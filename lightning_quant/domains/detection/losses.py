"""What a detector learns: which position answers for which box, and how far it is off."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_area, generalized_box_iou_loss, sigmoid_focal_loss

from lightning_quant.domains.detection.boxes import Boxes, centers, stride_of, to_boxes

# FCOS's later version: positions near the middle of a box see most of its object.
_RADIUS = 1.5


def assign(points: Tensor, boxes: Tensor, stride: int) -> Tensor:
    """Return which box each position answers for.

    A position answers for a box that its center lies in, at most 1.5 strides from the center of the box in x and y
    ("center sampling" of FCOS); and for each box, however small, does the position that holds its center. Of several
    boxes it is the smallest.

    Args:
        points: centers of the positions in pixels, (P, 2).
        boxes: (K, 4), in pixels.
        stride: in pixels.

    Returns:
        int64 (P): the index of a box, or -1.
    """
    if not len(boxes):
        return torch.full((len(points),), -1, device=points.device)
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    apart = (points[:, None] - middle).abs().amax(dim=2)
    inside = ((points[:, None] > boxes[:, :2]) & (points[:, None] < boxes[:, 2:])).all(dim=2)
    answers = (inside & (apart <= _RADIUS * stride)) | (apart <= stride / 2)
    areas = torch.where(answers, box_area(boxes), torch.inf)
    smallest, index = areas.min(dim=1)
    return torch.where(smallest.isinf(), -1, index)


def detection_losses(
    scores: Tensor, distances: Tensor, targets: Sequence[Boxes], size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return the losses of the scores and of the boxes of a batch, each divided by the number of positions with a box.

    The focal loss of Lin et al., 2017 (arXiv 1708.02002) over all positions and classes, and the generalized IoU loss
    of Rezatofighi et al., 2019 (arXiv 1902.09630) over positions with a box.

    Args:
        scores: logits, (N, C, h, w).
        distances: (N, 4, h, w), in units of the stride.
        targets: of each image.
        size: height and width of the images, in pixels.
    """
    stride = stride_of(scores, size)
    points = centers(scores, stride)
    logits, apart = scores.float().flatten(2).mT, distances.flatten(2).mT
    chosen = torch.stack([assign(points, one["boxes"], stride) for one in targets])
    has_box = chosen >= 0
    wanted = torch.zeros_like(logits)
    boxes: list[Tensor] = []
    for image, (target, index) in enumerate(zip(targets, chosen, strict=True)):
        here = has_box[image]
        wanted[image, here] = F.one_hot(target["labels"][index[here]], logits.shape[-1]).float()
        boxes.append(target["boxes"][index[here]])
    count = has_box.sum().clamp(min=1)
    predicted = to_boxes(points, apart, stride)[has_box]
    score_loss = sigmoid_focal_loss(logits, wanted, reduction="sum") / count
    return score_loss, generalized_box_iou_loss(predicted, torch.cat(boxes), reduction="sum") / count
