"""Weights whose integer flips back and forth during training, and freezing them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_quant.simulation.aimet import Quantizer
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.quantized_tensors import rounded_weights

# How much a step counts in the moving averages, and the frequency from which on a weight oscillates: section 3.2 and
# table 2 of 2203.11086. Once in two hundred steps.
_MOMENTUM, _OSCILLATES = 0.01, 0.005
# The frequency from which on a weight is frozen, at the start and at the end of training, in between a half cosine:
# those of the paper for MobileNetV2 (table 5).
_FROZEN_FROM, _FROZEN_TO = 0.04, 0.01


class WeightOscillation:
    """Note how often the integer of each weight turns back, and freeze those that do so often.

    Nagel et al., "Overcoming Oscillations in Quantization-Aware Training" (2203.11086). A weight between two integers
    is pushed over their border again and again, since its gradient is that of the rounded weight; what it is when
    training ends is chance. A step in which its integer changes against the direction of its last change counts as a
    turn. The frequency is the moving average of turns over the steps (equation 8 there). Where it exceeds a threshold,
    the weight becomes the moving average of its integers, rounded, and stays that (algorithm 1); the threshold sinks
    along a half cosine.

    Args:
        network: the quantized network before its first training step.
        freeze: whether to freeze.

    Attributes:
        steps: the training steps at which the shares were noted.
        oscillating: the share of weights that oscillate, frozen ones apart, at each of :attr:`steps`, 0 to 1.
        frozen: the share of frozen weights, likewise.
    """

    def __init__(self, network: QuantizedNetwork, freeze: bool) -> None:
        self.freeze = freeze
        self.steps: list[int] = []
        self.oscillating: list[float] = []
        self.frozen: list[float] = []
        self._rounded = rounded_weights(network)  # found once: looking them up takes longer than counting
        self._weights = {name: _Weight(_integers(*one), freeze) for name, one in self._rounded.items()}

    @torch.no_grad()
    def step(self, progress: float) -> None:
        """Count the turns of the optimizer's step that was just taken, and freeze.

        Args:
            progress: how much of training is over, 0 to 1.
        """
        threshold = _FROZEN_TO + (_FROZEN_FROM - _FROZEN_TO) * (1 + math.cos(math.pi * progress)) / 2
        for name, (weight, quantizer) in self._rounded.items():
            known = self._weights[name]
            known.count(_integers(weight, quantizer))
            if self.freeze:
                known.freeze(threshold)
                scale, offset = _grid(quantizer)
                frozen = (known.integers + offset) * scale
                weight.copy_(torch.where(known.frozen, frozen.to(weight.dtype), weight))

    def note(self, step: int) -> dict[str, float]:
        """Note the shares at ``step``.

        Returns:
            Both for loggers; empty if ``step`` is noted already.
        """
        if self.steps and step <= self.steps[-1]:
            return {}
        total = max(sum(one.frequency.numel() for one in self._weights.values()), 1)
        oscillating = sum(int(((one.frequency > _OSCILLATES) & ~one.frozen).sum()) for one in self._weights.values())
        frozen = sum(int(one.frozen.sum()) for one in self._weights.values())
        self.steps.append(step)
        self.oscillating.append(oscillating / total)
        self.frozen.append(frozen / total)
        scalars = {"oscillation/weights": self.oscillating[-1]}
        return scalars | ({"oscillation/frozen": self.frozen[-1]} if self.freeze else {})

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed fit needs."""
        noted = {"steps": self.steps, "oscillating": self.oscillating, "frozen": self.frozen}
        return {**noted, "weights": {name: vars(one) for name, one in self._weights.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        for name in ("steps", "oscillating", "frozen"):
            setattr(self, name, list(state[name]))
        for name, values in state["weights"].items():
            for part, value in values.items():
                own: Tensor | None = getattr(self._weights[name], part)
                if own is not None and value is not None:
                    own.copy_(value)


@dataclass
class _Weight:
    """What is known of one weight, all of its shape: integers, direction of their last change, averages."""

    integers: Tensor
    direction: Tensor
    frequency: Tensor
    frozen: Tensor
    mean: Tensor | None

    def __init__(self, integers: Tensor, freeze: bool) -> None:
        self.integers = integers
        self.direction = torch.zeros_like(integers, dtype=torch.int8)
        self.frequency = torch.zeros_like(integers)
        self.frozen = torch.zeros_like(integers, dtype=torch.bool)
        self.mean = integers.clone() if freeze else None

    def count(self, integers: Tensor) -> None:
        """Take the integers of the next step; those of frozen weights stay."""
        integers = torch.where(self.frozen, self.integers, integers)
        change = (integers - self.integers).sign().to(torch.int8)
        turned = change * self.direction < 0
        self.frequency.lerp_(turned.to(self.frequency.dtype), _MOMENTUM)
        self.direction = torch.where(change != 0, change, self.direction)
        self.integers = integers
        if self.mean is not None:
            self.mean.lerp_(integers, _MOMENTUM)

    def freeze(self, threshold: float) -> None:
        """Freeze what turns more often than ``threshold``, at the integer that it is on average."""
        assert self.mean is not None
        new = (self.frequency > threshold) & ~self.frozen
        self.integers = torch.where(new, self.mean.round(), self.integers)
        self.frozen |= new


def _grid(quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    """Return scale and offset, in float32."""
    return quantizer.get_scale().detach().float(), quantizer.get_offset().detach().float()


def _integers(weight: Tensor, quantizer: Quantizer) -> Tensor:
    """Return the integers that a weight is rounded to, as float32, of its shape."""
    scale, offset = _grid(quantizer)
    return ((weight.detach().float() / scale).round() - offset).clamp(quantizer.qmin, quantizer.qmax)
