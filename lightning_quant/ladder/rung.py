"""What a repair is given, and what it has to answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

from torch import nn

from lightning_quant.simulation.calibrate import calibrate
from lightning_quant.simulation.calibration_cache import StatisticsCache
from lightning_quant.simulation.inputs import NetworkInputs, Passes
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.prepare import PreparedNetwork, prepare


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
        cache: where calibration keeps what it saw, for other precisions; ``None``: nowhere.
    """

    float_network: nn.Module
    inputs: NetworkInputs
    samples: Callable[[], Iterator[NetworkInputs]]
    measure: Callable[[], float]
    suffices: Callable[[float], bool] | None
    cache: StatisticsCache | None = None

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

    Subclass it for a repair of your own and name the class in ``rungs``, as in ``rungs=("ptq", "my_package.MyRung")``.

    Attributes:
        name: how the rung is called in ``rungs`` and in records.
        start: what it is applied to: the ``"best"`` network so far, or the ``"float"`` weights newly quantized.
        is_correction: whether it corrects what rounding did to the layers' outputs. A correction holds for one rounding
            only: it is taken off before the next rung and made anew on top of it.
        refines: whether it may give quantizers more than 8 bits. Everything is then measured in float32, with all its
            digits: the float network and the rungs before it, too.
    """

    name: ClassVar[str]
    start: ClassVar[Literal["best", "float"]] = "best"
    is_correction: ClassVar[bool] = False
    refines: ClassVar[bool] = False

    def check(self, network: QuantizedNetwork) -> None:
        """Refuse what can never work, before any work is spent.

        Raises:
            ConfigurationError: when the hardware config does not allow it.
        """
        return None

    def skip_reason(self, network: QuantizedNetwork, context: RungContext) -> str | None:
        """Why it would change nothing in this network, or ``None``: the rung is then passed over."""
        return None

    def float_reference(self, context: RungContext) -> nn.Module | None:
        """What the same repair makes of the float network, if it changes that as well."""
        return None

    @abstractmethod
    def apply(self, network: QuantizedNetwork, context: RungContext) -> str:
        """Change ``network`` in place, calibrated when done; says in a few words what was changed.

        It is called in eval mode and without gradients.
        """
