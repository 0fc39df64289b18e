"""Hand each operation of a pass to the site it stands at.

The user's Python runs as it is written. While it runs, a ``TorchFunctionMode`` sees every operation of PyTorch. Where
in the code an operation stands (the module whose forward runs, the line, how many times it was reached before in this
pass) is its place, and the module that was made for the place computes instead. An operation without a site runs
unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from lightning_quant.simulation.callsites.attributes import DEFAULT_STATE, FOLDED, RECURRENT, SEEN, SITES
from lightning_quant.simulation.callsites.decompositions.table import TRACE_SUBSTITUTES
from lightning_quant.simulation.callsites.functions import base_name, computes, in_place, kept, tensors_among
from lightning_quant.simulation.callsites.passes import Pass, current, place
from lightning_quant.simulation.callsites.places import Sites, spot
from lightning_quant.simulation.callsites.traces import SIZES, is_noop_cast, size_as_number, tracing_state


class Interception(TorchFunctionMode):
    """Hands each operation to the site it stands at."""

    def __init__(self, running: Pass) -> None:
        super().__init__()
        self.running = running
        running.mode = self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # every operation of every step comes through here, and every access to a shape
        running = self.running
        if kwargs is None:
            kwargs = {}
        if running.changes:
            args, kwargs = current(args), current(kwargs)
        if running.is_observed or tracing_state() is not None:
            return self._observed(func, args, kwargs)
        if running.paused or not running.stack:
            return func(*args, **kwargs)
        module = running.stack[-1]
        values = module.__dict__
        if FOLDED in values and base_name(func) == "batch_norm":
            return args[0] if args else kwargs["input"]
        sites = values.get(SITES)
        if not sites:
            return func(*args, **kwargs)
        name = base_name(func)
        try:
            named = sites.by_name.get(name)
        except AttributeError:
            named = _indexed(module).get(name)
        if named is not None and kept(name, args, kwargs) is None:
            found = spot(running.parent, name)
            site = named.get((id(found), running.count(module, found)))
            if site is not None and (computed := site.compute(running, func, args, kwargs)) is not NotImplemented:
                return computed
        result = func(*args, **kwargs)
        if func is torch.zeros and isinstance(module, RECURRENT):
            result.__dict__[DEFAULT_STATE] = True
        return result

    def _observed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Do the same in a trace, and where each operation is observed or noted."""
        running = self.running
        traced = tracing_state() is not None
        if traced:
            if func in SIZES:
                return size_as_number(func, args, kwargs)
            if is_noop_cast(func, args, kwargs):
                return args[0]
        name = base_name(func)
        if not running.paused and (same := kept(name, args, kwargs)) is not None:
            if in_place(func, name):
                return same
            func, name, args, kwargs = torch.clone, "clone", (same,), {}
        observer = running.observer
        if observer is not None:
            return observer.operation(running, func, args, kwargs)
        if running.paused or not running.stack:
            return func(*args, **kwargs)
        module = running.stack[-1]
        values = module.__dict__
        if FOLDED in values and name == "batch_norm":
            return args[0] if args else kwargs["input"]
        at = place(running, module, name)
        site = values.get(SITES, {}).get(at)
        if site is not None and (computed := site.compute(running, func, args, kwargs)) is not NotImplemented:
            return computed
        if traced:
            func = TRACE_SUBSTITUTES.get(func, func)
        result = func(*args, **kwargs)
        known = site is None and at in values.get(SEEN, ()) and kwargs.get("out") is None
        noted = running.noted
        if (
            noted is not None
            and not module.training
            and not known
            and computes(name, tensors_among((args, kwargs)), result)
        ):
            noted.setdefault(module, []).append(name)
        if func is torch.zeros and isinstance(module, RECURRENT):
            result.__dict__[DEFAULT_STATE] = True
        return result


def _indexed(module: Any) -> Any:
    values = module.__dict__
    if not isinstance(values[SITES], Sites):
        values[SITES] = Sites(values[SITES])
    return values[SITES].index()
