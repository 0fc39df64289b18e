"""Nothing that a step of the user's changes stays changed: running one for calibration is no training.

A step updates teachers, counters, queues and metrics before and after it calls the network. All that the
LightningModule holds is therefore noted before the step and put back after it. Files are beyond that.
"""

from __future__ import annotations

import argparse
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.device_dtype_mixin import _DeviceDtypeModuleMixin
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

# Objects of these packages keep to themselves, but for modules: trainers, loggers, data sets, optimizers.
_CLOSED = frozenset({"torch", "lightning", "lightning_fabric", "pytorch_lightning", "aimet_torch", "lightning_quant"})
_NAMESPACES = (types.SimpleNamespace, argparse.Namespace)
# Of a larger container the contents are put back, what each of them holds is not.
_MANY = 10_000


@contextmanager
def untouched(trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Iterator[None]:
    """Run a step in this block as validation would, without a trace.

    The module is in eval mode where its parameters are; logging, backward passes, optimizers and schedulers do
    nothing. At the end, attributes, contents of containers, parameters, buffers, gradients, metric states and
    random number generators of the module, of what it holds and of the batch are what they were, and so are the
    attributes of the Trainer.

    Args:
        trainer: whose loggers are not to hear of it.
        module: whose step is run.
        batch: what the step is given.
    """
    with torch.no_grad(), _put_back([module, batch], shallow=[vars(trainer), vars(trainer.strategy)]), _NoBackward():
        module.eval()
        _quiet(trainer, module)
        yield


def _quiet(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Let what the module does to the outside do nothing; all of it is put back with its other attributes."""
    trainer.loggers = [DummyLogger() for _ in trainer.loggers]
    device = next((p.device for p in module.parameters() if not p.is_meta), module.device)
    part: Any
    for part in module.modules():
        if isinstance(part, _DeviceDtypeModuleMixin):
            part._device = device  # in setup() Lightning tells where it will be
        if isinstance(part, pl.LightningModule):
            part.log = lambda *_, **__: None  # type: ignore[method-assign]
            part.manual_backward = lambda *_, **__: None  # type: ignore[method-assign]
            for name in ("optimizers", "lr_schedulers"):
                setattr(part, name, partial(_idle, getattr(part, name)))


def _idle(ask: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    found = ask(*args, **kwargs)
    if isinstance(found, (list, tuple)):
        return [_Idle(one) for one in found]
    return None if found is None else _Idle(found)


class _Idle:
    """An optimizer or scheduler that can be asked everything, and takes no step."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def step(self, *args: Any, closure: Callable[[], Any] | None = None, **_: Any) -> Any:
        closure = closure or next((one for one in args if callable(one)), None)
        return None if closure is None else closure()

    def zero_grad(self, *_: Any, **__: Any) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class _NoBackward(TorchFunctionMode):
    """``loss.backward()`` does nothing: there is no graph, and nothing is to be learned."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return None if func is Tensor.backward else func(*args, **(kwargs or {}))


@contextmanager
def _put_back(held: list[Any], shallow: list[dict[str, Any]]) -> Iterator[None]:
    """Afterwards, what is reached from ``held`` is what it was, and ``shallow`` have their old entries."""
    undo: list[Callable[[], None]] = [partial(_refill, mapping, dict(mapping)) for mapping in shallow]
    known: dict[int, Any] = {}  # the objects too, lest another one gets the number of one that is gone
    waiting = list(held)
    while waiting:
        value = waiting.pop()
        if id(value) not in known:
            known[id(value)] = value
            action, inside = _hold(value)
            undo += action
            waiting += inside
    try:
        yield
    finally:
        for action in undo:
            action()


def _hold(value: Any) -> tuple[list[Callable[[], None]], list[Any]]:
    """How to put one value back, and the values it holds."""
    if isinstance(value, Tensor):
        return _hold_tensor(value), []
    if isinstance(value, np.ndarray):
        return [partial(_refill_array, value, value.copy())] if value.flags.writeable else [], []
    if isinstance(value, torch.Generator):
        return [partial(value.set_state, value.get_state())], []
    if isinstance(value, random.Random):
        return [partial(value.setstate, value.getstate())], []
    if isinstance(value, np.random.Generator):
        return [partial(setattr, value.bit_generator, "state", value.bit_generator.state)], []
    actions: list[Callable[[], None]] = []
    inside: list[Any] = []
    if isinstance(value, dict):
        actions.append(partial(_refill, value, dict(value)))
        inside = list(value.values())
    elif isinstance(value, (list, deque, set)):
        actions.append(partial(_refill_all, value, list(value)))
        inside = [] if isinstance(value, set) else list(value)
    elif isinstance(value, tuple):
        inside = list(value)
    if len(inside) > _MANY:
        inside = []
    if _is_open(value):
        inside.append(vars(value))
    return actions, inside


def _is_open(value: Any) -> bool:
    """Whether it is an object of the user's, with attributes of its own."""
    if isinstance(value, (nn.Module, *_NAMESPACES)):
        return True
    if not hasattr(value, "__dict__") or isinstance(value, (type, types.ModuleType, types.FunctionType)):
        return False
    packages = {base.__module__.partition(".")[0] for base in type(value).__mro__}
    return type(value).__module__.partition(".")[0] not in sys.stdlib_module_names and not packages & _CLOSED


def _hold_tensor(tensor: Tensor) -> list[Callable[[], None]]:
    if is_lazy(tensor) or tensor.is_meta or tensor.layout is not torch.strided:
        return []
    actions: list[Callable[[], None]] = [partial(_restore, tensor, tensor.detach(), tensor.detach().clone())]
    if tensor.is_leaf and not tensor.is_inference():
        actions.append(partial(_restore_grad, tensor, tensor.requires_grad, tensor.grad))
        tensor.grad = None  # an optimizer that the module keeps for itself has nothing to go by
    return actions


def _restore(tensor: Tensor, memory: Tensor, values: Tensor) -> None:
    """Give a tensor the memory and the values it had."""
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        if tensor.data_ptr() != memory.data_ptr() or tensor.shape != memory.shape:
            tensor.data = memory  # somebody wrote tensor.data = …
        if not torch.equal(tensor, values):
            tensor.copy_(values)


def _restore_grad(tensor: Tensor, requires_grad: bool, grad: Tensor | None) -> None:
    if tensor.requires_grad != requires_grad:
        tensor.requires_grad_(requires_grad)
    tensor.grad = grad


def _refill(mapping: MutableMapping[Any, Any], before: dict[Any, Any]) -> None:
    pairs = zip(mapping.items(), before.items(), strict=False)
    if len(mapping) != len(before) or any(a[0] is not b[0] or a[1] is not b[1] for a, b in pairs):
        mapping.clear()
        mapping.update(before)


def _refill_all(container: Any, before: list[Any]) -> None:
    if len(container) != len(before) or any(a is not b for a, b in zip(container, before, strict=False)):
        container.clear()
        container.update(before) if isinstance(container, set) else container.extend(before)


def _refill_array(array: Any, before: Any) -> None:
    array[...] = before
