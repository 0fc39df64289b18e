"""timm: one network of each family, the smallest that the family has; deep ones with fewer blocks."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from benchmarks.zoo.catalogue.entry import Entry, images

# name → (side of the image, options of the network)
_CONVOLUTIONAL: dict[str, tuple[int, dict[str, Any]]] = {
    "mobilenetv3_small_100": (64, {}),
    "mobilenetv4_conv_small": (64, {}),
    "tf_efficientnet_lite0": (64, {}),
    "tf_efficientnetv2_b0": (64, {}),
    "efficientnet_b0": (64, {}),
    "mixnet_s": (64, {}),
    "fbnetc_100": (64, {}),
    "hardcorenas_a": (64, {}),
    "lcnet_050": (64, {}),
    "tinynet_e": (64, {}),
    "rexnetr_200": (64, {}),
    "ghostnet_100": (64, {}),
    "ghostnetv2_100": (64, {}),
    "repghostnet_050": (64, {}),
    "repvit_m0_9": (64, {}),
    "repvgg_a0": (64, {}),
    "mobileone_s0": (64, {}),
    "fasternet_t0": (64, {}),
    "starnet_s1": (64, {}),
    "convnext_atto": (64, {}),
    "convnextv2_atto": (64, {}),
    "inception_next_atto": (64, {}),
    "resnet18d": (64, {}),
    "resnetv2_50": (64, {"layers": (1, 1, 1, 1)}),
    "ecaresnet26t": (64, {}),
    "skresnet18": (64, {}),
    "res2net50_26w_4s": (64, {"layers": (1, 1, 1, 1)}),
    "resnest14d": (64, {}),
    "regnety_002": (64, {}),
    "densenet121": (64, {"block_config": (2, 2, 2, 2)}),
    "dla46_c": (64, {}),
    "hrnet_w18_small": (64, {}),
    "cs3darknet_s": (64, {}),
    "ese_vovnet19b_dw": (64, {}),
    "hgnetv2_b0": (64, {}),
    "nf_regnet_b0": (64, {}),
    "convmixer_768_32": (64, {}),
    "poolformer_s12": (64, {}),
    "mambaout_femto": (64, {}),
}
_ATTENTION: dict[str, tuple[int, dict[str, Any]]] = {
    "fastvit_t8": (64, {}),
    "fastvit_sa12": (64, {}),
    "efficientformer_l1": (224, {}),
    "efficientformerv2_s0": (64, {"img_size": 64}),
    "mobilenetv4_hybrid_medium": (64, {}),
    "edgenext_xx_small": (64, {}),
    "mobilevit_xxs": (64, {}),
    "mobilevitv2_050": (64, {}),
    "efficientvit_b0": (64, {}),
    "efficientvit_m0": (64, {"img_size": 64}),
    "swiftformer_xs": (64, {}),
    "tiny_vit_5m_224": (64, {}),
    "vit_tiny_patch16_224": (64, {"img_size": 64, "depth": 4}),
    "deit_tiny_distilled_patch16_224": (64, {"img_size": 64, "depth": 4}),
    "deit3_small_patch16_224": (64, {"img_size": 64, "depth": 4}),
    "beit_base_patch16_224": (64, {"img_size": 64, "depth": 4, "embed_dim": 192, "num_heads": 3}),
    "eva02_tiny_patch14_224": (56, {"img_size": 56, "depth": 4}),
    "cait_xxs24_224": (64, {"img_size": 64, "depth": 4}),
    "samvit_base_patch16": (64, {"img_size": 64, "depth": 4, "embed_dim": 192, "num_heads": 3, "window_size": 2}),
    "swin_tiny_patch4_window7_224": (64, {"img_size": 64, "window_size": 4, "depths": (1, 2, 2, 1)}),
    "swinv2_tiny_window8_256": (64, {"img_size": 64, "window_size": 4, "depths": (1, 2, 2, 1)}),
    "maxvit_rmlp_pico_rw_256": (64, {"img_size": 64}),
    "coatnet_pico_rw_224": (64, {"img_size": 64}),
    "coat_lite_tiny": (64, {"img_size": 64}),
    "pvt_v2_b0": (64, {}),
    "xcit_nano_12_p16_224": (64, {"img_size": 64, "depth": 4}),
    "levit_128s": (224, {}),
    "crossvit_tiny_240": (240, {}),
    "pit_ti_224": (64, {"img_size": 64}),
    "twins_svt_small": (64, {"img_size": 64, "depths": (1, 1, 2, 1)}),
    "davit_tiny": (64, {"depths": (1, 1, 2, 1)}),
    "focalnet_tiny_srf": (64, {}),
    "gcvit_xxtiny": (64, {"img_size": 64}),
    "hiera_tiny_224": (64, {"img_size": 64, "stages": (1, 1, 2, 1)}),
    "mvitv2_tiny": (64, {"img_size": 64}),
    "volo_d1_224": (64, {"img_size": 64}),
    "caformer_s18": (64, {}),
    "botnet26t_256": (64, {"img_size": 64}),
    "mixer_s32_224": (64, {"img_size": 64}),
    "gmlp_ti16_224": (64, {"img_size": 64}),
    "resmlp_12_224": (64, {"img_size": 64}),
    "sequencer2d_s": (64, {"img_size": 64, "layers": (1, 1, 1, 1)}),
}


def _make(name: str, options: dict[str, Any]) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, num_classes=10, **options)


def entries() -> list[Entry]:
    """The networks of timm."""
    table = {**_CONVOLUTIONAL, **_ATTENTION}
    return [Entry(f"timm/{name}", partial(_make, name, opts), images(size)) for name, (size, opts) in table.items()]
