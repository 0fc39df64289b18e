"""A product with a number in front of a log-softmax, of which the NPU's compiler makes one operation that is wrong.

``(x * 3).log_softmax(-1)``: from a factor of 2 on, most values of the NPU's emulator are others. A division stays one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from lightning_quant.deploy.graph.qdq import QdqGraph, of_integers

if TYPE_CHECKING:
    import onnx

_ROUNDING = ("QuantizeLinear", "DequantizeLinear")


def divide_before_log_softmax(model: onnx.ModelProto) -> None:
    """Divide by one over a number where a log-softmax takes the product with it, in place.

    Args:
        model: a graph of floats or with QuantizeLinear and DequantizeLinear, its numbers in float.
    """
    graph = QdqGraph(model)
    for node in model.graph.node:
        if node.op_type != "Mul" or all(taker.op_type != "LogSoftmax" for taker in _takers(graph, node)):
            continue
        numbers = [_number(graph, name) for name in node.input]
        place = next((index for index, number in enumerate(numbers) if number), None)
        if place is not None:
            divisor = np.array(1 / float(numbers[place] or 1.0), np.float32)
            values = node.input[1 - place]
            node.op_type = "Div"
            node.input[:] = [values, graph.add(f"{node.output[0]}_divisor", divisor)]


def _number(graph: QdqGraph, name: str) -> float | None:
    """Return the value of a constant that is a single number, on a grid or not; ``None`` for others."""
    reader = graph.producers.get(name)
    if reader is None or not of_integers(reader):
        return graph.number(name)
    integer, scale, *zero_point = (graph.number(one) for one in reader.input)
    if integer is None or scale is None:
        return None
    return (integer - (zero_point[0] or 0.0 if zero_point else 0.0)) * scale


def _takers(graph: QdqGraph, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    for taker in graph.consumers[node.output[0]]:
        if taker.op_type in _ROUNDING:
            yield from _takers(graph, taker)
        else:
            yield taker
