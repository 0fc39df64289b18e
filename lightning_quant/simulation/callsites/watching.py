"""Modules that take part in passes: their classes, and what begins and ends a pass."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_quant.simulation.callsites.attributes import (
    BUFFERS,
    CONTAINERS,
    HIDDEN_SITES,
    LIST_SITES,
    OWNER,
    QUANTIZERS,
    SEEN,
    SITES,
    is_range,
)
from lightning_quant.simulation.callsites.functions import tensors_among
from lightning_quant.simulation.callsites.interception import Interception
from lightning_quant.simulation.callsites.passes import THREAD, Pass, current, is_observed_next
from lightning_quant.simulation.callsites.traces import tracing_hidden, tracing_state, without_scope
from lightning_quant.simulation.inputs import tensors_in


class CompiledForward(Protocol):
    """Computes the ``forward`` of a network as compiled code."""

    def takes(self) -> bool:
        """Return whether it computes the network's next call."""

    def __call__(self, args: Any, kwargs: Any) -> Any:
        """Compute the network's ``forward``."""


# Networks whose `forward` is compiled at present, and what computes it.
COMPILED: MutableMapping[nn.Module, CompiledForward] = weakref.WeakKeyDictionary()


def watch(module: nn.Module) -> None:
    """Let a module take part in passes: its class becomes a subclass that is called within one.

    PyTorch's FSDP and parametrizations change classes the same way: ``isinstance``, names, attributes, hooks and
    state stay what they are.
    """
    if not is_watched(module):
        cls: Any = type(module)
        module.__class__ = watched_class(cls)


def is_watched(module: nn.Module) -> bool:
    """Return whether :func:`watch` was applied."""
    return "watched" in vars(type(module))


def class_before_watch(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module had before :func:`watch`."""
    cls: Any = vars(type(module)).get("watched", type(module))
    return cls


@functools.cache
def watched_class(cls: Any, *more: Any) -> Any:
    """Return the subclass of ``cls`` whose calls are part of a pass, with the methods of the classes ``more`` too."""
    plain_call, plain_forward = cls.__call__, cls.forward

    @functools.wraps(plain_forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        running = THREAD.running
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
        running = THREAD.running
        if running is None:
            if (compiled := COMPILED.get(self)) is not None and not is_observed_next() and compiled.takes():
                return plain_call(self, *args, **kwargs)  # its hooks, and `forward`
            return begin(self, plain_call, args, kwargs)
        if running.paused:
            return plain_call(self, *args, **kwargs)
        running.stack.append(self)
        try:
            if tracing_state() is None and LIST_SITES not in self.__dict__:
                return plain_call(self, *args, **kwargs)
            with without_scope(self), _sites_hidden(self):
                return plain_call(self, *args, **kwargs)
        finally:
            running.stack.pop()

    def new(_: type, *args: Any, **kwargs: Any) -> Any:
        # an instance that a module makes of its own class, such as a slice of a Sequential, is not watched
        return cls(*args, **kwargs) if args or kwargs else cls.__new__(watched)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        made, arguments, *state = super(watched, self).__reduce_ex__(protocol)
        if getattr(made, "__name__", "") != "__newobj__":  # the class has its own way to be pickled
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


# How lists of modules are read; the modules at call sites that a list at the root has to hold are not its own items.
_ITERATING = ("__iter__", "__len__", "__getitem__", "__contains__", "keys", "values", "items")


def _without_sites(read: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(read)
    def reading(self: nn.Module, *args: Any) -> Any:
        with _sites_hidden(self):
            found = read(self, *args)
            return iter(list(found)) if read.__name__ == "__iter__" else found

    return reading


def _sites_hidden(module: nn.Module) -> AbstractContextManager[None]:
    names = module.__dict__.get(LIST_SITES)
    return nullcontext() if not names else _hidden(module, names)


@contextmanager
def _hidden(module: nn.Module, names: Iterable[str]) -> Iterator[None]:
    children = module._modules
    if not all(name in children for name in names):  # they are hidden already
        yield
        return
    hidden = module.__dict__[HIDDEN_SITES] = {name: children.pop(name) for name in names}
    try:
        yield
    finally:
        children.update(hidden)
        del module.__dict__[HIDDEN_SITES]


def _unpickled(cls: Any, *more: Any) -> Any:
    return cls.__new__(watched_class(cls, *more))


def begin(module: nn.Module, plain_call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call the outermost module, or its ``forward`` alone, within a new pass."""
    running = THREAD.running = Pass(THREAD.observer)
    running.stack.append(module)
    try:
        hidden = nullcontext() if tracing_state() is None else tracing_hidden()
        with hidden, Interception(running), without_scope(module), _sites_hidden(module):
            output = plain_call(module, *args, **kwargs)
        if running.observer is not None:
            running.observer.end(output)
        if running.changes:
            _update_attributes(module)
        if module.__dict__.get(BUFFERS):
            _detach_from_ranges(module, module.__dict__[BUFFERS])
        return apply_to_collection(output, Tensor, _unwrapped) if _needs_unwrapping(running, output) else output
    finally:
        running.end()
        THREAD.running = None


def _update_attributes(module: nn.Module) -> None:
    """Set attributes to what tensors changed in place have become: after the pass nothing resolves that."""
    values = module.__dict__
    kept = [name for name, value in values.items() if name not in _NOT_KEPT and isinstance(value, _KEEPING)]
    for name in kept:
        if any(current(tensor) is not tensor for tensor in tensors_among(values[name])):
            values[name] = current(values[name])
    for name, child in module._modules.items():
        if child is not None and name not in QUANTIZERS and not _is_only_ours(child):
            _update_attributes(child)


def _is_only_ours(module: nn.Module) -> bool:
    """Return whether a module stands at a call site and has no hooks."""
    return OWNER in module.__dict__ and not module._forward_hooks and not module._forward_pre_hooks


# Attributes that are not the user's, and what tensors can be kept in.
_NOT_KEPT = frozenset((*vars(nn.Module()), SITES, SEEN, BUFFERS))
_KEEPING = (Tensor, list, tuple, dict)


def written_buffers(network: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return the buffers that a pass may write rounded numbers into: not those of batch norms."""
    return [
        (module, name)
        for module in network.modules()
        if not isinstance(module, nn.modules.batchnorm._NormBase)
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.is_floating_point()
    ]


def _detach_from_ranges(root: nn.Module, buffers: list[tuple[nn.Module, str]]) -> None:
    """Detach buffers that rounding alone has tied to the graph of this pass.

    A mean of ``x.detach()`` has no gradient in float; rounded, it has that of its range, and the next step would go
    back into this one. What has a gradient in float keeps it.
    """
    tied = [buffer for module, name in buffers if (buffer := module._buffers.get(name)) is not None and buffer.grad_fn]
    if tied:
        ranges = {id(parameter) for name, parameter in root.named_parameters() if is_range(name)}
        for buffer in tied:
            if _depends_on_ranges_only(buffer, ranges):
                buffer.detach_()


def _depends_on_ranges_only(tensor: Tensor, ranges: set[int]) -> bool:
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


def _unwrapped(tensor: Tensor) -> Tensor:
    """Return what a tensor is now, in PyTorch's own class: AIMET's outputs are of a subclass."""
    tensor = current(tensor)
    if "aimet_torch" not in type(tensor).__module__ or tracing_state() is not None:
        return tensor
    return tensor.as_subclass(Tensor)


def _needs_unwrapping(running: Pass, output: Any) -> bool:
    """Return whether an output may hold tensors that were changed in place, or of AIMET's class."""
    if running.changes:
        return True
    if isinstance(output, Tensor):
        return type(output) is not Tensor
    return any(type(tensor) is not Tensor for tensor in tensors_in(output))
