"""Activations as the NPU's compiler takes them: with the operation before them, or right without it.

A convolution and the ReLU behind it are one operation in integers if the least integer stands for zero. Where the ReLU
goes into a concatenation with values below zero, all of them share one range, its zero is another integer, and the
compiler computes both in float. As an operation of its own, between two tensors of that grid, the ReLU is one of
integers again.

Of a Clip that stands on its own behind a convolution the compiler takes both limits or none: where one is at the end of
the grid or beyond it, the other is lost, and values come out that were cut off. With 16 bits both are lost even where
both are inside the grid (by its emulator, QAIRT 2.51).
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_quant.deploy.graph.qdq import QdqGraph, of_integers

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
    _write_limits(model)
    return parted


def _write_limits(model: onnx.ModelProto) -> None:
    """Write a Clip between two tensors of integers as an operation for each end of their grid that it cuts off.

    One of 8 bits that cuts off both ends stays, and one that cuts off none.
    """
    graph = QdqGraph(model)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        limits = _limits_inside(graph, node) if node.op_type == "Clip" else []
        if len(limits) == 1 or (len(limits) == 2 and _grid(graph, node)[1].itemsize > 1):
            nodes += _cut_off(graph, node, limits)
        else:
            nodes.append(node)
    graph.replace_nodes(nodes)


def _limits_inside(graph: QdqGraph, clip: onnx.NodeProto) -> list[tuple[str, int]]:
    """Return the integers that a Clip cuts off at, between the ends of the grid of its output, and the operation.

    None of a Clip that does not stand between two tensors of integers, or has a limit that is computed.
    """
    takers = graph.consumers[clip.output[0]]
    if not of_integers(graph.producers.get(clip.input[0])) or not takers:
        return []
    if takers[0].op_type != "QuantizeLinear" or len(takers[0].input) < 3:
        return []
    scale, zero_point = _grid(graph, clip)
    ends = np.iinfo(zero_point.dtype)
    found = []
    for operation, name in zip(("Max", "Min"), clip.input[1:], strict=False):
        if not name:
            continue
        if (limit := _limit(graph, name)) is None:
            return []
        integer = int(np.clip(np.rint(limit / float(scale)) + int(zero_point), ends.min, ends.max))
        if ends.min < integer < ends.max:
            found.append((operation, integer))
    return found


def _grid(graph: QdqGraph, clip: onnx.NodeProto) -> tuple[np.ndarray, np.ndarray]:
    """Return scale and zero point of the output of a Clip."""
    scale, zero_point = (graph.array(name) for name in graph.consumers[clip.output[0]][0].input[1:])
    return scale, zero_point


def _limit(graph: QdqGraph, name: str) -> float | None:
    """Return a constant, which AIMET may have rounded already; ``None`` for what is computed."""
    source = graph.producers.get(name)
    if source is None or not of_integers(source):
        return graph.number(name)
    integer, scale, zero_point = (graph.number(one) for one in source.input)
    return None if integer is None or scale is None or zero_point is None else (integer - zero_point) * scale


def _cut_off(graph: QdqGraph, clip: onnx.NodeProto, limits: list[tuple[str, int]]) -> list[onnx.NodeProto]:
    """Return what computes the same as a Clip: an operation for each limit, integers of its grid between the two."""
    from onnx import helper

    scale, zero_point = graph.consumers[clip.output[0]][0].input[1:]
    made: list[onnx.NodeProto] = []
    given = clip.input[0]
    for operation, limit in limits:
        if made:
            between = graph.free(f"{clip.output[0]}_above")
            made[-1].output[0] = between
            integers, given = f"{between}_q", f"{between}_qdq"
            made.append(helper.make_node("QuantizeLinear", [between, scale, zero_point], [integers], integers))
            made.append(helper.make_node("DequantizeLinear", [integers, scale, zero_point], [given], given))
        name = f"{clip.name}_{operation.lower()}"
        if operation == "Max" and limit == graph.array(zero_point):
            made.append(helper.make_node("Relu", [given], [clip.output[0]], name))
            continue
        # on the grid of the other input: compared with integers of another, values come out that were cut off
        constant = graph.add(f"{name}_q", np.asarray(limit, graph.array(zero_point).dtype))
        made.append(helper.make_node("DequantizeLinear", [constant, scale, zero_point], [f"{name}_limit"]))
        made.append(helper.make_node(operation, [given, f"{name}_limit"], [clip.output[0]], name))
    return made


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
