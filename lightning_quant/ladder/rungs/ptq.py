"""Ranges only: the weights stay as they are, every range is taken from the calibration data."""

from __future__ import annotations

from typing import ClassVar, Literal

from typing_extensions import override

from lightning_quant.ladder.rung import Technique, Workbench
from lightning_quant.simulation.calibrate import calibrate
from lightning_quant.simulation.network import QuantizedNetwork


class CalibratedRanges(Technique):
    """Float weights, ranges by the recipe's own estimator: what plain post-training quantization is."""

    name = "ptq"
    start: ClassVar[Literal["best", "float"]] = "float"
    estimator: ClassVar[str | None] = None

    @override
    def apply(self, network: QuantizedNetwork, bench: Workbench) -> str:
        estimator = self.estimator or network.recipe.range_estimator
        network.observe_with(estimator)
        samples = calibrate(network, bench.samples)
        return f"{estimator} ranges from {samples} samples"


class MinMaxRanges(CalibratedRanges):
    """Ranges from the smallest and largest value that occurred."""

    name = estimator = "min_max"


class TfEnhancedRanges(CalibratedRanges):
    """Ranges with the least signal-to-quantization-noise: outliers are cut off."""

    name = estimator = "tf_enhanced"


class PercentileRanges(CalibratedRanges):
    """Ranges that leave the outermost values out, as many as ``QuantRecipe.percentile`` says."""

    name = estimator = "percentile"
