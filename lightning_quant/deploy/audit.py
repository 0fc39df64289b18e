"""Whether every tensor the device will quantize has an encoding, and if not, why that is all right.

A tensor without an encoding is filled in by the device's compiler with a guess of its own, silently. So each
one is either explained here, with the reason recorded in the bundle's manifest, or the export fails.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lightning_quant.deploy.graph.qdq import hands_on
from lightning_quant.simulation.preflight import Finding

if TYPE_CHECKING:
    import onnx

# The hardware computes these together with the operation before them, in one step without rounding between.
_FUSED = ("Relu", "Clip", "PRelu", "LeakyRelu", "BatchNormalization", "HardSwish")
# Where an operation takes its weight, whose integers are fixed at export: never to be guessed.
_WEIGHTS = {("Conv", 1), ("ConvTranspose", 1), ("Gemm", 1), ("MatMul", 1)}
# Operations that take a constant as they take an activation: in float, it makes them compute in float.
_OPERATORS = (
    "Add",
    "Concat",
    "Div",
    "Einsum",
    "Gather",
    "GridSample",
    "MatMul",
    "Max",
    "Mean",
    "Min",
    "Mod",
    "Mul",
    "Pow",
    "ScatterElements",
    "ScatterND",
    "Sub",
    "Sum",
    "Where",
)
_BIASED = (
    "Conv",
    "ConvTranspose",
    "Gemm",
    "LayerNormalization",
    "InstanceNormalization",
    "BatchNormalization",
)


def unexplained(
    model: onnx.ModelProto, encoded: Iterable[str], findings: Iterable[Finding] = ()
) -> tuple[dict[str, str], list[str]]:
    """Sort the float tensors of ``model`` that have no encoding into explained and unexplained ones.

    Args:
        model: the exported float graph, without dangling nodes.
        encoded: names of the tensors that have an encoding.
        findings: what the preflight left in float, and has told the user about.

    Returns:
        The reason for each tensor that needs no encoding, and the names of those that lack one.
    """
    import onnx

    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    encodings = set(encoded)
    types = {v.name: v.type.tensor_type for v in [*graph.value_info, *graph.input, *graph.output]}
    sizes = {initializer.name: math.prod(initializer.dims) for initializer in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            consumers[name].append(node)
    reasons: dict[str, str] = {}
    missing: list[str] = []
    left: set[str] = set()  # tensors of operations left in float
    untouched: set[str] = set()  # inputs that no operation takes
    outputs = {value.name for value in graph.output}
    left_open = {finding.module for finding in findings if finding.kind.leaves_open}

    def is_open(name: str) -> bool:
        kind = types[name].elem_type if name in types else onnx.TensorProto.FLOAT
        return name not in encodings and kind == onnx.TensorProto.FLOAT

    def was_left(node: onnx.NodeProto) -> bool:
        module = module_of(node)
        return module in left_open or re.sub(r"_\d+$", "", module) in left_open  # relu_1: the second call of relu

    def as_said(node: onnx.NodeProto) -> str:
        return f"left in float, as the preflight said of {module_of(node) or 'the network'}"

    def is_number(name: str) -> bool:
        if name in sizes:
            return sizes[name] == 1
        axes = types[name].shape.dim if name in types and types[name].HasField("shape") else None
        return axes is not None and all(axis.dim_value == 1 for axis in axes)

    def is_bias(user: onnx.NodeProto, name: str) -> bool:
        products = [producers[other] for other in user.input if other != name and other in producers]
        return user.op_type == "Add" and any(n.op_type == "MatMul" and _scope(n) == _scope(user) for n in products)

    def is_operand(user: onnx.NodeProto, name: str) -> bool:
        """Whether a constant stands beside an activation, outside of what the simulation takes for one operation."""
        if user.op_type not in _OPERATORS or is_number(name):
            return False
        others = [other for other in user.input if other and other not in constants]
        inside = [producers[other] for other in others if other in producers and other not in encodings]
        return not any(module_of(user) and _scope(node) == _scope(user) for node in inside)

    def explain_constant(name: str) -> None:
        users = consumers[name]
        places = [(user, (user.op_type, list(user.input).index(name))) for user in users]
        wanting = [
            user
            for user, place in places
            if not is_bias(user, name)
            and not set(user.output) <= constants
            and (place in _WEIGHTS or is_operand(user, name))
        ]
        if users and all((place[0] in _BIASED and place[1] >= 2) or is_bias(user, name) for user, place in places):
            reasons[name] = "bias: a 32-bit integer on the device, its scale that of the input times that of the weight"
        elif wanting and not all(was_left(user) for user in wanting):
            missing.append(name)
        else:
            reasons[name] = as_said(wanting[0]) if wanting else "constant: its range follows from its values"

    constants = {initializer.name for initializer in graph.initializer} - encodings
    # shape computations and copies of constants are known when the model is compiled
    for node in graph.node:
        if node.op_type == "Constant" or (node.input and set(node.input) <= constants | {""}):
            constants.update(node.output)
            for tensor in (one.t for one in node.attribute if one.name == "value"):
                sizes[node.output[0]] = math.prod(tensor.dims)
    for initializer in graph.initializer:
        if initializer.data_type == onnx.TensorProto.FLOAT and initializer.name not in encodings:
            explain_constant(initializer.name)
    for value in graph.input:
        if not is_open(value.name):
            continue
        if any(was_left(consumer) for consumer in consumers[value.name]):
            reasons[value.name] = "goes into operations left in float, as the preflight said"
        elif all(node.op_type == "Identity" and set(node.output) <= outputs for node in consumers[value.name]):
            untouched.add(value.name)
            reasons[value.name] = "no operation takes it"
        else:
            missing.append(value.name)
    for node in graph.node:
        if set(node.output) <= constants:
            for name in node.output:
                if is_open(name) and consumers[name]:
                    explain_constant(name)
            continue
        for name in node.output:
            after = consumers[name]
            if not name or not is_open(name) or not (after or name in outputs):
                continue
            if after and all(c.op_type in _FUSED and set(c.output) & encodings for c in after):
                reasons[name] = f"computed together with the {after[0].op_type} after it"
            elif node.op_type == "MatMul" and after and all(_adds_bias(c, constants, encodings) for c in after):
                reasons[name] = "computed together with the bias after it"
            elif was_left(node) or (after and all(was_left(c) for c in after)):
                left.add(name)
                reasons[name] = as_said(node if was_left(node) else after[0])
            elif hands_on(node) and node.input[0] in left:
                left.add(name)
                reasons[name] = reasons[node.input[0]]
            elif hands_on(node) and node.input[0] in untouched:
                reasons[name] = f"the input {node.input[0]} as it is"
            elif after and module_of(node) and all(_scope(c) == _scope(node) for c in after):
                reasons[name] = f"inside one operation of the simulation ({module_of(node)})"
            else:
                missing.append(name)
    return reasons, missing


def _adds_bias(node: onnx.NodeProto, constants: set[str], encodings: set[str]) -> bool:
    return node.op_type == "Add" and bool(set(node.input) & constants) and set(node.output) <= encodings


def _scope(node: onnx.NodeProto) -> str:
    """The module call a node belongs to, as ONNX writes it: ``/network/body/body.0/Conv``, without the operation."""
    return node.name.rpartition("/")[0]


def module_of(node: onnx.NodeProto) -> str:
    """Qualified name of the module a node belongs to; empty for the network's own level."""
    return ".".join(part.rpartition(".")[2] for part in _scope(node).split("/")[2:])
