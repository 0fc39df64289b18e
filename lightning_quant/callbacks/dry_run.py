"""Run a user's step without side effects: a step that is run for calibration must not train.

A step updates teachers, counters, queues and metrics before and after it calls the network. So all that the
LightningModule holds is noted before the step and restored after it. Files are not.
"""

from __future__ import annotations

import argparse
import sys
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from lightning_quant.callbacks.lightning_internals import set_device
from lightning_quant.callbacks.lightning_packages import either
from lightning_quant.callbacks.snapshots import Restore, of_collection, of_dict, of_state
from lightning_quant.utilities.modules import preserve_modes

# Objects of these packages are left alone, except modules: Trainers, loggers, data sets, optimizers.
_CLOSED = frozenset({"torch", "lightning", "lightning_fabric", "pytorch_lightning", "aimet_torch", "lightning_quant"})
_PLAIN = frozenset(
    {type(None), bool, int, float, complex, str, bytes, type, types.FunctionType, torch.dtype, torch.device}
)
_DICTS = frozenset({dict, OrderedDict, defaultdict})
_NAMESPACES = (types.SimpleNamespace, argparse.Namespace)
# A larger container gets its items back, but what each of them holds is not looked into.
_MANY = 10_000


@contextmanager
def dry_run(
    trainer: pl.Trainer, module: pl.LightningModule, network: nn.Module, batch: Any, to_its_end: bool
) -> Iterator[None]:
    """Run a step in a block as validation would, without side effects.

    The module is in eval mode, on the device of its parameters; logging, backward passes, optimizers and schedulers
    do nothing. At the end, attributes, items of containers, parameters, buffers, gradients, metric states and random
    number generators of the module, of what it holds and of the batch are restored, and so are the attributes of the
    Trainer. Of the network, modes, hooks, gradients and weights are restored, but not attributes: what a step sets
    there before a call is needed when that call is made again.

    Args:
        trainer: the Trainer; its loggers get nothing.
        module: the module whose step is run.
        network: the network in it.
        batch: what the step is given.
        to_its_end: whether the step runs past its calls of the network, where it may change the weights.
    """
    shallow = [vars(trainer), vars(trainer.strategy)]
    restoring = _restoring([module, batch], shallow, network, to_its_end)
    with torch.no_grad(), preserve_modes(network), restoring, _NoBackward():
        module.eval()
        _quiet(trainer, module)
        yield


def _quiet(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Disable what the module does to the outside; all of it is restored with its other attributes."""
    trainer.loggers = [DummyLogger() for _ in trainer.loggers]
    device = next((p.device for p in module.parameters() if not p.is_meta), module.device)
    set_device(module, device)
    part: Any
    for part in module.modules():
        if isinstance(part, either(pl.LightningModule)):
            part.log = lambda *_, **__: None  # type: ignore[method-assign]
            part.manual_backward = lambda *_, **__: None  # type: ignore[method-assign]
            for name in ("optimizers", "lr_schedulers"):
                setattr(part, name, partial(_inert, getattr(part, name)))


def _inert(ask: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    found = ask(*args, **kwargs)
    if isinstance(found, (list, tuple)):
        return [_InertOptimizer(one) for one in found]
    return None if found is None else _InertOptimizer(found)


class _InertOptimizer:
    """An optimizer or scheduler whose attributes can be read, and that takes no step."""

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
    """Disable ``loss.backward()``: there is no graph."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return None if func is Tensor.backward else func(*args, **(kwargs or {}))


@contextmanager
def _restoring(held: list[Any], shallow: list[dict[str, Any]], network: nn.Module, values: bool) -> Iterator[None]:
    """Restore afterwards all that is reached from ``held``, and the entries of the dictionaries in ``shallow``."""
    undo: list[Restore] = [of_dict(mapping) for mapping in shallow]
    parts = list(network.modules())
    undo += [of_dict(hooks) for part in parts for hooks in (part._forward_pre_hooks, part._forward_hooks)]
    tensors = [*network.parameters(), *network.buffers()]
    undo += [restore for tensor in tensors for restore in _of_tensor(tensor, values)]
    # the objects too, which keeps their ids from being reused
    known: dict[int, Any] = {id(value): value for value in (*parts, *tensors)}
    waiting = list(held)
    while waiting:
        value = waiting.pop()
        # thousands of these in every network: the cheap tests first
        if type(value) in _PLAIN or id(value) in known:
            continue
        known[id(value)] = value
        if isinstance(value, nn.Module):
            waiting.append(value.__dict__)
        elif isinstance(value, dict):
            undo.append(of_dict(value))
            if 0 < len(value) <= _MANY:
                _replace_inference_tensors(value, value.items())
                waiting += value.values()
            if type(value) not in _DICTS and _is_open(value):
                waiting.append(vars(value))
        elif isinstance(value, (list, tuple, deque, set)):
            if not isinstance(value, tuple):
                undo.append(of_collection(value))
            if len(value) <= _MANY and not isinstance(value, set):
                if not isinstance(value, tuple):
                    _replace_inference_tensors(value, enumerate(value))
                waiting += value
        elif _is_open(value):
            waiting.append(vars(value))
        elif isinstance(value, Tensor):
            undo += _of_tensor(value)
        elif (restore := of_state(value)) is not None:
            undo.append(restore)
    try:
        yield
    finally:
        for restore in undo:
            restore()


def _replace_inference_tensors(holder: Any, items: Iterable[tuple[Any, Any]]) -> None:
    """Replace tensors made in inference mode by copies that a step can update, such as metrics of a validation."""
    if not torch.is_inference_mode_enabled():
        for key, one in items:
            if type(one) is Tensor and one.is_inference():
                holder[key] = one.clone()


def _is_open(value: Any) -> bool:
    """Whether a value is an object of the user's, whose attributes are restored one by one."""
    if isinstance(value, _NAMESPACES):
        return True
    if not hasattr(value, "__dict__") or isinstance(value, (Tensor, type, types.ModuleType, types.FunctionType)):
        return False
    packages = {base.__module__.partition(".")[0] for base in type(value).__mro__}
    return type(value).__module__.partition(".")[0] not in sys.stdlib_module_names and not packages & _CLOSED


def _of_tensor(tensor: Tensor, values: bool = True) -> list[Restore]:
    if is_lazy(tensor) or tensor.is_meta or tensor.layout is not torch.strided:
        return []
    actions: list[Restore] = []
    if values:
        actions.append(partial(_restore, tensor, tensor.detach(), tensor.detach().clone()))
    if tensor.is_leaf and not tensor.is_inference():
        actions.append(partial(_restore_grad, tensor, tensor.requires_grad, tensor.grad))
        tensor.grad = None  # an optimizer that the module keeps for itself has nothing to go by
    return actions


def _restore(tensor: Tensor, memory: Tensor, values: Tensor) -> None:
    """Restore the memory and the values of a tensor."""
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        if tensor.data_ptr() != memory.data_ptr() or tensor.shape != memory.shape:
            tensor.data = memory  # somebody wrote tensor.data = …
        if not torch.equal(tensor, values):
            tensor.copy_(values)


def _restore_grad(tensor: Tensor, requires_grad: bool, grad: Tensor | None) -> None:
    if tensor.requires_grad != requires_grad:
        tensor.requires_grad_(requires_grad)
    tensor.grad = grad
