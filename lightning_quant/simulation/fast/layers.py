"""AIMET's quantizers and layers on a short path: the same numbers, without the work between them.

AIMET computes scale and offset of a range with a dozen small operations on every call, looks for weights that have no
range yet, swaps parameters in and out of the layer and wraps what a quantizer returns in a tensor subclass. On small
images that takes longer than the convolutions. The classes here go from the inputs to the outputs directly, and leave
everything they do not know to AIMET: tracing, export, calibration, block sizes, types for which there is no kernel.

Importing this module imports AIMET.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_quant.simulation.aimet import (
    AffineEncoding,
    BaseQuantizationMixin,
    QuantizationMixin,
    QuantizeDequantize,
    QuantizedTensorBase,
    QuantizerBase,
    StatisticsNotFoundError,
    _DispatchMixin,
    _flag_extreme_min_max,
    _get_minimum_scale,
    _MinMaxObserver,
    _MinMaxRange,
    custom,
)
from lightning_quant.simulation.callsites.running import current, paused, running_pass, traced
from lightning_quant.simulation.fast import gpu, in_graphs, kernels
from lightning_quant.simulation.fast.kernels import Activation
from lightning_quant.simulation.fast.observers import accelerate_analyzer, slow_down_analyzer

# One pass computes these together with the quantization of what they put out.
_FUSED = {
    nn.ReLU: Activation.RELU,
    nn.ReLU6: Activation.RELU6,
    nn.Hardswish: Activation.HARDSWISH,
    nn.SiLU: Activation.SILU,
}
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
            if not _is_fast(module) or module.block_size or module.zero_point_shift:
                left.append(name)
            if hasattr(module, "encoding_analyzer"):
                accelerate_analyzer(module.encoding_analyzer)
    return left


def slow_down(network: nn.Module) -> None:
    """Give every quantizer and layer AIMET's own class back."""
    module: Any
    for module in network.modules():
        if _is_fast(module):
            module.__class__ = module.aimet_class
        if hasattr(module, "encoding_analyzer"):
            slow_down_analyzer(module.encoding_analyzer)


class _Fast:
    """What all classes on the short path have; ``aimet_class`` is the one they stand for."""

    aimet_class: Any

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the classes are made on demand and have no name that a pickle could find
        _, _, *state = cast("tuple[Any, ...]", object.__reduce_ex__(self, protocol))
        # nor has AIMET's, where it was made on demand too
        return (_unpickled, getattr(self.aimet_class, "made_by", (None, self.aimet_class)), *state)


class _FastQuantizer(_Fast):
    """Fake quantization by the compiled kernel."""

    def forward(self: Any, input: Tensor) -> Tensor:
        fused = self.after(input)
        return self.aimet_class.forward(self, input) if fused is None else fused

    def after(
        self: Any, input: Tensor, activation: Activation = Activation.NONE, dtype: torch.dtype | None = None
    ) -> Tensor | None:
        """Fake-quantize ``activation(input)``; ``None`` where AIMET has to.

        On a GPU the result can be asked for in another ``dtype``, for an operation that would round it to that anyway.
        """
        parameters = self._parameters
        low, high = parameters.get("min"), parameters.get("max")
        if (
            low is None
            or high is None
            or low.dtype is not torch.float32
            or self.block_size is not None
            or self.zero_point_shift
            or not (in_graphs.is_calibrated(self) if in_graphs.is_made() else _has_kernel(input, activation))
            or _is_traced()
            or not _known(self, low, high)
        ):
            return None
        qmin, qmax = self.qmin, self.qmax
        grid = (low, high, qmin, qmax, self._symmetric, _smallest_scale(qmax - qmin), activation)
        if in_graphs.is_made():
            return in_graphs.fake_quantize(input, *grid)
        if type(input) is not Tensor:
            input = input.as_subclass(Tensor)
        if input.is_cpu:
            return torch.ops.lightning_quant.fake_quantize(input, *grid)
        return gpu.fake_quantize(input, *grid, dtype) if qmax - qmin <= gpu.MOST_STEPS else None

    @contextlib.contextmanager
    def _compute_encodings(self: Any, passthrough: bool = False) -> Iterator[None]:
        """Observe what comes in, without AIMET's search for the best range of every batch, which it discards."""
        parameters = self._parameters
        if not (
            passthrough and self.is_overwrite_allowed() and {"min", "max"} == parameters.keys() and not self.block_size
        ):
            with self.aimet_class._compute_encodings(self, passthrough):
                yield
            return
        analyzer, steps = self.encoding_analyzer, self.qmax - self.qmin
        if self.zero_point_shift == 0.5:
            steps -= 1
        low = parameters["min"]
        # what reads it wants to know where a tensor comes from, see AIMET's protection against overflow
        encoding = AffineEncoding(
            torch.ones_like(low.detach()), torch.zeros_like(low.detach()), self.qmin, self.qmax, producer=self
        )

        def observe(input: Tensor) -> Tensor:
            seen = input.as_subclass(Tensor).detach()
            if seen.numel():
                _observe(analyzer, seen)
            seen.encoding = encoding  # type: ignore[attr-defined]
            return seen

        analyzer.reset_stats()
        self.forward = observe
        try:
            yield
        finally:
            del self.forward
        try:
            ends = analyzer.compute_encodings(steps, self.symmetric)
        except StatisticsNotFoundError:
            return
        _flag_extreme_min_max(*ends)
        self.set_range(
            *(end if self.is_overwrite_allowed(name) else None for name, end in zip(("min", "max"), ends, strict=True))
        )


class _Layer(_Fast):
    """A quantized layer: its inside holds no call sites."""

    float_class: type

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        running = running_pass()
        if running is not None and running.changes:
            args, kwargs = current(args), current(kwargs)
        if in_graphs.is_made():
            in_graphs.look((args, kwargs))
        return self._called(args, kwargs)

    def _called(self: Any, args: Any, kwargs: Any) -> Any:
        with paused():
            return self.aimet_class.__call__(self, *args, **kwargs)


class _FastLayer(_Layer):
    """A layer that quantizes its inputs, computes, and quantizes its output."""

    quantized_parameters: tuple[str, ...] = ()

    def _called(self: Any, args: Any, kwargs: Any) -> Any:
        # AIMET's looks for weights without a range first; such layers are not on the short path
        if not _ready(self):
            return _Layer._called(self, args, kwargs)
        self.__dict__["_is_ready"] = True  # for `forward`, which need not look again
        try:
            with torch._C.DisableTorchFunction():
                return nn.Module.__call__(self, *args, **kwargs)
        finally:
            self.__dict__.pop("_is_ready", None)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not (self.__dict__.pop("_is_ready", False) or _ready(self)):
            return self.aimet_class.forward(self, *args, **kwargs)
        modules = self._modules
        quantizers = modules["input_quantizers"]._modules.values()
        args = tuple(
            _plain(argument) if quantizer is None or not _is_float(argument) else quantizer(argument)
            for argument, quantizer in itertools.zip_longest(args, itertools.islice(quantizers, len(args)))
        )
        return self._computed(modules["output_quantizers"]._modules["0"], *args, **kwargs)

    def _computed(self: Any, quantizer: Any, *args: Any, **kwargs: Any) -> Any:
        output = self.float_class.forward(self, *args, **kwargs)
        return quantizer(output) if quantizer is not None and _is_float(output) else output


class _FastActivation(_FastLayer):
    """An activation that is computed in one pass with the quantization of its output."""

    def _computed(self: Any, quantizer: Any, *args: Any) -> Any:
        (input,) = args
        if _is_fast(quantizer) and _is_plain(quantizer):
            output = quantizer.after(input, _FUSED[self.float_class])
            if output is not None:
                return output
        return _FastLayer._computed(self, quantizer, input)


class _FastWeighted(_FastLayer):
    """A convolution or a linear layer."""

    quantized_parameters = ("weight",)

    def _computed(self: Any, quantizer: Any, input: Tensor) -> Any:
        weight = self._quantized_weight()
        if isinstance(self, nn.Linear):
            output = nn.functional.linear(input, weight, self.bias)
        else:
            output = self._conv_forward(input, weight, self.bias)
        return output if quantizer is None else quantizer(output)

    def _quantized_weight(self: Any) -> Tensor:
        weight = self.weight
        quantizer = self._modules["param_quantizers"]._modules["weight"]
        held = self.__dict__.get("_held_weight")
        if quantizer is None:
            return weight
        # what autocast would round it to next, for every batch anew
        dtype = torch.get_autocast_dtype("cuda") if weight.is_cuda and torch.is_autocast_enabled("cuda") else None
        if held is None or torch.is_grad_enabled() or in_graphs.is_made() or weight.is_inference():
            return _quantized(quantizer, weight, dtype)
        ends = quantizer._parameters.values()
        state = weight.data_ptr(), weight._version, *(end._version for end in ends), quantizer.qmin, quantizer.qmax
        if held.get("state") != (*state, dtype):
            held.update(state=(*state, dtype), weight=_quantized(quantizer, weight, dtype))
        return held["weight"]


def _quantized(quantizer: Any, weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or not _is_plain(quantizer):
        return quantizer(weight)
    made = quantizer.after(weight, dtype=dtype)
    return quantizer(weight) if made is None else made


@contextlib.contextmanager
def cached_weights(network: nn.Module) -> Iterator[None]:
    """Quantize every weight once for the length of a block, in which no gradient is computed.

    A weight that an operation of PyTorch changes is quantized anew; only what writes through ``.data`` goes unseen.
    """
    layers = [module for module in network.modules() if getattr(module, "quantized_parameters", ())]
    for layer in layers:
        layer.__dict__["_held_weight"] = {}
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("_held_weight", None)


@torch.no_grad()
def _observe(analyzer: Any, tensor: Tensor) -> None:
    observer = analyzer.observer
    if isinstance(observer, _MinMaxObserver) and math.prod(observer.shape) == 1:
        low, high = tensor.aminmax()  # AIMET reads the tensor once for each
        observer.merge_stats(_MinMaxRange(low.view(observer.shape), high.view(observer.shape)))
    else:
        analyzer.update_stats(tensor)


def _is_fast(module: Any) -> bool:
    return "aimet_class" in vars(type(module))


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _plain(value: Any) -> Any:
    """Without AIMET's tensor subclass, which slows every operation on it."""
    return value.as_subclass(Tensor) if isinstance(value, QuantizedTensorBase) else value


def _has_kernel(input: Tensor, activation: Activation) -> bool:
    if input.is_cpu:
        return input.dtype is torch.float32 and activation is not Activation.SILU and kernels.unavailable() is None
    return input.is_cuda and input.dtype in gpu.TYPES and gpu.unavailable() is None


def _is_traced() -> bool:
    if in_graphs.is_made():
        return False
    running = running_pass()
    return traced() if running is None else running.is_traced


def _is_plain(module: nn.Module) -> bool:
    """Whether calling the module would do no more than its ``forward``: AIMET replaces that to observe."""
    return (
        not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
        and "forward" not in module.__dict__
    )


def _known(quantizer: Any, *ends: Tensor) -> bool:
    """Whether its ranges were set; AIMET's own ``is_initialized`` takes ten times as long."""
    for name, end in zip(("min", "max"), ends, strict=True):
        initial, version = quantizer._initial_parameters.get(name, (None, None))
        if initial is not None and initial() is end and end._version == version:
            return False
    return True


def _ready(layer: Any) -> bool:
    """Whether a layer can take the short path now."""
    if _is_traced():
        return False
    quantizers = layer._modules["param_quantizers"]._modules
    for name, quantizer in quantizers.items():
        if quantizer is None:
            continue
        if name not in layer.quantized_parameters or not _is_fast(quantizer):
            return False
        if not _known(quantizer, *quantizer._parameters.values()):
            return False
    return not any(layer._param_pre_quantizers.values())


_smallest_scale = functools.cache(_get_minimum_scale)


@functools.cache
def _fast_class(aimet_class: Any) -> Any:
    """The class on the short path for one of AIMET's, if there is one."""
    float_class = QuantizationMixin.qcls_to_cls.get(aimet_class)
    kind: type[_Fast]
    if "aimet_class" in vars(aimet_class):  # on it already
        return None
    if aimet_class is QuantizeDequantize:
        kind = _FastQuantizer
    elif float_class in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear):
        kind = _FastWeighted
    elif float_class in _FUSED:
        kind = _FastActivation
    elif float_class in _PLAIN or _is_plainly_dispatched(aimet_class):
        kind = _FastLayer
    elif issubclass(aimet_class, BaseQuantizationMixin):
        kind = _Layer
    else:
        return None
    # AIMET's class is the only base: Python lets an object change its class only where both are laid out alike
    body = {name: value for base in kind.__mro__[-2::-1] for name, value in vars(base).items() if callable(value)}
    body |= {"aimet_class": aimet_class, "float_class": float_class, "__module__": __name__}
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


def _unpickled(make: Any, *of: Any) -> Any:
    made: Any = _fast_class(of[0] if make is None else make(*of))
    return made.__new__(made)
