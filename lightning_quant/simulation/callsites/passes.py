"""One pass of a network: what is known of it while it runs, in the thread that runs it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_quant.simulation.callsites.places import Place, Spot, same, spot
from lightning_quant.simulation.callsites.traces import traced

# Where a tensor that was changed in place keeps what it is now.
_NOW = "_changed_into"


class Observer(Protocol):
    """Sees every operation of a pass, and computes it."""

    def operation(self, running: Pass, func: Any, args: Any, kwargs: Any) -> Any:
        """Compute what was called."""

    def end(self, output: Any) -> None:
        """Record what the network returned."""


class Pass:
    """The state of the pass that runs: one per thread, begun by the outermost module."""

    __slots__ = (
        "changes",
        "counts",
        "is_observed",
        "is_traced",
        "joined",
        "kept",
        "mode",
        "noted",
        "observer",
        "parent",
        "paused",
        "stack",
        "views",
    )

    def __init__(self, observer: Observer | None = None) -> None:
        self.stack: list[nn.Module] = []
        self.counts: dict[tuple[int, int], int] = {}  # by the numbers of module and spot
        self.observer = observer
        self.noted = THREAD.noted
        self.is_observed = observer is not None or self.noted is not None
        self.is_traced = traced()  # no trace or export begins during a pass
        self.paused = False  # inside a quantized layer, where there is nothing to see
        self.changes = False  # whether a tensor was changed in place
        self.parent: Place | tuple[()] = ()  # the place of the operation whose decomposition runs
        self.mode: TorchFunctionMode  # what intercepts its operations
        self.views: dict[int, Any] = {}  # by the number of the tensor: those that follow each other's changes
        self.joined: dict[int, Any] = {}  # by the number of a tensor: what was written into it
        self.kept: list[Tensor] = []  # alive, so that no number is given twice

    def end(self) -> None:
        """Let go of the tensors that were followed."""
        self.views.clear()
        self.joined.clear()
        self.kept.clear()

    def count(self, module: nn.Module, found: Spot) -> int:
        """Return how many operations stood at this spot in the pass so far, and count one more."""
        key = id(module), id(found)
        count = self.counts.get(key, 0)
        self.counts[key] = count + 1
        return count


class _Thread(threading.local):
    def __init__(self) -> None:
        self.running: Pass | None = None
        self.observer: Observer | None = None  # takes part in the next pass
        self.noted: dict[nn.Module, list[str]] | None = None


THREAD = _Thread()


def running_pass() -> Pass | None:
    """Return the pass that runs in this thread."""
    return THREAD.running


@contextmanager
def observed_by(observer: Observer) -> Iterator[None]:
    """Let an observer see every operation of the passes in a block."""
    THREAD.observer = observer
    try:
        yield
    finally:
        THREAD.observer = None


@contextmanager
def noting() -> Iterator[dict[nn.Module, list[str]]]:
    """Note, by module, the operations that are computed in eval mode at places where none was seen before.

    They stay in float: code that the examples did not come to, or not with these settings.
    """
    before, THREAD.noted = THREAD.noted, {}
    try:
        yield THREAD.noted
    finally:
        THREAD.noted = before


class paused:
    """Intercept nothing for the length of a block: the inside of a quantized layer."""

    __slots__ = ("before", "running")

    def __enter__(self) -> None:
        self.running = THREAD.running
        if self.running is not None:
            self.before, self.running.paused = self.running.paused, True

    def __exit__(self, *_: Any) -> None:
        if self.running is not None:
            self.running.paused = self.before


def is_observed_next() -> bool:
    """Return whether the operations of the next pass are observed, noted or traced."""
    return THREAD.observer is not None or THREAD.noted is not None or traced()


def place(running: Pass, module: nn.Module, name: str) -> Place:
    """Return where in the code of ``module`` the operation stands that is handled now, and count it."""
    found = spot(running.parent, name)
    return same((found, running.count(module, found)))


def current(value: Any) -> Any:
    """Return the arguments of an operation, with what tensors changed in place have become."""
    if isinstance(value, Tensor):
        while (now := value.__dict__.get(_NOW)) is not None:
            value = now
        return value
    kind = type(value)
    if kind is tuple or kind is list:
        return kind([current(item) for item in value])
    if kind is dict:
        return {key: current(item) for key, item in value.items()} if value else value
    return value


def replace(running: Pass, tensor: Tensor, result: Tensor) -> None:
    """Let ``tensor`` be ``result`` from now on, for all who hold it."""
    if tensor is not result:
        tensor.__dict__[_NOW] = result
        running.changes = True
