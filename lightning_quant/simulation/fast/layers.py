"""AIMET's quantized layers on a short path, from the inputs to the outputs directly."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.simulation.aimet import QuantizationMixin, QuantizedTensorBase
from lightning_quant.simulation.batch_norms import output_factors
from lightning_quant.simulation.callsites.attributes import DEPTHWISE, ROUNDED_BY
from lightning_quant.simulation.callsites.passes import current, paused, running_pass
from lightning_quant.simulation.fast import in_graphs
from lightning_quant.simulation.fast.biases import rounded_bias, rounded_sums
from lightning_quant.simulation.fast.kernels import Activation
from lightning_quant.simulation.fast.quantizer import is_fast, is_known, is_traced

# Activations that one kernel computes together with the quantization of their outputs.
FUSED = {
    nn.ReLU: Activation.RELU,
    nn.ReLU6: Activation.RELU6,
    nn.Hardswish: Activation.HARDSWISH,
    nn.SiLU: Activation.SILU,
}


class Layer:
    """A quantized layer, which holds no call sites.

    It and its subclasses are collections of methods for subclasses of AIMET's own classes: see ``short_path.py``.
    """

    float_class: type

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the layer; the operations in it are not intercepted."""
        running = running_pass()
        if running is not None and running.changes:
            args, kwargs = current(args), current(kwargs)
        if in_graphs.is_tracing():
            in_graphs.note_foreign((args, kwargs))
        return self._called(args, kwargs)

    def _called(self: Any, args: Any, kwargs: Any) -> Any:
        with paused():
            return self.aimet_class.__call__(self, *args, **kwargs)


class FastLayer(Layer):
    """A layer that quantizes its inputs, computes, and quantizes its output."""

    quantized_parameters: tuple[str, ...] = ()

    def _called(self: Any, args: Any, kwargs: Any) -> Any:
        # AIMET's own call looks for weights without a range first; such layers are not on the short path
        if not _ready(self):
            return Layer._called(self, args, kwargs)
        self.__dict__["_is_ready"] = True  # for `forward`, which need not look again
        try:
            with torch._C.DisableTorchFunction():
                return nn.Module.__call__(self, *args, **kwargs)
        finally:
            self.__dict__.pop("_is_ready", None)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Quantize the inputs, compute, and quantize the output."""
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


class FastActivation(FastLayer):
    """An activation that is computed in one pass with the quantization of its output."""

    def _computed(self: Any, quantizer: Any, *args: Any) -> Any:
        (input,) = args
        if is_fast(quantizer) and _is_plain(quantizer):
            output = quantizer.after(input, FUSED[self.float_class])
            if output is not None:
                return output
        return FastLayer._computed(self, quantizer, input)


class FastWeighted(FastLayer):
    """A convolution or a linear layer."""

    quantized_parameters = ("weight",)

    def _computed(self: Any, quantizer: Any, input: Tensor) -> Any:
        weight, bias = self._rounded_parameters()
        if isinstance(self, nn.Linear):
            output = nn.functional.linear(input, weight, bias)
        else:
            output = self._conv_forward(input, weight, bias)
        return output if quantizer is None else quantizer(output)

    def _rounded_parameters(self: Any) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias; rounded once in a block of :func:`cached_weights`, until something changes."""
        weight = self.weight
        quantizer = self._modules["param_quantizers"]._modules["weight"]
        # what autocast would round it to next, again for every batch
        dtype = torch.get_autocast_dtype("cuda") if weight.is_cuda and torch.is_autocast_enabled("cuda") else None
        held = self.__dict__.get("_held_weight")
        if held is None or torch.is_grad_enabled() or in_graphs.is_tracing():
            return _quantized(quantizer, weight, dtype), rounded_bias(self)
        values = [value for value in (weight, self.bias) if value is not None]
        if any(value.is_inference() for value in values):  # which count no changes
            return _quantized(quantizer, weight, dtype), rounded_bias(self)
        if (sampled := held.get("sampled")) is not None and weight.numel():
            sampled.check(weight)
        state: list[Any] = [dtype, *[(value.data_ptr(), value._version) for value in values]]
        for one in (quantizer, self.__dict__.get(ROUNDED_BY)):
            if one is not None:
                state += [one.qmin, one.qmax, "forward" in one.__dict__]
                state += [end._version for end in one._parameters.values()]
        if held.get("state") != state:
            held |= {"state": state, "parameters": (_quantized(quantizer, weight, dtype), rounded_bias(self))}
        return held["parameters"]


class FastTransposed(FastWeighted):
    """A transposed convolution, whose size may be asked for in the call."""

    def compute_encodings(self: Any) -> Any:
        """Calibrate in a block; AIMET's protection of biases against overflow knows no groups that share scales."""
        if self.groups > 1:
            return QuantizationMixin.compute_encodings(self)
        return self.aimet_class.compute_encodings(self)

    def _computed(self: Any, quantizer: Any, input: Tensor, output_size: Any = None) -> Any:
        weight, bias = self._rounded_parameters()
        with _replaced(self, weight=weight, bias=bias):
            output = self.float_class.forward(self, input, output_size)
        return output if quantizer is None else quantizer(output)


class FastNorm(FastLayer):
    """A norm; in eval mode, one with running statistics computes what it does on the device, as a convolution."""

    def _computed(self: Any, quantizer: Any, input: Tensor) -> Any:
        is_plain = self.training or DEPTHWISE not in self.__dict__ or input.dtype is not torch.float32
        added = None if is_plain else rounded_sums(self)
        if added is None:
            return FastLayer._computed(self, quantizer, input)
        shape = [-1, *[1] * (input.dim() - 2)]
        output = torch.addcmul(added.reshape(shape), input, output_factors(self).reshape(shape))
        return output if quantizer is None else quantizer(output)


@contextlib.contextmanager
def _replaced(layer: nn.Module, **parameters: Tensor | None) -> Iterator[None]:
    """Let a layer compute with other parameters for the length of a block."""
    before: list[Any] = [layer._parameters if name in layer._parameters else layer.__dict__ for name in parameters]
    own = [holder[name] for holder, name in zip(before, parameters, strict=True)]
    for holder, (name, value) in zip(before, parameters.items(), strict=True):
        holder[name] = value
    try:
        yield
    finally:
        for holder, name, value in zip(before, parameters, own, strict=True):
            holder[name] = value


@contextlib.contextmanager
def cached_weights(network: nn.Module) -> Iterator[None]:
    """Quantize every weight, and round every bias, once for the length of a block, in which no gradient is computed.

    What an operation of PyTorch changes is quantized again. Writes through ``.data`` are seen where the first or the
    last convolution or linear layer is written to, as when averaged weights are put in the place of others.
    """
    layers = [module for module in network.modules() if getattr(module, "quantized_parameters", ())]
    held: list[dict[str, Any]] = [{} for _ in layers]
    for layer, one in zip(layers, held, strict=True):
        layer.__dict__["_held_weight"] = one
    looked_at = [one for layer, one in zip(layers, held, strict=True) if hasattr(layer, "_rounded_parameters")]
    for one in (*looked_at[:1], *looked_at[-1:]):
        one["sampled"] = _Sampled(held)
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("_held_weight", None)


class _Sampled:
    """A few values of a weight, which show that it was written to without a trace: then nothing held is valid.

    Args:
        held: what all layers hold.
    """

    def __init__(self, held: Sequence[dict[str, Any]]) -> None:
        self.held = held
        self.values: list[float] = []

    def check(self, weight: Tensor) -> None:
        """Drop what is held if values of ``weight`` are others than at the last call."""
        places = {tuple(int(part * (size - 1)) for size in weight.shape) for part in (0.0, 0.25, 0.5, 0.75, 1.0)}
        values = torch.stack([weight[place] for place in sorted(places)]).tolist()
        if self.values and values != self.values:
            for one in self.held:
                one.pop("state", None)
        self.values = values


def _quantized(quantizer: Any, weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    if quantizer is None:
        return weight
    if dtype is None or not _is_plain(quantizer):
        return quantizer(weight)
    made = quantizer.after(weight, dtype=dtype)
    return quantizer(weight) if made is None else made


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _plain(value: Any) -> Any:
    """Return a tensor without AIMET's subclass, which slows every operation on it."""
    return value.as_subclass(Tensor) if isinstance(value, QuantizedTensorBase) else value


def _is_plain(module: nn.Module) -> bool:
    """Return whether a call of the module only runs its class's ``forward``: AIMET replaces that to observe."""
    return (
        not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
        and "forward" not in module.__dict__
    )


def _ready(layer: Any) -> bool:
    """Return whether a layer can take the short path now."""
    if is_traced():
        return False
    quantizers = layer._modules["param_quantizers"]._modules
    for name, quantizer in quantizers.items():
        if quantizer is None:
            continue
        if name not in layer.quantized_parameters or not is_fast(quantizer):
            return False
        if not is_known(quantizer, *quantizer._parameters.values()):
            return False
    return not any(layer._param_pre_quantizers.values())
