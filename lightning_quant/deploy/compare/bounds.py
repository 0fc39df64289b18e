"""How much worse each thing may become: a small YAML file, read strictly."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from lightning_quant.errors import ConfigurationError

_MOST_BYTES = 2**16
_NUMBER = re.compile(r"([+-]?)(\d{1,12}(?:\.\d{1,12})?)\s*(\D*)")
# What was computed in another order differs by less; so a bound that is just met is kept.
_SLACK = 1e-9


class Part(Enum):
    """What is compared. The value is its name in a file of bounds."""

    VERSIONS = "versions"
    RECIPE = "recipe"
    FLOAT_WEIGHTS = "float_weights"
    IO = "io"
    METRIC = "metric"
    CLASS = "class"
    PARITY = "parity"
    PSNR = "psnr"
    AGREEMENT = "agreement"
    LATENCY = "latency"
    MEMORY = "memory"
    SIZE = "size"
    LAYERS_CPU = "layers_cpu"
    LAYERS_FLOAT = "layers_float"
    OPERATIONS = "operations"
    PARAMETERS_LOST = "parameters_lost"
    ENCODINGS = "encodings"
    WEIGHTS = "weights"


class Unit(Enum):
    """What a bound counts in. The value is how it is written."""

    POINTS = "pt"
    PERCENT = "%"
    DECIBELS = "dB"
    OWN = ""
    UNCHANGED = "unchanged"
    EXPLAINED = "explained"


_SHARES = (Unit.POINTS, Unit.PERCENT, Unit.OWN)
UNITS: dict[Part, tuple[Unit, ...]] = {
    Part.VERSIONS: (Unit.UNCHANGED,),
    Part.RECIPE: (Unit.UNCHANGED,),
    Part.FLOAT_WEIGHTS: (Unit.UNCHANGED,),
    Part.IO: (Unit.UNCHANGED,),
    Part.METRIC: _SHARES,
    Part.CLASS: _SHARES,
    Part.PARITY: (Unit.DECIBELS,),
    Part.PSNR: (Unit.DECIBELS,),
    Part.AGREEMENT: (Unit.POINTS,),
    Part.LATENCY: (Unit.PERCENT,),
    Part.MEMORY: (Unit.PERCENT,),
    Part.SIZE: (Unit.PERCENT,),
    Part.LAYERS_CPU: (Unit.OWN,),
    Part.LAYERS_FLOAT: (Unit.OWN,),
    Part.OPERATIONS: (Unit.UNCHANGED,),
    Part.PARAMETERS_LOST: (Unit.OWN,),
    Part.ENCODINGS: (Unit.UNCHANGED, Unit.EXPLAINED),
    Part.WEIGHTS: (Unit.UNCHANGED, Unit.EXPLAINED),
}
COUNTS = (Part.LAYERS_CPU, Part.LAYERS_FLOAT, Part.PARAMETERS_LOST)
# What a run or a device has to have measured; all else is in every bundle.
MEASURED = (
    Part.METRIC,
    Part.CLASS,
    Part.PSNR,
    Part.AGREEMENT,
    Part.LATENCY,
    Part.MEMORY,
    Part.LAYERS_CPU,
    Part.LAYERS_FLOAT,
)
# Of these less is better, so that a bound on them is written with a plus.
RISING = (Part.LATENCY, Part.MEMORY, Part.SIZE)


@dataclass(frozen=True)
class Bound:
    """How much worse one thing may become.

    Args:
        part: what it is about.
        unit: what it is counted in.
        most: how much worse is allowed, at least 0; nothing where ``unit`` is a rule instead.
    """

    part: Part
    unit: Unit
    most: float = 0.0

    def amount(self, worse: float, old: float) -> float:
        """Return how much worse something is, in the unit of the bound.

        Args:
            worse: the same in the figure's own unit; negative if better.
            old: the figure before.
        """
        if self.unit is Unit.POINTS:
            return 100 * worse
        if self.unit is Unit.PERCENT:
            return 100 * worse / abs(old) if old else (0.0 if worse <= 0 else float("inf"))
        return worse

    def allows(self, worse: float, old: float) -> bool:
        """Return whether that much is within the bound; the arguments are those of :meth:`amount`."""
        return self.amount(worse, old) <= self.most * (1 + _SLACK) + _SLACK

    def __str__(self) -> str:
        """Return it as it is written in a file."""
        if self.unit in (Unit.UNCHANGED, Unit.EXPLAINED):
            return self.unit.value
        sign = "" if self.part in COUNTS else "+" if self.part in RISING else "-"
        return f"{sign}{self.most:g} {self.unit.value}".strip()

    @classmethod
    def parse(cls, name: str, text: str) -> Bound:
        """Read one entry of a file, such as ``metric`` and ``-0.5 pt``.

        Raises:
            ConfigurationError: for an unknown name, unit or sign, with what is possible.
        """
        if name not in [part.value for part in Part]:
            known = ", ".join(part.value for part in Part)
            raise ConfigurationError(f"Unknown bound {name[:60]!r}: expected one of {known}.")
        part = Part(name)
        expected = f"expected {' or '.join(_example(part, unit) for unit in UNITS[part])}"
        rules = [unit for unit in UNITS[part] if unit.value == text.strip()]
        if rules and rules[0] in (Unit.UNCHANGED, Unit.EXPLAINED):
            return cls(part, rules[0])
        match = _NUMBER.fullmatch(text.strip())
        unit = next((unit for unit in UNITS[part] if match and unit.value == match[3].strip()), None)
        is_count = part in COUNTS
        sign = "" if is_count else "+" if part in RISING else "-"
        fits = match is not None and (match[1] == sign or (float(match[2]) == 0 and not is_count))
        if match is None or unit is None or not fits or (is_count and not match[2].isdigit()):
            raise ConfigurationError(f"The bound {name}: {text[:60]!r} cannot be read: {expected}.")
        return cls(part, unit, float(match[2]))


def _example(part: Part, unit: Unit) -> str:
    if unit in (Unit.UNCHANGED, Unit.EXPLAINED):
        return repr(unit.value)
    if part in COUNTS:
        return "a whole number such as '0'"
    most = {Unit.POINTS: 0.5, Unit.PERCENT: 5.0, Unit.DECIBELS: 3.0, Unit.OWN: 0.01}[unit]
    return repr(str(Bound(part, unit, most)))


Bounds = Mapping[Part, Bound]

# Kept while nothing but chance changes, exceeded where users would notice.
DEFAULTS: Bounds = {
    part: Bound.parse(part.value, text)
    for part, text in {
        Part.METRIC: "-0.5 pt",
        Part.CLASS: "-2 pt",
        Part.PARITY: "-10 dB",
        Part.PSNR: "-3 dB",
        Part.AGREEMENT: "-1 pt",
        Part.LATENCY: "+10 %",
        Part.MEMORY: "+10 %",
        Part.SIZE: "+2 %",
        Part.LAYERS_CPU: "0",
        Part.LAYERS_FLOAT: "0",
        Part.IO: "unchanged",
        Part.OPERATIONS: "unchanged",
        Part.PARAMETERS_LOST: "0",
        Part.ENCODINGS: "explained",
        Part.WEIGHTS: "explained",
    }.items()
}


def parse_bounds(given: Mapping[str, object]) -> Bounds:
    """Read bounds by their names, such as ``{"metric": "-0.5 pt", "layers_cpu": 0}``.

    Raises:
        ConfigurationError: naming the first that cannot be read.
    """
    found = [Bound.parse(str(name), str(value)) for name, value in given.items()]
    return {one.part: one for one in found}


def read_bounds(path: str | Path) -> Bounds:
    """Read a YAML file of names and bounds, which replace all of :data:`DEFAULTS`.

    Raises:
        ConfigurationError: when it is missing, is not such a file, or names something unknown, or one thing twice.
    """
    import yaml

    path = Path(path)
    try:
        if not path.is_file():  # a pipe or a device would never end
            raise FileNotFoundError("there is no such file")
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES + 1)
        if len(text) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES >> 10} kB")
        entries = _scalars(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())[:300]
        raise ConfigurationError(
            f"The bounds {path} cannot be read: {said}. Expected lines such as 'metric: -0.5 pt'."
        ) from error
    names, texts = entries[::2], entries[1::2]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigurationError(f"The bounds {path} have {twice[:60]!r} twice: expected each once.")
    return parse_bounds(dict(zip(names, texts, strict=True)))


def _scalars(text: bytes) -> list[str]:
    """Return names and values of a flat mapping in turn, as they are written; what is nested is not even read.

    Raises:
        ValueError, yaml.YAMLError: when it is something else.
    """
    import yaml

    found: list[str] = []
    inside = False
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        starts = isinstance(event, yaml.MappingStartEvent) and not inside
        nested = isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent, yaml.AliasEvent)) and not starts
        if nested or (isinstance(event, yaml.ScalarEvent) and not inside):
            raise ValueError("it is not a list of names and bounds")
        inside = inside or starts
        if isinstance(event, yaml.ScalarEvent):
            found.append(event.value)
    if not inside:
        raise ValueError("it is empty")
    return found
