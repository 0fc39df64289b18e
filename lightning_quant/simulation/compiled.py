"""Training steps and validation batches of a quantized network as compiled code.

PyTorch's compiler cannot follow what lets quantizers answer the operations of the user's ``forward``. So it is not
asked to: the user's Python runs once for a graph (``torch.compiler.nonstrict_trace``), with all weights, ranges and
buffers as inputs, and the graph of plain operations that it leaves is compiled. What else the Python does is not in the
graph. It is looked for while the graph is made, and where it is found, the network goes on as it is.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from enum import Enum
from operator import itemgetter
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_quant.errors import ConfigurationError
from lightning_quant.simulation import aimet
from lightning_quant.simulation.callsites import running
from lightning_quant.simulation.callsites.sites import is_at_call_site
from lightning_quant.simulation.fast import in_graphs
from lightning_quant.simulation.inputs import tensors_in, with_tensors

log = logging.getLogger(__name__)

# Graphs of one network; each takes a minute to compile.
MOST_GRAPHS = 16
_OPTIONS = ("backend", "mode", "options")
# Where a module keeps what is not the user's to set.
_OURS = (
    "_parameters",
    "_buffers",
    "_modules",
    running.SITES,
    running.SEEN,
    running.SET_ASIDE,
    running.BUFFERS,
    "_held_weight",
    "_is_ready",
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_NOT_READ = frozenset((*vars(nn.Module()), *_OURS))
_PLAIN = (bool, int, float, str, type(None))


class Why(Enum):
    """Why a network is not compiled."""

    ATTRIBUTE = "its forward sets the attribute {}, which a graph would not"
    TENSOR = "the attribute {} is a tensor that is neither a parameter nor a buffer: a graph would keep today's numbers"
    STRANGER = "it computes with a tensor of shape {} that is no input, parameter or buffer: a graph would keep it"
    BUFFER = "its forward writes into the buffer {}"
    RANDOM = "its forward draws random numbers of {}, which a graph would keep"
    OUTPUT = "its forward returns a {}, of which a graph knows nothing"
    QUANTIZED_HOOK = "a hook of {} itself holds quantized operations, which are looked at in no graph"
    HOOK = "{} has a hook, which a graph would not call"
    GRAPHS = "it was given calls of more than {} kinds (shapes, structures, modes, numbers in attributes)"
    COMPILER = "{}"


class CannotCompileError(Exception):
    """A graph of this network would not do what the network does."""

    def __init__(self, why: Why, what: str) -> None:
        super().__init__(why.value.format(what))
        self.why = why


def check_options(given: Any) -> dict[str, Any]:
    """Turn ``True`` or a mapping into arguments of ``torch.compile``.

    Raises:
        ConfigurationError: for anything else, or arguments that ``torch.compile`` does not take.
    """
    if given is not True and not isinstance(given, Mapping):
        raise ConfigurationError(f"compile={given!r}: expected True, False or a mapping of torch.compile's options.")
    options: dict[str, Any] = {} if given is True else dict(given)
    if other := sorted(options.keys() - set(_OPTIONS)):
        raise ConfigurationError(
            f"compile={given!r}: expected {', '.join(_OPTIONS)}. Leave {', '.join(map(repr, other))} away: a graph is "
            "whole, and of one size."
        )
    try:
        torch.compile(_read, **options)
    except Exception as error:  # each backend has its own
        raise ConfigurationError(
            f"compile={given!r}: torch.compile does not take it: {type(error).__name__}: "
            f"{str(error).strip().splitlines()[0]} Expected a backend, mode or options that it knows."
        ) from error
    return options


class Compiled:
    """The compiled form of a quantized network; it is in the network's place inside of :meth:`in_place`.

    Args:
        network: calibrated.
        options: arguments of ``torch.compile``, such as ``{"mode": "reduce-overhead"}``.

    Attributes:
        why_not: why the network runs as it is, if it does.
    """

    def __init__(self, network: nn.Module, options: Mapping[str, Any] | None = None) -> None:
        self.network = network
        self.why_not: CannotCompileError | None = None
        self._options = {"dynamic": False, "fullgraph": True, **(options or {})}
        self._graphs: dict[Any, Callable[..., Any]] = {}
        self._modules = dict(network.named_modules())
        # modules of the libraries have no attributes that others set from step to step
        own = {
            name: module for name, module in self._modules.items() if not type(module).__module__.startswith(_LIBRARIES)
        }
        self._own = own
        self._attributes = [vars(module) for module in own.values()]
        self._modes = [vars(module) for module in self._modules.values()]
        # of theirs, numbers that others may set: bit widths, the probability of a dropout; all of a module in one call
        self._numbers = [
            (itemgetter(*names), vars(module))
            for name, module in self._modules.items()
            if name not in own and not is_at_call_site(module) and (names := _names_of_numbers(module))
        ]
        self._hooks = [(name, vars(module)[kind]) for name, module in self._modules.items() if name for kind in _HOOKS]
        # outside of a graph nobody looks at what hooks of the network itself compute
        self._outside = [vars(network)[kind] for kind in _HOOKS] if _is_quantized_in_hooks(network) else []

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let calls of the network run compiled for the length of a block."""
        running.COMPILED[self.network] = self
        try:
            yield
        finally:
            del running.COMPILED[self.network]

    def takes(self) -> bool:
        """Whether the network's next call is one for :meth:`__call__`; its hooks run around it."""
        if self.why_not is None and any(self._outside):
            self._give_up(CannotCompileError(Why.QUANTIZED_HOOK, type(self.network).__name__))
        return self.why_not is None

    def _give_up(self, error: CannotCompileError) -> None:
        self.why_not = error
        log.warning("%s is not compiled: %s.", type(self.network).__name__, error)

    def __call__(self, args: Any, kwargs: Any) -> Any:
        """Compute the network's ``forward``."""
        if self.why_not is None:
            try:
                return self._run(args, kwargs)
            except CannotCompileError as error:
                self._give_up(error)
        return running.begin(self.network, _forward_of(self.network), args, kwargs)

    def _run(self, args: Any, kwargs: Any) -> Any:
        for name, hooks in self._hooks:
            if hooks:
                raise CannotCompileError(Why.HOOK, name)
        tensors = [*self.network.parameters(), *self.network.buffers()]
        state = (
            _kind((args, kwargs)),
            _kind_of_pass(),
            tuple([tensor.requires_grad for tensor in tensors]),
            tuple([values["training"] for values in self._modes]),
            tuple(
                [_read(value) for values in self._attributes for key, value in values.items() if key not in _NOT_READ]
            ),
            tuple([get(values) for get, values in self._numbers]),
        )
        graph = self._graphs.get(state)
        before = _remembered(self._modules) if graph is None else None
        if graph is None:
            if len(self._graphs) == MOST_GRAPHS:
                raise CannotCompileError(Why.GRAPHS, str(MOST_GRAPHS))
            graph = self._graphs[state] = self._made()
        try:
            return graph(tensors, args, kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if before is not None:
                _put_back(self._modules, before)
            elif not isinstance(error, _OF_THE_COMPILER):
                raise
            if (found := _cause(error)) is not None:
                raise found from None
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            raise CannotCompileError(Why.COMPILER, reason) from error

    def _made(self) -> Callable[..., Any]:
        """The compiler's form of the forward pass, in the state the modules are in now."""
        network, forward = self.network, _forward_of(self.network)
        own = [*network.parameters(), *network.buffers()]
        calibrated = _calibrated(network)

        def run(tensors: list[Tensor], args: Any, kwargs: Any) -> Any:
            before, drawn = _remembered(self._modules), _random_states()
            with in_graphs.made(calibrated) as strangers, _exchanged(network, own, tensors):
                output = running.begin(network, forward, args, kwargs)
            self._check_traces(before, drawn)
            if strangers and type(tensors[0]) not in (Tensor, nn.Parameter):  # backend="eager" runs this with real ones
                raise CannotCompileError(Why.STRANGER, f"{tuple(strangers[0].shape)}")
            answer[:] = [apply_to_collection(output, Tensor, lambda _: _TENSOR)]
            if (other := next((one for one in _leaves(output) if type(one) not in _PLAIN), None)) is not None:
                raise CannotCompileError(Why.OUTPUT, type(other).__name__)
            return tensors_in(output)

        answer: list[Any] = []  # what it is made of: the compiler knows tensors, numbers and few containers
        traced = _nonstrict_trace(run)

        def graph(tensors: list[Tensor], args: Any, kwargs: Any) -> Any:
            return traced(tensors, args, kwargs)

        # the compiler keeps its graphs, and counts them, by the code object
        separate = FunctionType(graph.__code__.replace(), graph.__globals__, "graph", None, graph.__closure__)
        compiled = torch.compile(separate, **self._options)

        def answered(tensors: list[Tensor], args: Any, kwargs: Any) -> Any:
            found = compiled(tensors, args, kwargs)
            return with_tensors(answer[0], found)

        return answered

    def _check_traces(self, before: Any, drawn: Any) -> None:
        """Raise if the Python that has run left more behind than operations, or read what no graph reads."""
        _put_back({name: self._modules[name] for name in self._modules.keys() - self._own.keys()}, before)
        for name, module in self._own.items():
            now = _values(module)
            for key in before[name].keys() | now.keys():
                if not _same(before[name].get(key, _MISSING), now.get(key, _MISSING)):
                    raise CannotCompileError(Why.ATTRIBUTE, f"{name}.{key}".lstrip("."))
                if isinstance(now[key], Tensor):
                    raise CannotCompileError(Why.TENSOR, f"{name}.{key}".lstrip("."))
        for whose, old, new in zip(("Python", "NumPy"), drawn, _random_states(), strict=True):
            if old != new:
                raise CannotCompileError(Why.RANDOM, whose)


@contextmanager
def _exchanged(network: nn.Module, own: list[Tensor], given: list[Tensor]) -> Iterator[None]:
    """Let a network compute with other parameters and buffers for the length of a block.

    ``torch.func.functional_call`` does not put all back where a module has two names, as shared quantizers have.
    """
    of = {id(mine): other for mine, other in zip(own, given, strict=True)}
    places: list[tuple[nn.Module, Any, str, Tensor]] = [
        (module, holder, name, value)
        for module in network.modules()
        for holder in (module._parameters, module._buffers)
        for name, value in holder.items()
        if value is not None
    ]
    versions = [tensor._version for tensor in given]
    try:
        for _, holder, name, value in places:
            holder[name] = of[id(value)]
        yield
        changed = {id(tensor) for tensor, before in zip(given, versions, strict=True) if tensor._version != before}
        for module, holder, name, value in places:
            # what is written may depend on ranges that learn, and the compiler would let the next step go back to it
            is_norm = isinstance(module, nn.modules.batchnorm._NormBase)
            if holder.get(name) is not of[id(value)] or (id(of[id(value)]) in changed and not is_norm):
                raise CannotCompileError(Why.BUFFER, f"{name} of a {type(module).__name__}")
    finally:
        for _, holder, name, value in places:
            holder[name] = value


_LIBRARIES = ("torch.", "aimet_torch.", "lightning_quant.simulation.")
_MISSING = object()
# PyTorch 2.11 has it in its private place only.
_nonstrict_trace: Any = getattr(torch.compiler, "nonstrict_trace", None) or torch._dynamo.nonstrict_trace


# What a graph that was made once can still raise, before it computes: it is made anew where something is different.
_OF_THE_COMPILER = (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit)


# Where a tensor is in an answer.
_TENSOR = torch.empty(0)


def _leaves(answer: Any) -> Iterator[Any]:
    """What is at the ends of an answer, but for tensors."""
    if isinstance(answer, Mapping):
        answer = list(answer.values())
    elif is_dataclass(answer) and not isinstance(answer, type):
        answer = [getattr(answer, one.name) for one in fields(answer)]
    elif not isinstance(answer, (list, tuple)):
        if not isinstance(answer, Tensor):
            yield answer
        return
    for one in answer:
        yield from _leaves(one)


def _kind(value: Any) -> Any:
    """What a graph takes for given of the arguments of a call: all but the numbers in tensors."""
    if isinstance(value, Tensor):
        strides = value.stride() if value.layout is torch.strided else ()
        return type(value), value.shape, strides, value.dtype, value.device, value.requires_grad
    if isinstance(value, (list, tuple)):
        return (type(value), *map(_kind, value))
    if isinstance(value, Mapping):
        return (type(value), *((key, _kind(one)) for key, one in value.items()))
    return (type(value), value) if type(value) in _PLAIN else type(value)


def _kind_of_pass() -> Any:
    """What a graph takes for given of what surrounds a call."""
    kinds = ("cpu", "cuda")
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in kinds),
    )


def _read(value: Any, inside: bool = False) -> Any:
    """What a forward pass can read of an attribute and take for given: numbers, and what consists of them."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is list or kind is tuple:
        return tuple([_read(one, inside) for one in value])
    if kind is dict:
        return tuple([(key, _read(one, inside)) for key, one in value.items() if type(key) in _PLAIN])
    if inside or not hasattr(value, "__dict__") or isinstance(value, _NOT_LOOKED_INTO):
        return None
    if kind.__module__.partition(".")[0] in _NOT_OF_USERS:
        return None
    return _read(vars(value), inside=True)  # an object of the user's own, such as a configuration


_NOT_LOOKED_INTO = (nn.Module, type, ModuleType, FunctionType, MethodType)
_NOT_OF_USERS = ("torch", "aimet_torch", "lightning_quant", "functools")


def _names_of_numbers(module: nn.Module) -> list[str]:
    return [name for name, value in vars(module).items() if type(value) in _PLAIN and name not in _OURS]


def _forward_of(network: nn.Module) -> Callable[..., Any]:
    watched: Any = type(network)
    return watched.watched.forward


def _is_quantized_in_hooks(network: nn.Module) -> bool:
    """Whether a call site of the network stands in no ``forward``."""
    outermost = [found[-2] for found, _ in running.sites_of(network) if len(found) > 1]
    return any(name.rpartition(".")[2] != "forward" for name, *_ in outermost)


def _calibrated(network: nn.Module) -> list[nn.Module]:
    """The quantizers whose ranges are known."""
    return [one for one in network.modules() if isinstance(one, aimet.QuantizerBase) and one.is_initialized()]


def _values(module: nn.Module) -> dict[str, Any]:
    """What a module keeps, one level of containers copied."""
    kept = {}
    for key, value in vars(module).items():
        if key not in _OURS and key not in _HOOKS:
            kept[key] = value.copy() if type(value) in (list, dict, set) else value
    return kept


def _remembered(modules: Mapping[str, nn.Module]) -> dict[str, dict[str, Any]]:
    return {name: _values(module) for name, module in modules.items()}


def _put_back(modules: Mapping[str, nn.Module], before: Mapping[str, dict[str, Any]]) -> None:
    for name, module in modules.items():
        now = _values(module)
        for key in now.keys() - before[name].keys():
            del vars(module)[key]
        for key, value in before[name].items():
            if not _same(value, now.get(key, _MISSING)):
                vars(module)[key] = value


def _same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if type(one) is dict:
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if type(one) is list:
        return len(one) == len(other) and all(map(_same, one, other))
    if type(one) is set:
        return bool(one == other)
    return one is other or (type(one) in _PLAIN and one == other)


def _random_states() -> tuple[Any, Any]:
    kind, keys, *rest = np.random.get_state(legacy=True)
    return random.getstate(), (kind, keys.tobytes(), *rest)  # type: ignore[union-attr]


def _cause(error: BaseException | None) -> CannotCompileError | None:
    """What this file raised, below whatever the compiler has made of it."""
    while error is not None:
        if isinstance(error, CannotCompileError):
            return error
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    return None
