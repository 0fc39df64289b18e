"""Which change helps against what rounding costs a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lightning_quant.deploy.blame.grid_use import GridUse
from lightning_quant.deploy.blame.reasons import Cause, Change, Reason, Remedy
from lightning_quant.deploy.blame.takers import Takers
from lightning_quant.precision import Precision
from lightning_quant.simulation.aimet import Quantizer
from lightning_quant.simulation.conversions import converts
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.precisions import layer_precision, planned_widths, quantized_layers
from lightning_quant.simulation.range_estimators import MinMax
from lightning_quant.simulation.sensitivity import next_finer

# Where the extremes of the calibration samples are not those of the data.
_TIMES_THE_SAMPLES = 4


class Remedies:
    """Finds what helps against a cause, in one network.

    Args:
        network: the quantized network, which is left as it is.
        takers: the layers that take the output of each layer.
    """

    def __init__(self, network: QuantizedNetwork, takers: Takers) -> None:
        self.network, self.takers = network, takers
        self.layers = quantized_layers(network)

    def reason(self, layer: str, use: GridUse) -> Reason:
        """Return what is wrong with a grid of a layer, and what helps."""
        reason = use.reason()
        return replace(reason, remedy=self._remedy(layer, use, reason.cause))

    def of_all(self, weights: bool) -> Remedy | None:
        """Return what helps where no layer stands out: a finer precision of all.

        Args:
            weights: whether the weights are what costs most, not the activations.
        """
        finer = next_finer("weights" if weights else "activations", self.network.recipe.precision)
        return None if finer is None else Remedy(Change.PRECISION, value=str(finer))

    def _remedy(self, layer: str, use: GridUse, cause: Cause) -> Remedy | None:
        of_activations = not use.parameter
        takes_extremes = isinstance(self.network.range_estimator, MinMax)
        if of_activations and cause is Cause.CLIPPED:
            if not takes_extremes:
                return Remedy(Change.RANGE_ESTIMATOR, value="min_max")
            more = _TIMES_THE_SAMPLES * self.network.recipe.calibration_samples
            return Remedy(Change.CALIBRATION_SAMPLES, value=str(more))
        if of_activations and cause is Cause.TOO_WIDE and takes_extremes:
            return Remedy(Change.RANGE_ESTIMATOR, value="percentile")
        if (finer := self._finer(layer, use)) is not None:
            return finer
        if cause is Cause.OUTLIER_CHANNEL and not self.network.equalized:
            return Remedy(Change.RUNGS, value="cle")
        return None

    def _finer(self, layer: str, use: GridUse) -> Remedy | None:
        """Return the overrides that give one tensor more bits; where none do, the precision of the whole network."""
        if use.parameter:
            finer = next_finer("weights", layer_precision(self.network, layer))
            return None if finer is None else Remedy(Change.OVERRIDES, ((layer, finer),))
        # the precision of an activation is that of the layers that take it
        is_input = use.quantizer in list(self.layers[layer].input_quantizers)
        names = [layer] if is_input else self._takers(layer) or [layer]
        now = {name: layer_precision(self.network, name) for name in names}
        overrides = {name: finer for name, one in now.items() if (finer := next_finer("activations", one)) is not None}
        if overrides and self._gets_finer(overrides, use.quantizer):
            return Remedy(Change.OVERRIDES, tuple(overrides.items()))
        return self.of_all(weights=False)

    def _takers(self, layer: str) -> list[str]:
        """Return the layers that take an output, behind those that round nothing and hand it on."""
        found: dict[str, None] = {}
        for name in self.takers.get(layer, ()):
            one = self.layers[name]
            rounds = any(
                quantizer is not None
                for quantizer in (*one.input_quantizers, *one.output_quantizers, *one.param_quantizers.values())
            )
            found.update(dict.fromkeys([name] if rounds else self._takers(name)))
        return list(found)

    def _gets_finer(self, overrides: Mapping[str, Precision], quantizer: Quantizer) -> bool:
        """Return whether a tensor gets more bits by these overrides."""
        if converts(quantizer):  # a raised layer needs it no longer
            return True
        names = {module: name for name, module in self.network.network.named_modules()}
        group = self.network.dataflow.group_of[names[quantizer]]
        return planned_widths(self.network, overrides)[group] > quantizer.bitwidth
