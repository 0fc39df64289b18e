"""A network in a trace or an export computes what it computes outside of one."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.simulation.callsites.functions import CASTS, base_name

tracing_state = torch._C._get_tracing_state
# Private in PyTorch 2.14: what torch.onnx's exporter traces with.
_trace_graph: Any = torch.jit._get_trace_graph


def traced() -> bool:
    """Return whether PyTorch records what runs now: in a trace, a compilation or an export."""
    return tracing_state() is not None or torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export()


@contextmanager
def untraced() -> Iterator[None]:
    """Compute without recording in a block: the results are constants in the trace."""
    tracer: Any = torch._C
    state = tracer._get_tracing_state()
    tracer._set_tracing_state(None)
    try:
        yield
    finally:
        tracer._set_tracing_state(state)


# ---- a pass as exporters run it --------------------------------------------------------------------------------------
def run_in_trace(network: nn.Module, inputs: Tensor | tuple[Tensor, ...]) -> None:
    """Run a network once while PyTorch traces it; the trace itself is thrown away.

    What is traced is a function: PyTorch makes a script module of every module of a traced network, which takes several
    times as long as the pass. Of a function, ``torch.jit.trace`` would make a compiled one, which PyTorch keeps as long
    as the process runs, and with it the weights.
    """

    def run(*tensors: Tensor) -> Any:
        network(*tensors)
        return tensors

    with _as_constants(network):
        _trace_graph(run, inputs if isinstance(inputs, tuple) else (inputs,), strict=False)


@contextmanager
def _as_constants(network: nn.Module) -> Iterator[None]:
    """Let a function's trace take the parameters as constants, which have no gradients."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


# ---- sizes and casts -------------------------------------------------------------------------------------------------
_SHAPE: Any = Tensor.shape
SIZES = frozenset((Tensor.size, _SHAPE.__get__, Tensor.numel, Tensor.nelement, Tensor.__len__, torch.numel))


def size_as_number(func: Any, args: Any, kwargs: Any) -> Any:
    """Return a size as a number, as outside of a trace: a device has one graph for one size.

    A trace returns tensors for it. What is computed of these (padding, masks, positions) would go into the graph, and
    code that asks whether a size is a tensor would take another branch.
    """
    with untraced():
        return func(*args, **kwargs)


def is_noop_cast(func: Any, args: Any, kwargs: Any) -> bool:
    """Return whether a cast returns its tensor unchanged; a trace records it anyway, and AIMET loses the tensor."""
    if base_name(func) not in CASTS or not args or not isinstance(args[0], Tensor) or kwargs.get("copy"):
        return False
    given = args[0]
    made = func(torch.empty((), dtype=given.dtype, device=given.device), *args[1:], **kwargs)
    return isinstance(made, Tensor) and made.dtype == given.dtype and made.device == given.device


# ---- what the network's own code sees of a trace, and where its operations stand -------------------------------------
# Code of these packages still sees whether it is traced or exported.
_LIBRARIES = ("torch", "aimet_torch", "lightning_quant")


@contextmanager
def tracing_hidden() -> Iterator[None]:
    """Hide from the network's own code that it is traced or exported.

    Libraries take another branch then, around what older exporters could not write, or with sizes that are tensors. The
    branch that was quantized, calibrated and measured is the one to export.
    """
    patched: list[tuple[Any, str, Any]] = [
        (torch.jit, "is_tracing", torch.jit.is_tracing),
        (torch.onnx, "is_in_onnx_export", torch.onnx.is_in_onnx_export),
    ]
    for module, name, original in patched:
        setattr(module, name, functools.partial(_seen_by_libraries, original))
    try:
        yield
    finally:
        for module, name, original in patched:
            setattr(module, name, original)


def _seen_by_libraries(original: Callable[[], bool]) -> bool:
    caller = str(sys._getframe(1).f_globals.get("__name__", ""))
    return caller.partition(".")[0] in _LIBRARIES and original()


def without_scope(module: nn.Module) -> AbstractContextManager[None]:
    """Let a module's operations stand where its call stands, while AIMET traces.

    A module that is called twice computes with other sites the second time; a trace by modules has one body for both.
    """
    names = torch.jit._trace._trace_module_map
    if names is None or tracing_state() is None or torch.onnx.is_in_onnx_export():
        return nullcontext()
    return _removed(names, module)


@contextmanager
def _removed(names: Any, module: nn.Module) -> Iterator[None]:
    name = names.pop(module, None)
    try:
        yield
    finally:
        if name is not None:
            names[module] = name


# ---- autograd functions ----------------------------------------------------------------------------------------------
@contextmanager
def functions_inlined() -> Iterator[None]:
    """Let a trace see through autograd functions, whose forward may hold call sites.

    Those of PyTorch and AIMET, and those that define their own export (``symbolic``), stay as they are.
    """
    patched = [cls for cls in _subclasses(torch.autograd.Function) if "apply" not in vars(cls) and _is_opaque(cls)]
    for cls in patched:
        cls.apply = classmethod(_inlined)
    try:
        yield
    finally:
        for cls in patched:
            del cls.apply


def _subclasses(cls: Any) -> Iterator[Any]:
    for one in cls.__subclasses__():
        yield one
        yield from _subclasses(one)


def _is_opaque(cls: Any) -> bool:
    return cls.__module__.partition(".")[0] not in ("aimet_torch", "torch") and not hasattr(cls, "symbolic")


def _inlined(cls: Any, *args: Any, **kwargs: Any) -> Any:
    if cls.setup_context is not torch.autograd.Function.setup_context:  # its forward takes no context
        return cls.forward(*args, **kwargs)
    return cls.forward(_NoContext(), *args, **kwargs)


class _NoContext:
    """Accepts what a forward saves for a backward pass that never runs."""

    needs_input_grad = (False,) * 64

    def save_for_backward(self, *_: Any) -> None:
        return None

    mark_dirty = mark_non_differentiable = set_materialize_grads = save_for_forward = save_for_backward
