"""A rung as a user writes one, in a file of their own."""

from __future__ import annotations

from typing import Any

import lightning_quant as lq
from lightning_quant.simulation.calibrate import weight_quantizers


class ScaledWeights(lq.Rung):
    """Widen every range of weights.

    Args:
        factor: by how much.
    """

    name = "scaled_weights"

    def __init__(self, factor: float = 1.05) -> None:
        self.factor = factor

    def apply(self, network: Any, context: Any) -> str:
        """Set the ranges."""
        for quantizer in weight_quantizers(network):
            quantizer.set_range(self.factor * quantizer.get_min(), self.factor * quantizer.get_max())
        context.calibrate(network, weights=False)
        return f"weight ranges {self.factor:g} times as wide"
