"""Rungs from what a user writes in ``rungs``, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_quant.errors import ConfigurationError
from lightning_quant.ladder.rung import RUNGS, Rung
from lightning_quant.ladder.session import TRAINING
from lightning_quant.utilities.registry import Spec


def parse_rungs(given: Sequence[Rung | Spec]) -> list[Rung]:
    """Make the rungs that are meant, in order.

    Args:
        given: rungs; names from :data:`~lightning_quant.ladder.rung.RUNGS` or of a class of your own that was imported;
            dotted paths of such classes; or one of the latter with options, as in ``{"mixed": {"budget": 0.05}}``.

    Raises:
        ConfigurationError: for an unknown or repeated rung, or an option it does not take.
    """
    if isinstance(given, str) or not isinstance(given, Sequence) or not given:
        raise ConfigurationError(f"rungs={given!r}: expected a list of at least one rung, e.g. ('ptq', 'cle').")
    if any(one == TRAINING or (isinstance(one, Mapping) and TRAINING in one) for one in given):
        raise ConfigurationError(f"Rung {TRAINING!r}: training follows the rungs by itself; remove it from rungs.")
    made = [RUNGS.make(one) for one in given]
    names = [rung.name for rung in made]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ConfigurationError(f"rungs={given!r} names {repeated!r} twice: expected each rung once.")
    return made


def rung_spec(rung: Rung) -> Spec:
    """Return what :func:`parse_rungs` makes the same rung of, in another process too."""
    reference = RUNGS.reference(type(rung))
    return {reference: rung.options} if rung.options else reference
