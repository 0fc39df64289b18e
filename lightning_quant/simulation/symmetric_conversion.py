"""The conversion in front of a product: to a symmetric grid that holds the range of what it converts.

Importing this module imports AIMET.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_quant.simulation.aimet import QuantizeDequantize, _get_minimum_scale
from lightning_quant.simulation.second_operands import ROOM


class SymmetricConversion(QuantizeDequantize):
    """A quantizer with the ends of another, not symmetric, whose grid reaches as far to both sides as they do at most.

    With few bits, for which it is not made symmetric, it is any conversion.
    """

    @override
    def get_scale(self, dtype: Any = None) -> Tensor | None:
        if not self.symmetric or not self.is_initialized():
            plain: Tensor | None = super().get_scale(dtype)
            return plain
        kind, steps = dtype or torch.float32, self.qmax - self.qmin
        low, high = symmetric_ends(self.min.to(kind), self.max.to(kind))
        return ((high - low) / steps).clamp_min(_get_minimum_scale(steps))


def symmetric_ends(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return both ends of the range around zero that holds another, with the room that the NPU's integers lack."""
    furthest = torch.maximum(low.abs(), high.abs()) * ROOM
    return -furthest, furthest
