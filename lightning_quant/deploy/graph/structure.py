"""What two networks have in common that differ in their weights only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

# Operations whose float constants say how much, never of which size a result is, as the scales of a resize do.
_WEIGHTED = {
    *("Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN", "Gather", "PRelu", "Add", "Sub", "Mul", "Div"),
    *("BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization"),
}


def structure_sha256(path: Path) -> str:
    """Compute the SHA-256 of a graph without the values of its weights, as 64 hexadecimal digits.

    It is the same for a network before and after training. Operations, names, shapes, types, and every constant that
    is not certain to be a weight count: where in doubt, two networks are different ones.

    Args:
        path: an ONNX file.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    for tensor in _weights(model.graph):
        for field in ("raw_data", "float_data", "double_data", "int32_data", "external_data"):
            tensor.ClearField(field)
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def _weights(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    from onnx import TensorProto

    floats = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            tensors |= {name: one.t for name in node.output for one in node.attribute if one.name == "value"}
    elsewhere = {value.name for value in graph.output}
    for node in graph.node:
        nested = any(one.HasField("g") or one.graphs for one in node.attribute)  # they read what is outside as well
        if nested:
            return
        if node.op_type not in _WEIGHTED:
            elsewhere.update(node.input)
    for name, tensor in tensors.items():
        if name not in elsewhere and tensor.data_type in floats and tensor.dims:
            yield tensor
