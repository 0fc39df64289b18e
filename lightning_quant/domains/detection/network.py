"""A small one-level detector for CPUs, in the manner of FCOS: no anchors, one box at each position of one map.

Tian et al., "FCOS: Fully Convolutional One-Stage Object Detection", 2019 (arXiv 1904.01355), without the centerness
branch and with one level, at 1/8 of the input, into which the coarser ones are added top-down (Lin et al., "Feature
Pyramid Networks", 2017).

Written for quantization: convolutions, batch norms that fold, ReLUs, nearest upsampling and additions, which the NPU
all takes. Scores and distances are tensors of their own, so that each has a range of its own; boxes in pixels are made
outside of the network, see :mod:`lightning_quant.domains.detection.boxes`.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from lightning_quant.errors import ConfigurationError

# Of each sigmoid at the start: otherwise the many positions without an object end the training of the few with one
# (Lin et al., "Focal Loss for Dense Object Detection", 2017, section 4.1).
_PRIOR = 0.01
# In strides. Behind a ReLU, a distance that starts at 0 would stay there.
_FIRST_DISTANCE = 2.0


class _Residual(nn.Module):
    """Two 3x3 convolutions beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _conv(channels, channels)
        self.second = Conv2dNormActivation(channels, channels, 3, activation_layer=None)
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the same shape."""
        return self.activation(x + self.second(self.first(x)))


class Detector(nn.Module):
    """Map images to class scores and box distances at 1/8 of their height and width.

    Args:
        num_classes: channels of the scores, 1 or more.
        widths: channels of the backbone at 1/2, 1/4, 1/8, 1/16 and 1/32 of the input.
        neck: channels in which the scales are added, and of the heads.

    Attributes:
        divisor: what height and width of an image are multiples of.

    Raises:
        ConfigurationError: ``num_classes`` is below 1.
    """

    divisor = 32

    def __init__(
        self, num_classes: int, widths: tuple[int, int, int, int, int] = (12, 16, 32, 48, 64), neck: int = 32
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ConfigurationError(f"num_classes={num_classes}: expected the number of classes to detect, 1 or more.")
        half, quarter, fine, middle, coarse = widths
        self.stem = nn.Sequential(_conv(3, half, stride=2), _conv(half, quarter, stride=2))
        self.fine = nn.Sequential(_conv(quarter, fine, stride=2), _Residual(fine))
        self.middle = nn.Sequential(_conv(fine, middle, stride=2), _Residual(middle))
        self.coarse = nn.Sequential(_conv(middle, coarse, stride=2), _Residual(coarse))
        self.lateral_fine = nn.Conv2d(fine, neck, 1)
        self.lateral_middle = nn.Conv2d(middle, neck, 1)
        self.lateral_coarse = nn.Conv2d(coarse, neck, 1)
        self.mix = _conv(neck, neck)
        self.score_tower = _conv(neck, neck)
        self.scores = nn.Conv2d(neck, num_classes, 3, padding=1)
        self.distance_tower = _conv(neck, neck)
        self.distances = nn.Conv2d(neck, 4, 3, padding=1)
        self.distance_activation = nn.ReLU()
        for head in (self.scores, self.distances):
            nn.init.normal_(head.weight, std=0.01)
        nn.init.constant_(self.scores.bias, -math.log((1 - _PRIOR) / _PRIOR))  # type: ignore[arg-type]
        nn.init.constant_(self.distances.bias, _FIRST_DISTANCE)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the raw maps of normalized images ``(N, 3, H, W)``, H and W multiples of 32.

        Returns:
            ``scores``, ``(N, num_classes, H / 8, W / 8)``: logits; and ``distances``, ``(N, 4, H / 8, W / 8)``: from
            the center of a position to the left, top, right and bottom edge of its box, in units of 8 pixels, 0 or
            more.
        """
        fine = self.fine(self.stem(images))
        middle = self.middle(fine)
        x = self.lateral_middle(middle) + _doubled(self.lateral_coarse(self.coarse(middle)))
        x = self.mix(self.lateral_fine(fine) + _doubled(x))
        return {
            "scores": self.scores(self.score_tower(x)),
            "distances": self.distance_activation(self.distances(self.distance_tower(x))),
        }


def fcos_nano(num_classes: int) -> Detector:
    """Return an untrained detector of 0.2 million parameters, for images of about 128x256 pixels on a CPU."""
    return Detector(num_classes)


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    return Conv2dNormActivation(inputs, outputs, 3, stride, inplace=False)


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
