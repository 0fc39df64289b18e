"""Schedulers that see an optimizer as the user made it, without the groups of the ranges."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

# How deep in a user's containers and objects schedulers are looked for.
_DEEPEST = 4
# Whose objects keep no schedulers of a user.
_LIBRARIES = frozenset(("builtins", "lightning", "pytorch_lightning", "torch", "torchmetrics", "lightning_quant"))


def show_as_given(holders: Iterable[Any], optimizer: Optimizer, given: Callable[[dict[str, Any]], bool]) -> None:
    """Let schedulers see only those groups of ``optimizer`` that were there when they were made.

    A scheduler keeps something for each group that it saw, and each kind of scheduler elsewhere: a group that is added
    later is ignored by one and makes another raise.

    Args:
        holders: schedulers, including those that hold others; anything else is skipped.
        optimizer: the optimizer that they drive.
        given: tells whether a group is one of the user's.
    """
    _replace(holders, optimizer, given, set(), _DEEPEST)


def _as_given(optimizer: Optimizer, given: Callable[[dict[str, Any]], bool]) -> Any:
    """Return a view of the same optimizer, attribute by attribute, that shows the given groups only."""
    kind: Any = type(optimizer)

    class AsGiven(kind):
        @property
        def param_groups(self) -> list[dict[str, Any]]:
            return [group for group in optimizer.param_groups if given(group)]

        @param_groups.setter
        def param_groups(self, groups: list[dict[str, Any]]) -> None:
            optimizer.param_groups = [*groups, *(group for group in optimizer.param_groups if not given(group))]

        def add_param_group(self, param_group: dict[str, Any]) -> None:
            optimizer.add_param_group(param_group)

        def __eq__(self, other: object) -> bool:  # callbacks look for a scheduler's optimizer among the Trainer's
            return other is self or other is optimizer or optimizer.__eq__(other) is True

        def __hash__(self) -> int:
            return hash(optimizer)

        def __reduce_ex__(self, protocol: Any) -> Any:  # a copy is a copy of the optimizer
            return optimizer.__reduce_ex__(protocol)

    AsGiven.__name__, AsGiven.__qualname__, AsGiven.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    view = object.__new__(AsGiven)
    view.__dict__ = optimizer.__dict__
    return view


def _replace(
    holders: Iterable[Any], optimizer: Optimizer, given: Callable[[dict[str, Any]], bool], seen: set[int], depth: int
) -> None:
    for holder in holders:
        if id(holder) in seen:
            continue
        if not is_scheduler_of(holder, optimizer):
            if depth and (held := _held_by(holder)) is not None:
                seen.add(id(holder))
                _replace(held, optimizer, given, seen, depth - 1)
            continue
        seen.add(id(holder))
        for name, value in list(vars(holder).items()):
            if _shows(value, optimizer):
                vars(holder)[name] = _as_given(value, given)
            elif isinstance(value, dict):
                _replace(value.values(), optimizer, given, seen, depth)
            else:
                _replace(value if isinstance(value, (list, tuple)) else [value], optimizer, given, seen, depth)


def _held_by(value: Any) -> Iterable[Any] | None:
    """Return what a container holds, or an object of the user's own that may keep schedulers; ``None`` for others."""
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple)):
        return value
    is_plain = type(value).__module__.partition(".")[0] not in _LIBRARIES and not isinstance(value, (type, nn.Module))
    return list(vars(value).values()) if is_plain and hasattr(value, "__dict__") else None


def _shows(value: Any, optimizer: Optimizer) -> bool:
    """Whether an object is the optimizer, or a view of it without the ranges of another network."""
    return value is optimizer or (isinstance(value, Optimizer) and value == optimizer)


def is_scheduler_of(value: Any, optimizer: Optimizer) -> bool:
    """Whether an object keeps the optimizer and takes no steps with it, as a wrapper of optimizers would."""
    attributes = getattr(value, "__dict__", None)
    if not isinstance(attributes, dict) or isinstance(value, type) or hasattr(value, "zero_grad"):
        return False
    return any(_shows(held, optimizer) for held in attributes.values())
