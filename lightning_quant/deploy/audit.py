"""Whether every tensor the device will quantize has an encoding, and if not, why that is all right.

A tensor without an encoding is filled in by the device's compiler with a guess of its own, silently. So each
one is either explained here, with the reason recorded in the bundle's manifest, or the export fails.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lightning_quant.simulation.preflight import Finding

if TYPE_CHECKING:
    import onnx

# The hardware computes these together with the operation before them, in one step without rounding between.
_FUSED = ("Relu", "Clip", "PRelu", "LeakyRelu", "BatchNormalization", "HardSwish")
# These hand values on as they are.
_MOVES = ("Flatten", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
# Where an operation takes its weight, whose integers are fixed at export: never to be guessed.
_WEIGHTS = {("Conv", 1), ("ConvTranspose", 1), ("Gemm", 1), ("MatMul", 1)}
_LEFT = "left in float"
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

    graph = onnx.shape_inference.infer_shapes(model).graph
    encodings = set(encoded)
    kinds = {v.name: v.type.tensor_type.elem_type for v in [*graph.value_info, *graph.input, *graph.output]}
    consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            consumers[name].append(node)
    reasons: dict[str, str] = {}
    missing: list[str] = []
    outputs = {value.name for value in graph.output}
    left_open = {f.module for f in findings if "float" in f.problem or "no ranges" in f.problem}

    def is_open(name: str) -> bool:
        return name not in encodings and kinds.get(name, onnx.TensorProto.FLOAT) == onnx.TensorProto.FLOAT

    def was_left(node: onnx.NodeProto) -> bool:
        module = _module(node)
        return module in left_open or re.sub(r"_\d+$", "", module) in left_open  # relu_1: the second call of relu

    def explain_constant(name: str) -> None:
        users = consumers[name]
        places = {(user.op_type, list(user.input).index(name)) for user in users}
        if users and all(operation in _BIASED and place >= 2 for operation, place in places):
            reasons[name] = "bias: a 32-bit integer on the device, its scale that of the input times that of the weight"
        elif any(place in _WEIGHTS for place in places) and not all(was_left(user) for user in users):
            missing.append(name)
        else:
            reasons[name] = "constant: its range follows from its values"

    constants = {initializer.name for initializer in graph.initializer} - encodings
    for initializer in graph.initializer:
        if initializer.data_type == onnx.TensorProto.FLOAT and initializer.name not in encodings:
            explain_constant(initializer.name)
    for value in graph.input:
        if is_open(value.name):
            if any(was_left(consumer) for consumer in consumers[value.name]):
                reasons[value.name] = "goes into operations left in float, as the preflight said"
            else:
                missing.append(value.name)
    for node in graph.node:
        # shape computations and copies of constants are known when the model is compiled
        if node.op_type == "Constant" or (node.input and set(node.input) <= constants):
            constants.update(node.output)
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
                left = node if was_left(node) else after[0]
                reasons[name] = f"{_LEFT}, as the preflight said of {_module(left) or 'the network'}"
            elif node.op_type in _MOVES and reasons.get(node.input[0], "").startswith(_LEFT):
                reasons[name] = reasons[node.input[0]]
            elif after and _module(node) and all(_scope(c) == _scope(node) for c in after):
                reasons[name] = f"inside one operation of the simulation ({_module(node)})"
            else:
                missing.append(name)
    return reasons, missing


def _adds_bias(node: onnx.NodeProto, constants: set[str], encodings: set[str]) -> bool:
    return node.op_type == "Add" and bool(set(node.input) & constants) and set(node.output) <= encodings


def _scope(node: onnx.NodeProto) -> str:
    """The module call a node belongs to, as ONNX writes it: ``/network/body/body.0/Conv``, without the operation."""
    return node.name.rpartition("/")[0]


def _module(node: onnx.NodeProto) -> str:
    """Qualified name of the module a node belongs to; empty for the network's own level."""
    return ".".join(part.rpartition(".")[2] for part in _scope(node).split("/")[2:])
