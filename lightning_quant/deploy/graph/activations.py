"""Activations as the NPU's compiler takes them: with the operation before them, or right without it.

A convolution and the ReLU behind it are one operation in integers if the least integer stands for zero. Where the ReLU
goes into a concatenation with values below zero, all of them share one range, its zero is another integer, and the
compiler computes both in float. As an operation of its own, between two tensors of that grid, the ReLU is one of
integers again.

Of a Clip that stands on its own behind a convolution the compiler takes both limits or none: where one is at the end of
the grid or beyond it, the other is lost, and values come out that were cut off (by its emulator, QAIRT 2.51).
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_quant.deploy.graph.qdq import QdqGraph

if TYPE_CHECKING:
    import onnx

_ACTIVATIONS = ("Relu", "Clip")


def part_activations(model: onnx.ModelProto) -> dict[str, str]:
    """Round what goes into a ReLU to the grid of what comes out of it, where that grid reaches below zero.

    The numbers do not change: zero is on the grid, so rounding and cutting off below zero can change places.

    Args:
        model: a QDQ graph; changed in place.

    Returns:
        The tensors that are rounded now → those whose grid they have.
    """
    from onnx import helper

    graph = QdqGraph(model)
    nodes: list[onnx.NodeProto] = []
    parted: dict[str, str] = {}
    for node in model.graph.node:
        source = graph.producers.get(node.input[0]) if node.op_type in _ACTIVATIONS else None
        takers = graph.consumers[node.output[0]]
        if (
            source is not None
            and source.op_type != "DequantizeLinear"
            and len(graph.consumers[node.input[0]]) == 1
            and len(takers) == 1
            and takers[0].op_type == "QuantizeLinear"
            and _reaches_below_zero(graph, takers[0])
        ):
            name, grid = node.input[0], list(takers[0].input[1:])
            integers, rounded = graph.free(f"{name}_q"), graph.free(f"{name}_qdq")
            nodes.append(helper.make_node("QuantizeLinear", [name, *grid], [integers], integers))
            nodes.append(helper.make_node("DequantizeLinear", [integers, *grid], [rounded], rounded))
            node.input[0] = rounded
            parted[name] = node.output[0]
        nodes.append(node)
    graph.replace_nodes(nodes)
    _write_single_limits(model)
    return parted


def _write_single_limits(model: onnx.ModelProto) -> None:
    """Write a Clip between two tensors of integers that cuts off one end of their grid as what does that alone."""
    from onnx import numpy_helper

    graph = QdqGraph(model)
    for node in model.graph.node:
        source = graph.producers.get(node.input[0]) if node.op_type == "Clip" else None
        takers = graph.consumers[node.output[0]]
        if source is None or source.op_type != "DequantizeLinear" or not takers:
            continue
        if takers[0].op_type != "QuantizeLinear" or len(takers[0].input) < 3:
            continue
        limits = [graph.number(name) for name in (*node.input[1:], "", "")][:2]
        if any(limit is None and name for name, limit in zip(node.input[1:], limits, strict=False)):
            continue  # a limit that is computed
        scale, zero_point = (graph.array(name) for name in takers[0].input[1:])
        integers = np.iinfo(zero_point.dtype)
        ends = [(limit - float(zero_point)) * float(scale) for limit in (integers.min, integers.max)]
        low, high = (None if one is None or not ends[0] < one < ends[1] else one for one in limits)
        if (low is None) == (high is None):
            continue
        number = low if low is not None else high
        del node.input[1:]
        del node.attribute[:]
        if number == 0.0 and low is not None:
            node.op_type = "Relu"
            continue
        name = graph.free(f"{node.output[0]}_limit")
        model.graph.initializer.append(numpy_helper.from_array(np.float32(number), name))
        node.op_type = "Max" if low is not None else "Min"
        node.input.append(name)


def _reaches_below_zero(graph: QdqGraph, quantizer: onnx.NodeProto) -> bool:
    if len(quantizer.input) < 3 or not all(name in graph.constants for name in quantizer.input[1:]):
        return False
    zero_point = graph.array(quantizer.input[2])
    return zero_point.size == 1 and int(zero_point.item()) > np.iinfo(zero_point.dtype).min


def update_encodings(encodings: dict[str, Any], parted: dict[str, str]) -> None:
    """Write the grids that :func:`part_activations` gave tensors into AIMET's encodings (version 1.0.0)."""
    entries = encodings["activation_encodings"]
    known = {entry["name"]: entry for entry in entries}
    for name, like in parted.items():
        if name not in known and like in known:
            entries.append({**copy.deepcopy(known[like]), "name": name})
