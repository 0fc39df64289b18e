"""What a batch norm in eval mode multiplies and adds, and how the device holds it where no layer took it in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

# Of the weights of the depthwise convolution that it is on the device, whatever the other layers have.
WEIGHT_BITS = 8


def output_factors(norm: _BatchNorm) -> Tensor:
    """Return what a batch norm in eval mode multiplies each channel with: weight / sqrt(running_var + eps)."""
    assert norm.running_var is not None
    scale = (norm.running_var.detach() + norm.eps).rsqrt()
    return scale if norm.weight is None else norm.weight * scale


def sums(norm: Any) -> Tensor:
    """Return what it adds to each channel then, (C,): bias - running_mean * factor."""
    added: Tensor = -norm.running_mean.detach() * output_factors(norm)
    return added if norm.bias is None else norm.bias + added


def ends_on_device(factors: Tensor) -> tuple[Tensor, Tensor]:
    """Return both ends of the range of each channel's weight.

    The weight is the largest integer, or the smallest but one: the NPU loses some 500 of 65536 steps where a lone
    weight is the integer 1.
    """
    high, eps = factors.abs(), torch.finfo(factors.dtype).eps
    high = torch.maximum(high, (high.max() * eps).clamp_min(eps**2))  # a channel that is multiplied by zero
    return -high * 2 ** (WEIGHT_BITS - 1) / (2 ** (WEIGHT_BITS - 1) - 1), high
