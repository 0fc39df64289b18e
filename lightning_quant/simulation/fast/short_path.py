"""AIMET's quantizers and layers on a short path: the same numbers, without the work between them.

AIMET computes scale and offset of a range with a dozen small operations on every call, looks for weights that have no
range yet, swaps parameters in and out of the layer and wraps what a quantizer returns in a tensor subclass. On small
images that takes longer than the convolutions. The classes here go from the inputs to the outputs directly, and leave
everything they do not know to AIMET: tracing, export, calibration, block sizes, types for which there is no kernel.

Importing this module imports AIMET.
"""

from __future__ import annotations

import functools
from typing import Any, cast

from torch import nn

from lightning_quant.simulation.aimet import (
    BaseQuantizationMixin,
    QuantizationMixin,
    QuantizeDequantize,
    QuantizerBase,
    _DispatchMixin,
    custom,
)
from lightning_quant.simulation.fast.layers import (
    FUSED,
    FastActivation,
    FastLayer,
    FastNorm,
    FastTransposed,
    FastWeighted,
    Layer,
)
from lightning_quant.simulation.fast.observers import accelerate_analyzer, slow_down_analyzer
from lightning_quant.simulation.fast.quantizer import FastConversion, FastQuantizer, is_fast
from lightning_quant.simulation.symmetric_conversion import SymmetricConversion

# Layers whose forward pass AIMET wraps in nothing but their quantizers, in its own words or in a detour of its own.
_PLAIN = (nn.Hardsigmoid, nn.Hardswish, nn.ConstantPad2d, nn.ZeroPad2d, nn.ReflectionPad2d, custom.Concat)


def accelerate(network: nn.Module) -> list[str]:
    """Put the quantizers and layers of a simulated network on the short path, in place.

    Weights, ranges, names and states stay what they are; :func:`slow_down` is the way back.

    Returns:
        The names of the quantizers that stay with AIMET: other kinds, block sizes, shifted grids.
    """
    left = []
    module: Any
    for name, module in network.named_modules():
        fast = _fast_class(type(module))  # type: ignore[arg-type]
        if fast is not None:
            module.__class__ = fast
        if isinstance(module, QuantizerBase):
            if not is_fast(module) or module.block_size or module.zero_point_shift:
                left.append(name)
            if hasattr(module, "encoding_analyzer"):
                accelerate_analyzer(module.encoding_analyzer)
    return left


def slow_down(network: nn.Module) -> None:
    """Give every quantizer and layer AIMET's own class back."""
    module: Any
    for module in network.modules():
        if is_fast(module):
            module.__class__ = module.aimet_class
        if hasattr(module, "encoding_analyzer"):
            slow_down_analyzer(module.encoding_analyzer)


# With running statistics, which instance norms have if they are asked to.
_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)


@functools.cache
def _fast_class(aimet_class: Any) -> Any:
    """Return the class on the short path for one of AIMET's, which is its ``aimet_class``, or ``None``."""
    float_class = QuantizationMixin.qcls_to_cls.get(aimet_class)
    kind: type
    if "aimet_class" in vars(aimet_class):  # on it already
        return None
    if aimet_class is QuantizeDequantize:
        kind = FastQuantizer
    elif aimet_class is SymmetricConversion:
        kind = FastConversion
    elif float_class in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear):
        kind = FastWeighted
    elif float_class in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
        kind = FastTransposed
    elif float_class in FUSED:
        kind = FastActivation
    elif float_class in _NORMS:
        kind = FastNorm
    elif float_class in _PLAIN or _is_plainly_dispatched(aimet_class):
        kind = FastLayer
    elif issubclass(aimet_class, BaseQuantizationMixin):
        kind = Layer
    else:
        return None
    # AIMET's class is the only base: Python lets an object change its class only where both are laid out alike
    body = {name: value for base in kind.__mro__[-2::-1] for name, value in vars(base).items() if callable(value)}
    body |= {"aimet_class": aimet_class, "float_class": float_class}
    body |= {"__module__": __name__, "__reduce_ex__": _reduce}
    made = type(aimet_class)(aimet_class.__name__, (aimet_class,), body)
    made.quantized_parameters = getattr(kind, "quantized_parameters", ())
    if float_class is not None:
        QuantizationMixin.qcls_to_cls[made] = float_class  # where AIMET looks for the way back to float
    return made


def _is_plainly_dispatched(aimet_class: Any) -> bool:
    return (
        issubclass(aimet_class, _DispatchMixin)
        and aimet_class.forward is _DispatchMixin.forward
        and aimet_class._is_dispatch_necessary is _DispatchMixin._is_dispatch_necessary
        and not hasattr(aimet_class, "quantized_forward")
    )


def _reduce(self: Any, protocol: Any) -> Any:
    # the classes are made on demand and have no name that a pickle could find
    _, _, *state = cast("tuple[Any, ...]", object.__reduce_ex__(self, protocol))
    # nor has AIMET's, where it was made on demand too
    return (_unpickled, getattr(self.aimet_class, "made_by", (None, self.aimet_class)), *state)


def _unpickled(make: Any, *of: Any) -> Any:
    made: Any = _fast_class(of[0] if make is None else make(*of))
    return made.__new__(made)
