"""How a range follows from what calibration saw of a tensor: the estimators, and how they are found by name."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lightning_quant.errors import CheckpointError, ConfigurationError
from lightning_quant.simulation import aimet
from lightning_quant.utilities.parsing import fitting

if TYPE_CHECKING:
    from torch import Tensor

RangeEstimatorSpec = str | Mapping[str, Mapping[str, Any]]
"""A name, or ``{name: {option: value}}``."""

_REGISTERED: dict[str, type[RangeEstimator]] = {}


class RangeEstimator:
    """Turn what calibration saw of a tensor into the range of its quantizer.

    Subclass it, with a ``name`` and :meth:`ends`, for an estimator of your own: a frozen dataclass whose fields are its
    options. It is registered by its name as soon as its module is imported.

    Examples:
        >>> @dataclass(frozen=True)
        ... class ThreeSigma(RangeEstimator):
        ...     name = "three_sigma"
        ...     sigmas: float = 3.0
        ...
        ...     def ends(self, counts, edges):
        ...         centers = (edges[1:] + edges[:-1]) / 2
        ...         mean = (counts * centers).sum() / counts.sum()
        ...         deviation = ((counts * (centers - mean) ** 2).sum() / counts.sum()).sqrt()
        ...         return float(mean - self.sigmas * deviation), float(mean + self.sigmas * deviation)
        >>> RangeEstimator.parse({"three_sigma": {"sigmas": 2.5}})
        ThreeSigma(sigmas=2.5)

    Attributes:
        name: what it is called in ``range_estimator=...``, in checkpoints and in records.
    """

    name: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        name = vars(cls).get("name")
        if name is None:  # a base of others
            return
        if not isinstance(name, str) or not name.isidentifier():
            raise ConfigurationError(
                f"{cls.__qualname__}.name is {name!r}: expected a word of letters, digits and underscores."
            )
        known = _REGISTERED.get(name)
        # by another file or the same one again: as a script and imported, or a cell of a notebook
        if known is not None and (known.__module__ == __name__ or known.__qualname__ != cls.__qualname__):
            raise ConfigurationError(
                f"{cls.__qualname__} is named {name!r}, as {known.__module__}.{known.__qualname__} is: expected a name "
                "of its own."
            )
        if cls.ends is RangeEstimator.ends and cls.analyzer is RangeEstimator.analyzer:
            raise ConfigurationError(
                f"{cls.__qualname__} has no ends(self, counts, edges): expected a method that returns the lower and "
                "upper end of a range."
            )
        _REGISTERED[name] = cls

    @classmethod
    def parse(cls, given: RangeEstimator | RangeEstimatorSpec) -> RangeEstimator:
        """Return the estimator that is meant.

        Args:
            given: one, a registered name, the dotted path of a class, or one of the latter two with options:
                ``{"percentile": {"percentile": 99.9}}``.

        Raises:
            ConfigurationError: for an unknown name, or options that it does not take.
        """
        if isinstance(given, RangeEstimator):
            return _with_plain_options(given)
        name, options = _name_and_options(given)
        return _make(_imported(name) if "." in name else _registered(name), options)

    @classmethod
    def of_checkpoint(cls, spec: RangeEstimatorSpec) -> RangeEstimator:
        """Return the estimator that a checkpoint names. Nothing is imported, whatever the name says.

        Raises:
            CheckpointError: for a name that is not registered, or options that it does not take.
        """
        try:
            name, options = _name_and_options(spec)
            return _make(_registered(name), options)
        except ConfigurationError as error:
            raise CheckpointError(
                f"The checkpoint was calibrated with range_estimator={spec!r}, which cannot be made here: {error} "
                "Expected one that is registered: import the module that defines it before you load the checkpoint."
            ) from error

    def ends(self, counts: Tensor, edges: Tensor) -> tuple[float, float]:
        """Return the lower and upper end of a range. Zero is added to it, and symmetric grids are made symmetric.

        Args:
            counts: how many values fell into each bin, float32 ``(bins,)``.
            edges: the ends of the bins in units of the tensor, ascending, ``(bins + 1,)``.
        """
        raise NotImplementedError  # a class without it is refused when it is defined

    def analyzer(self, shape: tuple[int, ...], block_size: tuple[int, ...] | None = None) -> Any:
        """Return the AIMET ``EncodingAnalyzer`` that observes values in histograms and computes ranges of ``shape``."""
        from lightning_quant.simulation.histogram_analyzer import HistogramAnalyzer  # imports AIMET

        return HistogramAnalyzer(self.name, self.ends, shape, block_size)

    @property
    def spec(self) -> RangeEstimatorSpec:
        """The name, with the options that are not at their defaults: what :meth:`parse` takes."""
        options: dict[str, Any] = {}
        if is_dataclass(self):
            values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
            options = {name: value for name, (value, default) in values.items() if value != default}
        return {self.name: options} if options else self.name

    def __str__(self) -> str:
        spec = self.spec
        if isinstance(spec, str):
            return spec
        return f"{self.name}({', '.join(f'{name}={value!r}' for name, value in spec[self.name].items())})"


@dataclass(frozen=True)
class MinMax(RangeEstimator):
    """The smallest and the largest value that occurred."""

    name = "min_max"

    def analyzer(self, shape: tuple[int, ...], block_size: tuple[int, ...] | None = None) -> Any:
        """Return AIMET's analyzer."""
        return aimet.MinMaxEncodingAnalyzer(shape, block_size=block_size)


@dataclass(frozen=True)
class TfEnhanced(RangeEstimator):
    """The range with the highest signal-to-quantization-noise ratio: outliers are cut off."""

    name = "tf_enhanced"

    def analyzer(self, shape: tuple[int, ...], block_size: tuple[int, ...] | None = None) -> Any:
        """Return AIMET's analyzer."""
        return aimet.TfEnhancedEncodingAnalyzer(shape, block_size=block_size)


@dataclass(frozen=True)
class Percentile(RangeEstimator):
    """The range without the outermost values.

    Args:
        percentile: where the upper end lies, and mirrored the lower one: 99.99 cuts off 0.01 % of the values on each
            side.
    """

    name = "percentile"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        if not 50 <= self.percentile <= 100:
            raise ConfigurationError(f"percentile={self.percentile!r}: expected a share between 50 and 100.")

    def analyzer(self, shape: tuple[int, ...], block_size: tuple[int, ...] | None = None) -> Any:
        """Return AIMET's analyzer."""
        return aimet.PercentileEncodingAnalyzer(shape, percentile=self.percentile, block_size=block_size)


def _registered(name: str) -> type[RangeEstimator]:
    if name in _REGISTERED:
        return _REGISTERED[name]
    near = difflib.get_close_matches(name, _REGISTERED, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigurationError(
        f"Unknown range_estimator {name!r}: expected one of {', '.join(_REGISTERED)}, or the dotted path of a class of "
        f"your own.{hint}"
    )


def _imported(path: str) -> type[RangeEstimator]:
    module, _, attribute = path.rpartition(".")
    try:
        kind: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(f"range_estimator={path!r} cannot be imported: {error}.") from error
    if not (isinstance(kind, type) and issubclass(kind, RangeEstimator)):
        raise ConfigurationError(f"range_estimator={path!r} is not a subclass of lightning_quant.RangeEstimator.")
    return kind


def _name_and_options(given: RangeEstimatorSpec) -> tuple[str, Mapping[str, Any]]:
    if isinstance(given, str):
        return given, {}
    if isinstance(given, Mapping) and len(given) == 1:
        ((name, options),) = given.items()
        if isinstance(name, str) and isinstance(options, Mapping):
            return name, options
    raise ConfigurationError(
        f"range_estimator={given!r}: expected a name, or one name with its options, "
        "{'percentile': {'percentile': 99.9}}."
    )


def _make(kind: type[RangeEstimator], options: Mapping[str, Any]) -> RangeEstimator:
    try:
        return _with_plain_options(kind(**options))
    except TypeError as error:
        raise ConfigurationError(
            f"range_estimator={getattr(kind, 'name', kind.__qualname__)!r} with options {dict(options)!r}: {error}."
        ) from error


def _with_plain_options(estimator: RangeEstimator) -> RangeEstimator:
    """Refuse what no checkpoint can hold."""
    if not isinstance(getattr(estimator, "name", None), str):
        raise ConfigurationError(f"{type(estimator).__qualname__} has no name: expected a class attribute name = '…'.")
    options: list[str] = [field.name for field in fields(estimator)] if is_dataclass(estimator) else []
    if lost := sorted(set(getattr(estimator, "__dict__", {})).difference(options)):
        raise ConfigurationError(
            f"The range estimator {estimator.name!r} keeps {', '.join(lost)}, which no checkpoint would hold: expected "
            "a frozen dataclass whose fields are its options."
        )
    try:
        spec = estimator.spec
        if not isinstance(spec, str):
            fitting(spec, dict[str, Any])
    except ValueError as error:
        raise ConfigurationError(
            f"The options of the range estimator {estimator.name!r} do not go into a checkpoint: {error}."
        ) from error
    return estimator
