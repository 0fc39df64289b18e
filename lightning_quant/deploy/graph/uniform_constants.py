"""Constants with one value for all elements, which the NPU's compiler gets wrong where they are added.

Behind a convolution a 16-bit sum is thousands of steps off, with zeros where the sum has a wider range, or the network
is refused (QAIRT 2.51). An 8-bit sum is wrong where a product of two activations takes it first, as linear attention
does with ``elu(q) + 1``. What is subtracted is right to the step: ``x + c`` is ``x − (−c)``, on the same grid, as
integers and zero point are counted from its other end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_quant.deploy.graph.qdq import QdqGraph, of_integers

if TYPE_CHECKING:
    import onnx


def rewrite_uniform(model: onnx.ModelProto) -> None:
    """Subtract what a QDQ graph adds of such constants.

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
    left = QdqGraph(model)
    gone = of_constants - left.producers.keys() - left.constants.keys()
    encodings["activation_encodings"] = [entry for entry in entries if entry["name"] not in gone]


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
