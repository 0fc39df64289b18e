"""FFNet: the segmentation network of the worked example, and a small sister of it for CPUs.

Mehta et al., "Simple and Efficient Architectures for Semantic Segmentation", 2022 (arXiv 2206.08236): a plain
ResNet whose four scales are added top-down and concatenated, nothing but 3x3 and 1x1 convolutions, batch
norms and ReLUs. The three published mobile variants (40S, 54S, 78S, "dBBB mobile") carry the published
parameter names here, so their checkpoints load with ``strict=True``.

Written for quantization: no ReLU module is called twice (a reused module has one output range for two
tensors), none works in place, and no branch depends on data or on a size, so ``torch.fx`` traces the network
once for every input size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.domains.segmentation.weights import load_weights
from lightning_quant.errors import ConfigurationError


@dataclass(frozen=True)
class FFNetConfig:
    """Depth and width of an :class:`FFNet`. The defaults are those of FFNet-40S.

    Every tuple of four goes from the finest to the coarsest scale.

    Args:
        blocks: residual blocks in each of the backbone's four layers.
        stem: channels of the two strided convolutions at the start.
        backbone: channels of the backbone's layers.
        adapter: channels in which the top-down path adds the scales.
        branch: channels of each scale in the concatenation.
        head: channels between the two convolutions of the head.
        first_stride: stride of layer 1. The output has ``1 / (4 * first_stride)`` of the input's height and width.
    """

    blocks: tuple[int, int, int, int] = (4, 5, 6, 4)
    stem: tuple[int, int] = (32, 64)
    backbone: tuple[int, int, int, int] = (64, 128, 192, 320)
    adapter: tuple[int, int, int, int] = (64, 128, 128, 256)
    branch: tuple[int, int, int, int] = (96, 96, 64, 32)
    head: int = 256
    first_stride: int = 2


_FFNET_40S = FFNetConfig()
_FFNET_54S = replace(_FFNET_40S, blocks=(5, 8, 8, 5))
_FFNET_78S = replace(_FFNET_40S, blocks=(6, 12, 12, 8))
# Output stride 4: at 1/8 the poles and signs of small pictures are gone. Thin fine scales pay for it.
_FFNET_NANO = FFNetConfig(
    blocks=(1, 1, 1, 1),
    stem=(12, 16),
    backbone=(16, 32, 64, 96),
    adapter=(16, 32, 48, 64),
    branch=(16, 16, 16, 16),
    head=32,
    first_stride=1,
)


class ConvBNReLU(nn.Module):
    """Convolution without bias, batch norm and ReLU, under the published name ``layers``."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class BasicBlock(nn.Module):
    """ResNet's basic block (He et al. 2015), with one ReLU module for each of its two activations."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(x)) + shortcut)


class Backbone(nn.Module):
    """Two strided convolutions and four residual layers; returns the four scales, finest first."""

    def __init__(self, config: FFNetConfig) -> None:
        super().__init__()
        first, second = config.stem
        self.conv0 = nn.Conv2d(3, first, 3, stride=2, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(first)
        self.relu0 = nn.ReLU()
        self.conv1 = nn.Conv2d(first, second, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(second)
        self.relu1 = nn.ReLU()
        c1, c2, c3, c4 = config.backbone
        n1, n2, n3, n4 = config.blocks
        self.layer1 = _residual_layer(second, c1, n1, config.first_stride)
        self.layer2 = _residual_layer(c1, c2, n2, 2)
        self.layer3 = _residual_layer(c2, c3, n3, 2)
        self.layer4 = _residual_layer(c3, c4, n4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = self.relu0(self.bn0(self.conv0(x)))
        x = self.relu1(self.bn1(self.conv1(x)))
        x1 = self.layer1(x)
        x2 = self.layer2(x1)
        x3 = self.layer3(x2)
        return x1, x2, x3, self.layer4(x3)


class Adapters(nn.Module):
    """One 1x1 convolution per scale: the backbone's channels to those of the top-down path."""

    def __init__(self, in_channels: Sequence[int], out_channels: Sequence[int]) -> None:
        super().__init__()
        self.adapter_conv = nn.ModuleList(ConvBNReLU(i, o, 1) for i, o in zip(in_channels, out_channels, strict=True))

    def forward(self, scales: Sequence[Tensor]) -> list[Tensor]:
        return [adapter(x) for adapter, x in zip(self.adapter_conv, scales, strict=True)]


class TopDown(nn.Module):
    """Add each coarser scale to the next finer one and smooth every sum; returns four scales, finest first.

    The published names count from the input of a network with output stride 4: ``fam_4`` works on the finest
    scale and ``fam_32_*`` on the coarsest, whatever their true strides are.
    """

    def __init__(self, channels: Sequence[int], out_channels: Sequence[int]) -> None:
        super().__init__()
        c4, c8, c16, c32 = channels
        o4, o8, o16, o32 = out_channels
        self.fam_32_sm = ConvBNReLU(c32, o32, 3)
        self.fam_32_up = ConvBNReLU(c32, c16, 1)
        self.fam_16_sm = ConvBNReLU(c16, o16, 3)
        self.fam_16_up = ConvBNReLU(c16, c8, 1)
        self.fam_8_sm = ConvBNReLU(c8, o8, 3)
        self.fam_8_up = ConvBNReLU(c8, c4, 1)
        self.fam_4 = ConvBNReLU(c4, o4, 3)

    def forward(self, scales: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x4, x8, x16, x32 = scales
        x16 = _upsample_to(self.fam_32_up(x32), x16) + x16
        x8 = _upsample_to(self.fam_16_up(x16), x8) + x8
        x4 = _upsample_to(self.fam_8_up(x8), x4) + x4
        return self.fam_4(x4), self.fam_8_sm(x8), self.fam_16_sm(x16), self.fam_32_sm(x32)


class Concatenate(nn.Module):
    """Upsample every scale to the finest and concatenate the channels, finest first as published."""

    def forward(self, scales: Sequence[Tensor]) -> Tensor:
        x4, x8, x16, x32 = scales
        return torch.cat(
            (x4, _upsample_to(x8, x4), _upsample_to(x16, x4), _upsample_to(x32, x4)),
            dim=1,
        )


class Classifier(nn.Module):
    """Two 3x3 convolutions with bias: concatenated channels to class logits."""

    def __init__(self, in_channels: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.last_layer = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, num_classes, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(x)


class Head(nn.Module):
    """Adapters, top-down path, concatenation and classifier, under the published name ``layers``."""

    def __init__(self, config: FFNetConfig, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            Adapters(config.backbone, config.adapter),
            TopDown(config.adapter, config.branch),
            Concatenate(),
            Classifier(sum(config.branch), config.head, num_classes),
        )

    def forward(self, scales: Sequence[Tensor]) -> Tensor:
        return self.layers(scales)


class FFNet(nn.Module):
    """FFNet, a fully convolutional network for semantic segmentation.

    ``forward`` takes normalized RGB images of shape ``(N, 3, H, W)`` and returns logits of shape
    ``(N, num_classes, H / s, W / s)``, rounded up, with ``s = 4 * config.first_stride`` (8 as published).
    Upsampling to the size of the image is left to the caller, as in the published model: argmax over 1/64 of
    the pixels is what makes the network cheap on a device. Any ``H`` and ``W`` work; multiples of 64 keep the
    scales aligned.

    Args:
        config: depth and width.
        num_classes: channels of the output, at least 1.

    Raises:
        ConfigurationError: when ``num_classes`` is below 1.
    """

    def __init__(self, config: FFNetConfig = _FFNET_40S, num_classes: int = 19) -> None:
        super().__init__()
        if num_classes < 1:
            raise ConfigurationError(f"num_classes={num_classes}: FFNet needs at least 1 (Cityscapes has 19).")
        self.backbone_model = Backbone(config)
        self.head = Head(config, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # No batch norm follows the last convolution: small weights let training start from an even guess.
        nn.init.normal_(self.get_parameter("head.layers.3.last_layer.3.weight"), std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone_model(x))


def ffnet_40s(num_classes: int = 19, weights: str | Path | None = None) -> FFNet:
    """Build FFNet-40S dBBB mobile: 13,911,283 parameters with 19 classes, 55.6 MB in float, 13.9 MB at 8 bits.

    Args:
        num_classes: channels of the output; the published weights have 19.
        weights: a checkpoint to load; :func:`~lightning_quant.domains.segmentation.weights.load_weights` says which.
            ``None`` leaves random weights.

    Raises:
        CheckpointError: when the checkpoint is missing, damaged or of another network.
        ConfigurationError: when ``num_classes`` is below 1.
    """
    return _build(_FFNET_40S, num_classes, weights)


def ffnet_54s(num_classes: int = 19, weights: str | Path | None = None) -> FFNet:
    """Build FFNet-54S dBBB mobile: 18,044,659 parameters with 19 classes. Arguments as in :func:`ffnet_40s`."""
    return _build(_FFNET_54S, num_classes, weights)


def ffnet_78s(num_classes: int = 19, weights: str | Path | None = None) -> FFNet:
    """Build FFNet-78S dBBB mobile: 27,491,059 parameters with 19 classes. Arguments as in :func:`ffnet_40s`."""
    return _build(_FFNET_78S, num_classes, weights)


def ffnet_nano(num_classes: int = 19, weights: str | Path | None = None) -> FFNet:
    """Build FFNet at a size that trains on a CPU in minutes, for tests and demonstrations; not a published one.

    287,311 parameters with 19 classes. Logits at 1/4 of the input's size. Arguments as in :func:`ffnet_40s`.
    """
    return _build(_FFNET_NANO, num_classes, weights)


def _build(config: FFNetConfig, num_classes: int, weights: str | Path | None) -> FFNet:
    network = FFNet(config, num_classes)
    if weights is not None:
        load_weights(network, weights)
    return network


def _residual_layer(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))


def _upsample_to(x: Tensor, like: Tensor) -> Tensor:
    # By size, not by factor: at an input height that 64 does not divide, a coarse row has no two fine ones.
    return F.interpolate(x, size=like.shape[-2:], mode="nearest")
