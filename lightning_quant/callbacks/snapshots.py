"""What a single value holds, noted: each function returns what restores it, in the object that it is."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy
import torch

Restore = Callable[[], object]


def of_dict(value: dict[Any, Any]) -> Restore:
    """Note the entries of a dictionary, in their order."""
    return partial(_refill_dict, value, dict(value))


def of_collection(value: Any) -> Restore:
    """Note what a list, a set or a deque holds."""
    return partial(_refill, value, list(value))


def of_state(value: Any) -> Restore | None:
    """Note the numbers of a NumPy array or the state of a random generator; ``None`` for anything else."""
    if isinstance(value, numpy.ndarray):
        return partial(_refill_array, value, value.copy()) if value.flags.writeable else None
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if isinstance(value, numpy.random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if isinstance(value, numpy.random.RandomState):
        return partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    return None


def _refill_dict(value: dict[Any, Any], before: dict[Any, Any]) -> None:
    pairs = zip(value.items(), before.items(), strict=False)
    if len(value) != len(before) or any(a[0] is not b[0] or a[1] is not b[1] for a, b in pairs):
        value.clear()
        value.update(before)


def _refill(value: Any, before: list[Any]) -> None:
    if len(value) != len(before) or any(a is not b for a, b in zip(value, before, strict=False)):
        value.clear()
        (value.update if isinstance(value, set) else value.extend)(before)


def _refill_array(value: Any, before: Any) -> None:
    if value.flags.writeable and value.shape == before.shape:
        value[...] = before
