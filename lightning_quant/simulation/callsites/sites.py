"""What stands at a call site: a module that computes the function there, or the decomposition of the function."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_quant.simulation.callsites.attributes import CONTAINERS, HIDDEN_SITES, SITES
from lightning_quant.simulation.callsites.decompositions.table import DECOMPOSITIONS
from lightning_quant.simulation.callsites.functions import in_place
from lightning_quant.simulation.callsites.joins import note_join
from lightning_quant.simulation.callsites.passes import Pass
from lightning_quant.simulation.callsites.places import CallSite, Place, PlacedSite, Sites
from lightning_quant.simulation.callsites.rules.table import GENERIC, RULES, inplace_by_position
from lightning_quant.simulation.callsites.views import changed_into, writes_itself


class Site(PlacedSite):
    """The module that computes one operation in the code of a network.

    Args:
        name: base name of the function, with a star if the generic rule applies.
        holder: the module that the computing one is a child of.
        child: its name there, by which AIMET replaces it.
        own: whether the holder is the module whose code it is; else it is the innermost around it that is not a list.
        at: the place of the operation.
    """

    def __init__(self, name: str, holder: nn.Module, child: str, own: bool, at: Place) -> None:
        super().__init__(name, at)
        self.holder = holder
        self.child = child
        self.own = own

    def module(self, running: Pass) -> nn.Module:
        """Return the module that computes: of the network that runs, which can be a copy that AIMET made."""
        stack = running.stack
        holder: nn.Module | None = stack[-1]
        if not self.own:
            holder = next((m for m in reversed(stack) if not isinstance(m, CONTAINERS)), None)
        found = None if holder is None else holder._modules.get(self.child)
        if found is None:  # of a list that is called on its own, or at the root
            found = self.holder._modules.get(self.child) or vars(self.holder)[HIDDEN_SITES][self.child]
        return found

    def compute(self, running: Pass, func: Any, args: Any, kwargs: Any) -> Any:
        """Compute what was called, or return ``NotImplemented`` if the module computes something else."""
        if kwargs and kwargs.get("out") is not None:
            return NotImplemented
        name = self.name
        result = RULES.get(name, GENERIC).call(self.module(running), args, kwargs)
        if result is NotImplemented:
            return result
        if changes_its_input(func, name, args, kwargs):
            changed_into(running, args[0] if args else kwargs["input"], result, self.at)
        return result


class DecomposedSite(PlacedSite):
    """An operation that is computed by its decomposition, each part of which has a site of its own.

    Args:
        name: base name of the function.
        at: its place, which those of its parts begin with.
        joins: whether parts of what it writes into are read later.
    """

    def __init__(self, name: str, at: Place, joins: bool = False) -> None:
        super().__init__(name, at)
        self.joins = joins

    def fits(self, running: Pass, args: Any, kwargs: Any) -> bool:
        """Return whether the decomposition computes the same with these arguments; if not, the function does it."""
        supports = DECOMPOSITIONS[self.name].supports
        return kwargs.get("out") is None and (supports is None or supports(*args, **kwargs))

    def compute(self, running: Pass, func: Any, args: Any, kwargs: Any) -> Any:
        """Compute what was called, or return ``NotImplemented`` if the decomposition does not support the arguments."""
        if not self.fits(running, args, kwargs):
            return NotImplemented
        if running.views and self.name == "setitem" and writes_itself(running, args):
            return None
        before, running.parent = running.parent, self.at
        try:
            with running.mode:
                result = DECOMPOSITIONS[self.name].compute(*args, **kwargs)
        finally:
            running.parent = before
        if changes_its_input(func, self.name, args, kwargs):
            changed_into(running, args[0] if args else kwargs["input"], result, self.at)
            if self.joins and self.name == "setitem" and id(args[0]) not in running.views:
                whole, key, value = args
                note_join(running, whole, key, value, result)
        return result


def changes_its_input(func: Any, name: str, args: Any, kwargs: Any) -> bool:
    """Return whether a function changes its first argument in place."""
    return bool(in_place(func, name) or kwargs.get("inplace") or (len(args) > 1 and inplace_by_position(name, args)))


def sites_of(module: nn.Module) -> dict[Place, CallSite]:
    """Return the call sites of a module; empty if it has none."""
    return module.__dict__.get(SITES, {})


def add_site(module: nn.Module, at: Place, site: CallSite) -> None:
    """Let ``site`` compute the operation at a place in the code of ``module``."""
    module.__dict__.setdefault(SITES, Sites())[at] = site
