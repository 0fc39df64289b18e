"""torchaudio and PyTorch's recurrent layers: convolutions over time, recurrences, separation."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.catalogue.entry import Entry, Inputs, noise


class _FullLength(nn.Module):
    """A network that also wants the length of each sequence: all of them are whole."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Frames (N, time, features)."""
        lengths = torch.full((x.shape[0],), x.shape[1], dtype=torch.long)
        return self.network(x, lengths)[0]


class _Tagger(nn.Module):
    """PyTorch's own recurrent layer and a class for every step, as in its tutorial on sequence models."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.recurrent = getattr(nn, kind)(16, 24, batch_first=True, **options)
        self.classify = nn.Linear(24 * (2 if options.get("bidirectional") else 1), 6)

    def forward(self, x: Tensor) -> Tensor:
        """Frames (N, time, 16) to scores (N, time, 6)."""
        return self.classify(self.recurrent(x)[0])


def _conv_tasnet() -> nn.Module:
    from torchaudio.models import ConvTasNet

    return ConvTasNet(
        2, enc_num_feats=64, msk_num_feats=32, msk_num_hidden_feats=64, msk_num_layers=3, msk_num_stacks=1
    )


def _conformer() -> nn.Module:
    from torchaudio.models import Conformer

    return _FullLength(Conformer(32, num_heads=4, ffn_dim=64, num_layers=2, depthwise_conv_kernel_size=7, dropout=0.1))


def _deepspeech() -> nn.Module:
    from torchaudio.models import DeepSpeech

    return DeepSpeech(n_feature=16, n_hidden=32, n_class=10)


def _wav2letter() -> nn.Module:
    from torchaudio.models import Wav2Letter

    return Wav2Letter(num_classes=10, input_type="mfcc", num_features=16)


def _wavernn() -> nn.Module:
    from torchaudio.models import WaveRNN

    return WaveRNN([2, 2], n_classes=16, hop_length=4, n_res_block=2, n_rnn=16, n_fc=16, kernel_size=5, n_freq=16,
                   n_hidden=16, n_output=16)  # fmt: skip


def _wave_and_spectrum(count: int, generator: torch.Generator) -> Inputs:
    frames = 8  # a frame gives 4 samples; the kernel of 5 takes two frames from each end
    wave = torch.randn(count, 1, (frames - 4) * 4, generator=generator)
    return wave, torch.randn(count, 1, 16, frames, generator=generator)


def entries() -> list[Entry]:
    """Networks for sound and sequences."""
    return [
        Entry("torchaudio/conv_tasnet", _conv_tasnet, noise(1, 800)),
        Entry("torchaudio/conformer", _conformer, noise(16, 32), "all sequences of one length"),
        Entry("torchaudio/deepspeech", _deepspeech, noise(1, 12, 16)),
        Entry("torchaudio/wav2letter", _wav2letter, noise(16, 64)),
        Entry("torchaudio/wavernn", _wavernn, _wave_and_spectrum),
        Entry("torch/gru", partial(_Tagger, "GRU"), noise(12, 16)),
        Entry("torch/lstm-bidirectional", partial(_Tagger, "LSTM", bidirectional=True), noise(12, 16)),
        Entry("torch/lstm-two-layers", partial(_Tagger, "LSTM", num_layers=2, dropout=0.1), noise(12, 16)),
        Entry("torch/transformer_encoder", _transformer_encoder, noise(16, 32)),
    ]


def _transformer_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
