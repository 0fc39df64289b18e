"""What a product of two activations multiplies with: 16 bits with zero in their middle, as signed integers.

Of 16 bits the NPU multiplies by nothing else, and by those from Hexagon v73 on (the exception for MatMul in AIMET's
``_base/quantsim.py``). ONNX Runtime's QNN provider converts an unsigned second operand to 8 bits, without a word: on
the emulator 49 dB are left of the product of two random matrices, 81 with signed integers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lightning_quant.deploy.graph.qdq import QdqGraph, hands_on

if TYPE_CHECKING:
    import onnx

# Of 16 bits, where zero is in the middle.
_MIDDLE = 2**15


def sign_second_operands(model: onnx.ModelProto) -> None:
    """Give the second operands of products a sign where their 16-bit grids are symmetric, as the simulation's are.

    Args:
        model: a QDQ graph, its constants integers; changed in place.
    """
    graph = QdqGraph(model)
    nodes: list[onnx.NodeProto] = []
    made: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type in ("MatMul", "Gemm"):
            name = node.input[1]
            source = graph.producers.get(name)
            if source is not None and _is_symmetric(graph, source) and not _is_slice_of_transposed(graph, name):
                if name not in made:
                    made[name] = _signed(graph, source, name, nodes)
                node.input[1] = made[name]
        nodes.append(node)
    graph.replace_nodes(nodes)


def _is_symmetric(graph: QdqGraph, source: onnx.NodeProto) -> bool:
    if source.op_type != "DequantizeLinear" or len(source.input) < 3:
        return False
    zero_point = graph.array(source.input[2])
    return zero_point.dtype == np.uint16 and bool((zero_point == _MIDDLE).all())


def _is_slice_of_transposed(graph: QdqGraph, name: str) -> bool:
    """Return whether a tensor is cut out of one that was transposed: three of one, as queries, keys and values.

    ONNX Runtime puts the Transpose behind the slices then, and the NPU's compiler refuses what comes of it.
    """
    is_slice = False
    while (node := graph.producers.get(name)) is not None:
        if not (hands_on(node) or node.op_type in ("QuantizeLinear", "DequantizeLinear", "Concat", "Where")):
            return False
        if is_slice and node.op_type == "Transpose":
            return True
        is_slice = is_slice or node.op_type == "Slice"
        name = node.input[2] if node.op_type == "Where" else node.input[0]
    return False


def _signed(graph: QdqGraph, source: onnx.NodeProto, name: str, nodes: list[onnx.NodeProto]) -> str:
    """Append what gives the same values from signed integers, of a tensor or a constant; return the name of that."""
    from onnx import helper

    scale = source.input[1]
    zero_point = graph.add(f"{name}_signed_zero_point", np.zeros(graph.array(scale).shape, np.int16))
    integers, floats = graph.free(f"{name}_signed_q"), graph.free(f"{name}_signed_qdq")
    if source.input[0] in graph.constants:
        values = graph.array(source.input[0]).astype(np.int32) - _MIDDLE
        integers = graph.add(integers, values.astype(np.int16))
    else:
        nodes.append(helper.make_node("QuantizeLinear", [name, scale, zero_point], [integers], f"{name}_signed"))
    nodes.append(helper.make_node("DequantizeLinear", [integers, scale, zero_point], [floats], f"{name}_unsigned"))
    return floats
