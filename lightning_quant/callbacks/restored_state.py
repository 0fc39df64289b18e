"""Restore what a validation changes in the user's objects: metrics that accumulate, best values, counters."""

from __future__ import annotations

import argparse
import datetime
import random
import re
import sys
import types
from collections import deque
from collections.abc import Iterable, Iterator
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
from lightning_quant.callbacks.snapshots import Restore, of_collection, of_dict, of_state

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
    """Restore attributes after a block: numbers, tensors, arrays, containers, metrics, generators.

    Objects keep their identity, and so do those that they refer to: what changed is restored in place. Parameters, data
    sets and objects that hold more than data (files, runs of a logger) are left alone.

    Args:
        roots: objects whose attributes may change, e.g. a LightningModule and callbacks.
        apart: a module inside that is left alone.
    """
    restores = _remember(roots, apart)
    try:
        yield
    finally:
        with torch.inference_mode():  # in which tensors made in it can be written to
            for restore in restores:
                restore()


def _remember(roots: Iterable[Any], apart: nn.Module) -> list[Restore]:
    """Return what restores everything that can be reached."""
    seen: dict[int, Any] = {id(module): module for module in apart.modules()}
    left = list(roots)
    given = {id(root) for root in left}
    found: list[Restore] = []
    while left:
        value = left.pop()
        if id(value) in seen or isinstance(value, (*_VALUES, *_DATA)) or _trained(value):
            continue
        seen[id(value)] = value  # which also keeps it alive, so that its id stays its own
        if isinstance(value, (tuple, frozenset)):
            left.extend(value)
        elif isinstance(value, dict):
            left.extend(value.values())
            found.append(of_dict(value))
        elif isinstance(value, (list, set, deque)):
            left.extend(value)
            found.append(of_collection(value))
        elif isinstance(value, Tensor):
            found.append(_tensor(value))
        elif (restore := of_state(value)) is not None:
            found.append(restore)
        elif not isinstance(value, _STATES) and (id(value) in given or isinstance(value, nn.Module) or _is_data(value)):
            skipped = attributes_of_lightning(value)
            own = {name: held for name, held in vars(value).items() if name not in skipped}
            left.extend(own.values())
            found.append(_attributes(value, own, skipped))
    return found


def _trained(value: Any) -> bool:
    return isinstance(value, Tensor) and (isinstance(value, nn.Parameter) or value.requires_grad)


def _is_data(value: Any) -> bool:
    """Whether an object holds nothing but data, in all its parts."""
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
    """Whether an object is of the standard library and holds a resource: files, threads, loggers."""
    module = type(value).__module__.partition(".")[0]
    return module in sys.stdlib_module_names and not isinstance(value, (types.SimpleNamespace, argparse.Namespace))


def _attributes(value: Any, own: dict[str, Any], skipped: frozenset[str]) -> Restore:
    def restore() -> None:
        attributes = vars(value)  # past any __setattr__
        for name in attributes.keys() - own.keys() - skipped:
            del attributes[name]
        attributes.update(own)

    return restore


def _tensor(value: Tensor) -> Restore:
    copy = value.detach().clone()

    def restore() -> None:
        if value.shape != copy.shape or value.dtype != copy.dtype or value.device != copy.device:
            value.data = copy
        elif not torch.equal(value, copy):
            value.copy_(copy)

    return restore
