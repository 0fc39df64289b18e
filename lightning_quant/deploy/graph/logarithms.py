"""Logarithms of 16 bits, which the NPU gets wrong: written so that it computes them in float.

Most values of a rounded 16-bit ``Log`` are others on the emulated NPU (4 dB). Where another operation stands between
it and the rounding, the compiler takes both in float, between a conversion from integers and one back: 75 dB.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lightning_quant.deploy.graph.qdq import QdqGraph

if TYPE_CHECKING:
    import onnx


def log_in_float(model: onnx.ModelProto) -> None:
    """Negate 16-bit logarithms twice in front of their rounding, in place.

    Args:
        model: a graph with QuantizeLinear and DequantizeLinear.
    """
    import onnx

    graph = QdqGraph(model)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes.append(node)
        if node.op_type != "Log" or not _has_16_bits(graph, node.output[0]):
            continue
        name = node.output[0]
        node.output[0] = f"{name}_of_floats"
        nodes.append(onnx.helper.make_node("Neg", [node.output[0]], [f"{name}_negated"], f"{node.name}_negated"))
        nodes.append(onnx.helper.make_node("Neg", [f"{name}_negated"], [name], f"{node.name}_back"))
    graph.replace_nodes(nodes)


def _has_16_bits(graph: QdqGraph, name: str) -> bool:
    rounded = [taker for taker in graph.consumers[name] if taker.op_type == "QuantizeLinear"]
    return any(graph.array(taker.input[2]).dtype in (np.uint16, np.int16) for taker in rounded)
