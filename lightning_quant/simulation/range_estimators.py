"""How a range follows from what calibration saw of a tensor: the estimators, and how they are found by name."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lightning_quant.errors import CheckpointError, ConfigurationError
from lightning_quant.simulation import aimet
from lightning_quant.utilities.parsing import parse_as
from lightning_quant.utilities.registry import Registry, Spec

if TYPE_CHECKING:
    from torch import Tensor


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
        if "name" in vars(cls) and cls.ends is RangeEstimator.ends and cls.analyzer is RangeEstimator.analyzer:
            raise ConfigurationError(
                f"{cls.__qualname__} has no ends(self, counts, edges): expected a method that returns the lower and "
                "upper end of a range."
            )
        ESTIMATORS.register(cls)

    @classmethod
    def parse(cls, given: RangeEstimator | Spec) -> RangeEstimator:
        """Return the estimator that is meant.

        Args:
            given: one, a registered name, the dotted path of a class, or one of the latter two with options:
                ``{"percentile": {"percentile": 99.9}}``.

        Raises:
            ConfigurationError: for an unknown name, or options that it does not take.
        """
        return _with_plain_options(ESTIMATORS.make(given))

    @classmethod
    def of_checkpoint(cls, spec: Spec) -> RangeEstimator:
        """Return the estimator that a checkpoint names. Nothing is imported, whatever the name says.

        Raises:
            CheckpointError: for a name that is not registered, or options that it does not take.
        """
        try:
            return _with_plain_options(ESTIMATORS.make(spec, paths=False))
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
    def spec(self) -> Spec:
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


ESTIMATORS: Registry[RangeEstimator] = Registry(
    "range estimator",
    RangeEstimator,
    {
        "min_max": f"{__name__}.MinMax",
        "tf_enhanced": f"{__name__}.TfEnhanced",
        "percentile": f"{__name__}.Percentile",
    },
)


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


def _with_plain_options(estimator: RangeEstimator) -> RangeEstimator:
    """Refuse what no checkpoint can hold."""
    options: list[str] = [field.name for field in fields(estimator)] if is_dataclass(estimator) else []
    if lost := sorted(set(getattr(estimator, "__dict__", {})).difference(options)):
        raise ConfigurationError(
            f"The range estimator {estimator.name!r} keeps {', '.join(lost)}, which no checkpoint would hold: expected "
            "a frozen dataclass whose fields are its options."
        )
    try:
        spec = estimator.spec
        if not isinstance(spec, str):
            parse_as(spec, dict[str, Any])
    except ValueError as error:
        raise ConfigurationError(
            f"The options of the range estimator {estimator.name!r} do not go into a checkpoint: {error}."
        ) from error
    return estimator
