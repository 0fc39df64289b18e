"""What a rung is given, and what it has to do."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

from torch import nn

from lightning_quant.simulation.calibrate import calibrate
from lightning_quant.simulation.calibration_cache import StatisticsCache
from lightning_quant.simulation.inputs import NetworkInputs, Passes
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.prepare import PreparedNetwork, prepare
from lightning_quant.utilities.registry import Registry

# What calibration and a step that learns weights take, in passes of the same samples without gradients: measured on
# FFNet-nano on a CPU.
_CALIBRATION, LEARNING_STEP = 2.0, 2.5


@dataclass(frozen=True)
class Cost:
    """What a rung takes, in units whose time is known on every machine before it runs.

    Args:
        samples: single samples passed through the quantized network without gradients, or what takes as long.
        validations: the user's validation of the whole network.
    """

    samples: float
    validations: float = 1


@dataclass
class RungContext:
    """What a rung works with, besides the quantized network itself.

    Args:
        float_network: the user's network, in eval mode. Not to be changed.
        inputs: an example call of it.
        samples: starts another pass over the calibration samples, the same calls every time.
        measure: the user's metric of the quantized network as it is now, with the correction in force, if there is
            one (see :attr:`Rung.is_correction`). Costs a validation.
        suffices: whether a value of that metric is within what the user allows; ``None`` if there is no bound.
        measure_float: the user's metric of another float network in the place of theirs. Costs a validation.
        cache: where calibration keeps what it saw, for other precisions; ``None``: nowhere.
        attempt: makes what each rung runs within.
    """

    float_network: nn.Module
    inputs: NetworkInputs
    samples: Callable[[], Iterator[NetworkInputs]]
    measure: Callable[[], float]
    suffices: Callable[[float], bool] | None
    measure_float: Callable[[nn.Module], float]
    cache: StatisticsCache | None = None
    attempt: Callable[[Rung], AbstractContextManager[object]] = nullcontext

    @cached_property
    def prepared(self) -> PreparedNetwork:
        """The float network with the layers and the weights that its simulation started from."""
        return prepare(self.float_network, self.inputs)

    def calibrate(self, network: QuantizedNetwork, *, weights: bool = True) -> int:
        """Calibrate from the same samples again; return how many there were.

        Args:
            network: the quantized network.
            weights: ``False`` keeps the ranges of the weights as they are.
        """
        return calibrate(network, Passes(self.samples), weights=weights, cache=self.cache)


class Rung(ABC):
    """A rung of the ladder: changes a quantized network in place, so that it comes closer to the float one.

    Subclass it for a rung of your own and give ``rungs`` an instance, ``rungs=("ptq", MyRung())``, the dotted path of
    the class, ``rungs=("ptq", "my_package.MyRung")``, or its ``name``, once the class was imported.

    Attributes:
        name: the name of the rung in records.
        start: what it is applied to: the ``"best"`` network so far, or the ``"float"`` weights newly quantized.
        is_correction: whether it corrects what rounding did to the layers' outputs. A correction holds for one rounding
            only: it is reverted before the next rung, and applied again after it unless that makes the metric worse.
        refines: whether it may give quantizers more than 8 bits. Everything is then measured in float32, with all its
            digits: the float network and the rungs before it, too.
    """

    name: ClassVar[str]
    start: ClassVar[Literal["best", "float"]] = "best"
    is_correction: ClassVar[bool] = False
    refines: ClassVar[bool] = False
    _options: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        RUNGS.register(cls)

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Note the arguments, for :attr:`options`."""
        made = super().__new__(cls)
        made._options = _given(cls, made, args, kwargs)
        return made

    @property
    def options(self) -> dict[str, Any]:
        """The arguments that it was made with, without those at their defaults."""
        return self._options

    def check(self, network: QuantizedNetwork) -> None:
        """Refuse what can never work, before any work is spent.

        Raises:
            ConfigurationError: when the hardware config does not allow it.
        """
        return None

    def skip_reason(self, network: QuantizedNetwork, context: RungContext) -> str | None:
        """Return why it would change nothing in this network: the rung is then skipped. ``None`` if it would."""
        return None

    def float_reference(self, context: RungContext) -> nn.Module | None:
        """Return the float network changed in the same way, if that changes it as well."""
        return None

    def cost(self, network: QuantizedNetwork, context: RungContext) -> Cost | None:
        """Return about what it takes, for the estimate that is shown before it runs; ``None``: no estimate."""
        return None

    @abstractmethod
    def apply(self, network: QuantizedNetwork, context: RungContext) -> str:
        """Change ``network`` in place, calibrated when done, and return in a few words what was changed.

        It is called in eval mode and without gradients.
        """


def calibration(network: QuantizedNetwork) -> float:
    """Return what a calibration takes, see :attr:`Cost.samples`."""
    return _CALIBRATION * network.recipe.calibration_samples


RUNGS: Registry[Rung] = Registry(
    "rung",
    Rung,  # type: ignore[type-abstract]  # instances are of subclasses
    {
        "ptq": f"{__package__}.rungs.ptq.CalibratedRanges",
        "min_max": f"{__package__}.rungs.ptq.MinMaxRanges",
        "tf_enhanced": f"{__package__}.rungs.ptq.TfEnhancedRanges",
        "percentile": f"{__package__}.rungs.ptq.PercentileRanges",
        "cle": f"{__package__}.rungs.cle.CrossLayerEqualization",
        "bn_reestimation": f"{__package__}.rungs.bn_reestimation.BatchNormReestimation",
        "bias_correction": f"{__package__}.rungs.bias_correction.BiasCorrection",
        "seq_mse": f"{__package__}.rungs.seq_mse.SequentialMse",
        "rounding": f"{__package__}.rungs.rounding.LearnedRounding",
        "clipping": f"{__package__}.rungs.ptq.ClippedActivations",
        "adaround": f"{__package__}.rungs.adaround.AdaptiveRounding",
        "attention": f"{__package__}.rungs.attention.AttentionPrecision",
        "joins": f"{__package__}.rungs.joins.JoinedPrecision",
        "mixed": f"{__package__}.rungs.mixed.MixedPrecision",
    },
    reserved=("float", "qat"),  # in records
)
"""The rungs by name. A class of this package is loaded when it is asked for."""


def _given(cls: type[Rung], made: Rung, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a constructor by name, without those that are at their defaults."""
    signature = inspect.signature(cls.__init__)
    try:
        given = signature.bind(made, *args, **kwargs).arguments
    except TypeError:  # a copy, which is filled in afterwards, or arguments that the constructor refuses next
        return {}
    found: dict[str, Any] = {}
    for name, value in list(given.items())[1:]:
        parameter = signature.parameters[name]
        if parameter.kind is parameter.VAR_KEYWORD:
            found |= value
        # as printed: two arrays do not compare to one truth value
        elif parameter.kind is not parameter.VAR_POSITIONAL and repr(value) != repr(parameter.default):
            found[name] = value
    return found
