"""Find the call sites of a network by running it, and give each its module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.simulation import aimet
from lightning_quant.simulation.callsites import running
from lightning_quant.simulation.callsites.functions import (
    AUGMENTED,
    CASTS,
    LOSSES,
    MOVES,
    SEEN_THROUGH,
    SHAPES,
    base_name,
    in_place,
    tensors_among,
    values_taken,
)
from lightning_quant.simulation.callsites.places import Place
from lightning_quant.simulation.callsites.running import (
    CONTAINERS,
    FOLDED,
    IN_TRACES_ONLY,
    MADE_UP,
    OF_A_LIST,
    OWNER,
    SEEN,
    Pass,
    add_site,
    place,
)
from lightning_quant.simulation.callsites.sites import GENERIC, RULES, ApartSite, Site, Weighted
from lightning_quant.simulation.callsites.taken_apart import APART, STEPPING
from lightning_quant.simulation.inplace import state_kept
from lightning_quant.simulation.inputs import NetworkInputs, tensors_in

# Layers that AIMET knows as one operation and the hardware as several, or that compute no output of a device.
_NOT_ONE = (
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.GroupNorm,
    nn.SiLU,
    nn.Mish,
    nn.GLU,
    nn.CosineSimilarity,
    nn.Fold,
    nn.Unfold,
    nn.PairwiseDistance,
    nn.modules.loss._Loss,
)
# AIMET's package of classes that are several operations to the hardware, whole layers of a language model among them.
_OF_TRANSFORMERS = "aimet_torch.nn.transformers"


def is_layer(module: nn.Module) -> bool:
    """Whether AIMET quantizes a module as a whole, and may: nothing in it was changed from the outside."""
    if isinstance(module, nn.Identity):
        return True
    quantized = aimet.QuantizationMixin.cls_to_qcls.get(type(module))
    if quantized is None or quantized.__module__.startswith(_OF_TRANSFORMERS) or isinstance(module, _NOT_ONE):
        return False
    own = vars(module)
    if "forward" in own or module._forward_hooks or module._forward_pre_hooks:
        return False
    # a weight that something else makes: pruned, normalized
    return not any(isinstance(own.get(part), Tensor) for part in ("weight", "bias"))


@dataclass
class _Found:
    """An operation that needs a site."""

    module: nn.Module
    at: Place
    name: str  # of the function; with a star for the generic rule
    repeats: bool  # one step of several that are alike
    traced: bool  # seen in a trace only
    child: nn.Module | None = None  # what answers it; ``None``: it is taken apart
    holder: nn.Module | None = None
    weight: Tensor | None = None


@dataclass
class _Edge:
    """What an operation made of what."""

    inputs: list[int]
    outputs: list[int]
    found: _Found | None = None


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
    pending: dict[tuple[int, Place], _Found] = field(default_factory=dict)
    constants: dict[int, Tensor] = field(default_factory=dict)
    known: set[int] = field(default_factory=set)
    kept: list[Any] = field(default_factory=list)  # alive, so that no id is given twice
    edges: list[_Edge] = field(default_factory=list)
    given: set[int] = field(default_factory=set)
    held: set[int] = field(default_factory=set)  # what the network keeps from pass to pass
    fresh: set[int] = field(default_factory=set)  # made of numbers alone
    repeating: bool = False
    stale: dict[int, nn.Module] = field(default_factory=dict)  # what a layer in place was given
    seen_changed: dict[int, tuple[int, Place]] = field(default_factory=dict)  # by an operation in place on another
    refused: set[tuple[int, Place]] = field(default_factory=set)  # such operations, of which somebody sees the change
    aliased: set[nn.Module] = field(default_factory=set)

    def begin(self, inputs: Sequence[Tensor]) -> None:
        """Before a pass."""
        self.kept.clear()
        self.edges.clear()
        self.constants = {id(tensor): tensor for tensor in _tensors_of(self.root)}
        self.held = set(self.constants)
        self.fresh.clear()
        self.known = {id(tensor) for tensor in inputs} | self.constants.keys()
        self.kept.extend(inputs)
        self.given = {id(tensor) for tensor in inputs}
        self.stale.clear()
        self.seen_changed.clear()
        self._origins_known = True

    def operation(self, running: Pass, func: Any, args: Any, kwargs: Any) -> Any:
        """Compute what was called, and note it."""
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
        if (id(module), at) in self.refused:
            result = func(*args, **kwargs)
            self._note(name, args, kwargs, result)
            return result
        apart = pending is not None and pending.child is None and ApartSite(name, at).fits(running, args, kwargs)
        if apart or (pending is None and self._comes_apart(name, func, args, kwargs)):
            if pending is None:
                self._add(_Found(module, at, name, self.repeating, _is_traced()))
            before, self.repeating = self.repeating, self.repeating or name in STEPPING
            try:
                result = ApartSite(name, at).answer(running, func, args, kwargs)
            finally:
                self.repeating = before
            if name == "setitem":
                self.seen_changed |= dict.fromkeys(self._sharing_memory(args[0]), (id(module), at))
            return result
        given = tensors_among((args, kwargs))
        self.used(given)
        made = None
        if pending is None and kwargs.get("out") is None and self._needs_site(name, func, given):
            made = self._make(running, module, at, name, func, args, kwargs)
        result = func(*args, **kwargs)
        if made is not None and not (isinstance(result, Tensor) and result.is_floating_point()) and name not in MOVES:
            made = None
        if made is not None:
            self._add(made)
        self._note(name, args, kwargs, result, made)
        if name == "zeros" and isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            result.__dict__[MADE_UP] = True
        return result

    def used(self, tensors: Iterable[Tensor]) -> None:
        """Somebody computes with these."""
        for tensor in tensors if self.stale or self.seen_changed else ():
            if id(tensor) in self.stale:
                self.aliased.add(self.stale[id(tensor)])
            if id(tensor) in self.seen_changed:
                self.refused.add(self.seen_changed[id(tensor)])

    def forget(self) -> None:
        """What was found in the place of operations that are refused now."""
        gone = [at for _, at in self.refused]
        self.pending = {key: found for key, found in self.pending.items() if found.at[0][:2] not in gone}
        for key in self.refused:
            self.pending.pop(key, None)

    def _sharing_memory(self, tensor: Tensor) -> Iterator[int]:
        """The tensors that change with this one."""
        base = tensor if tensor._base is None else tensor._base
        return (id(one) for one in self.kept if one is not tensor and (one is base or one._base is base))

    def end(self, output: Any) -> None:
        """After a pass: which operations its outputs depend on."""
        made = [running.current(tensor) for tensor in tensors_in(output)]
        self.used(made)
        outputs = [tensor for tensor in made if tensor.is_floating_point()]
        outputs = [tensor for tensor in outputs if tensor.dim()] or outputs
        needed = {id(tensor) for tensor in outputs}
        spared = []
        for edge in reversed(self.edges):
            if not needed.isdisjoint(edge.outputs):
                needed.update(edge.inputs)
            elif edge.found is not None and self._origins_known:
                spared.append(edge.found)
        for one in spared:
            del self.pending[id(one.module), one.at]

    def _add(self, found: _Found) -> None:
        self.pending[id(found.module), found.at] = found

    def _depends(self, tensors: Iterable[Tensor]) -> bool:
        return any(id(tensor) not in self.constants for tensor in tensors)

    def _comes_apart(self, name: str, func: Any, args: Any, kwargs: Any) -> bool:
        if name not in APART or kwargs.get("out") is not None:
            return False
        given = tensors_among((args, kwargs))
        if in_place(func, name) and self._is_kept(given[0]):
            return False
        if name == "setitem" and id(given[0]) in self.given:  # who called the network sees the change
            return False
        if not any(tensor.is_floating_point() for tensor in given) or not self._depends(given):
            return False
        takes = APART[name][1]
        try:
            return takes is None or takes(*args, **kwargs)
        except TypeError:  # another function of that name
            return False

    def _needs_site(self, name: str, func: Any, given: list[Tensor]) -> bool:
        if name in LOSSES or not given or not self._depends(values_taken(name, given)):
            return False
        if name in CASTS:
            return not given[0].is_floating_point()
        if name in MOVES and name not in SEEN_THROUGH and given[0].is_floating_point() and id(given[0]) in self.given:
            return True  # behind it AIMET would lose the network's input
        if name in MOVES or not any(tensor.is_floating_point() for tensor in given):
            return False
        # what is kept from pass to pass is changed itself; a sum that begins with zeros has the other's values
        if not in_place(func, name) or id(given[0]) not in self.constants:
            return True
        return not self._is_kept(given[0]) and not self._is_zero(given[0])

    def _is_kept(self, tensor: Tensor) -> bool:
        """Whether the network keeps a tensor from pass to pass, or one that this is a view of."""
        return id(tensor) in self.held or id(tensor._base) in self.held

    def _is_zero(self, tensor: Tensor) -> bool:
        """Whether a tensor holds zeros, which are on every grid, and always will."""
        return id(tensor) in self.fresh and not tensor.any()

    def _make(
        self, running: Pass, module: nn.Module, at: Place, name: str, func: Any, args: Any, kwargs: Any
    ) -> _Found | None:
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
            and id(value) in self.constants
            and not self._is_zero(value)
        )
        # a list is iterated over: its sites go to the module around it, if there is one
        holder = next((one for one in reversed(running.stack) if not isinstance(one, CONTAINERS)), running.stack[0])
        child.__dict__["_moves"] = name in MOVES and name not in CASTS
        name = name if rule is not GENERIC else f"{name}*"
        return _Found(module, at, name, self.repeating, _is_traced(), child, holder, weight)

    def _note(self, name: str, args: Any, kwargs: Any, result: Any, made: _Found | None = None) -> None:
        given, new = tensors_among((args, kwargs)), tensors_among(result)
        for tensor in given:
            if id(tensor) not in self.known:  # made where no function was seen
                self._origins_known = False
                self.known.add(id(tensor))
                self.kept.append(tensor)
        if name in ("setitem", "copy", "index_copy", "index_put", "scatter", "masked_scatter") and given:
            new.append(given[0])
        given = values_taken(name, given)
        constant = name in LOSSES or not self._depends(given)
        if name in SHAPES and not any(tensor.is_floating_point() for tensor in new):
            constant = True
        for tensor in new:
            self.kept.append(tensor)
            self.known.add(id(tensor))
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
    """What a network holds before it runs: parameters, buffers, and tensors in plain attributes."""
    yield from root.parameters()
    yield from root.buffers()
    for module in root.modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                yield from tensors_among(value)


def _is_traced() -> bool:
    return torch._C._get_tracing_state() is not None


# ---- instrumenting ---------------------------------------------------------------------------------------------------
def instrument(root: nn.Module, calls: Sequence[NetworkInputs]) -> None:
    """Give every functional operation of ``root`` that an output depends on a module, in place.

    Modules that are called more than once in a pass are no layers any more: each call computes with a site of its own.

    Args:
        root: the network, in eval mode.
        calls: examples; the first is traced too, since some code asks whether it is.
    """
    running.follow_checkpoints()
    for module in root.modules():
        if FOLDED in vars(module):  # nothing is left that could normalize
            running.watch(module)
    with state_kept(root):
        layers = _layers(root, calls)
    for module in root.modules():
        if module not in layers:
            running.watch(module)
    with state_kept(root):
        others = _changing_what_others_use(root, calls, layers)
    for module in others:
        layers.remove(module)
        running.watch(module)
    recorder = Recorder(root)
    with torch.no_grad(), state_kept(root), _seen_as_one(layers, recorder):
        for call in calls:
            _recorded(root, call, recorder)
        _traced(root, calls[0], recorder)
    _install(recorder.pending.values())


def _changing_what_others_use(
    root: nn.Module, calls: Sequence[NetworkInputs], layers: set[nn.Module]
) -> set[nn.Module]:
    """Layers in place whose input is used by others as well, who see it changed: a ReLU that a shortcut goes around."""
    changing = [module for module in layers if getattr(module, "inplace", False) is True]
    recorder = Recorder(root)
    try:
        for module in changing:
            vars(module)["inplace"] = False  # so that its input and its output are two tensors
        with torch.no_grad(), _seen_as_one(layers, recorder, changing):
            for call in calls if changing else ():
                _recorded(root, call, recorder)
    finally:
        for module in changing:
            vars(module)["inplace"] = True
    return recorder.aliased


def _recorded(root: nn.Module, call: NetworkInputs, recorder: Recorder) -> None:
    refused = None
    while refused != recorder.refused:
        refused = set(recorder.refused)
        recorder.forget()
        own = call.map(torch.clone)  # it may change what it is given
        recorder.begin(own.tensors)
        with running.recorded_by(recorder):
            root(*own.args, **own.kwargs)


def _traced(root: nn.Module, call: NetworkInputs, recorder: Recorder) -> None:
    from lightning_quant.simulation.network import FlatNetwork

    class Recorded(FlatNetwork):
        def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
            recorder.begin(tensors)
            return super().forward(*tensors)

    before = dict(recorder.pending)
    try:
        with aimet.quiet(), running.recorded_by(recorder):
            torch.jit.trace(Recorded(root, call), tuple(call.tensors), check_trace=False, strict=False)
    except Exception:
        recorder.pending = before


def _layers(root: nn.Module, calls: Sequence[NetworkInputs]) -> set[nn.Module]:
    """The modules that AIMET takes as a whole: known to it, and called once in a pass at most."""
    most: Counter[nn.Module] = Counter()
    for call in calls:
        counts = _calls(root, call)
        most |= counts
    single = (nn.Dropout, nn.Identity, nn.Flatten)
    return {
        module
        for module in root.modules()
        # what none of the calls uses, such as a head for training alone, the device does not compute
        if module is not root and is_layer(module) and (most[module] == 1 or isinstance(module, single))
    }


def _calls(root: nn.Module, call: NetworkInputs) -> Counter[nn.Module]:
    counts: Counter[nn.Module] = Counter()

    def count(module: nn.Module, *_: Any) -> None:
        counts[module] += 1

    with _hooked(root.modules(), count, None), torch.no_grad():
        call.call(root)
    return counts


@contextmanager
def _seen_as_one(layers: Iterable[nn.Module], recorder: Recorder, changing: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Let the recorder pass over the inside of layers.

    Args:
        layers: the layers.
        recorder: notes who uses what those among them that are ``changing`` their input were given.
        changing: layers in place.
    """
    stack: list[running.paused] = []
    in_place_layers = set(changing)

    def enter(_: nn.Module, args: Any) -> None:
        recorder.used(tensors_among(args))
        stack.append(running.paused())
        stack[-1].__enter__()

    def leave(module: nn.Module, args: Any, _: Any) -> None:
        stack.pop().__exit__()
        if module in in_place_layers:
            recorder.stale[id(args[0])] = module

    with _hooked(layers, enter, leave):
        yield


@contextmanager
def _hooked(
    modules: Iterable[nn.Module], before: Callable[..., None] | None, after: Callable[..., None] | None
) -> Iterator[None]:
    handles = []
    for module in list(modules):
        if before is not None:
            handles.append(module.register_forward_pre_hook(before, prepend=True))
        if after is not None:
            handles.append(module.register_forward_hook(after, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _install(found: Iterable[_Found]) -> None:
    for one in found:
        if one.child is None:
            add_site(one.module, one.at, ApartSite(one.name, one.at))
            continue
        assert one.holder is not None
        one.child.eval()
        own = vars(one.child)
        own["_weight_of"] = one.weight  # until the simulation is built
        if one.traced:
            own[IN_TRACES_ONLY] = True
        own[OWNER] = id(one.module)
        own["_repeats"] = (id(one.module), one.at[0]) if one.repeats else None
        name = _free_name(one.holder, one.name)
        one.holder.add_module(name, one.child)
        if isinstance(one.holder, CONTAINERS):
            vars(one.holder)[OF_A_LIST] = (*vars(one.holder).get(OF_A_LIST, ()), name)
        add_site(one.module, one.at, Site(one.name, one.holder, name, own=one.holder is one.module))


def _free_name(holder: nn.Module, name: str) -> str:
    name = AUGMENTED.get(name, name).removesuffix("*")
    base = name[1:] if name in ("radd", "rsub", "rmul", "rtruediv", "rdiv", "rmatmul", "rpow") else name
    base = {"truediv": "div"}.get(base, base)
    free, number = base, 0
    while hasattr(holder, free):
        number += 1
        free = f"{base}_{number}"
    return free
