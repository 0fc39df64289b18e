"""Training steps and validation batches of a quantized network as compiled code.

PyTorch's compiler cannot follow the interception of the user's ``forward``. So the user's Python runs once per graph
(``torch.compiler.nonstrict_trace``), with all weights, ranges and buffers as inputs, and the resulting graph of plain
operations is compiled. Side effects of the Python are not in the graph. They are detected while the graph is traced;
a network that has any runs uncompiled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from enum import Enum
from operator import itemgetter
from types import FunctionType
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_quant.errors import ConfigurationError
from lightning_quant.simulation import aimet
from lightning_quant.simulation.callsites.attributes import is_at_call_site
from lightning_quant.simulation.callsites.sites import sites_of
from lightning_quant.simulation.callsites.watching import COMPILED, begin
from lightning_quant.simulation.fast import in_graphs
from lightning_quant.simulation.graph_state import (
    HOOKS,
    MISSING,
    NOT_READ,
    PLAIN,
    attributes_of,
    call_key,
    constants_of,
    is_same,
    mode_key,
    number_names,
    random_states,
    restore,
    snapshot,
)
from lightning_quant.simulation.inputs import tensors_in, with_tensors

log = logging.getLogger(__name__)

# Graphs of one network; each takes a minute to compile.
MOST_GRAPHS = 16
_OPTIONS = ("backend", "mode", "options")


class Why(Enum):
    """Why a network is not compiled."""

    ATTRIBUTE = "its forward sets the attribute {}, which a graph would not"
    TENSOR = "the attribute {} is a tensor that is neither a parameter nor a buffer: a graph would keep its values"
    FOREIGN_TENSOR = (
        "it computes with a tensor of shape {} that is not an input, parameter or buffer, which a graph would keep"
    )
    BUFFER = "its forward writes into the buffer {}"
    RANDOM = "its forward draws random numbers of {}, which a graph would repeat"
    OUTPUT = "its forward returns a {}, an object of unknown content"
    QUANTIZED_HOOK = "a hook of {} itself holds quantized operations, which a graph does not contain"
    HOOK = "{} has a hook, which a graph would not call"
    GRAPHS = "it was called in more than {} ways (shapes, structures, modes, numbers in attributes)"
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
            f"compile={given!r}: expected {', '.join(_OPTIONS)}. Remove {', '.join(map(repr, other))}: a graph is "
            "whole, and of one size."
        )
    try:
        torch.compile(constants_of, **options)
    except Exception as error:  # each backend has its own
        raise ConfigurationError(
            f"compile={given!r}: torch.compile does not take it: {type(error).__name__}: "
            f"{str(error).strip().splitlines()[0]} Expected a backend, mode or options that it knows."
        ) from error
    return options


class Compiled:
    """The compiled form of a quantized network; calls of the network use it inside :meth:`active`.

    Args:
        network: calibrated.
        options: arguments of ``torch.compile``, such as ``{"mode": "reduce-overhead"}``.

    Attributes:
        why_not: why the network runs uncompiled, if it does.
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
            if name not in own and not is_at_call_site(module) and (names := number_names(module))
        ]
        self._hooks = [(name, vars(module)[kind]) for name, module in self._modules.items() if name for kind in HOOKS]
        # operations in hooks of the network itself are outside of any graph, and would not be intercepted
        self._outside = [vars(network)[kind] for kind in HOOKS] if _is_quantized_in_hooks(network) else []

    @contextmanager
    def active(self) -> Iterator[None]:
        """Let calls of the network run compiled for the length of a block."""
        COMPILED[self.network] = self
        try:
            yield
        finally:
            del COMPILED[self.network]

    def takes(self) -> bool:
        """Return whether the network's next call is one for :meth:`__call__`; its hooks run around it."""
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
        return begin(self.network, _forward_of(self.network), args, kwargs)

    def _run(self, args: Any, kwargs: Any) -> Any:
        for name, hooks in self._hooks:
            if hooks:
                raise CannotCompileError(Why.HOOK, name)
        tensors = self._tensors()
        state = (
            call_key((args, kwargs)),
            mode_key(),
            tuple([tensor.requires_grad for tensor in tensors]),
            tuple([values["training"] for values in self._modes]),
            tuple(
                [
                    constants_of(value)
                    for values in self._attributes
                    for key, value in values.items()
                    if key not in NOT_READ
                ]
            ),
            tuple([get(values) for get, values in self._numbers]),
        )
        graph = self._graphs.get(state)
        before = snapshot(self._modules) if graph is None else None
        if graph is None:
            if len(self._graphs) == MOST_GRAPHS:
                raise CannotCompileError(Why.GRAPHS, str(MOST_GRAPHS))
            graph = self._graphs[state] = self._compile()
        try:
            return graph(tensors, args, kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if before is not None:
                restore(self._modules, before)
            elif not isinstance(error, _OF_THE_COMPILER):
                raise
            if (found := _cause(error)) is not None:
                raise found from None
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            raise CannotCompileError(Why.COMPILER, reason) from error

    def _tensors(self) -> list[Tensor]:
        """Return parameters and buffers; ``nn.Module`` takes longer to find them than a small network to compute."""
        of_modules = [values for values in self._modes for values in (values["_parameters"], values["_buffers"])]
        return [
            one for one in dict.fromkeys([one for given in of_modules for one in given.values()]) if one is not None
        ]

    def _compile(self) -> Callable[..., Any]:
        """Compile the forward pass in the current state of the modules."""
        network, forward = self.network, _forward_of(self.network)
        own = self._tensors()
        calibrated = _calibrated(network)

        def run(tensors: list[Tensor], args: Any, kwargs: Any) -> Any:
            before, drawn = snapshot(self._modules), random_states()
            with in_graphs.tracing(calibrated) as foreign, _exchanged(network, own, tensors):
                output = begin(network, forward, args, kwargs)
            self._check_side_effects(before, drawn)
            if foreign and type(tensors[0]) not in (Tensor, nn.Parameter):  # backend="eager" runs this with real ones
                raise CannotCompileError(Why.FOREIGN_TENSOR, f"{tuple(foreign[0].shape)}")
            structure[:] = [apply_to_collection(output, Tensor, lambda _: _TENSOR)]
            if (other := next((one for one in _leaves(output) if type(one) not in PLAIN), None)) is not None:
                raise CannotCompileError(Why.OUTPUT, type(other).__name__)
            return tensors_in(output)

        structure: list[Any] = []  # of the output: the compiler knows tensors, numbers and few containers
        traced = _nonstrict_trace(run)

        def graph(tensors: list[Tensor], args: Any, kwargs: Any) -> Any:
            return traced(tensors, args, kwargs)

        # the compiler keeps its graphs, and counts them, by the code object
        separate = FunctionType(graph.__code__.replace(), graph.__globals__, "graph", None, graph.__closure__)
        compiled = torch.compile(separate, **self._options)

        def restructured(tensors: list[Tensor], args: Any, kwargs: Any) -> Any:
            found = compiled(tensors, args, kwargs)
            return with_tensors(structure[0], found)

        return restructured

    def _check_side_effects(self, before: Any, drawn: Any) -> None:
        """Raise if the Python that has run had side effects, or read what a graph would not read."""
        restore({name: self._modules[name] for name in self._modules.keys() - self._own.keys()}, before)
        for name, module in self._own.items():
            now = attributes_of(module)
            for key in before[name].keys() | now.keys():
                if not is_same(before[name].get(key, MISSING), now.get(key, MISSING)):
                    raise CannotCompileError(Why.ATTRIBUTE, f"{name}.{key}".lstrip("."))
                if isinstance(now[key], Tensor):
                    raise CannotCompileError(Why.TENSOR, f"{name}.{key}".lstrip("."))
        for whose, old, new in zip(("Python", "NumPy"), drawn, random_states(), strict=True):
            if old != new:
                raise CannotCompileError(Why.RANDOM, whose)


@contextmanager
def _exchanged(network: nn.Module, own: list[Tensor], given: list[Tensor]) -> Iterator[None]:
    """Let a network compute with other parameters and buffers for the length of a block.

    ``torch.func.functional_call`` does not restore everything where a module has two names, as shared quantizers have.
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
            # what is written may depend on ranges that learn, and the next backward pass would go back through it
            is_norm = isinstance(module, nn.modules.batchnorm._NormBase)
            if holder.get(name) is not of[id(value)] or (id(of[id(value)]) in changed and not is_norm):
                raise CannotCompileError(Why.BUFFER, f"{name} of a {type(module).__name__}")
    finally:
        for _, holder, name, value in places:
            holder[name] = value


_LIBRARIES = ("torch.", "aimet_torch.", "lightning_quant.simulation.")
# Private in PyTorch 2.11.
_nonstrict_trace: Any = getattr(torch.compiler, "nonstrict_trace", None) or torch._dynamo.nonstrict_trace


# What an existing graph can still raise before it computes: it is recompiled where something is different.
_OF_THE_COMPILER = (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit)


# Stands for a tensor in the structure of an output.
_TENSOR = torch.empty(0)


def _leaves(output: Any) -> Iterator[Any]:
    """Yield the leaves of an output that are not tensors."""
    if isinstance(output, Mapping):
        output = list(output.values())
    elif is_dataclass(output) and not isinstance(output, type):
        output = [getattr(output, one.name) for one in fields(output)]
    elif not isinstance(output, (list, tuple)):
        if not isinstance(output, Tensor):
            yield output
        return
    for one in output:
        yield from _leaves(one)


def _forward_of(network: nn.Module) -> Callable[..., Any]:
    watched: Any = type(network)
    return watched.watched.forward


def _is_quantized_in_hooks(network: nn.Module) -> bool:
    """Return whether a call site of the network is outside of every ``forward``."""
    outermost = [found[-2] for found, _ in sites_of(network) if len(found) > 1]
    return any(name.rpartition(".")[2] != "forward" for name, *_ in outermost)


def _calibrated(network: nn.Module) -> list[nn.Module]:
    """Return the quantizers whose ranges are set."""
    return [one for one in network.modules() if isinstance(one, aimet.QuantizerBase) and one.is_initialized()]


def _cause(error: BaseException | None) -> CannotCompileError | None:
    """Return the error of this file that an error of the compiler was caused by."""
    while error is not None:
        if isinstance(error, CannotCompileError):
            return error
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    return None
