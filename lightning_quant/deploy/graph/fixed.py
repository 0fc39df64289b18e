"""A device compiles one graph, of fixed sizes, that computes the same every time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.module_tracker import ModuleTracker

from lightning_quant.deploy.audit import module_of
from lightning_quant.errors import ExportError
from lightning_quant.simulation.inputs import NetworkInputs, tensors_in

if TYPE_CHECKING:
    import onnx

_RANDOM = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
# Operations that output as many values as they find.
_FINDS = ("Compress", "NonMaxSuppression", "NonZero", "Unique")
# Operations that do either the one or the other.
_BRANCHES = ("If", "Loop", "Scan")
# Which inputs of an operation give the size of its output.
_SIZES = {
    "CenterCropPad": (1,),
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "OneHot": (1,),
    "Pad": (1,),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Tile": (1,),
    "TopK": (1,),
}


def check_fixed(model: onnx.ModelProto, network: str) -> None:
    """Refuse a graph that no device can hold.

    Args:
        model: an exported float graph, without dangling nodes, its inputs of fixed sizes.
        network: what to call the network in the error.

    Raises:
        ExportError: naming the operations that draw random numbers, or the outputs whose size depends on values.
    """
    if not model.graph.input:
        raise ExportError(
            f"The graph that was written of {network} takes no input: all it computes is a constant, of one sample. "
            "Expected outputs that are computed of the inputs by PyTorch alone: values that leave it (numpy(), "
            "tolist(), item()) do not come back; compute with tensors, or quantize the part before."
        )
    if drawing := random_operations(model):
        raise _draws(network, {(node.op_type, module_of(node)) for node in drawing})
    if outputs := open_outputs(model):
        names = "; ".join(
            f"{name!r}, by {node.op_type} in {module_of(node) or 'its own forward'}" for name, node in outputs.items()
        )
        raise ExportError(
            f"The size of {network}'s output depends on the values it computes: {names}. Expected outputs of fixed "
            "sizes, the only ones a device compiles. Move the post-processing out of the network (return all scores "
            "and boxes, select in the step), or quantize the part before it (network='model.backbone')."
        )


def check_repeatable(network: nn.Module, inputs: NetworkInputs, given: Any, title: str) -> None:
    """Refuse a network that samples: one that returns something else in a second call, and draws random numbers in it.

    What is drawn and thrown away (stochastic depth does so in eval mode, in some libraries) does not count.

    Args:
        network: on the CPU in eval mode.
        inputs: how to call it.
        given: what it returned for them before.
        title: what to call it in the error.

    Raises:
        ExportError: naming the operations that draw.
    """
    drawn: set[tuple[str, str]] = set()
    # the tracker hooks whatever needs a gradient, and takes parts of parameters for that without one
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.random.fork_rng(devices=[]), _Watch(drawn) as watch, watch.tracker:
            again = inputs.call(network)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    pairs = zip(tensors_in(given), tensors_in(again), strict=False)
    same = all(one.shape == two.shape and torch.equal(one.nan_to_num(), two.nan_to_num()) for one, two in pairs)
    if drawn and not same:
        raise _draws(title, drawn)


class _Watch(TorchDispatchMode):
    """Collect the operations that change the state of the random numbers, each with its module."""

    def __init__(self, found: set[tuple[str, str]]) -> None:
        super().__init__()
        self.found = found
        self.tracker = ModuleTracker()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = torch.get_rng_state()
        result = func(*args, **(kwargs or {}))
        if not torch.equal(before, torch.get_rng_state()):
            _, _, module = max(self.tracker.parents, key=len).partition(".")  # QuantizedNetwork.network.body
            self.found.add((func.overloadpacket.__name__, f"{module}.".removeprefix("network.").rstrip(".")))
        return result


def _draws(network: str, operations: Iterable[tuple[str, str]]) -> ExportError:
    places = ", ".join(f"{name} in {module or 'its own forward'}" for name, module in sorted(operations))
    return ExportError(
        f"{network} draws random numbers in eval mode: {places}. Expected a network that answers the same every time: "
        "what runs on a device could never be compared with the simulation. Draw outside of the network and give it "
        "the numbers as an input, draw while training only (if self.training), or quantize the part before it "
        "(network='model.backbone')."
    )


def random_operations(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return the operations that output something else every time."""
    return [node for node in _nodes(model.graph) if node.op_type in _RANDOM]


def open_outputs(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """Return the outputs whose size depends on the values of the inputs, each with the operation that makes it so.

    Sizes that were merely not written down do not count: an output counts when its size is not known from those of
    the inputs, and an operation before it gives a size that depends on values (boolean masks, non-maximum
    suppression, a slice up to a computed position).
    """
    import onnx

    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    fixed = {v.name for v in [*graph.value_info, *graph.input, *graph.output] if _is_fixed(v)}
    varying = {value.name for value in graph.input}  # tensors whose values are not known beforehand
    sized: dict[str, onnx.NodeProto] = {}  # tensors whose size is not, with the operation that made it so
    for node in graph.node:
        taken = {*node.input, *(name for body in _bodies(node) for inner in _nodes(body) for name in inner.input)}
        varies = not varying.isdisjoint(taken)
        of_size = {node.input[place] for place in _SIZES.get(node.op_type, ()) if place < len(node.input)}
        cause = next((sized[name] for name in node.input if name in sized), None)
        if node.op_type in ("Shape", "Size"):
            varies, cause = cause is not None, None
        elif (node.op_type in (*_FINDS, *_BRANCHES) and varies) or not varying.isdisjoint(of_size):
            cause = cause or node
        for name in node.output:
            if varies:
                varying.add(name)
            if cause is not None and name not in fixed:
                sized[name] = cause
    return {value.name: sized[value.name] for value in graph.output if value.name in sized}


def _is_fixed(value: onnx.ValueInfoProto) -> bool:
    tensor = value.type.tensor_type
    return tensor.HasField("shape") and all(axis.HasField("dim_value") for axis in tensor.shape.dim)


def _bodies(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [attribute.g for attribute in node.attribute if attribute.HasField("g")]


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Return the nodes of a graph and of the branches in it."""
    for node in graph.node:
        yield node
        for body in _bodies(node):
            yield from _nodes(body)
