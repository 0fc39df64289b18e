"""The rungs by name, and from what a user writes in ``rungs`` to the objects."""

from __future__ import annotations

import difflib
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_quant.errors import ConfigurationError
from lightning_quant.ladder.rung import REGISTERED, Rung

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


def parse_rungs(given: Sequence[Rung | RungSpec]) -> list[Rung]:
    """Make the rungs that are meant, in order.

    Args:
        given: rungs; names from :data:`RUNGS` or of a class of your own that was imported; dotted paths of such
            classes; or one of the latter with options, as in ``{"mixed": {"budget": 0.05}}``.

    Raises:
        ConfigurationError: for an unknown or repeated rung, or an option it does not take.
    """
    if isinstance(given, str) or not isinstance(given, Sequence) or not given:
        raise ConfigurationError(f"rungs={given!r}: expected a list of at least one rung, e.g. ('ptq', 'cle').")
    made = [_checked(one, type(one).__qualname__) if isinstance(one, Rung) else _made(one) for one in given]
    names = [rung.name for rung in made]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ConfigurationError(f"rungs={given!r} names {repeated!r} twice: expected each rung once.")
    return made


def rung_spec(rung: Rung) -> RungSpec:
    """Return what :func:`parse_rungs` makes the same rung of, in another process too."""
    kind = type(rung)
    path = f"{kind.__module__}.{kind.__qualname__}"
    name = next((name for name, home in _HOMES.items() if path == f"{__package__}.rungs.{home}"), path)
    return {name: rung.options} if rung.options else name


def _made(given: RungSpec) -> Rung:
    name: Any = given
    options: Mapping[str, Any] = {}
    if isinstance(given, Mapping):
        if len(given) != 1:
            raise ConfigurationError(f"Rung {dict(given)!r}: expected one name with its options, {{'mixed': {{…}}}}.")
        ((name, options),) = given.items()
        if not isinstance(options or {}, Mapping):
            raise ConfigurationError(f"Rung {name!r} with options {options!r}: expected a dict, {{'mixed': {{…}}}}.")
    if not isinstance(name, str):
        raise ConfigurationError(
            f"Rung {name!r}: expected a name, one of {', '.join(RUNGS)}, a dotted path or an instance."
        )
    kind = _class(name)
    try:
        made = kind(**dict(options or {}))
    except TypeError as error:
        raise ConfigurationError(f"Rung {name!r} with options {dict(options or {})!r}: {error}.") from error
    return _checked(made, name)


def _class(name: str) -> type[Rung]:
    if name == "qat":
        raise ConfigurationError("Rung 'qat': training follows the rungs by itself; remove it from rungs.")
    if name in REGISTERED and name not in _HOMES:
        return REGISTERED[name]
    path = f"{__package__}.rungs.{_HOMES[name]}" if name in _HOMES else name
    if "." not in path:
        near = difflib.get_close_matches(name, RUNGS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigurationError(
            f"Unknown rung {name!r}: expected one of {', '.join(RUNGS)}, the dotted path of a class of your own, or "
            f"its name once it was imported.{hint}"
        )
    try:
        kind = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigurationError(f"Rung {name!r} cannot be imported: {error}.") from error
    if not (isinstance(kind, type) and issubclass(kind, Rung)):
        raise ConfigurationError(f"Rung {name!r} is not a subclass of lightning_quant.Rung.")
    return kind


def _checked(rung: Rung, given: str) -> Rung:
    name = getattr(rung, "name", None)
    if not isinstance(name, str):
        raise ConfigurationError(f"Rung {given!r} has no name: expected a class attribute name = '…', for its records.")
    if name in _HOMES and not type(rung).__module__.startswith(f"{__package__}.rungs."):
        raise ConfigurationError(f"Rung {given!r} is named {name!r}, as one of this package is: give it its own.")
    return rung
