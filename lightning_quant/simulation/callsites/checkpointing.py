"""Gradient checkpointing: what is run again in the backward pass belongs to the pass it was first run in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint

from lightning_quant.simulation.callsites.interception import Interception
from lightning_quant.simulation.callsites.passes import THREAD, Pass, current
from lightning_quant.simulation.callsites.traces import tracing_state


def _resuming_pass(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that resumes the pass it was first run in when the backward pass runs it again."""
    first = THREAD.running
    if first is None or first.observer is not None:
        return function
    stack, counts = list(first.stack), dict(first.counts)
    changes, joined = first.changes, dict(first.joined)

    @functools.wraps(function, assigned=("__name__", "__doc__"), updated=())
    def resumed(*args: Any, **kwargs: Any) -> Any:
        if THREAD.running is not None:
            return function(*args, **kwargs)
        running = THREAD.running = Pass()
        running.stack, running.counts = list(stack), dict(counts)
        running.changes, running.joined = changes, dict(joined)
        try:
            with Interception(running):
                return function(*args, **kwargs)
        finally:
            running.end()
            THREAD.running = None

    return resumed


@functools.cache
def follow_checkpoints() -> None:
    """Let ``torch.utils.checkpoint`` run functions again in the pass they belong to."""
    module: Any = torch.utils.checkpoint
    name = "_checkpoint_without_reentrant_generator"
    name = f"{name}_impl" if hasattr(module, f"{name}_impl") else name  # its name in PyTorch 2.14; the other in 2.11
    without_reentrant, reentrant = getattr(module, name), module.CheckpointFunction.apply

    @functools.wraps(without_reentrant)
    def generator(fn: Any, *args: Any, **kwargs: Any) -> Any:
        return without_reentrant(_resuming_pass(fn), *current(args), **current(kwargs))

    def apply(function: Any, *args: Any) -> Any:
        if tracing_state() is not None:
            return function(*args[1:])  # the first says whether to keep the state of the random numbers
        return reentrant(_resuming_pass(function), *current(args))

    setattr(module, name, generator)
    module.CheckpointFunction.apply = apply
