"""A weight while it is learned whether to round it up or down."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# The rectified sigmoid of 2004.10568 reaches 0 and 1 within itself: it is stretched to these ends and clipped.
_LOW, _HIGH = -0.1, 1.1


class SoftWeight:
    """A weight between the two integers around it, on the grid of its range.

    Args:
        layer: its weight and the quantizer of it.
    """

    def __init__(self, layer: Any) -> None:
        quantizer = layer.param_quantizers["weight"]
        weight = layer.weight.detach()
        self.scale = quantizer.get_scale(dtype=torch.float32).detach()
        self.zero = quantizer.get_offset(dtype=torch.float32).detach()
        self.ends = quantizer.qmin, quantizer.qmax
        steps = weight / self.scale
        self.floor = steps.floor()
        fraction = (steps - self.floor).clamp(1e-4, 1 - 1e-4)
        self.nearest = steps.round()
        self.logits = torch.logit((fraction - _LOW) / (_HIGH - _LOW)).requires_grad_()

    def _share(self) -> Tensor:
        """Return how far each is from the lower integer to the upper one, 0 to 1."""
        return (torch.sigmoid(self.logits) * (_HIGH - _LOW) + _LOW).clamp(0, 1)

    def _on_grid(self, steps: Tensor) -> Tensor:
        return ((steps - self.zero).clamp(*self.ends) + self.zero) * self.scale

    def soft(self) -> Tensor:
        """Return the weight as it is learned."""
        return self._on_grid(self.floor + self._share())

    def hard(self) -> Tensor:
        """Return the weight on its grid."""
        return self._on_grid(self._decided()).detach()

    @property
    def upwards(self) -> Tensor:
        """Whether each is rounded up."""
        return self.logits.detach() >= 0

    def decide(self, upwards: Tensor) -> None:
        """Round each up or down as it is said."""
        self.logits = torch.where(upwards, torch.inf, -torch.inf)

    def _decided(self) -> Tensor:
        return self.floor + self.upwards

    def turned(self) -> int:
        """Count the weights that are not rounded to the nearest integer."""
        return int((self._decided() != self.nearest).sum())

    def penalty(self, exponent: float) -> Tensor:
        """Return how undecided the weights are: zero if each is one of both integers."""
        return (1 - (2 * self._share() - 1).abs().pow(exponent)).sum()
