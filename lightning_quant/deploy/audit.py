"""Whether every tensor the device will quantize has an encoding, and if not, why that is all right.

A tensor without an encoding is filled in by the device's compiler with a guess of its own, silently. So each
one is either explained here, with the reason recorded in the bundle's manifest, or the export fails.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lightning_quant.simulation.preflight import Finding

if TYPE_CHECKING:
    import onnx

# The hardware computes these together with the operation before them, in one step without rounding between.
_FUSED = ("Relu", "Clip", "PRelu", "LeakyRelu", "BatchNormalization", "HardSwish")
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
    left_float = [finding for finding in findings if "float" in finding.problem]

    def is_open(name: str) -> bool:
        return name not in encodings and kinds.get(name, onnx.TensorProto.FLOAT) == onnx.TensorProto.FLOAT

    for initializer in graph.initializer:
        if initializer.data_type == onnx.TensorProto.FLOAT and initializer.name not in encodings:
            reasons[initializer.name] = _constant_reason(initializer.name, consumers, len(initializer.dims))
    missing += [value.name for value in graph.input if is_open(value.name)]
    constants = set(reasons)
    for node in graph.node:
        # shape computations and copies of constants are known when the model is compiled
        if node.op_type == "Constant" or (node.input and set(node.input) <= constants):
            constants.update(node.output)
            reasons.update(
                {
                    name: _constant_reason(name, consumers, 1)
                    for name in node.output
                    if is_open(name) and consumers[name]
                }
            )
            continue
        for name in node.output:
            if not name or not is_open(name):
                continue
            after = consumers[name]
            if after and all(c.op_type in _FUSED and set(c.output) & encodings for c in after):
                reasons[name] = f"computed together with the {after[0].op_type} after it"
            elif node.op_type == "MatMul" and after and all(_adds_bias(c, constants, encodings) for c in after):
                reasons[name] = "computed together with the bias after it"
            elif after and _scope(node) and all(_scope(c) == _scope(node) for c in after):
                reasons[name] = f"inside one operation of the simulation ({_scope(node)})"
            elif left_float:
                reasons[name] = f"left in float, as the preflight said of {left_float[0].module or 'the network'}"
            else:
                missing.append(name)
    return reasons, missing


def _adds_bias(node: onnx.NodeProto, constants: set[str], encodings: set[str]) -> bool:
    return node.op_type == "Add" and bool(set(node.input) & constants) and set(node.output) <= encodings


def _scope(node: onnx.NodeProto) -> str:
    """The module call a node belongs to; empty for the network's own level."""
    return node.name.rpartition("/")[0].removeprefix("/network").strip("/")


def _constant_reason(name: str, consumers: dict[str, list[onnx.NodeProto]], dims: int) -> str:
    users = consumers[name]
    biased = [c for c in users if c.op_type in _BIASED and list(c.input).index(name) >= 2]
    if users and len(biased) == len(users):
        return "bias: a 32-bit integer on the device, its scale that of the input times that of the weight"
    return "constant: its range follows from its values"
