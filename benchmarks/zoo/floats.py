"""Which values of a QDQ file no QuantizeLinear rounds, counted from the file alone, whoever wrote it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

_FLOAT = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE}
# They hand values on as they are: what was rounded before stays rounded.
_MOVES = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split", "Identity", "Expand", "Tile",
          "Gather", "DepthToSpace", "SpaceToDepth"}  # fmt: skip
# The NPU computes these together with what stands before them.
_FUSED = {"Relu", "Clip"}
_FUSES = {"Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Mul", "Sub", "BatchNormalization"}
# How many inputs are operands, where what follows are settings: limits, sizes, mean and variance of a norm.
_OPERANDS = {"Clip": 1, "Resize": 1, "Pad": 1, "Pow": 1, "TopK": 1, "OneHot": 1, "Range": 0, "Dropout": 1,
             "ConstantOfShape": 0, "ReduceMean": 1, "BatchNormalization": 3}  # fmt: skip


def left_in_float(path: str | Path) -> list[str]:
    """Names of the values of the network, and of its constants, that are computed with in float.

    Convolution and activation, or product and bias, are one operation of the NPU: no rounding in between is needed.
    Values that follow from shapes alone are not values of the network.
    """
    model = onnx.load(path)
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    types |= {one.name: one.data_type for one in graph.initializer}
    constants = {one.name for one in graph.initializer}
    consumers: dict[str, list[Any]] = defaultdict(list)
    makers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        for name in filter(None, node.input):
            consumers[name].append(node)
        if node.op_type in ("Constant", "Shape", "Size") or all(n in constants for n in node.input if n):
            constants.update(node.output)
    fixed = constants.__contains__
    results = {value.name for value in graph.output}

    def rounded(name: str, by: str) -> bool:
        """Whether all that reads a value reads it rounded."""
        if name in results:
            return False
        return all(
            node.op_type == "QuantizeLinear"
            or (node.op_type in _MOVES and all(rounded(output, node.op_type) for output in node.output))
            or (node.op_type in _FUSED and by in _FUSES and len(consumers[name]) == 1)
            or (node.op_type == "Add" and by == "MatMul" and len(consumers[name]) == 1 and any(map(fixed, node.input)))
            for node in consumers[name]
        )

    given = [v.name for v in graph.input if v.name not in constants and types[v.name] in _FLOAT]
    left = [name for name in given if not rounded(name, "")]
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") or set(node.output) <= constants:
            continue
        if node.op_type not in _MOVES:
            left += [o for o in node.output if o and types.get(o) in _FLOAT and not rounded(o, node.op_type)]
        operands = node.input[: _OPERANDS.get(node.op_type, len(node.input))]
        left += [name for name in operands if name in constants and _is_float(name, types, makers)]
    return list(dict.fromkeys(left))


def _is_float(name: str, types: Mapping[str, int], makers: Mapping[str, onnx.NodeProto]) -> bool:
    """Whether a constant is given in float, rather than as integers with a scale."""
    if types.get(name) not in _FLOAT:
        return False
    while name in makers and makers[name].op_type in _MOVES:
        name = makers[name].input[0]
    return name not in makers or makers[name].op_type != "DequantizeLinear"
