"""torchvision: every family of its classifiers, its segmentation, detectors without post-processing, video."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torchvision import models
from torchvision.models import detection, segmentation, video
from torchvision.models.video.mvit import MSBlockConfig

from benchmarks.zoo.catalogue.entry import Entry, images, noise

# name → (side of the image, options); AlexNet and VGG pool to a fixed size that ONNX cannot give from fewer pixels
_CLASSIFIERS: dict[str, tuple[int, dict[str, Any]]] = {
    "alexnet": (224, {}),
    "convnext_tiny": (64, {}),
    "densenet121": (64, {}),
    "efficientnet_b0": (64, {}),
    "efficientnet_v2_s": (64, {}),
    "googlenet": (64, {"aux_logits": False, "init_weights": False}),
    "inception_v3": (96, {"aux_logits": False, "init_weights": False}),
    "mnasnet0_5": (64, {}),
    "mobilenet_v2": (64, {}),
    "mobilenet_v3_large": (64, {}),
    "regnet_x_400mf": (64, {}),
    "regnet_y_400mf": (64, {}),
    "resnet18": (64, {}),
    "resnext50_32x4d": (64, {}),
    "shufflenet_v2_x0_5": (64, {}),
    "squeezenet1_1": (64, {}),
    "swin_t": (64, {}),
    "swin_v2_t": (64, {}),
    "vgg11_bn": (224, {}),
}
_SEGMENTATION = ("fcn_resnet50", "deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")
_VIDEO: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "r3d_18": ((3, 4, 48, 48), {}),
    "r2plus1d_18": ((3, 4, 48, 48), {}),
    "swin3d_t": ((3, 4, 64, 64), {}),
}


class BackboneAndHead(nn.Module):
    """A detector without resizing, anchors and suppression of boxes: what runs on an NPU."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.head = detector.head

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) to scores and box offsets, anchors along axis 1."""
        return self.head(list(self.backbone(x).values()))  # type: ignore[operator]


def _ssdlite() -> nn.Module:
    return BackboneAndHead(
        detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=8),
    )


def _retinanet() -> nn.Module:
    return BackboneAndHead(detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=8))


def _vit() -> nn.Module:
    return models.VisionTransformer(64, 16, num_layers=4, num_heads=3, hidden_dim=192, mlp_dim=384, num_classes=10)


def _maxvit() -> nn.Module:
    return models.MaxVit(
        input_size=(64, 64), stem_channels=16, partition_size=4, block_channels=[16, 32], block_layers=[1, 1],
        head_dim=8, stochastic_depth_prob=0.1, num_classes=10,
    )  # fmt: skip


def _mvit() -> nn.Module:
    space, time = [3, 3, 3], [1, 1, 1]
    blocks = [
        MSBlockConfig(1, 24, 48, space, space, time, [1, 4, 4]),
        MSBlockConfig(2, 48, 96, space, space, [1, 2, 2], [1, 2, 2]),
        MSBlockConfig(4, 96, 96, space, space, [1, 2, 2], time),
    ]
    return video.MViT((64, 64), 4, blocks, True, True, True, True, num_classes=10)


def entries() -> list[Entry]:
    """The networks of torchvision."""
    left_out = "without resizing, anchors and non-maximum suppression"
    found: list[tuple[str, Callable[[], nn.Module], Any, str]] = []
    for name, (size, options) in _CLASSIFIERS.items():
        found.append((name, partial(getattr(models, name), weights=None, num_classes=10, **options), images(size), ""))
    found.append(("vit", _vit, images(64), ""))
    found.append(("maxvit", _maxvit, images(64), ""))
    for name in _SEGMENTATION:
        make = partial(getattr(segmentation, name), weights=None, weights_backbone=None, num_classes=8)
        found.append((name, make, images(64), ""))
    found.append(("ssdlite320_mobilenet_v3_large", _ssdlite, images(128), left_out))
    found.append(("retinanet_resnet50_fpn", _retinanet, images(64), left_out))
    for name, (shape, options) in _VIDEO.items():
        found.append((name, partial(getattr(video, name), weights=None, num_classes=10, **options), noise(*shape), ""))
    found.append(("mvit", _mvit, noise(3, 4, 64, 64), ""))
    return [Entry(f"torchvision/{name}", make, inputs, note) for name, make, inputs, note in found]
