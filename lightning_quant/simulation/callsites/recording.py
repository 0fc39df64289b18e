"""Find the operations of a network that need a call site, by watching it run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.simulation.callsites.aliases import Aliases
from lightning_quant.simulation.callsites.attributes import (
    CONTAINERS,
    DEFAULT_STATE,
    FILLS,
    FOLDED,
    INFINITE,
    MASK_IS_COMPUTED,
    NUMBER,
    RECURRENT,
    SEEN,
)
from lightning_quant.simulation.callsites.decompositions.table import (
    DECOMPOSITIONS,
    JOINS,
    OVERWRITES,
    REPEATED_STEPS,
    UNWRITTEN,
)
from lightning_quant.simulation.callsites.functions import (
    CASTS,
    CHOICES,
    COMPARISONS,
    LOSSES,
    MOVES,
    SEEN_THROUGH,
    SHAPES,
    base_name,
    in_place,
    tensors_among,
    values_taken,
)
from lightning_quant.simulation.callsites.joins import TAKE, SourceSite, source_of
from lightning_quant.simulation.callsites.passes import Pass, current, place
from lightning_quant.simulation.callsites.places import Place
from lightning_quant.simulation.callsites.read_out import ReadNumber, ReadOut, without_places
from lightning_quant.simulation.callsites.rules.table import GENERIC, RULES
from lightning_quant.simulation.callsites.rules.weighted import Weighted
from lightning_quant.simulation.callsites.sites import DecomposedSite, changes_its_input
from lightning_quant.simulation.callsites.traces import tracing_state
from lightning_quant.simulation.callsites.views import ViewSite, changed_into, link
from lightning_quant.simulation.inputs import tensors_in


@dataclass
class Found:
    """An operation that needs a site."""

    module: nn.Module
    at: Place
    name: str  # of the function; with a star for the generic rule
    repeats: bool  # one step of several that are alike
    traced: bool  # seen in a trace only
    child: nn.Module | None = None  # what computes it; ``None``: its decomposition
    holder: nn.Module | None = None
    weight: Tensor | None = None
    site: type[DecomposedSite | SourceSite | ViewSite] = DecomposedSite  # if there is no child


@dataclass
class _Edge:
    """The tensors that an operation computed from others."""

    inputs: list[int]
    outputs: list[int]
    found: Found | None = None


@dataclass
class Recorder:
    """Sees the operations of a network while it runs, and finds those that need a site.

    An operation needs one if it computes floating-point values from the network's inputs and an output of the network
    depends on them. What is computed of weights and buffers alone is a constant.

    Args:
        root: the network, its modules watched.
        inputs: the tensors it is called with.
    """

    root: nn.Module
    pending: dict[tuple[int, Place], Found] = field(default_factory=dict)
    constants: dict[int, Tensor] = field(default_factory=dict)
    known: set[int] = field(default_factory=set)
    kept: list[Any] = field(default_factory=list)  # alive, so that no id is given twice
    edges: list[_Edge] = field(default_factory=list)
    given: set[int] = field(default_factory=set)
    parts: set[int] = field(default_factory=set)  # the inputs, and what AIMET sees of them through operations that move
    held: set[int] = field(default_factory=set)  # what the network keeps from pass to pass
    fresh: set[int] = field(default_factory=set)  # made of numbers alone
    read_out: dict[ReadOut, None] = field(default_factory=dict)  # values that leave PyTorch, in order
    repeating: bool = False
    joining: bool = False
    aliases: Aliases = field(init=False)

    def __post_init__(self) -> None:
        self.aliases = Aliases(self.kept)

    def begin(self, inputs: Sequence[Tensor]) -> None:
        """Start a pass with these inputs."""
        self.kept.clear()
        self.edges.clear()
        self.constants = {id(tensor): tensor for tensor in _tensors_of(self.root)}
        self.held = set(self.constants)
        self.fresh.clear()
        self.known = {id(tensor) for tensor in inputs} | self.constants.keys()
        self.kept.extend(inputs)
        self.given = {id(tensor) for tensor in inputs}
        self.parts = set(self.given)
        self.aliases.begin(self.given | self.held)
        self._origins_known = True

    def operation(self, running: Pass, func: Any, args: Any, kwargs: Any) -> Any:
        """Compute what was called, and record it; numbers that leave PyTorch are followed."""
        args, kwargs, places = without_places(args, kwargs)
        self.read_out.update(dict.fromkeys(places))
        result = self._operation(running, func, args, kwargs)
        left = ReadOut.by(func)
        if left is None or not self._depends(tensors_among((args, kwargs))):
            return result
        if isinstance(result, float):
            return ReadNumber.at(result, left)
        self.read_out[left] = None
        return result

    def _operation(self, running: Pass, func: Any, args: Any, kwargs: Any) -> Any:
        name = base_name(func)
        if running.paused or not running.stack:
            result = func(*args, **kwargs)
            self._note(name, args, kwargs, result)
            return result
        module = running.stack[-1]
        if FOLDED in module.__dict__ and name == "batch_norm":
            return args[0] if args else kwargs["input"]
        at = place(running, module, name)
        module.__dict__.setdefault(SEEN, set()).add(at)
        pending = self.pending.get((id(module), at))
        if (id(module), at) in self.aliases.refused:
            result = func(*args, **kwargs)
            self._note(name, args, kwargs, result)
            return result
        target: Any = None
        if changes_its_input(func, name, args, kwargs):
            target = args[0] if args else kwargs.get("input")
            self.aliases.wrote(target)
        reads_part = name in TAKE and bool(args) and id(args[0]) in running.joined
        source = source_of(running, func, args, kwargs) if reads_part else None
        if source is not None and id(source.tensor) not in self.parts:  # AIMET would lose the network's input
            self.aliases.parts.add((id(module), at))
            if (id(module), at) in self.aliases.passed_by:
                self._note(name, (source.tensor,), {}, source.part)
                self._add(Found(module, at, name, self.repeating, tracing_state() is not None, site=SourceSite))
                return source.part
        if name == "setitem":
            self.aliases.forget_first_half(args)
        decomposed = (
            pending is not None
            and pending.child is None
            and pending.site is DecomposedSite
            and DecomposedSite(name, at).fits(running, args, kwargs)
        )
        if decomposed or (pending is None and self._is_decomposed(name, func, args, kwargs)):
            if pending is None:
                self._add(Found(module, at, name, self.repeating, tracing_state() is not None))
            before, self.repeating = self.repeating, self.repeating or name in REPEATED_STEPS
            around, self.joining = self.joining, name in JOINS
            try:
                result = DecomposedSite(name, at, joins=True).compute(running, func, args, kwargs)
            finally:
                self.repeating, self.joining = before, around
            if target is not None and id(target) not in running.views:
                self.aliases.changed(target, (id(module), at))
            return result
        given = tensors_among((args, kwargs))
        self.aliases.used(given if name not in SHAPES or name == "get" else [])
        made = None
        if pending is None and kwargs.get("out") is None and self._needs_site(name, func, given):
            made = self._make(running, module, at, name, func, args, kwargs)
        has_site = made is not None or (pending is not None and pending.child is not None)
        is_followed = target is not None and has_site and id(target) in running.views
        if is_followed:  # as its site will, out of place
            changed = target.clone()
            result = func(changed, *args[1:], **kwargs) if args else func(**kwargs | {"input": changed})
        else:
            result = func(*args, **kwargs)
        of_numbers = isinstance(result, Tensor) and result.is_floating_point()
        if not of_numbers and name not in COMPARISONS and (name not in MOVES or name in CASTS):
            made = None  # a mask is cast to truth values
        if made is not None:
            self._add(made)
        self._note(name, args, kwargs, result, made)
        if target is None:
            views = self.aliases.taken_here((id(module), at), func, args, kwargs, result)
            if views and (pending is None or pending.site is ViewSite):
                link(running, func, args, kwargs, result)
                self._add(Found(module, at, name, self.repeating, tracing_state() is not None, site=ViewSite))
        elif is_followed:
            changed_into(running, target, result, at)
        elif id(target) not in running.views:
            self.aliases.changed(target, (id(module), at))
        if name == "zeros" and isinstance(module, RECURRENT):
            result.__dict__[DEFAULT_STATE] = True
        return result

    def forget(self) -> None:
        """Drop what was found at operations that are refused now."""
        gone = [at for _, at in self.aliases.refused]
        self.pending = {key: found for key, found in self.pending.items() if found.at[0][:2] not in gone}
        for key in self.aliases.refused:
            self.pending.pop(key, None)

    def end(self, output: Any) -> None:
        """Finish a pass: drop the operations that its outputs do not depend on."""
        made = [current(tensor) for tensor in tensors_in(output)]
        self.aliases.used(made)
        sized = [tensor for tensor in made if tensor.dim()]  # others are losses
        outputs = sized if any(tensor.is_floating_point() for tensor in sized) else made
        needed = {id(tensor) for tensor in outputs}
        unneeded = []
        for edge in reversed(self.edges):
            if not needed.isdisjoint(edge.outputs):
                needed.update(edge.inputs)
            elif edge.found is not None and self._origins_known:
                unneeded.append(edge.found)
        for one in unneeded:
            del self.pending[id(one.module), one.at]

    def _add(self, found: Found) -> None:
        self.pending[id(found.module), found.at] = found

    def _depends(self, tensors: Iterable[Tensor]) -> bool:
        return any(id(tensor) not in self.constants for tensor in tensors)

    def _is_decomposed(self, name: str, func: Any, args: Any, kwargs: Any) -> bool:
        if name not in DECOMPOSITIONS or kwargs.get("out") is not None:
            return False
        if name in UNWRITTEN:
            return True
        given = tensors_among((args, kwargs))
        if name in OVERWRITES and not in_place(func, name):
            return False
        if in_place(func, name) and self._is_kept(given[0]):
            return False
        if name == "linear":
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            if id(weight) not in self.known or not self._depends([weight]):
                return False
        if name == "setitem" and id(given[0]) in self.given:  # the caller of the network sees the change
            return False
        if name in JOINS and (self.joining or self.parts.isdisjoint(map(id, given))):
            return False
        if not any(tensor.is_floating_point() for tensor in given) or not self._depends(given):
            return False
        supports = DECOMPOSITIONS[name].supports
        try:
            return supports is None or supports(*args, **kwargs)
        except TypeError:  # another function of that name
            return False

    def _needs_site(self, name: str, func: Any, given: list[Tensor]) -> bool:
        if name in LOSSES or not given or not self._depends(values_taken(name, given)):
            return False
        if name in CASTS:
            return not given[0].is_floating_point()
        if name == "where":  # two numbers, one of which a mask chooses, are values that depend on the mask
            return True
        if name in COMPARISONS:  # of activations are not rounded, but the network's input is, in front of them
            return given[0].is_floating_point() and id(given[0]) in self.parts
        if name in MOVES and name not in SEEN_THROUGH and given[0].is_floating_point() and id(given[0]) in self.parts:
            return True  # behind it AIMET would lose the network's input
        if name in MOVES or not any(tensor.is_floating_point() for tensor in given):
            return False
        # what is kept from pass to pass is changed itself; a sum that begins with zeros has the other's values
        if not in_place(func, name) or id(given[0]) not in self.constants:
            return True
        return not self._is_kept(given[0]) and not self._is_zero(given[0])

    def _is_kept(self, tensor: Tensor) -> bool:
        """Return whether the network keeps a tensor from pass to pass, or one that this is a view of."""
        return id(tensor) in self.held or id(tensor._base) in self.held

    def _is_zero(self, tensor: Tensor) -> bool:
        """Return whether a tensor holds zeros, which are on every grid, and always will."""
        return id(tensor) in self.fresh and not tensor.any()

    def _size_of_infinity(self, value: Any) -> float:
        """Return the size of a number, or of those in a constant tensor, that stands for minus infinity; else 0."""
        if isinstance(value, Tensor):
            is_constant = id(value) in self.constants and value.is_floating_point() and value.numel() > 0
            value = float(value.amax()) if is_constant else 0.0
        return -float(value) if value <= -INFINITE else 0.0

    def _make(
        self, running: Pass, module: nn.Module, at: Place, name: str, func: Any, args: Any, kwargs: Any
    ) -> Found | None:
        rule = RULES.get(name, GENERIC)
        weight = None
        if isinstance(rule, Weighted):
            bound = rule.bind(args, kwargs)
            weights = [bound[part] for part in ("weight", "bias") if bound.get(part) is not None]
            if self._depends(one for one in weights if id(one) in self.known):
                rule = GENERIC  # computed from the inputs: no weights, but two activations
            else:
                weight = bound.get("weight")
        child = rule.make(name, func, args, kwargs)
        if child is None:
            rule = GENERIC
            child = rule.make(name, func, args, kwargs)
        if child is None:
            return None
        operands = rule.operands(args, kwargs)
        child.__dict__["_constant_inputs"] = tuple(
            index
            for index, value in enumerate(operands)
            if isinstance(value, Tensor)
            and value.is_floating_point()
            and value.numel() > 1
            and (id(value) in self.constants or id(value) not in self.known)  # made outside
            and not self._is_zero(value)
        )
        # the first one is made a tensor (Binary.call)
        child.__dict__["_number_inputs"] = tuple(
            index for index, value in enumerate(operands) if index and not isinstance(value, Tensor)
        )
        # a list is iterated over: its sites go to the module around it, if there is one
        holder = next((one for one in reversed(running.stack) if not isinstance(one, CONTAINERS)), running.stack[0])
        numbers = [value for value in operands if isinstance(value, int | float)]
        if len(numbers) == 1:
            child.__dict__[NUMBER] = float(numbers[0])
        if name in ("where", "masked_fill"):
            masks = [tensor for tensor in tensors_among((args, kwargs)) if tensor.dtype == torch.bool]
            child.__dict__[MASK_IS_COMPUTED] = self._depends(masks)
            filled = [self._size_of_infinity(value) for value in args[1:3]]
            if any(filled):
                child.__dict__[FILLS] = min(size for size in filled if size)
        child.__dict__["_compares"] = name in COMPARISONS
        child.__dict__["_moves"] = name in CHOICES or (name in MOVES and name not in CASTS)
        name = name if rule is not GENERIC else f"{name}*"
        return Found(module, at, name, self.repeating, tracing_state() is not None, child, holder, weight)

    def _note(self, name: str, args: Any, kwargs: Any, result: Any, made: Found | None = None) -> None:
        given, new = tensors_among((args, kwargs)), tensors_among(result)
        for tensor in given:
            if id(tensor) not in self.known:  # made where no function was seen
                self._origins_known = False
                self.known.add(id(tensor))
                self.constants[id(tensor)] = tensor
                self.kept.append(tensor)
        if name in ("setitem", "copy", "index_copy", "index_put", "scatter", "masked_scatter") and given:
            new.append(given[0])
        given = values_taken(name, given)
        constant = name in LOSSES or not self._depends(given)
        if name in SHAPES and not any(tensor.is_floating_point() for tensor in new):
            constant = True
        is_part = name in MOVES and name in SEEN_THROUGH and bool(given) and id(given[0]) in self.parts
        for tensor in new:
            self.kept.append(tensor)
            self.known.add(id(tensor))
            if is_part and tensor.is_floating_point():
                self.parts.add(id(tensor))
            if constant:
                self.constants[id(tensor)] = tensor
                if not given:
                    self.fresh.add(id(tensor))
            else:
                self.constants.pop(id(tensor), None)
            if given:
                self.fresh.discard(id(tensor))
        self.edges.append(_Edge([id(tensor) for tensor in given], [id(tensor) for tensor in new], made))


def _tensors_of(root: nn.Module) -> Iterator[Tensor]:
    """Yield what a network holds before it runs: parameters, buffers, and tensors in plain attributes."""
    yield from root.parameters()
    yield from root.buffers()
    for module in root.modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                yield from tensors_among(value)
