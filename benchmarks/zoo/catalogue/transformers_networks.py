"""transformers: networks from small configurations, without a download."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from benchmarks.zoo.catalogue.entry import Entry, Inputs, images, noise, tokens

# A transformer of two layers of width 64. Weights of the usual 0.02 suit a width of 768: in one this narrow the signal
# would vanish, and a rounding with it look like an error.
_WIDTH = {"initializer_range": 0.1}
_SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, **_WIDTH}
_IMAGE = {"image_size": 64, "patch_size": 16}
_TEXT = {"vocab_size": 100, "max_position_embeddings": 32}
_DECODER = {**_SMALL, **_TEXT, "num_key_value_heads": 2, "use_cache": False}
_SWIN = {"image_size": 128, "patch_size": 4, "embed_dim": 24, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4],
         "window_size": 4}  # fmt: skip
_STAGES = ["stage1", "stage2", "stage3", "stage4"]


def _model(name: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    """A network of class ``name`` from a configuration of class ``config``."""

    def make() -> nn.Module:
        import transformers

        made = getattr(transformers, config)(**options)
        return getattr(transformers, name)(made)

    return make


def _detr() -> nn.Module:
    import transformers

    backbone = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage4"],
    )  # fmt: skip
    config = transformers.DetrConfig(
        use_timm_backbone=False, backbone_config=backbone, backbone=None, use_pretrained_backbone=False, d_model=64,
        encoder_layers=2, decoder_layers=2, encoder_ffn_dim=128, decoder_ffn_dim=128, encoder_attention_heads=4,
        decoder_attention_heads=4, num_queries=10, num_labels=8,
    )  # fmt: skip
    return transformers.DetrForObjectDetection(config)


def _mask2former() -> nn.Module:
    import transformers

    backbone = transformers.SwinConfig(**_SWIN, out_features=_STAGES)
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=64,
        encoder_layers=1, decoder_layers=2, num_attention_heads=4, dim_feedforward=64, num_queries=10, num_labels=5,
    )  # fmt: skip
    return transformers.Mask2FormerForUniversalSegmentation(config)


def _depth_anything() -> nn.Module:
    import transformers

    backbone = transformers.Dinov2Config(
        image_size=56, patch_size=14, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
        out_indices=[1, 2, 3, 4], apply_layernorm=True, reshape_hidden_states=False, **_WIDTH,
    )  # fmt: skip
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone, patch_size=14, reassemble_hidden_size=64, neck_hidden_sizes=[16, 24, 32, 32],
        fusion_hidden_size=16, head_hidden_size=16, **_WIDTH,
    )  # fmt: skip
    return transformers.DepthAnythingForDepthEstimation(config)


def _upernet() -> nn.Module:
    import transformers

    backbone = transformers.ConvNextConfig(hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 1, 1], out_features=_STAGES)
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=32, auxiliary_in_channels=32, auxiliary_channels=16, num_labels=5
    )
    return transformers.UperNetForSemanticSegmentation(config)


def _whisper_encoder() -> nn.Module:
    import transformers

    config = transformers.WhisperConfig(
        d_model=64, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=128, num_mel_bins=16,
        max_source_positions=32, decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=64, vocab_size=100,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.WhisperModel(config).get_encoder()


def _t5_encoder() -> nn.Module:
    import transformers

    config = transformers.T5Config(vocab_size=100, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    return transformers.T5EncoderModel(config)


def _sam_encoder() -> nn.Module:
    import transformers

    config = transformers.SamVisionConfig(
        hidden_size=64, output_channels=32, num_hidden_layers=2, num_attention_heads=4, image_size=64, patch_size=16,
        window_size=2, global_attn_indexes=[1], mlp_dim=128, num_pos_feats=16, **_WIDTH,
    )  # fmt: skip
    return transformers.SamVisionModel(config)


def _clip(part: str) -> Callable[[], nn.Module]:
    options = {**_SMALL, **(_IMAGE if part == "Vision" else _TEXT)}
    return _model(f"CLIP{part}Model", f"CLIP{part}Config", **options)


_SEGFORMER = {"num_encoder_blocks": 4, "depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64],
              "num_attention_heads": [1, 2, 2, 4], "decoder_hidden_size": 32, "num_labels": 5, **_WIDTH}  # fmt: skip
_MOBILEVIT = {"image_size": 64, "hidden_sizes": [32, 40, 48], "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 128],
              "num_labels": 10, **_WIDTH}  # fmt: skip
_SPEECH = {**_SMALL, "conv_dim": (32, 32), "conv_stride": (5, 2), "conv_kernel": (10, 3), "vocab_size": 12,
           "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
           "mask_time_prob": 0.0, "mask_feature_prob": 0.0, "layerdrop": 0.0}  # fmt: skip

_DISTILBERT = {"vocab_size": 100, "max_position_embeddings": 32, "n_layers": 2, "n_heads": 4, "dim": 64,
               "hidden_dim": 128}  # fmt: skip
_MOBILEBERT = {**_SMALL, **_TEXT, "embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32}
_GPT2 = {"vocab_size": 100, "n_positions": 32, "n_embd": 64, "n_layer": 2, "n_head": 4, "use_cache": False,
         "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
_YOLOS = {**_SMALL, "image_size": [64, 64], "patch_size": 16, "num_detection_tokens": 10}
_SPECTROGRAM = {**_SMALL, "max_length": 64, "num_mel_bins": 32}
_DINO = {**_SMALL, "image_size": 56, "patch_size": 14}

_Samples = Callable[[int, Any], Inputs]
_NETWORKS: dict[str, tuple[Callable[[], nn.Module], _Samples]] = {
    "vit": (_model("ViTForImageClassification", "ViTConfig", **_SMALL, **_IMAGE), images(64)),
    "dinov2": (_model("Dinov2ForImageClassification", "Dinov2Config", **_DINO), images(56)),
    "segformer": (_model("SegformerForSemanticSegmentation", "SegformerConfig", **_SEGFORMER), images(64)),
    "mobilevit": (_model("MobileViTForImageClassification", "MobileViTConfig", **_MOBILEVIT), images(64)),
    "swin": (_model("SwinForImageClassification", "SwinConfig", **_SWIN), images(128)),
    "depth_anything": (_depth_anything, images(56)),
    "detr": (_detr, images(64)),
    "mask2former": (_mask2former, images(128)),
    "upernet-convnext": (_upernet, images(192)),
    "yolos": (_model("YolosForObjectDetection", "YolosConfig", **_YOLOS), images(64)),
    "sam-vision-encoder": (_sam_encoder, images(64)),
    "clip-vision": (_clip("Vision"), images(64)),
    "clip-text": (_clip("Text"), tokens(16, 100)),
    "bert": (_model("BertForSequenceClassification", "BertConfig", **_SMALL, **_TEXT), tokens(16, 100)),
    "distilbert": (_model("DistilBertForSequenceClassification", "DistilBertConfig", **_DISTILBERT), tokens(16, 100)),
    "mobilebert": (_model("MobileBertForSequenceClassification", "MobileBertConfig", **_MOBILEBERT), tokens(16, 100)),
    "t5-encoder": (_t5_encoder, tokens(16, 100)),
    "gpt2": (_model("GPT2LMHeadModel", "GPT2Config", **_GPT2), tokens(16, 100)),
    "llama": (_model("LlamaForCausalLM", "LlamaConfig", **_DECODER), tokens(16, 100)),
    "qwen3": (_model("Qwen3ForCausalLM", "Qwen3Config", **_DECODER, head_dim=16), tokens(16, 100)),
    "whisper-encoder": (_whisper_encoder, noise(16, 64)),
    "wav2vec2": (_model("Wav2Vec2ForCTC", "Wav2Vec2Config", **_SPEECH), noise(640)),
    "audio-spectrogram-transformer": (
        _model("ASTForAudioClassification", "ASTConfig", **_SPECTROGRAM),
        noise(64, 32),
    ),
}


def entries() -> list[Entry]:
    """The networks of transformers."""
    return [Entry(f"transformers/{name}", make, inputs) for name, (make, inputs) in _NETWORKS.items()]
