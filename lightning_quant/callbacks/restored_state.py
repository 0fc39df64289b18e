"""What a validation leaves behind in the user's objects, put back: metrics that remember, best values, counters."""

from __future__ import annotations

import argparse
import datetime
import random
import re
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from functools import partial
from pathlib import PurePath
from typing import Any

import lightning.pytorch as pl
import numpy
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_quant.callbacks.lightning_internals import attributes_of_lightning
from lightning_quant.callbacks.lightning_packages import either

_VALUES = (
    *(bool, int, float, complex, str, bytes, type(None), type, Enum, PurePath, range, re.Pattern),
    *(datetime.date, datetime.time, datetime.timedelta, Decimal, Fraction),
    *(torch.dtype, torch.device, torch.Size, numpy.generic, numpy.dtype),
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodType, partial),
)
_DATA = (Dataset, DataLoader, Sampler)  # large, and not what validation writes to
_RUNNING = (*either(pl.Trainer), *_DATA)
_STATES = (Tensor, numpy.ndarray, torch.Generator, numpy.random.Generator, numpy.random.RandomState, random.Random)


@contextmanager
def restored_state(roots: Iterable[Any], apart: nn.Module) -> Iterator[None]:
    """Put attributes back as they were before a block: numbers, tensors, arrays, containers, metrics, generators.

    Objects stay the same ones, and so do those that they refer to: what changed is set back in place. Parameters, data
    sets and objects that hold more than data (files, runs of a logger) are left alone.

    Args:
        roots: objects whose attributes may change, e.g. a LightningModule and callbacks.
        apart: a module inside that is left alone.
    """
    put_back = _remember(roots, apart)
    try:
        yield
    finally:
        with torch.inference_mode():  # in which tensors made in it can be written to
            for restore in put_back:
                restore()


def _remember(roots: Iterable[Any], apart: nn.Module) -> list[Callable[[], object]]:
    """How to put back everything that can be reached."""
    seen: dict[int, Any] = {id(module): module for module in apart.modules()}
    left = list(roots)
    given = {id(root) for root in left}
    found: list[Callable[[], object]] = []
    while left:
        value = left.pop()
        if id(value) in seen or isinstance(value, (*_VALUES, *_DATA)) or _trained(value):
            continue
        seen[id(value)] = value  # which also keeps it alive, so that its id stays its own
        if isinstance(value, (tuple, frozenset)):
            left.extend(value)
        elif isinstance(value, dict):
            left.extend(value.values())
            found.append(_dictionary(value))
        elif isinstance(value, (list, set, deque)):
            left.extend(value)
            found.append(_collection(value))
        elif (restore := _state_of(value)) is not None:
            found.append(restore)
        elif id(value) in given or isinstance(value, nn.Module) or _is_data(value):
            skipped = attributes_of_lightning(value)
            own = {name: held for name, held in vars(value).items() if name not in skipped}
            left.extend(own.values())
            found.append(_attributes(value, own, skipped))
    return found


def _trained(value: Any) -> bool:
    return isinstance(value, Tensor) and (isinstance(value, nn.Parameter) or value.requires_grad)


def _is_data(value: Any) -> bool:
    """Whether an object consists of data alone, through and through."""
    seen: dict[int, Any] = {}
    left = [value]
    while left:
        part = left.pop()
        if id(part) in seen or isinstance(part, (*_VALUES, *_STATES, nn.Module)):
            continue
        seen[id(part)] = part
        if isinstance(part, dict):
            left.extend(part.values())
        elif isinstance(part, (list, tuple, set, frozenset, deque)):
            left.extend(part)
        elif not getattr(part, "__dict__", None) or isinstance(part, _RUNNING) or _is_pythons(part):
            return False
        else:
            left.extend(vars(part).values())
    return True


def _is_pythons(value: Any) -> bool:
    """Whether an object is of a class of Python's own that does something: files, threads, loggers."""
    module = type(value).__module__.partition(".")[0]
    return module in sys.stdlib_module_names and not isinstance(value, (types.SimpleNamespace, argparse.Namespace))


def _dictionary(value: dict[Any, Any]) -> Callable[[], None]:
    items = list(value.items())

    def restore() -> None:
        if not _same([part for item in items for part in item], [part for item in value.items() for part in item]):
            value.clear()
            setting = value.__setitem__  # update() would take the items for entries to count in a Counter
            for item in items:
                setting(*item)

    return restore


def _collection(value: Any) -> Callable[[], None]:
    held = list(value)

    def restore() -> None:
        if not _same(held, list(value)):
            value.clear()
            (value.update if isinstance(value, set) else value.extend)(held)

    return restore


def _attributes(value: Any, own: dict[str, Any], skipped: frozenset[str]) -> Callable[[], None]:
    def restore() -> None:
        attributes = vars(value)  # past any __setattr__
        for name in attributes.keys() - own.keys() - skipped:
            del attributes[name]
        attributes.update(own)

    return restore


def _state_of(value: Any) -> Callable[[], object] | None:
    """How to put back what is no container, if it is known."""
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, numpy.ndarray):
        return _array(value)
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if isinstance(value, numpy.random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if isinstance(value, numpy.random.RandomState):
        return partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    return None


def _tensor(value: Tensor) -> Callable[[], None]:
    copy = value.detach().clone()

    def restore() -> None:
        if value.shape != copy.shape or value.dtype != copy.dtype or value.device != copy.device:
            value.data = copy
        elif not torch.equal(value, copy):
            value.copy_(copy)

    return restore


def _array(value: Any) -> Callable[[], None]:
    copy = value.copy()

    def restore() -> None:
        if value.flags.writeable and value.shape == copy.shape:
            value[...] = copy

    return restore


def _same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))
