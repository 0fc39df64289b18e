"""What a rule is, and the rules for functions that AIMET or ``torch.nn`` has a module for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_quant.simulation.callsites.traces import tracing_state


class Rule(ABC):
    """How one kind of function becomes a module, and how the module is called."""

    @abstractmethod
    def make(self, name: str, func: Any, args: Any, kwargs: Any) -> nn.Module | None:
        """Return the module for a call, or ``None`` if the rule does not fit; the generic one is used then."""

    def call(self, module: Any, args: Any, kwargs: Any) -> Any:
        """Compute with the module, or return ``NotImplemented`` if it computes something else than was called."""
        return module(*args, **kwargs)

    def operands(self, args: Any, kwargs: Any) -> list[Any]:
        """Return the module's positional inputs, among which constants need quantizers."""
        return []


class Binary(Rule):
    """Arithmetic of two operands, by AIMET's module."""

    def __init__(self, module: str, swapped: bool = False) -> None:
        self.module = module
        self.swapped = swapped

    @override
    def make(self, name: str, func: Any, args: Any, kwargs: Any) -> nn.Module | None:
        from lightning_quant.simulation.aimet import custom

        if not _is_of_two(self.operands(args, kwargs), kwargs):
            return None
        made: nn.Module = getattr(custom, self.module)()
        return made

    @override
    def operands(self, args: Any, kwargs: Any) -> list[Any]:
        found = list(args[:2])
        if kwargs:
            found += [value for key, value in kwargs.items() if key in _SECOND]
        return found[::-1] if self.swapped else found

    @override
    def call(self, module: Any, args: Any, kwargs: Any) -> Any:
        operands = self.operands(args, kwargs)
        if not _is_of_two(operands, kwargs):
            return NotImplemented
        a, b = operands
        if not isinstance(a, Tensor):
            # filled on the device: a copy from the host would wait for it, and a CUDA graph would not have it
            fills = isinstance(a, int | float) and tracing_state() is None
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

    @override
    def make(self, name: str, func: Any, args: Any, kwargs: Any) -> nn.Module | None:
        settings = self._settings(args, kwargs)
        if not _are_numbers(settings):
            return None
        made = self.factory(**settings)
        made.__dict__["_settings"] = settings
        return made

    @override
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


def clip(min: float | None = None, max: float | None = None) -> nn.Module:
    """Make the module for a ``clamp`` between numbers, either of which can be missing."""
    largest = torch.finfo(torch.float32).max
    return hardtanh(-largest if min is None else float(min), largest if max is None else float(max))


def hardtanh(min_val: float = -1.0, max_val: float = 1.0) -> nn.Module:
    """Make the module for ``F.hardtanh``."""
    # by this class AIMET knows that the hardware computes it with the convolution before it
    return nn.ReLU6() if (min_val, max_val) == (0.0, 6.0) else nn.Hardtanh(min_val, max_val)


class Clip(Configured):
    """``clamp`` between numbers."""

    def _set(self, module: Any, settings: dict[str, Any]) -> None:
        wanted: Any = clip(**settings)
        module.min_val, module.max_val = wanted.min_val, wanted.max_val


class Named(Rule):
    """AIMET's module of the same signature as the function.

    Args:
        module: its name.
        tensors: how many of its first arguments are tensors, any of which may be constant.
    """

    def __init__(self, module: str, tensors: int = 0) -> None:
        self.module = module
        self.tensors = tensors

    @override
    def make(self, name: str, func: Any, args: Any, kwargs: Any) -> nn.Module | None:
        from lightning_quant.simulation.aimet import custom

        made: nn.Module = getattr(custom, self.module)()
        return made

    @override
    def operands(self, args: Any, kwargs: Any) -> list[Any]:
        return list(args[: self.tensors])

    @override
    def call(self, module: Any, args: Any, kwargs: Any) -> Any:
        if "input" in kwargs:
            args, kwargs = (kwargs["input"], *args), {key: v for key, v in kwargs.items() if key != "input"}
        return module(*args, **kwargs)


class Padding(Named):
    """``F.pad`` with an explicit value: AIMET's exporter cannot read a Pad at the start of a graph without one."""

    @override
    def call(self, module: Any, args: Any, kwargs: Any) -> Any:
        given = dict(zip(("input", "pad", "mode", "value"), args, strict=False)) | kwargs
        if given.get("mode", "constant") == "constant" and given.get("value") is None:
            given["value"] = 0.0
        return module(given.pop("input"), **given)


class Concatenation(Rule):
    """``cat`` of a list of tensors."""

    @override
    def make(self, name: str, func: Any, args: Any, kwargs: Any) -> nn.Module | None:
        from lightning_quant.simulation.aimet import custom

        made: nn.Module = custom.Concat(self._axis(args, kwargs))
        return made

    @override
    def operands(self, args: Any, kwargs: Any) -> list[Any]:
        return list(args[0] if args else kwargs["tensors"])

    def _axis(self, args: Any, kwargs: Any) -> int:
        return int(args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0)))

    @override
    def call(self, module: Any, args: Any, kwargs: Any) -> Any:
        module._axis = self._axis(args, kwargs)
        return module(*self.operands(args, kwargs))
