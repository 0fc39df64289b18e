"""AIMET's view of a network: every layer stays the same object, every weight is where AIMET expects it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_quant.simulation.callsites.traces import run_in_trace


@contextmanager
def converted_in_place() -> Iterator[None]:
    """Let AIMET quantize layers in place.

    It makes a new module for each and copies what the old one holds. The old one becomes the new one here, so that
    whoever holds the layer (the user's own attributes, lists and hooks) holds the quantized one.
    """
    from lightning_quant.simulation.aimet import QuantizationMixin

    convert = QuantizationMixin.__dict__["from_module"]

    def from_module(cls: Any, module: nn.Module) -> nn.Module:
        made = convert.__get__(None, cls)(module)
        if made is not module:
            module.__class__ = _with_layout_of(*map(type, (made, module)))
            module.__dict__ = made.__dict__
        return module

    QuantizationMixin.from_module = classmethod(from_module)
    try:
        yield
    finally:
        QuantizationMixin.from_module = convert


class LayoutBase:
    """Decides how Python lays an object out; the same way for all classes of PyTorch."""


@functools.cache
def _with_layout_of(quantized: Any, plain: Any) -> Any:
    """Return AIMET's class, or a subclass that Python lets a module change to: it compares the first base only."""
    from lightning_quant.simulation.aimet import QuantizationMixin

    try:
        plain.__new__(plain).__class__ = quantized
    except TypeError:
        body = {"__module__": __name__, "made_by": (_with_layout_of, quantized, plain)}
        made = type(quantized)(quantized.__name__, (LayoutBase, quantized), body)
        QuantizationMixin.implements(plain)(made)  # AIMET looks classes up by type
        QuantizationMixin.cls_to_qcls[plain] = quantized
        return made
    return quantized


@contextmanager
def weights_attached(network: nn.Module) -> Iterator[None]:
    """Give the layers at call sites the weights they computed with last, for AIMET to find and to export."""
    layers = [module for module in network.modules() if "_takes_weights" in module.__dict__]
    for layer in layers:
        for part in ("weight", "bias"):
            value: Tensor | None = layer.__dict__.pop(part)
            # a parameter of its own: AIMET may move it, and the computed one is not a leaf
            layer._parameters[part] = None if value is None else nn.Parameter(value.detach(), requires_grad=False)
    try:
        yield
    finally:
        for layer in layers:
            for part in ("weight", "bias"):
                value = layer._parameters.pop(part)
                layer.__dict__[part] = None if value is None else value.detach()


# What AIMET 2.42 has no entry for among the operations of ONNX, by whose names its configurations say how weights are
# quantized: these would get one scale for all channels, and those of a norm a range symmetric about zero.
_OPERATIONS: dict[type[nn.Module], str] = {
    nn.BatchNorm3d: "BatchNormalization",
    nn.Conv3d: "Conv",
    nn.ConvTranspose1d: "ConvTranspose",
    nn.ConvTranspose3d: "ConvTranspose",
    nn.InstanceNorm3d: "InstanceNormalization",
    nn.SyncBatchNorm: "BatchNormalization",
}


@contextmanager
def operations_named() -> Iterator[None]:
    """Let AIMET know, for the length of a block, which operations of ONNX layers are that its table lacks."""
    from lightning_quant.simulation import aimet

    table, quantized = aimet.map_torch_types_to_onnx, aimet.QuantizationMixin.cls_to_qcls
    before = dict(table)
    for kind, operation in _OPERATIONS.items():
        table.setdefault(kind, [operation])
        table.setdefault(quantized[kind], [operation])
    try:
        yield
    finally:
        table.clear()
        table.update(before)


@contextmanager
def shapes_from_traces() -> Iterator[None]:
    """Let AIMET know the sizes in code that is run in a trace only, as some libraries have it for masks.

    It looks them up in a pass without a trace, and regards a layer that it did not see there as an error.
    """
    from lightning_quant.simulation.aimet import connectedgraph

    graph = connectedgraph.ConnectedGraph
    original = graph.__dict__["_generate_module_tensor_shapes_lookup_table"]

    def table(model: nn.Module, model_input: Any) -> Any:
        found = original.__func__(model, model_input)

        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            sizes = apply_to_collection((inputs, output), Tensor, _of_its_size)
            given, made = map(connectedgraph._get_module_tensor_shapes_entry, sizes)
            found[module] = tuple(one if isinstance(one, list) else [one] for one in (given, made))

        handles = [module.register_forward_hook(note) for module in model.modules() if module not in found]
        try:
            run_in_trace(model, model_input)
        finally:
            for handle in handles:
                handle.remove()
        return found

    graph._generate_module_tensor_shapes_lookup_table = staticmethod(table)
    try:
        yield
    finally:
        graph._generate_module_tensor_shapes_lookup_table = original


def _of_its_size(tensor: Tensor) -> Tensor:
    return torch.empty([int(size) for size in tensor.shape], device="meta")
