"""A quantization callback as Python source that makes it again."""

from __future__ import annotations

import inspect
from typing import Any

from lightning_quant.callbacks.quantization import QuantizationCallback
from lightning_quant.callbacks.training import QuantizationAwareTraining
from lightning_quant.ladder.registry import rung_spec
from lightning_quant.ladder.rung import Rung
from lightning_quant.simulation.range_estimators import ESTIMATORS, RangeEstimator


def reproduce(callback: QuantizationCallback) -> str:
    """Return Python source that makes an equal callback, with what was not left at its default.

    Rungs and range estimators of the user's own are named by dotted path: their module need not be imported.
    """
    recipe = callback.recipe
    given: dict[str, Any] = {
        "network": callback.network_name,
        "hardware": recipe.hardware,
        "calibration_samples": recipe.calibration_samples,
        "range_estimator": _as_spec(recipe.range_estimator),
        "overrides": {glob: str(precision) for glob, precision in recipe.overrides.items()} or None,
        "strict": recipe.strict,
    }
    if isinstance(callback, QuantizationAwareTraining):
        ladder = callback.result
        given |= {"max_drop": ladder.max_drop, "monitor": ladder.monitor or None, "mode": ladder.mode}
        given |= {"rungs": tuple(_as_spec(rung) for rung in callback.rungs)}
        given |= {"train_ranges": callback.train_ranges, "oscillations": callback.notes.oscillations}
        given |= {"distillation": callback.distillation.argument}
        given |= {"compile": callback.compile or callback.compile is not None}  # no options: True
    defaults = inspect.signature(type(callback)).parameters
    changed = [f"{name}={value!r}" for name, value in given.items() if value != defaults[name].default]
    arguments = ", ".join([repr(str(recipe.precision)), *changed])
    return f"import lightning_quant as lq\n\nlq.{type(callback).__name__}({arguments})"


def _as_spec(value: Any) -> Any:
    """A rung or a range estimator as plain values, from which it is made where its class was not imported."""
    if isinstance(value, RangeEstimator):
        spec, reference = value.spec, ESTIMATORS.reference(type(value))
        return reference if isinstance(spec, str) else {reference: spec[value.name]}
    if isinstance(value, Rung):
        spec = rung_spec(value)
        if isinstance(spec, str):
            return spec
        return {name: {key: _as_spec(one) for key, one in options.items()} for name, options in spec.items()}
    return value
