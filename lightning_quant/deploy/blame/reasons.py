"""Why a layer computes something else, and the change that helps: facts first, made into words last."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from lightning_quant.precision import Precision
from lightning_quant.utilities.parsing import check, parse_as, parse_fields


class Cause(Enum):
    """Why a layer computes something else than its reference. The value stands in JSON."""

    # of the file
    NOT_ROUNDED = "not_rounded"
    SCALE = "scale"
    ZERO_POINT = "zero_point"
    BITS = "bits"
    WEIGHTS = "weights"
    WEIGHTS_PERMUTED = "weights_permuted"
    BIAS = "bias"
    BIAS_MISSING = "bias_missing"
    OPERATION = "operation"
    # of rounding
    CLIPPED = "clipped"
    OUTLIER_CHANNEL = "outlier_channel"
    TOO_WIDE = "too_wide"
    COARSE_GRID = "coarse_grid"
    # of the NPU
    FALLEN_BACK = "fallen_back"
    FLOAT_ISLAND = "float_island"
    ARITHMETIC = "arithmetic"


class Change(Enum):
    """What to change. The value is the argument that it is given to, or stands in JSON."""

    OVERRIDES = "overrides"
    PRECISION = "precision"
    RUNGS = "rungs"
    RANGE_ESTIMATOR = "range_estimator"
    CALIBRATION_SAMPLES = "calibration_samples"
    EXPORT = "export"
    OPERATION = "operation"
    REPORT = "report"


@dataclass(frozen=True)
class Remedy:
    """A change that helps.

    Args:
        change: what to change.
        overrides: layers with the precision to give them.
        value: of another argument: a precision, a rung, a range estimator, a number of samples.
    """

    change: Change
    overrides: tuple[tuple[str, Precision], ...] = ()
    value: str = ""

    @property
    def line(self) -> str:
        """What to paste: an argument of the quantization callback, or a call. Empty where it takes more than that."""
        match self.change:
            case Change.OVERRIDES:
                return f"overrides={_braces(self.overrides)}"
            case Change.PRECISION | Change.RANGE_ESTIMATOR:
                return f'{self.change.value}="{self.value}"'
            case Change.RUNGS:
                return f'rungs=["{self.value}"]'
            case Change.CALIBRATION_SAMPLES:
                return f"calibration_samples={self.value}"
            case Change.EXPORT:
                return 'lq.export_bundle(module.model, "export/net", samples)'
            case Change.OPERATION | Change.REPORT:
                return ""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        overrides = {name: str(precision) for name, precision in self.overrides}
        return {"change": self.change.value, "overrides": overrides, "value": self.value, "line": self.line}

    @classmethod
    def from_json(cls, value: Any, where: str = "") -> Remedy:
        """Read what :meth:`to_dict` returned.

        Raises:
            FieldError: naming the entry that is missing or cannot be.
        """
        values = parse_as(value, dict[str, Any], where)
        overrides = parse_as(values.get("overrides", {}), dict[str, Precision], f"{where}.overrides")
        text = parse_as(values.get("value", ""), str, f"{where}.value")
        return cls(parse_as(values.get("change"), Change, f"{where}.change"), tuple(overrides.items()), text)

    def __str__(self) -> str:
        """Return :attr:`line`, or a sentence."""
        match self.change:
            case Change.OPERATION:
                return "another operation, which the NPU has"
            case Change.REPORT:
                return "please report it with the network and the file"
            case _:
                return self.line


@dataclass(frozen=True)
class Reason:
    """One cause in one layer, with what was measured of it, and what helps.

    Args:
        cause: which one.
        parameter: the parameter that it is about; empty for activations.
        expected: the simulation's value: scale, zero point or bits.
        found: the value that was found: of the file likewise, the bits of a coarse grid, the steps that an NPU is off.
        share: share of the values that are others, are clipped, or of the grid that almost all values lie in, 0 to 1.
        channels: the channels that it is about: of a parameter along its first axis, of activations along the second.
        said: the reason that the NPU's compiler gave.
        remedy: what to change; ``None`` where nothing is known to help.
    """

    cause: Cause
    parameter: str = ""
    expected: float | None = None
    found: float | None = None
    share: float | None = None
    channels: tuple[int, ...] = ()
    said: str = ""
    remedy: Remedy | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        remedy = None if self.remedy is None else self.remedy.to_dict()
        return {**vars(self), "cause": self.cause.value, "remedy": remedy, "sentence": str(self)}

    @classmethod
    def from_json(cls, value: Any, where: str = "") -> Reason:
        """Read what :meth:`to_dict` returned.

        Raises:
            FieldError: naming the entry that is missing or cannot be.
        """
        values = parse_as(value, dict[str, Any], where)
        made: Reason = parse_fields({name: one for name, one in values.items() if name != "sentence"}, cls, where)
        for name in _MEASURED.get(made.cause, ()):
            check(getattr(made, name) is not None, f"{where}.{name}", None, f"a number with {made.cause.value}")
        return made

    def __str__(self) -> str:
        """Return it as a clause, without the remedy."""
        share = "" if self.share is None else f"{self.share:.2%}"
        channels = ", ".join(map(str, self.channels[:4])) + (", …" if len(self.channels) > 4 else "")
        where = f" (channel {channels})" if channels else ""
        of = f" of {self.parameter}" if self.parameter else ""
        match self.cause:
            case Cause.NOT_ROUNDED:
                return "its output is not rounded in the file: an encoding is missing"
            case Cause.SCALE:
                return f"scale{of} {self.found:.6g} instead of {self.expected:.6g}{where}"
            case Cause.ZERO_POINT:
                return f"zero point {self.found:.0f} instead of {self.expected:.0f}"
            case Cause.BITS:
                return f"{self.found:.0f} bits instead of {self.expected:.0f}"
            case Cause.WEIGHTS_PERMUTED:
                return f"channels of {self.parameter} in another order{where}"
            case Cause.WEIGHTS | Cause.BIAS:
                return f"{share} of the values of {self.parameter} differ{where}"
            case Cause.BIAS_MISSING:
                return f"{self.parameter} is missing"
            case Cause.OPERATION:
                return "same parameters and grids, other results: another operation, or other attributes of it"
            case Cause.CLIPPED:
                return f"range{of} too narrow: {share} of the values are clipped"
            case Cause.OUTLIER_CHANNEL:
                return f"outlier{of} in channel {channels}: the others use {share} of the range"
            case Cause.TOO_WIDE:
                return f"range{of} too wide: 99.9% of the values use {share} of it"
            case Cause.COARSE_GRID:
                return f"{self.found:.0f} bits{of or ' of activations'} are too coarse here"
            case Cause.FALLEN_BACK:
                return f"runs on the CPU: {self.said}" if self.said else "runs on the CPU"
            case Cause.FLOAT_ISLAND:
                return "computed in float on the NPU"
            case Cause.ARITHMETIC:
                return f"the NPU computes {share} of the values otherwise, by up to {self.found:.0f} steps of the grid"


# What is said of a cause in numbers.
_MEASURED = {
    Cause.SCALE: ("found", "expected"),
    Cause.ZERO_POINT: ("found", "expected"),
    Cause.BITS: ("found", "expected"),
    Cause.COARSE_GRID: ("found",),
    Cause.ARITHMETIC: ("found",),
}


def merged(remedies: list[Remedy]) -> list[Remedy]:
    """Merge remedies of several layers: each once, all overrides in one."""
    overrides = {name: precision for one in remedies for name, precision in one.overrides}
    others = [one for one in dict.fromkeys(remedies) if one.change is not Change.OVERRIDES]
    return [Remedy(Change.OVERRIDES, tuple(overrides.items())), *others] if overrides else others


def _braces(overrides: tuple[tuple[str, Precision], ...]) -> str:
    return "{" + ", ".join(f'"{name}": "{precision}"' for name, precision in overrides) + "}"
