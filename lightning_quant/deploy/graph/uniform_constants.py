"""Constants with one value for all elements, which the NPU's compiler gets wrong where they are added.

Behind a convolution a 16-bit sum is thousands of steps off, with zeros where the sum has a wider range, or the network
is refused (QAIRT 2.51). An 8-bit sum is wrong where a product of two activations takes it first, as linear attention
does with ``elu(q) + 1``. What is subtracted is right to the step: ``x + c`` is ``x − (−c)``, on the same grid, as
integers and zero point are counted from its other end. Where the 16-bit sum has a finer grid than what is added to, by
a factor of 2 and more, all of it is wrong, unless the constant is written once for each element of an axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_quant.deploy.graph.qdq import QdqGraph, of_integers, sizes_of

if TYPE_CHECKING:
    import onnx


# How much finer the grid of a sum is, at least and below, where its constant is written once for each element: from
# there on the rounding of the one operand is coarser than what this would mend.
_FINER = (2, 64)


def rewrite_uniform(model: onnx.ModelProto) -> None:
    """Subtract what a QDQ graph adds of such constants, and write 16-bit ones out where the difference is narrow.

    Args:
        model: a QDQ graph, its constants integers; changed in place.
    """
    graph = QdqGraph(model)
    nodes: list[onnx.NodeProto] = []
    made: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type == "Add":
            for index, name in enumerate(node.input):
                source = _source(graph, name)
                if source is not None and (kind := graph.array(source.input[2]).dtype).kind == "u":
                    if name not in made:
                        arrays, last = [graph.array(one) for one in source.input], np.iinfo(kind).max
                        negated = [last - arrays[0], arrays[1], last - arrays[2]]
                        made[name] = _read(graph, source, negated, "negated", nodes)
                    node.op_type, node.input[:] = "Sub", [node.input[1 - index], made[name]]
                    break
        nodes.append(node)
    graph.replace_nodes(nodes)
    _write_out(model)


def _write_out(model: onnx.ModelProto) -> None:
    """Write subtracted 16-bit numbers as vectors where the grid of the difference is finer."""
    graph, sizes = QdqGraph(model), sizes_of(model)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        source = _source(graph, node.input[1]) if node.op_type == "Sub" else None
        if source is not None and graph.array(source.input[2]).dtype == np.uint16 and _is_narrow(graph, node):
            arrays = [graph.array(one) for one in source.input]
            if (vector := _vector(arrays[0], sizes.get(node.output[0], ()))) is not None:
                node.input[1] = _read(graph, source, [vector, *arrays[1:]], f"times_{vector.size}", nodes)
        nodes.append(node)
    graph.replace_nodes(nodes)


def _vector(number: np.ndarray, sizes: Sequence[int]) -> np.ndarray | None:
    """Return a number once for each element of the last axis that has several."""
    axis = next((axis for axis in range(1, len(sizes) + 1) if sizes[-axis] > 1), None)
    if axis is None or number.size != 1:
        return None
    return np.full((sizes[-axis], *[1] * (axis - 1)), number.item(), number.dtype)


def _is_narrow(graph: QdqGraph, node: onnx.NodeProto) -> bool:
    """Return whether the output of an operation has a finer grid than its first input, by what matters here."""
    source = graph.source(node.input[0])
    takers = [one for one in graph.consumers[node.output[0]] if one.op_type == "QuantizeLinear"]
    if source is None or not of_integers(source) or not takers:
        return False
    scales = [graph.array(one.input[1]) for one in (source, takers[0])]
    return all(one.size == 1 for one in scales) and _is_finer(scales[0].item(), scales[1].item())


def _is_finer(scale: float, of_sum: float) -> bool:
    return _FINER[0] <= scale / of_sum < _FINER[1]


def rewrite_encoded(model: onnx.ModelProto, encodings: dict[str, Any]) -> None:
    """Do the same to a float graph, by its encodings.

    Args:
        model: AIMET's float graph; changed in place.
        encodings: AIMET's encodings (version 1.0.0); changed in place.
    """
    graph = QdqGraph(model)
    entries = encodings["activation_encodings"]
    known = {entry["name"]: entry for entry in entries}
    of_constants = {name for name in known if graph.known(name) is not None}
    nodes: list[onnx.NodeProto] = []
    made: dict[str, str] = {}
    for node in model.graph.node:
        nodes.append(node)
        for index, name in enumerate(node.input if node.op_type == "Add" else ()):
            value, entry = graph.known(name), known.get(name)
            if value is None or entry is None or not _is_uniform(value):
                continue
            if name not in made:
                made[name] = graph.add(f"{name}_negated", -value)
                (offset,), last = entry["offset"], 2 ** entry["bw"] - 1
                entries.append({**entry, "name": made[name], "is_sym": False, "offset": [-(last + offset)]})
            node.op_type, node.input[:] = "Sub", [node.input[1 - index], made[name]]
            break
    graph.replace_nodes(nodes)
    _write_out_encoded(model, entries)
    left = QdqGraph(model)
    gone = (of_constants | {*made.values()}) - left.producers.keys() - left.constants.keys()
    encodings["activation_encodings"] = [entry for entry in entries if entry["name"] not in gone]


def _write_out_encoded(model: onnx.ModelProto, entries: list[dict[str, Any]]) -> None:
    """Write subtracted 16-bit numbers of a float graph as vectors where the grid of the difference is finer."""
    graph, sizes = QdqGraph(model), sizes_of(model)
    known = {entry["name"]: entry for entry in entries}
    for node in model.graph.node:
        if node.op_type != "Sub" or not all(name in known for name in (*node.input, *node.output)):
            continue
        one, number, output = (known[name] for name in (*node.input, *node.output))
        value = graph.known(number["name"])
        if value is None or output["bw"] != 16:
            continue
        scales = [entry["scale"] for entry in (one, output)]
        vector = _vector(value, sizes.get(output["name"], ()))
        if vector is not None and all(len(scale) == 1 for scale in scales) and _is_finer(scales[0][0], scales[1][0]):
            node.input[1] = graph.add(f"{number['name']}_times_{vector.size}", vector)
            entries.append({**number, "name": node.input[1]})
    graph.replace_nodes(list(model.graph.node))


def _source(graph: QdqGraph, name: str) -> onnx.NodeProto | None:
    """Return what reads the integers of a constant of one value; ``None`` for other tensors."""
    source = graph.producers.get(name)
    if source is None or not of_integers(source) or any(one not in graph.constants for one in source.input):
        return None
    return source if len(source.input) == 3 and _is_uniform(graph.array(source.input[0])) else None


def _is_uniform(array: np.ndarray) -> bool:
    return array.size > 0 and bool((array == array.flat[0]).all())


def _read(
    graph: QdqGraph, source: onnx.NodeProto, arrays: list[np.ndarray], suffix: str, nodes: list[onnx.NodeProto]
) -> str:
    """Add integers with their grid, and what reads them as ``source`` does; return the name of the numbers."""
    from onnx import helper

    names = [graph.add(f"{name}_{suffix}", array) for name, array in zip(source.input, arrays, strict=True)]
    numbers = f"{names[0]}_qdq"
    nodes.append(helper.make_node("DequantizeLinear", names, [numbers], f"{numbers}_dq"))
    return numbers
