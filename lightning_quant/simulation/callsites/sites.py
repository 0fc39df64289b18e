"""What stands at a call site: a module for the function that is called there, and how it is called."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.simulation.callsites.functions import AUGMENTED, in_place
from lightning_quant.simulation.callsites.lending import LaidOutAlike
from lightning_quant.simulation.callsites.places import Place, same
from lightning_quant.simulation.callsites.running import CONTAINERS, OWNER, SET_ASIDE, Pass, changed_into
from lightning_quant.simulation.callsites.taken_apart import APART


def is_at_call_site(module: nn.Module) -> bool:
    """Whether a module was made for a call site."""
    return OWNER in vars(module)


class Site:
    """The module that answers one operation in the code of a network.

    Args:
        name: base name of the function, with a star where it is answered by the generic rule.
        holder: the module that the answering one is a child of.
        child: its name there, by which AIMET exchanges it.
        own: whether the holder is the module whose code it is; else it is the innermost around it that is no list.
    """

    def __init__(self, name: str, holder: nn.Module, child: str, own: bool) -> None:
        self.name = name
        self.holder = holder
        self.child = child
        self.own = own

    def module(self, running: Pass) -> nn.Module:
        """The module that answers: of the network that runs, which can be a copy that AIMET made."""
        stack = running.stack
        holder: nn.Module | None = stack[-1]
        if not self.own:
            holder = next((m for m in reversed(stack) if not isinstance(m, CONTAINERS)), None)
        found = None if holder is None else holder._modules.get(self.child)
        if found is None:  # of a list that is called on its own, or at the root
            found = self.holder._modules.get(self.child) or vars(self.holder)[SET_ASIDE][self.child]
        return found

    def answer(self, running: Pass, func: Any, args: Any, kwargs: Any) -> Any:
        """Compute what was called, or return ``NotImplemented`` where the module computes something else."""
        if kwargs and kwargs.get("out") is not None:
            return NotImplemented
        name = self.name
        result = RULES.get(name, GENERIC).call(self.module(running), args, kwargs)
        if result is NotImplemented:
            return result
        if in_place(func, name) or kwargs.get("inplace") or (len(args) > 1 and _inplace_by_position(name, args)):
            changed_into(running, args[0] if args else kwargs["input"], result)
        return result


class ApartSite:
    """An operation that is computed as several, each with a site of its own.

    Args:
        name: base name of the function.
        at: its place, which those of its parts begin with.
    """

    def __init__(self, name: str, at: Place) -> None:
        self.name = name
        self.at = same(at)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def fits(self, running: Pass, args: Any, kwargs: Any) -> bool:
        """Whether the operation can be computed as several with these arguments; if not, the function does it."""
        takes = APART[self.name][1]
        return kwargs.get("out") is None and (takes is None or takes(*args, **kwargs))

    def answer(self, running: Pass, func: Any, args: Any, kwargs: Any) -> Any:
        """Compute what was called, or return ``NotImplemented`` where it cannot be computed as several."""
        if not self.fits(running, args, kwargs):
            return NotImplemented
        before, running.within = running.within, self.at
        try:
            with running.mode:
                result = APART[self.name][0](*args, **kwargs)
        finally:
            running.within = before
        if in_place(func, self.name) or kwargs.get("inplace"):
            changed_into(running, args[0] if args else kwargs["input"], result)
        return result


# ---- rules -----------------------------------------------------------------------------------------------------------
class Rule(ABC):
    """How one kind of function becomes a module, and how the module is called."""

    @abstractmethod
    def make(self, name: str, func: Any, args: Any, kwargs: Any) -> nn.Module | None:
        """The module for a call, or ``None`` where the rule does not fit; the generic one is taken then."""

    def call(self, module: Any, args: Any, kwargs: Any) -> Any:
        """Compute with the module, or return ``NotImplemented`` where it computes something else than was called."""
        return module(*args, **kwargs)

    def operands(self, args: Any, kwargs: Any) -> list[Any]:
        """What the module is given by position, for quantizers on constants among it."""
        return []


class Binary(Rule):
    """Arithmetic of two operands, by AIMET's module."""

    def __init__(self, module: str, swapped: bool = False) -> None:
        self.module = module
        self.swapped = swapped

    def make(self, name: str, func: Any, args: Any, kwargs: Any) -> nn.Module | None:
        from lightning_quant.simulation.aimet import custom

        if not _is_of_two(self.operands(args, kwargs), kwargs):
            return None
        made: nn.Module = getattr(custom, self.module)()
        return made

    def operands(self, args: Any, kwargs: Any) -> list[Any]:
        found = list(args[:2])
        if kwargs:
            found += [value for key, value in kwargs.items() if key in _SECOND]
        return found[::-1] if self.swapped else found

    def call(self, module: Any, args: Any, kwargs: Any) -> Any:
        operands = self.operands(args, kwargs)
        if not _is_of_two(operands, kwargs):
            return NotImplemented
        a, b = operands
        if not isinstance(a, Tensor):
            # filled on the device: a copy from the host would wait for it, and a CUDA graph would not have it
            fills = isinstance(a, int | float) and torch._C._get_tracing_state() is None
            a = b.new_full((), a) if fills else torch.as_tensor(a, dtype=b.dtype, device=b.device)
        return module(a, b)


def _is_of_two(operands: list[Any], kwargs: Any) -> bool:
    if kwargs and (kwargs.get("alpha", 1) != 1 or kwargs.get("rounding_mode")):
        return False
    return len(operands) == 2


_SECOND = ("input", "other", "mat2", "tensor2", "exponent")


class Configured(Rule):
    """A function of one tensor, by the module of torch.nn with the same settings.

    Args:
        factory: the module's class.
        names: the settings in the order in which the function takes them after the tensor.
    """

    def __init__(self, factory: Callable[..., nn.Module], *names: str) -> None:
        self.factory = factory
        self.names = names

    def _settings(self, args: Any, kwargs: Any) -> dict[str, Any]:
        found = dict(zip(self.names, args[1:], strict=False)) if len(args) > 1 else {}
        for name, value in kwargs.items():
            if name in self.names:
                found[name] = value
        for name in _IGNORED:
            found.pop(name, None)
        return found

    def make(self, name: str, func: Any, args: Any, kwargs: Any) -> nn.Module | None:
        settings = self._settings(args, kwargs)
        if not _are_numbers(settings):
            return None
        made = self.factory(**settings)
        made.__dict__["_settings"] = settings
        return made

    def call(self, module: Any, args: Any, kwargs: Any) -> Any:
        if len(args) > 1 or kwargs:
            settings = self._settings(args, kwargs)
            if not _are_numbers(settings):
                return NotImplemented
            if settings != module.__dict__["_settings"]:  # one line of code called with something else this time
                self._set(module, settings)
                module.__dict__["_settings"] = settings
        return module(args[0] if args else kwargs["input"])

    def _set(self, module: Any, settings: dict[str, Any]) -> None:
        vars(module).update({key: vars(self.factory(**settings))[key] for key in settings})


def _are_numbers(settings: dict[str, Any]) -> bool:
    return not any(isinstance(value, Tensor) for value in settings.values()) if settings else True


_IGNORED = ("inplace", "_stacklevel", "dtype")


def _clip(min: float | None = None, max: float | None = None) -> nn.Module:
    largest = torch.finfo(torch.float32).max
    return _hardtanh(-largest if min is None else float(min), largest if max is None else float(max))


def _hardtanh(min_val: float = -1.0, max_val: float = 1.0) -> nn.Module:
    # by this class AIMET knows that the hardware computes it with the convolution before it
    return nn.ReLU6() if (min_val, max_val) == (0.0, 6.0) else nn.Hardtanh(min_val, max_val)


class Clip(Configured):
    """``clamp`` between numbers."""

    def _set(self, module: Any, settings: dict[str, Any]) -> None:
        wanted: Any = _clip(**settings)
        module.min_val, module.max_val = wanted.min_val, wanted.max_val


class Named(Rule):
    """AIMET's module of the same signature as the function."""

    def __init__(self, module: str) -> None:
        self.module = module

    def make(self, name: str, func: Any, args: Any, kwargs: Any) -> nn.Module | None:
        from lightning_quant.simulation.aimet import custom

        made: nn.Module = getattr(custom, self.module)()
        return made

    def call(self, module: Any, args: Any, kwargs: Any) -> Any:
        if "input" in kwargs:
            args, kwargs = (kwargs["input"], *args), {key: v for key, v in kwargs.items() if key != "input"}
        return module(*args, **kwargs)


class Padding(Named):
    """``F.pad``, told what it pads with: AIMET's exporter cannot read a Pad in front that leaves it out."""

    def call(self, module: Any, args: Any, kwargs: Any) -> Any:
        given = dict(zip(("input", "pad", "mode", "value"), args, strict=False)) | kwargs
        if given.get("mode", "constant") == "constant" and given.get("value") is None:
            given["value"] = 0.0
        return module(given.pop("input"), **given)


class Generic(Named):
    """A module made for the function, where AIMET has none: nothing stays in float for lack of an entry here."""

    def __init__(self) -> None:
        super().__init__("")

    def make(self, name: str, func: Any, args: Any, kwargs: Any) -> nn.Module | None:
        function = func
        if in_place(func, name):  # out of place, as every module computes
            plain = AUGMENTED.get(name, name)
            function = getattr(torch.Tensor, plain, None)
            if function is None:
                return None
        return generic_class(name, function)()


class Concatenation(Rule):
    """``cat`` of a list of tensors."""

    def make(self, name: str, func: Any, args: Any, kwargs: Any) -> nn.Module | None:
        from lightning_quant.simulation.aimet import custom

        made: nn.Module = custom.Concat(self._axis(args, kwargs))
        return made

    def operands(self, args: Any, kwargs: Any) -> list[Any]:
        return list(args[0] if args else kwargs["tensors"])

    def _axis(self, args: Any, kwargs: Any) -> int:
        return int(args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0)))

    def call(self, module: Any, args: Any, kwargs: Any) -> Any:
        module._axis = self._axis(args, kwargs)
        return module(*self.operands(args, kwargs))


class Weighted(Rule):
    """A function that takes weights: by the layer of torch.nn, which is lent the weights of each call.

    The layer never owns them. They stay parameters of the module that hands them over, or what it computes of its
    parameters: normalized, standardized, pruned. What is computed with is what is rounded.

    Args:
        names: the function's arguments in order.
        build: makes the layer, its parameters on the meta device.
    """

    def __init__(self, names: Sequence[str], build: Callable[[dict[str, Any]], nn.Module | None]) -> None:
        self.names = names
        self.build = build

    def bind(self, args: Any, kwargs: Any) -> dict[str, Any]:
        """The arguments by name."""
        return {**dict(zip(self.names, args, strict=False)), **kwargs}

    def make(self, name: str, func: Any, args: Any, kwargs: Any) -> nn.Module | None:
        bound = self.bind(args, kwargs)
        layer = self.build(bound)
        if layer is not None:
            for part in list(layer._parameters):
                del layer._parameters[part]
                layer.__dict__[part] = None
            layer.__dict__["_lent"] = ()
            layer.__dict__["_settings"] = _settings(bound)
            self._lend(layer, bound)
        return layer

    def _fits(self, module: Any, bound: dict[str, Any]) -> bool:
        settings = _settings(bound)
        return settings is not None and settings == module.__dict__["_settings"]

    def _lend(self, layer: Any, bound: dict[str, Any]) -> None:
        values = layer.__dict__
        for part in ("weight", "bias"):
            values[part] = bound.get(part)

    def call(self, module: Any, args: Any, kwargs: Any) -> Any:
        bound = self.bind(args, kwargs)
        return self._compute(module, bound) if self._fits(module, bound) else NotImplemented

    def _compute(self, module: Any, bound: dict[str, Any]) -> Any:
        values = module.__dict__
        if "weight" not in values:  # lent for good, while AIMET looks at it as at any layer
            return module(bound["input"])
        lent = bound.get("weight"), bound.get("bias")
        detached = tuple([None if one is None else one.detach() for one in lent])
        if not torch.is_grad_enabled():
            values["weight"], values["bias"] = detached
            return module(bound["input"])
        # without gradients a part of a parameter says that it has one, which hooks of PyTorch's do not take
        # nor as parameters: setting one on a module, as AIMET does for a moment, would register it there
        plain = [one.as_subclass(Tensor) if isinstance(one, nn.Parameter) else one for one in lent]
        values["weight"], values["bias"] = plain
        try:
            return module(bound["input"])
        finally:  # without the graph that computed them
            values["weight"], values["bias"] = detached


def _settings(bound: dict[str, Any]) -> dict[str, Any] | None:
    """What a function is called with beside its input and weights; ``None`` where tensors are among it.

    Of the axes that are normalized over the number alone: in a trace their sizes are tensors, and a layer refuses
    others than its own.
    """
    found: dict[str, Any] = {}
    for name, value in bound.items():
        if name == "normalized_shape":
            found[name] = len(value)
        elif isinstance(value, Tensor) and name not in ("input", "weight", "bias"):
            return None
        elif name not in ("input", "weight", "bias"):
            found[name] = tuple(value) if isinstance(value, list) else value
    return found


def _linear(bound: dict[str, Any]) -> nn.Module | None:
    outputs, inputs = bound["weight"].shape if bound["weight"].dim() == 2 else (0, 0)
    if not outputs:
        return None
    return nn.Linear(inputs, outputs, bound.get("bias") is not None, device="meta")


def _convolution(transposed: bool) -> Callable[[dict[str, Any]], nn.Module | None]:
    plain = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    turned = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

    def build(bound: dict[str, Any]) -> nn.Module | None:
        weight, groups = bound["weight"], bound.get("groups", 1)
        spatial = weight.dim() - 2
        if bound["input"].dim() != weight.dim():  # no batch
            return None
        settings = {key: bound[key] for key in ("stride", "padding", "dilation", "output_padding") if key in bound}
        channels = weight.shape[0], weight.shape[1] * groups
        factory: Any = (turned if transposed else plain)[spatial - 1]
        inputs, outputs = channels if transposed else channels[::-1]
        bias = bound.get("bias") is not None
        made: nn.Module = factory(
            inputs, outputs, tuple(weight.shape[2:]), groups=groups, bias=bias, device="meta", **settings
        )
        return made

    return build


def _layer_norm(bound: dict[str, Any]) -> nn.Module | None:
    affine = bound.get("weight") is not None
    bias = bound.get("bias") is not None
    return nn.LayerNorm(
        tuple(bound["normalized_shape"]), bound.get("eps", 1e-5), elementwise_affine=affine, bias=bias, device="meta"
    )


def _instance_norm(bound: dict[str, Any]) -> nn.Module | None:
    dimensions = bound["input"].dim() - 2
    if bound.get("running_mean") is not None or not 1 <= dimensions <= 3:
        return None
    channels = bound["input"].shape[1]
    factory = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[dimensions - 1]
    return factory(channels, bound.get("eps", 1e-5), affine=True, device="meta")


class InstanceNorm(Weighted):
    """``F.instance_norm``; the NPU computes with integers only where there is a weight and a bias."""

    def make(self, name: str, func: Any, args: Any, kwargs: Any) -> nn.Module | None:
        layer = super().make(name, func, args, kwargs)
        if layer is not None and super().bind(args, kwargs).get("weight") is None:
            layer.__dict__["_made_up"] = True
        return layer

    def bind(self, args: Any, kwargs: Any) -> dict[str, Any]:
        bound = super().bind(args, kwargs)
        channels, like = bound["input"].shape[1], {"dtype": bound["input"].dtype, "device": bound["input"].device}
        if bound.get("weight") is None:
            bound["weight"] = torch.ones(channels, **like)
        if bound.get("bias") is None:
            bound["bias"] = torch.zeros(channels, **like)
        return bound


def _batch_norm(bound: dict[str, Any]) -> nn.Module | None:
    if bound.get("running_mean") is None or bound.get("weight") is None or bound.get("bias") is None:
        return None
    dimensions = bound["input"].dim() - 2
    factory = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}.get(dimensions)
    if factory is None:
        return None
    return factory(bound["weight"].numel(), bound.get("eps", 1e-5), device="meta")


class BatchNorm(Weighted):
    """``F.batch_norm`` with weight and bias; its statistics are lent as well, and updated as the function does."""

    def make(self, name: str, func: Any, args: Any, kwargs: Any) -> nn.Module | None:
        layer = super().make(name, func, args, kwargs)
        if layer is not None:
            layer._buffers.clear()
            layer.__dict__["num_batches_tracked"] = None
            self._lend_statistics(layer, self.bind(args, kwargs))
        return layer

    def _lend_statistics(self, layer: Any, bound: dict[str, Any]) -> None:
        values = layer.__dict__
        for part in ("running_mean", "running_var"):
            values[part] = bound.get(part)
        for setting, default in (("training", False), ("momentum", 0.1), ("eps", 1e-5)):
            values[setting] = bound.get(setting, default)

    def _fits(self, module: Any, bound: dict[str, Any]) -> bool:
        return all(isinstance(bound.get(part), Tensor) for part in ("running_mean", "running_var", "weight", "bias"))

    def _compute(self, module: Any, bound: dict[str, Any]) -> Any:
        self._lend_statistics(module, bound)
        return super()._compute(module, bound)


def _prelu(bound: dict[str, Any]) -> nn.Module | None:
    return nn.PReLU(bound["weight"].numel(), device="meta")


_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_INSTANCE = ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")

RULES: dict[str, Rule] = {
    **dict.fromkeys(("add", "iadd"), Binary("Add")),
    **dict.fromkeys(("sub", "isub", "subtract"), Binary("Subtract")),
    **dict.fromkeys(("mul", "imul", "multiply"), Binary("Multiply")),
    **dict.fromkeys(("div", "truediv", "itruediv", "divide", "true_divide"), Binary("Divide")),
    **dict.fromkeys(("matmul", "bmm", "mm", "imatmul"), Binary("MatMul")),
    "radd": Binary("Add", swapped=True),
    "rsub": Binary("Subtract", swapped=True),
    "rmul": Binary("Multiply", swapped=True),
    "rtruediv": Binary("Divide", swapped=True),
    "rdiv": Binary("Divide", swapped=True),
    "rmatmul": Binary("MatMul", swapped=True),
    "maximum": Binary("Maximum"),
    "minimum": Binary("Minimum"),
    **dict.fromkeys(("cat", "concat", "concatenate"), Concatenation()),
    "softmax": Configured(nn.Softmax, "dim", "_stacklevel", "dtype"),
    "log_softmax": Configured(nn.LogSoftmax, "dim", "_stacklevel", "dtype"),
    "relu": Configured(nn.ReLU, "inplace"),
    "relu6": Configured(nn.ReLU6, "inplace"),
    "gelu": Configured(nn.GELU, "approximate"),
    "sigmoid": Configured(nn.Sigmoid),
    "tanh": Configured(nn.Tanh),
    "hardswish": Configured(nn.Hardswish, "inplace"),
    "hardsigmoid": Configured(nn.Hardsigmoid, "inplace"),
    "leaky_relu": Configured(nn.LeakyReLU, "negative_slope", "inplace"),
    "elu": Configured(nn.ELU, "alpha", "inplace"),
    "selu": Configured(nn.SELU, "inplace"),
    "softplus": Configured(nn.Softplus, "beta", "threshold"),
    "hardtanh": Configured(_hardtanh, "min_val", "max_val", "inplace"),
    "clamp": Clip(_clip, "min", "max"),
    "clip": Clip(_clip, "min", "max"),
    "clamp_min": Clip(_clip, "min"),
    "clamp_max": Clip(_clip, "max"),
    **{
        name: Named(module)
        for name, module in {
            "interpolate": "Interpolate",
            "avg_pool2d": "AvgPool2d",
            "max_pool2d": "MaxPool2d",
            "adaptive_avg_pool2d": "AdaptiveAvgPool2d",
            "mean": "Mean",
            "sum": "Sum",
            "pow": "Pow",
            "ipow": "Pow",
            "sqrt": "Sqrt",
            "exp": "Exponential",
            "log": "Log",
            "abs": "Abs",
            "neg": "Neg",
            "sin": "Sin",
            "cos": "Cos",
            "erf": "Erf",
            "amax": "AMax",
            "amin": "AMin",
            "cumsum": "CumSum",
            "norm": "Norm",
            "grid_sample": "GridSample",
            "square": "Square",
        }.items()
    },
    "pad": Padding("Pad"),
    "linear": Weighted(("input", "weight", "bias"), _linear),
    **{f"conv{d}d": Weighted(_CONVOLUTION, _convolution(transposed=False)) for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": Weighted(_TRANSPOSED, _convolution(transposed=True)) for d in (1, 2, 3)},
    "layer_norm": Weighted(("input", "normalized_shape", "weight", "bias", "eps"), _layer_norm),
    "instance_norm": InstanceNorm(_INSTANCE, _instance_norm),
    "batch_norm": BatchNorm(_BATCH_NORM, _batch_norm),
    "prelu": Weighted(("input", "weight"), _prelu),
}
GENERIC = Generic()

# Where a setting "inplace" stands among the arguments of functions that can be given it by position.
_INPLACE_AT = {
    name: 1 + rule.names.index("inplace")
    for name, rule in RULES.items()
    if isinstance(rule, Configured) and "inplace" in rule.names
}


def _inplace_by_position(name: str, args: Any) -> bool:
    at = _INPLACE_AT.get(name)
    return at is not None and len(args) > at and bool(args[at])


@functools.cache
def generic_class(name: str, function: Any) -> type[nn.Module]:
    """The module's class for a function that AIMET has none for, known to AIMET."""
    from lightning_quant.simulation.aimet import QuantizationMixin, create_wrapper_module

    plain: Any = create_wrapper_module("".join(part.title() for part in name.split("_")), function)
    plain.__module__ = __name__

    class Quantized(LaidOutAlike, QuantizationMixin, plain):
        """The function, its inputs and output quantized."""

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            args = tuple(
                quantizer(value) if quantizer is not None and _is_float(value) else value
                for value, quantizer in _paired(args, self.input_quantizers)
            )
            output = super(QuantizationMixin, self).forward(*args, **kwargs)
            quantizer = self.output_quantizers[0]
            return quantizer(output) if quantizer is not None and _is_float(output) else output

    Quantized.__name__ = Quantized.__qualname__ = f"Quantized{plain.__name__}"
    Quantized.made_by = (_quantized_generic, name, function)
    QuantizationMixin.implements(plain)(Quantized)
    return plain


def _quantized_generic(name: str, function: Any) -> Any:
    from lightning_quant.simulation.aimet import QuantizationMixin

    return QuantizationMixin.cls_to_qcls[generic_class(name, function)]


def _paired(args: Sequence[Any], quantizers: Sequence[Any]) -> list[tuple[Any, Any]]:
    known = list(quantizers)
    return [(value, known[index] if index < len(known) else None) for index, value in enumerate(args)]


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
