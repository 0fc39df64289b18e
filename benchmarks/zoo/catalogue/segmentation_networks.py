"""segmentation_models_pytorch: every decoder with three encoders that it takes."""

from __future__ import annotations

from functools import partial

from torch import nn

from benchmarks.zoo.catalogue.entry import Entry, images

_CONVOLUTIONAL = ("resnet18", "mobilenet_v2", "timm-tf_efficientnet_lite0")
_TRANSFORMER = ("resnet18", "mobilenet_v2", "mit_b0")
# DPT reads plain transformers only; its own files scale them down by name.
_PLAIN_TRANSFORMERS = ("tu-vit_tiny_patch16_224", "tu-deit_tiny_patch16_224", "tu-vit_small_patch32_224")
_ENCODERS = {
    "Unet": _TRANSFORMER,
    "UnetPlusPlus": _CONVOLUTIONAL,
    "MAnet": _TRANSFORMER,
    "Linknet": _CONVOLUTIONAL,
    "FPN": _TRANSFORMER,
    "PSPNet": _TRANSFORMER,
    "DeepLabV3": _CONVOLUTIONAL,
    "DeepLabV3Plus": _CONVOLUTIONAL,
    "PAN": _CONVOLUTIONAL,
    "UPerNet": _TRANSFORMER,
    "Segformer": _TRANSFORMER,
    "DPT": _PLAIN_TRANSFORMERS,
}
# PAN halves the image seven times; ONNX pools to 1, 2, 3 and 6 bins only from sizes that they divide.
_SIZES = {"PAN": 128, "PSPNet": 96, "UPerNet": 192}


def _make(decoder: str, encoder: str) -> nn.Module:
    import segmentation_models_pytorch as smp

    options = {"dynamic_img_size": True} if decoder == "DPT" else {}
    return getattr(smp, decoder)(encoder, encoder_weights=None, classes=5, **options)


def _unet_without_batch_norms() -> nn.Module:
    import segmentation_models_pytorch as smp

    decoder_norm = {"type": "instancenorm", "affine": True}
    return smp.Unet(
        "tu-resnet18", encoder_weights=None, classes=5, decoder_use_norm=decoder_norm, norm_layer="groupnorm"
    )


def entries() -> list[Entry]:
    """The networks of segmentation_models_pytorch."""
    found = [
        Entry(f"smp/{decoder}-{encoder}", partial(_make, decoder, encoder), images(_SIZES.get(decoder, 64)))
        for decoder, encoders in _ENCODERS.items()
        for encoder in encoders
    ]
    note = "GroupNorm and InstanceNorm"
    return [*found, Entry("smp/Unet-groupnorm", _unet_without_batch_norms, images(64), note)]
