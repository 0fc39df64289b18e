"""One pass of a network: whose forward runs, which operation is reached for the how-manieth time, who answers it.

The user's Python runs as it is written. While it runs, a ``TorchFunctionMode`` sees every operation of PyTorch. Where
in the code an operation stands — the module whose forward runs, the line, the how-manieth time in this pass — is its
place, and the module that was made for the place computes in its stead. An operation without a place of its own runs
as if nobody were looking.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.utils.checkpoint
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_quant.simulation.callsites.functions import CASTS, base_name, computes, tensors_among
from lightning_quant.simulation.callsites.places import Place, Sites, Spot, same, spot
from lightning_quant.simulation.inputs import tensors_in

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from lightning_quant.simulation.callsites.recording import Recorder
    from lightning_quant.simulation.callsites.sites import ApartSite, Site
    from lightning_quant.simulation.compiled import Compiled

# Where a module keeps its call sites, in its ``__dict__``: no child, no parameter, copied and pickled along.
SITES = "_call_sites"
# Where it keeps the places that were looked at, whether they needed a site or not.
SEEN = "_places_seen"
# Where a tensor that was changed in place keeps what it is now.
_NOW = "_changed_into"
# A batch norm of another class than PyTorch's own that was folded into the layer before it.
FOLDED = "_folded_away"
# What the module at a call site is marked with that only a trace comes to.
IN_TRACES_ONLY = "_in_traces_only"
# What the module at a call site is marked with: whose code the operation stands in.
OWNER = "_owner"
# Names of the sites that a list of modules holds itself, and where they are while it is read.
OF_A_LIST, SET_ASIDE = "_sites_of_a_list", "_sites_set_aside"
# Where the outermost module keeps which buffers a pass may write into: the modules, and the names there.
BUFFERS = "_written_buffers"
# These are iterated over: no place for a child of ours, where there is another.
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# What PyTorch's recurrent layers mark a first state with that nobody gave them.
MADE_UP = "_is_made_up"

# Networks whose `forward` is compiled for the time being, and what computes it.
COMPILED: MutableMapping[nn.Module, Compiled] = weakref.WeakKeyDictionary()

# Functions that ONNX does not have → what computes the same of other functions, for a trace.
IN_TRACES: dict[Any, Callable[..., Any]] = {}


class Pass:
    """What is known of the pass that runs: one per thread, begun by the outermost module."""

    __slots__ = (
        "changes",
        "counts",
        "is_looked_at",
        "is_traced",
        "mode",
        "noted",
        "paused",
        "recorder",
        "stack",
        "within",
    )

    def __init__(self, recorder: Recorder | None = None) -> None:
        self.stack: list[nn.Module] = []
        self.counts: dict[tuple[int, int], int] = {}  # by the numbers of module and spot
        self.recorder = recorder
        self.noted = _local.noted
        self.is_looked_at = recorder is not None or self.noted is not None
        self.is_traced = traced()  # no trace or export begins in the midst of a pass
        self.paused = False  # inside a quantized layer, where there is nothing to see
        self.changes = False  # whether a tensor was changed in place
        self.within: Place | tuple[()] = ()  # the place of the operation that is being taken apart
        self.mode = Interception(self)

    def count(self, module: nn.Module, found: Spot) -> int:
        """How many operations stood at this spot in the pass so far; one more does now."""
        key = id(module), id(found)
        count = self.counts.get(key, 0)
        self.counts[key] = count + 1
        return count


def traced() -> bool:
    """Whether PyTorch is writing down what runs now."""
    return torch._C._get_tracing_state() is not None or torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export()


class _Local(threading.local):
    def __init__(self) -> None:
        self.running: Pass | None = None
        self.recorder: Recorder | None = None  # takes part in the next pass
        self.noted: dict[nn.Module, list[str]] | None = None


_local = _Local()


class Interception(TorchFunctionMode):
    """Hands each operation to the site it stands at."""

    def __init__(self, running: Pass) -> None:
        super().__init__()
        self.running = running

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # every operation of every step comes through here, and every look at a shape
        running = self.running
        if kwargs is None:
            kwargs = {}
        if running.changes:
            args, kwargs = current(args), current(kwargs)
        if running.is_looked_at or _tracing_state() is not None:
            return self._looked_at(func, args, kwargs)
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
        if named is not None:
            found = spot(running.within, name)
            site = named.get((id(found), running.count(module, found)))
            if site is not None and (answer := site.answer(running, func, args, kwargs)) is not NotImplemented:
                return answer
        result = func(*args, **kwargs)
        if func is torch.zeros and isinstance(module, _RECURRENT):
            result.__dict__[MADE_UP] = True
        return result

    def _looked_at(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The same in a trace, and where somebody wants to know of each operation."""
        running = self.running
        traced = _tracing_state() is not None
        if traced:
            if func in _SIZES:
                return _as_numbers(func, args, kwargs)
            if _is_idle_cast(func, args, kwargs):
                return args[0]
        recorder = running.recorder
        if recorder is not None:
            return recorder.operation(running, func, args, kwargs)
        if running.paused or not running.stack:
            return func(*args, **kwargs)
        module = running.stack[-1]
        values = module.__dict__
        name = base_name(func)
        if FOLDED in values and name == "batch_norm":
            return args[0] if args else kwargs["input"]
        at = place(running, module, name)
        site = values.get(SITES, {}).get(at)
        if site is not None and (answer := site.answer(running, func, args, kwargs)) is not NotImplemented:
            return answer
        if traced:
            func = IN_TRACES.get(func, func)
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
        if func is torch.zeros and isinstance(module, _RECURRENT):
            result.__dict__[MADE_UP] = True
        return result


_tracing_state = torch._C._get_tracing_state
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)


def _indexed(module: nn.Module) -> Any:
    values = module.__dict__
    if not isinstance(values[SITES], Sites):
        values[SITES] = Sites(values[SITES])
    return values[SITES].index()


_SHAPE: Any = Tensor.shape
_SIZES = frozenset((Tensor.size, _SHAPE.__get__, Tensor.numel, Tensor.nelement, Tensor.__len__, torch.numel))


def _as_numbers(func: Any, args: Any, kwargs: Any) -> Any:
    """Answer what is asked of a size as outside of a trace, where it is a number: a device has one graph for one size.

    A trace hands out tensors for it. What is computed of these (padding, masks, positions) would go into the graph, and
    code that asks whether a size is a tensor would go another way.
    """
    with untraced():
        return func(*args, **kwargs)


@contextmanager
def untraced() -> Iterator[None]:
    """Leave what is computed in a block out of a trace: its results are constants there."""
    tracer: Any = torch._C
    state = tracer._get_tracing_state()
    tracer._set_tracing_state(None)
    try:
        yield
    finally:
        tracer._set_tracing_state(state)


def _is_idle_cast(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a cast leaves a tensor the object it was; a trace writes it down all the same, which AIMET loses."""
    if base_name(func) not in CASTS or not args or not isinstance(args[0], Tensor) or kwargs.get("copy"):
        return False
    given = args[0]
    made = func(torch.empty((), dtype=given.dtype, device=given.device), *args[1:], **kwargs)
    return isinstance(made, Tensor) and made.dtype == given.dtype and made.device == given.device


def place(running: Pass, module: nn.Module, name: str) -> Place:
    """Where in the code of ``module`` the operation stands that is handled now; counts it."""
    found = spot(running.within, name)
    return same((found, running.count(module, found)))


def current(value: Any) -> Any:
    """The arguments of an operation, with what tensors changed in place have become."""
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


def changed_into(running: Pass, tensor: Tensor, result: Tensor) -> None:
    """Note that an operation in place made ``tensor`` what ``result`` is, for all who hold it."""
    if tensor is not result:
        tensor.__dict__[_NOW] = result
        running.changes = True


def sites_of(module: nn.Module) -> dict[Place, Site | ApartSite]:
    """The call sites of a module; empty where it has none."""
    return module.__dict__.get(SITES, {})


def add_site(module: nn.Module, at: Place, site: Site | ApartSite) -> None:
    """Let ``site`` answer the operation at a place in the code of ``module``."""
    module.__dict__.setdefault(SITES, Sites())[at] = site


# ---- modules that take part ------------------------------------------------------------------------------------------
def watch(module: nn.Module) -> None:
    """Let a module take part in passes: its class becomes a subclass that is called within one.

    PyTorch's FSDP and parametrizations change classes the same way: ``isinstance``, names, attributes, hooks and
    state stay what they are.
    """
    if not is_watched(module):
        cls: Any = type(module)
        module.__class__ = watched_class(cls)


def is_watched(module: nn.Module) -> bool:
    """Whether :func:`watch` was applied."""
    return "watched" in vars(type(module))


@functools.cache
def watched_class(cls: Any, *more: Any) -> Any:
    """The subclass of ``cls`` whose calls are part of a pass; it has the methods of the classes ``more`` too."""
    plain_call, plain_forward = cls.__call__, cls.forward

    @functools.wraps(plain_forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        running = _local.running
        if running is None and (compiled := COMPILED.get(self)) is not None:
            return compiled(args, kwargs)
        output = plain_forward(self, *args, **kwargs)
        if running is None or not running.changes:
            return output
        if isinstance(output, Tensor):
            return current(output)
        if all(current(one) is one for one in tensors_in(output)):
            return output
        return apply_to_collection(output, Tensor, current)  # hooks keep what they are given

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        running = _local.running
        if running is None:
            if (compiled := COMPILED.get(self)) is not None and not _is_looked_at() and compiled.takes():
                return plain_call(self, *args, **kwargs)  # its hooks, and `forward`
            return begin(self, plain_call, args, kwargs)
        if running.paused:
            return plain_call(self, *args, **kwargs)
        running.stack.append(self)
        try:
            if _tracing_state() is None and OF_A_LIST not in self.__dict__:
                return plain_call(self, *args, **kwargs)
            with _flat(self), _sites_set_aside(self):
                return plain_call(self, *args, **kwargs)
        finally:
            running.stack.pop()

    def new(_: type, *args: Any, **kwargs: Any) -> Any:
        # what a module makes of its own class, such as a slice of a Sequential, is nothing that was watched
        return cls(*args, **kwargs) if args or kwargs else cls.__new__(watched)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        made, arguments, *state = super(watched, self).__reduce_ex__(protocol)
        if getattr(made, "__name__", "") != "__newobj__":  # the class has a way of its own
            return (made, arguments, *state)
        return (_unpickled, (cls, *more), *state)

    def named_parameters(self: nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        # weights in the order of the float network, so that a teacher's can be zipped with them; then the ranges
        ranges = []
        for name, parameter in super(watched, self).named_parameters(*args, **kwargs):
            if is_range(name):
                ranges.append((name, parameter))
            else:
                yield name, parameter
        yield from ranges

    body = {
        "__call__": call,
        "forward": forward,
        "__new__": new,
        "__reduce_ex__": reduce,
        "named_parameters": named_parameters,
        "watched": cls,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    if issubclass(cls, CONTAINERS):
        body |= {name: _without_sites(getattr(cls, name)) for name in _ITERATING if hasattr(cls, name)}
    for one in more:
        body |= {name: value for name, value in vars(one).items() if callable(value)}
    watched = type(cls)(cls.__name__, (cls,), body)
    return watched


# How lists of modules are read; the modules at call sites that a list at the root has to hold are none of its own.
_ITERATING = ("__iter__", "__len__", "__getitem__", "__contains__", "keys", "values", "items")


def _without_sites(read: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(read)
    def reading(self: nn.Module, *args: Any) -> Any:
        with _sites_set_aside(self):
            found = read(self, *args)
            return iter(list(found)) if read.__name__ == "__iter__" else found

    return reading


def _sites_set_aside(module: nn.Module) -> AbstractContextManager[None]:
    names = module.__dict__.get(OF_A_LIST)
    return nullcontext() if not names else _set_aside(module, names)


@contextmanager
def _set_aside(module: nn.Module, names: Iterable[str]) -> Iterator[None]:
    children = module._modules
    if not all(name in children for name in names):  # they are already
        yield
        return
    aside = module.__dict__[SET_ASIDE] = {name: children.pop(name) for name in names}
    try:
        yield
    finally:
        children.update(aside)
        del module.__dict__[SET_ASIDE]


_QUANTIZERS = ("param_quantizers", "input_quantizers", "output_quantizers")


def is_range(name: str) -> bool:
    """Whether a parameter of that name is an end of a quantizer's range."""
    return name.endswith((".min", ".max")) and any(f"{part}." in name for part in _QUANTIZERS)


def _unpickled(cls: Any, *more: Any) -> Any:
    return cls.__new__(watched_class(cls, *more))


def begin(module: nn.Module, plain_call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call the outermost module, or its ``forward`` alone, within a new pass."""
    running = _local.running = Pass(_local.recorder)
    running.stack.append(module)
    try:
        usual = nullcontext() if torch._C._get_tracing_state() is None else _going_the_usual_way()
        with usual, running.mode, _flat(module), _sites_set_aside(module):
            output = plain_call(module, *args, **kwargs)
        if running.recorder is not None:
            running.recorder.end(output)
        if running.changes:
            _keep_current(module)
        if module.__dict__.get(BUFFERS):
            _leave_ranges(module, module.__dict__[BUFFERS])
        return apply_to_collection(output, Tensor, _plain) if _is_marked(running, output) else output
    finally:
        _local.running = None


# Who is told the truth about a trace or an export.
_TOLD = ("torch", "aimet_torch", "lightning_quant")


@contextmanager
def _going_the_usual_way() -> Iterator[None]:
    """Hide from the network's own code that it is traced or exported.

    Libraries go another way then, around what older exporters could not write, or with sizes that are tensors. The way
    that was quantized, calibrated and measured is the one that is wanted.
    """
    asked: list[tuple[Any, str, Any]] = [
        (torch.jit, "is_tracing", torch.jit.is_tracing),
        (torch.onnx, "is_in_onnx_export", torch.onnx.is_in_onnx_export),
    ]
    for module, name, told in asked:
        setattr(module, name, functools.partial(_answered, told))
    try:
        yield
    finally:
        for module, name, told in asked:
            setattr(module, name, told)


def _answered(told: Callable[[], bool]) -> bool:
    asking = str(sys._getframe(1).f_globals.get("__name__", ""))
    return asking.partition(".")[0] in _TOLD and told()


def _keep_current(module: nn.Module) -> None:
    """Give attributes what tensors changed in place have become: after the pass they are read as they lie."""
    values = module.__dict__
    kept = [name for name, value in values.items() if name not in _NOT_KEPT and isinstance(value, _KEEPING)]
    for name in kept:
        if any(current(tensor) is not tensor for tensor in tensors_among(values[name])):
            values[name] = current(values[name])
    for name, child in module._modules.items():
        if child is not None and name not in _QUANTIZERS and not _is_only_ours(child):
            _keep_current(child)


def _is_only_ours(module: nn.Module) -> bool:
    """Whether a module stands at a call site and nobody hooked into it."""
    return OWNER in module.__dict__ and not module._forward_hooks and not module._forward_pre_hooks


# Attributes in which nothing of the user's lies, and what tensors can be kept in.
_NOT_KEPT = frozenset((*vars(nn.Module()), SITES, SEEN, BUFFERS))
_KEEPING = (Tensor, list, tuple, dict)


def written_buffers(network: nn.Module) -> list[tuple[nn.Module, str]]:
    """The buffers that a pass may write rounded numbers into, for :data:`BUFFERS`: not those of batch norms."""
    return [
        (module, name)
        for module in network.modules()
        if not isinstance(module, nn.modules.batchnorm._NormBase)
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.is_floating_point()
    ]


def _leave_ranges(root: nn.Module, buffers: list[tuple[nn.Module, str]]) -> None:
    """Let buffers forget where rounding alone has tied them to this pass.

    A mean of ``x.detach()`` has no gradient in float; rounded, it has that of its range, and the next step would go
    back into this one. What has a gradient in float keeps it.
    """
    tied = [buffer for module, name in buffers if (buffer := module._buffers.get(name)) is not None and buffer.grad_fn]
    if tied:
        ranges = {id(parameter) for name, parameter in root.named_parameters() if is_range(name)}
        for buffer in tied:
            if _is_of_ranges_only(buffer, ranges):
                buffer.detach_()


def _is_of_ranges_only(tensor: Tensor, ranges: set[int]) -> bool:
    waiting: list[Any] = [tensor.grad_fn]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in ranges:
            return False
        waiting += [before for before, _ in node.next_functions]
    return True


def _plain(tensor: Tensor) -> Tensor:
    """What a tensor is now, in PyTorch's own class: AIMET marks its outputs with another."""
    tensor = current(tensor)
    if "aimet_torch" not in type(tensor).__module__ or torch._C._get_tracing_state() is not None:
        return tensor
    return tensor.as_subclass(Tensor)


def _is_marked(running: Pass, output: Any) -> bool:
    """Whether an output has to be looked through: for what was changed in place, and for AIMET's class of tensors."""
    if running.changes:
        return True
    if isinstance(output, Tensor):
        return type(output) is not Tensor
    return any(type(tensor) is not Tensor for tensor in tensors_in(output))


def _flat(module: nn.Module) -> AbstractContextManager[None]:
    """While AIMET traces, a module's operations stand where its call stands.

    A module that is called twice computes with other sites the second time; a trace by modules has one body for both.
    """
    names = torch.jit._trace._trace_module_map
    if names is None or torch._C._get_tracing_state() is None or torch.onnx.is_in_onnx_export():
        return nullcontext()
    return _left_out(names, module)


@contextmanager
def _left_out(names: Any, module: nn.Module) -> Iterator[None]:
    name = names.pop(module, None)
    try:
        yield
    finally:
        if name is not None:
            names[module] = name


class paused:
    """Look at nothing for the length of a block: the inside of a quantized layer."""

    __slots__ = ("before", "running")

    def __enter__(self) -> None:
        self.running = _local.running
        if self.running is not None:
            self.before, self.running.paused = self.running.paused, True

    def __exit__(self, *_: Any) -> None:
        if self.running is not None:
            self.running.paused = self.before


def _is_looked_at() -> bool:
    """Whether somebody wants to see the operations of the next pass."""
    return _local.recorder is not None or _local.noted is not None or traced()


def running_pass() -> Pass | None:
    """The pass that runs in this thread."""
    return _local.running


@contextmanager
def recorded_by(recorder: Recorder) -> Iterator[None]:
    """Let a recorder see every operation of the passes in a block."""
    _local.recorder = recorder
    try:
        yield
    finally:
        _local.recorder = None


@contextmanager
def noting() -> Iterator[dict[nn.Module, list[str]]]:
    """Note, by module, the operations that are computed in eval mode at places where none was seen before.

    They stay in float: code that the examples did not come to, or not with these settings.
    """
    before, _local.noted = _local.noted, {}
    try:
        yield _local.noted
    finally:
        _local.noted = before


# ---- gradient checkpointing ------------------------------------------------------------------------------------------
def _keeping_place(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is run a second time in the backward pass, as part of the pass it was first run in."""
    first = _local.running
    if first is None or first.recorder is not None:
        return function
    stack, counts = list(first.stack), dict(first.counts)

    @functools.wraps(function, assigned=("__name__", "__doc__"), updated=())
    def resumed(*args: Any, **kwargs: Any) -> Any:
        if _local.running is not None:
            return function(*args, **kwargs)
        running = _local.running = Pass()
        running.stack, running.counts = list(stack), dict(counts)
        try:
            with running.mode:
                return function(*args, **kwargs)
        finally:
            _local.running = None

    return resumed


@functools.cache
def follow_checkpoints() -> None:
    """Let ``torch.utils.checkpoint`` run functions again in the pass they belong to."""
    module: Any = torch.utils.checkpoint
    name = "_checkpoint_without_reentrant_generator"
    name = f"{name}_impl" if hasattr(module, f"{name}_impl") else name  # what 2.14 has made of the one of 2.11
    without_reentrant, reentrant = getattr(module, name), module.CheckpointFunction.apply

    @functools.wraps(without_reentrant)
    def generator(fn: Any, *args: Any, **kwargs: Any) -> Any:
        return without_reentrant(_keeping_place(fn), *args, **kwargs)

    def apply(function: Any, *args: Any) -> Any:
        if torch._C._get_tracing_state() is not None:
            return function(*args[1:])  # the first says whether to keep the state of the random numbers
        return reentrant(_keeping_place(function), *args)

    setattr(module, name, generator)
    module.CheckpointFunction.apply = apply
