"""What a compiled graph takes as constant, and what a forward pass must leave as it was."""

from __future__ import annotations

import random
from collections.abc import Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_quant.simulation.callsites.attributes import BUFFERS, HIDDEN_SITES, SEEN, SITES

# Where a module keeps what is not the user's to set.
_OURS = (
    "_parameters",
    "_buffers",
    "_modules",
    SITES,
    SEEN,
    HIDDEN_SITES,
    BUFFERS,
    "_held_weight",
    "_is_ready",
)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
NOT_READ = frozenset((*vars(nn.Module()), *_OURS))
PLAIN = (bool, int, float, str, type(None))
# An attribute that is not there.
MISSING = object()


def call_key(value: Any) -> Any:
    """Return what a graph takes as constant of the arguments of a call: all but the values of tensors."""
    if isinstance(value, Tensor):
        strides = value.stride() if value.layout is torch.strided else ()
        return type(value), value.shape, strides, value.dtype, value.device, value.requires_grad
    if isinstance(value, (list, tuple)):
        return (type(value), *map(call_key, value))
    if isinstance(value, Mapping):
        return (type(value), *((key, call_key(one)) for key, one in value.items()))
    return (type(value), value) if type(value) in PLAIN else type(value)


def mode_key() -> Any:
    """Return what a graph takes as constant of the modes around a call: gradients, inference, autocast."""
    kinds = ("cpu", "cuda")
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in kinds),
    )


def constants_of(value: Any, inside: bool = False) -> Any:
    """Return what a graph takes as constant of an attribute: numbers, and what consists of them."""
    kind = type(value)
    if kind in PLAIN:
        return value
    if kind is list or kind is tuple:
        return tuple([constants_of(one, inside) for one in value])
    if kind is dict:
        return tuple([(key, constants_of(one, inside)) for key, one in value.items() if type(key) in PLAIN])
    if inside or not hasattr(value, "__dict__") or isinstance(value, _NOT_LOOKED_INTO):
        return None
    if kind.__module__.partition(".")[0] in _NOT_OF_USERS:
        return None
    return constants_of(vars(value), inside=True)  # an object of the user's own, such as a configuration


_NOT_LOOKED_INTO = (nn.Module, type, ModuleType, FunctionType, MethodType)
_NOT_OF_USERS = ("torch", "aimet_torch", "lightning_quant", "functools")


def number_names(module: nn.Module) -> list[str]:
    """Return the names of the attributes of a module that are numbers or strings."""
    return [name for name, value in vars(module).items() if type(value) in PLAIN and name not in _OURS]


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module, one level of containers copied."""
    kept = {}
    for key, value in vars(module).items():
        if key not in _OURS and key not in HOOKS:
            kept[key] = value.copy() if type(value) in (list, dict, set) else value
    return kept


def snapshot(modules: Mapping[str, nn.Module]) -> dict[str, dict[str, Any]]:
    """Return the attributes of modules by name, for :func:`restore`."""
    return {name: attributes_of(module) for name, module in modules.items()}


def restore(modules: Mapping[str, nn.Module], before: Mapping[str, dict[str, Any]]) -> None:
    """Set the attributes of modules to what they were."""
    for name, module in modules.items():
        now = attributes_of(module)
        for key in now.keys() - before[name].keys():
            del vars(module)[key]
        for key, value in before[name].items():
            if not is_same(value, now.get(key, MISSING)):
                vars(module)[key] = value


def is_same(one: Any, other: Any) -> bool:
    """Return whether two values of an attribute are the same: the object, or equal numbers and containers of them."""
    if type(one) is not type(other):
        return False
    if type(one) is dict:
        return one.keys() == other.keys() and all(is_same(value, other[key]) for key, value in one.items())
    if type(one) is list:
        return len(one) == len(other) and all(map(is_same, one, other))
    if type(one) is set:
        return bool(one == other)
    return one is other or (type(one) in PLAIN and one == other)


def random_states() -> tuple[Any, Any]:
    """Return the states of the random numbers of Python and NumPy."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return random.getstate(), (kind, keys.tobytes(), *rest)  # type: ignore[union-attr]
