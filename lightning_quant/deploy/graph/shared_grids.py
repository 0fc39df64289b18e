"""One integer grid for one tensor, and the same one for what hands it on.

AIMET writes a QuantizeLinear for each operation that had a quantizer of its own, and two scales that are one range in
the simulation may differ in their last digit. ONNX Runtime computes the same either way. The NPU's compiler meets a
tensor of floats between two grids, and computes the operation next to it in float.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_quant.deploy.graph.qdq import QdqGraph, of_integers
from lightning_quant.simulation import aimet

if TYPE_CHECKING:
    import onnx

# Two scales nearer than this, relative, are one range: 32 bits hold seven digits.
_NEAR = 1e-5


def share_grids(model: onnx.ModelProto) -> dict[str, float]:
    """Leave one QuantizeLinear for each tensor, and one grid for the operations that hand integers on.

    Two grids are one where the zero points are equal and the scales are but for the last digits; the first one in
    the graph stays. Which operations hand integers on, and need the same grid on both sides (Reshape, Slice, Concat,
    MaxPool, Resize …), AIMET knows.

    Args:
        model: a QDQ graph; changed in place.

    Returns:
        The new scales of tensors, by their names in the float graph, for the encodings to agree.
    """
    merged = _merge(QdqGraph(model))
    graph = QdqGraph(model)
    tied = _tie(graph)
    scales = {integers: _grid(graph, integers)[0] for integers in {*merged.values(), *tied}}
    changed = {integers: scales[integers] for integers in tied}
    changed |= {dropped: scales[kept] for dropped, kept in merged.items()}
    _convert_behind(model)
    aimet._remove_dangling_nodes_and_initializers(model)
    return {integers.removesuffix("_q"): scale for integers, scale in changed.items()}


def update_encodings(encodings: dict[str, Any], scales: Mapping[str, float]) -> None:
    """Write the scales that :func:`share_grids` gave tensors into AIMET's encodings (version 1.0.0)."""
    for entry in [*encodings["activation_encodings"], *encodings["param_encodings"]]:
        if entry["name"] in scales:
            entry["scale"] = [scales[entry["name"]]]


def _merge(graph: QdqGraph) -> dict[str, str]:
    """Let a tensor be quantized once.

    Returns:
        For each tensor of integers that nothing takes any more, the one taken instead.
    """
    merged: dict[str, str] = {}
    first: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.model.graph.node:
        if node.op_type != "QuantizeLinear":
            continue
        tensor = node.input[0]
        while (before := graph.producers.get(tensor)) is not None and before.op_type == "Identity":
            tensor = before.input[0]
        others = [*([before] if before is not None and of_integers(before) else []), *first[tensor]]
        same = next((other for other in others if _one_grid(_of(graph, other), _of(graph, node))), None)
        if same is None:
            first[tensor].append(node)
            continue
        kept = same.input[0] if same.op_type == "DequantizeLinear" else same.output[0]
        for taker in graph.consumers[node.output[0]]:
            taker.input[0] = kept
            taker.input[1:] = same.input[1:]
            graph.consumers[kept].append(taker)
        merged[node.output[0]] = kept
    return merged


def _tie(graph: QdqGraph) -> list[str]:
    """Give the integers before and after an operation that hands them on one scale, where they are all but equal.

    Returns:
        The tensors of integers whose scale changed.
    """
    stands_for: dict[str, str] = {}

    def first(integers: str) -> str:
        while integers in stands_for:
            integers = stands_for[integers]
        return integers

    for node in graph.model.graph.node:
        if not (aimet._is_grid_equivariant_op(node.op_type) or aimet._is_htp_interpolation_op(node.op_type)):
            continue
        sources = [graph.producers[name] for name in node.input if of_integers(graph.producers.get(name))]
        takers = [taker for name in node.output for taker in graph.consumers[name]]
        given = [source.input[0] for source in sources]
        given += [taker.output[0] for taker in takers if taker.op_type == "QuantizeLinear"]
        for other in given[1:] if sources else ():
            one, two = first(given[0]), first(other)
            if one != two and _one_grid(_grid(graph, one), _grid(graph, two)):
                stands_for[two] = one
    changed = []
    for integers in stands_for:
        if _grid(graph, integers) != _grid(graph, first(integers)):
            changed.append(integers)
            scale = _quantizer(graph, first(integers)).input[1]
            for node in _users(graph, integers):
                node.input[1] = scale
    return changed


def _convert_behind(model: onnx.ModelProto) -> None:
    """Let what hands integers on have one grid, where its output is rounded to another: convert behind it.

    The numbers do not change, as they are on the first grid.
    """
    from onnx import helper

    graph = QdqGraph(model)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        source = _handed_on(graph, node.input[0]) if node.op_type == "QuantizeLinear" else None
        if source is not None and source is not graph.producers[node.input[0]]:
            one, two = _of(graph, source), _of(graph, node)
            if one != two and one[2] and two[2]:
                grid = source.input[1:]
                integers, floats = graph.free(f"{node.input[0]}_kept_q"), graph.free(f"{node.input[0]}_kept_qdq")
                nodes.append(helper.make_node("QuantizeLinear", [node.input[0], *grid], [integers], integers))
                nodes.append(helper.make_node("DequantizeLinear", [integers, *grid], [floats], floats))
                node.input[0] = floats
        nodes.append(node)
    graph.replace_nodes(nodes)


def _handed_on(graph: QdqGraph, tensor: str) -> onnx.NodeProto | None:
    """Return what dequantizes the integers that a tensor holds, in another order or form; ``None`` for other tensors.

    A concatenation is of one grid here: PyTorch's exporter writes ``roll`` as one.
    """
    node = graph.producers.get(tensor)
    if node is None or of_integers(node):
        return node
    if not aimet._is_grid_equivariant_op(node.op_type):
        return None
    sources = [_handed_on(graph, name) for name in (node.input if node.op_type == "Concat" else node.input[:1])]
    grids = {None if one is None else _of(graph, one) for one in sources}
    return sources[0] if len(grids) == 1 else None


def _users(graph: QdqGraph, integers: str) -> list[onnx.NodeProto]:
    """Return the nodes that turn floats into these integers, and these into floats."""
    nodes = [graph.producers.get(integers), *graph.consumers[integers]]
    return [node for node in nodes if node is not None and node.op_type in ("QuantizeLinear", "DequantizeLinear")]


def _quantizer(graph: QdqGraph, integers: str) -> onnx.NodeProto:
    return _users(graph, integers)[0]


def _grid(graph: QdqGraph, integers: str) -> tuple[float, int, str]:
    return _of(graph, _quantizer(graph, integers))


def _of(graph: QdqGraph, node: onnx.NodeProto) -> tuple[float, int, str]:
    """Return scale, zero point and type of a grid; NaN for one that is not constant, or one for each channel."""
    if any(name not in graph.constants for name in node.input[1:]) or graph.array(node.input[1]).size != 1:
        return float("nan"), 0, ""
    scale = float(graph.array(node.input[1]).item())
    if len(node.input) < 3:
        return scale, 0, "uint8"
    zero_point = graph.array(node.input[2])
    return scale, int(zero_point.item()), str(zero_point.dtype)


def _one_grid(one: tuple[float, int, str], two: tuple[float, int, str]) -> bool:
    return one[1:] == two[1:] and bool(np.isclose(one[0], two[0], rtol=_NEAR, atol=0))
