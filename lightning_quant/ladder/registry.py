"""The rungs by name, and from what a user writes in ``rungs`` to the objects."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_quant.errors import ConfigurationError
from lightning_quant.ladder.rung import Rung

# Where each rung lives. Loaded when asked for.
_HOMES = {
    "ptq": "ptq.CalibratedRanges",
    "min_max": "ptq.MinMaxRanges",
    "tf_enhanced": "ptq.TfEnhancedRanges",
    "percentile": "ptq.PercentileRanges",
    "cle": "cle.CrossLayerEqualization",
    "bn_reestimation": "bn_reestimation.BatchNormReestimation",
    "bias_correction": "bias_correction.BiasCorrection",
    "seq_mse": "seq_mse.SequentialMse",
    "adaround": "adaround.AdaptiveRounding",
    "mixed": "mixed.MixedPrecision",
}
RUNGS = tuple(_HOMES)

RungSpec = str | Mapping[str, Mapping[str, Any]]
"""A name, or ``{name: {option: value}}``."""


def parse_rungs(rungs: Sequence[RungSpec]) -> list[Rung]:
    """Make the rungs that ``rungs`` names, in order.

    Args:
        rungs: names from :data:`RUNGS`, dotted paths of classes of your own, or one of them with options, as in
            ``{"mixed": {"budget": 0.05}}``.

    Raises:
        ConfigurationError: for an unknown or repeated rung, or an option it does not take.
    """
    if isinstance(rungs, str) or not isinstance(rungs, Sequence) or not rungs:
        raise ConfigurationError(f"rungs={rungs!r}: expected a list of at least one rung, e.g. ('ptq', 'cle').")
    made = [_rung(rung) for rung in rungs]
    names = [rung.name for rung in made]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ConfigurationError(f"rungs={rungs!r} names {repeated!r} twice: expected each rung once.")
    return made


def _rung(rung: RungSpec) -> Rung:
    name: Any = rung
    options: Mapping[str, Any] = {}
    if isinstance(rung, Mapping):
        if len(rung) != 1:
            raise ConfigurationError(f"Rung {dict(rung)!r}: expected one name with its options, {{'mixed': {{…}}}}.")
        ((name, options),) = rung.items()
        if not isinstance(options or {}, Mapping):
            raise ConfigurationError(f"Rung {name!r} with options {options!r}: expected a dict, {{'mixed': {{…}}}}.")
    if not isinstance(name, str):
        raise ConfigurationError(f"Rung {name!r}: expected a name, one of {', '.join(RUNGS)}.")
    if name == "qat":
        raise ConfigurationError("Rung 'qat': training follows the rungs by itself; leave it out of rungs.")
    path = f"{__package__}.rungs.{_HOMES[name]}" if name in _HOMES else name
    module, _, attribute = path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), attribute) if module else None
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigurationError(f"Rung {name!r} cannot be imported: {error}.") from error
    if kind is None:
        near = difflib.get_close_matches(name, RUNGS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigurationError(
            f"Unknown rung {name!r}: expected one of {', '.join(RUNGS)}, or the dotted path of a class of your "
            f"own.{hint}"
        )
    if not (isinstance(kind, type) and issubclass(kind, Rung)):
        raise ConfigurationError(f"Rung {name!r} is no subclass of {Rung.__module__}.{Rung.__name__}.")
    if not isinstance(getattr(kind, "name", None), str):
        raise ConfigurationError(f"Rung {name!r} has no name: expected a class attribute name = '…', for its records.")
    if kind.name in _HOMES and name not in _HOMES:
        raise ConfigurationError(f"Rung {name!r} is named {kind.name!r}, as one of this package is: give it its own.")
    try:
        return kind(**dict(options or {}))
    except TypeError as error:
        raise ConfigurationError(f"Rung {name!r} with options {dict(options)!r}: {error}.") from error
