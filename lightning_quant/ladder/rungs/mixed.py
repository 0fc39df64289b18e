"""Mixed precision: raise the few layers that lose the most accuracy to the next finer precision."""

from __future__ import annotations

import math
from typing import ClassVar

from typing_extensions import override

from lightning_quant.errors import ConfigurationError
from lightning_quant.ladder.rung import Cost, Rung, RungContext, calibration
from lightning_quant.precision import Precision
from lightning_quant.simulation.calibrate import calibrate_weights
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.precisions import layer_precision, quantized_layers, set_precisions
from lightning_quant.simulation.sensitivity import LayerSensitivity, layer_sensitivity, next_finer

# Of sums of shares.
_ROUNDING = 1e-9


class MixedPrecision(Rung):
    """Raise the fewest layers (W4 → W8, A8 → A16) that restore the metric.

    The order comes from :func:`~lightning_quant.simulation.sensitivity.layer_sensitivity`; the metric is measured
    with 1, 2, 4, … of them raised, until it suffices or the budget is spent, and then once more for each halving of
    the last step, so that no more layers stay raised than the metric asks for.

    Args:
        budget: how much may be raised: part of all weights, and part of all multiply-accumulate operations for
            activations, above 0 to 1.
        samples: calibration samples for the sensitivity.

    Raises:
        ConfigurationError: for a value out of range.
    """

    name = "mixed"
    refines: ClassVar[bool] = True

    def __init__(self, budget: float = 0.1, samples: int = 8) -> None:
        if not 0 < budget <= 1:
            raise ConfigurationError(f"{self.name}: budget={budget!r}: expected a share above 0, up to 1.")
        if not isinstance(samples, int) or samples < 1:
            raise ConfigurationError(f"{self.name}: samples={samples!r}: expected a whole number of at least 1.")
        self.budget = budget
        self.samples = samples

    @override
    def skip_reason(self, network: QuantizedNetwork, context: RungContext) -> str | None:
        now = network.recipe.precision
        if all(next_finer(part, now) is None for part in ("weights", "activations")):
            return f"{now} is the finest precision there is"
        return None

    @override
    def cost(self, network: QuantizedNetwork, context: RungContext) -> Cost:
        layers = len(quantized_layers(network))
        sensitivity = 2 * layers * self.samples
        if context.suffices is None:  # all that the budget allows is raised at once
            return Cost(sensitivity + calibration(network))
        tries = 2 * math.log2(max(layers, 2))
        return Cost(sensitivity + tries * calibration(network), validations=tries)

    @override
    def apply(self, network: QuantizedNetwork, context: RungContext) -> str:
        chosen = self._within_budget(network, layer_sensitivity(network, context.samples(), self.samples))
        start = network.snapshot()
        if context.suffices is None:  # nothing suffices: raise all that the budget allows
            self._raise(network, chosen, start, context)
            return _describe(chosen)
        enough, few = 0, 0  # a number of layers known to suffice, and one known not to
        count = 1
        while chosen:
            count = min(count, len(chosen))
            if self._suffices(network, chosen[:count], start, context):
                enough = count
                break
            few = count
            if count == len(chosen):
                break
            count *= 2
        while enough - few > 1:
            middle = (enough + few) // 2
            if self._suffices(network, chosen[:middle], start, context):
                enough = middle
            else:
                few = middle
        raised = chosen[: enough or len(chosen)]
        self._raise(network, raised, start, context)
        return _describe(raised)

    def _within_budget(
        self, network: QuantizedNetwork, sensitivities: list[LayerSensitivity]
    ) -> list[LayerSensitivity]:
        spent: dict[str, dict[str, float]] = {"weights": {}, "activations": {}}
        chosen = []
        for one in sensitivities:
            is_finest = next_finer(one.part, layer_precision(network, one.layer)) is None
            if is_finest or not self._may_be_raised(network, one):
                continue
            together = {**spent[one.part], **one.shares}  # layers that are raised already cost nothing more
            if sum(together.values()) <= self.budget + _ROUNDING:
                spent[one.part] = together
                chosen.append(one)
        return chosen

    def _may_be_raised(self, network: QuantizedNetwork, one: LayerSensitivity) -> bool:
        return True

    def _suffices(
        self, network: QuantizedNetwork, raised: list[LayerSensitivity], start: dict[str, object], context: RungContext
    ) -> bool:
        self._raise(network, raised, start, context)
        return context.suffices is not None and context.suffices(context.measure())

    def _raise(
        self, network: QuantizedNetwork, raised: list[LayerSensitivity], start: dict[str, object], context: RungContext
    ) -> None:
        network.restore(start)
        precisions: dict[str, Precision] = {}
        for one in raised:
            now = precisions.get(one.layer) or layer_precision(network, one.layer)
            if (next_one := next_finer(one.part, now)) is not None:
                precisions[one.layer] = next_one
        set_precisions(network, precisions)
        network.promoted = {**network.promoted, **precisions}
        calibrate_weights(network, [one.layer for one in raised if one.part == "weights"])
        context.calibrate(network, weights=False)


def _describe(raised: list[LayerSensitivity]) -> str:
    if not raised:
        return "raised nothing: no layer fits the budget"
    shares = {part: sum(_shares(raised, part).values()) for part in ("weights", "activations")}
    units = {"weights": "of the weights", "activations": "of the multiply-accumulates"}
    parts = ", ".join(f"{share:.1%} {units[part]}" for part, share in shares.items() if share)
    names = ", ".join(f"{one.layer} ({one.part})" for one in raised[:3]) + (", …" if len(raised) > 3 else "")
    return f"raised {len(raised)} ({parts}): {names}"


def _shares(raised: list[LayerSensitivity], part: str) -> dict[str, float]:
    return {name: share for one in raised if one.part == part for name, share in one.shares.items()}
