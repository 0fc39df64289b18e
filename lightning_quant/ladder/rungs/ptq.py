"""Ranges only, taken from the calibration data: the weights stay as they are."""

from __future__ import annotations

from typing import ClassVar, Literal

from typing_extensions import override

from lightning_quant.ladder.rung import Cost, Rung, RungContext, calibration
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.range_estimators import (
    MinMax,
    Percentile,
    RangeEstimator,
    TfEnhanced,
)
from lightning_quant.utilities.registry import Spec


class CalibratedRanges(Rung):
    """Float weights, ranges from the calibration data: what plain post-training quantization is.

    Args:
        range_estimator: another estimator than the recipe's, in each form that ``range_estimator=`` of the callbacks
            takes. The rung is then recorded under its name.
    """

    name = "ptq"
    start: ClassVar[Literal["best", "float"]] = "float"
    estimator: RangeEstimator | None = None

    def __init__(self, range_estimator: RangeEstimator | Spec | None = None) -> None:
        if range_estimator is not None:
            self.estimator = RangeEstimator.parse(range_estimator)
            self.name = self.estimator.name  # type: ignore[misc]  # one rung for each estimator

    @override
    def cost(self, network: QuantizedNetwork, context: RungContext) -> Cost:
        return Cost(calibration(network))

    @override
    def apply(self, network: QuantizedNetwork, context: RungContext) -> str:
        estimator = self.estimator or network.recipe.range_estimator
        network.set_range_estimator(estimator)
        samples = context.calibrate(network)
        return f"{estimator} ranges from {samples} samples"


class MinMaxRanges(CalibratedRanges):
    """Ranges from the smallest and largest value that occurred."""

    name = "min_max"

    def __init__(self) -> None:
        super().__init__(MinMax())


class TfEnhancedRanges(CalibratedRanges):
    """Ranges with the least signal-to-quantization-noise: outliers are cut off."""

    name = "tf_enhanced"

    def __init__(self) -> None:
        super().__init__(TfEnhanced())


class PercentileRanges(CalibratedRanges):
    """Ranges without the outermost values.

    Args:
        percentile: where the upper end of a range lies, and mirrored the lower one, 50 to 100.
    """

    name = "percentile"

    def __init__(self, percentile: float = 99.99) -> None:
        super().__init__(Percentile(percentile))


class ClippedActivations(Rung):
    """Ranges of activations without the outermost values, for the weights as earlier rungs left them.

    An estimator is tried on the float weights. Where rounding these costs so much that no range helps, as at 4 bits,
    clipping pays only once they are rounded well.

    Args:
        percentile: where the upper end of a range lies, and mirrored the lower one, 50 to 100.
    """

    name = "clipping"

    def __init__(self, percentile: float = 99.99) -> None:
        self.estimator = Percentile(percentile)

    @override
    def skip_reason(self, network: QuantizedNetwork, context: RungContext) -> str | None:
        known = network.range_estimator == self.estimator
        return f"its ranges are those of {self.estimator} already" if known else None

    @override
    def cost(self, network: QuantizedNetwork, context: RungContext) -> Cost:
        return Cost(calibration(network))

    @override
    def apply(self, network: QuantizedNetwork, context: RungContext) -> str:
        network.set_range_estimator(self.estimator)
        samples = context.calibrate(network, weights=False)
        return f"{self.estimator} ranges of activations from {samples} samples"
