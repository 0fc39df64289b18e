"""Inputs that a network hands on before it computes with them: a device does so with the integers that it was given.

In the simulation an output that is an input is the float tensor itself. AIMET's files leave it without a range, and the
input as well: the range stands at the copy that the first operation takes. The same with an input that is read in
parts, as the first layer of some detectors does: the ranges, which are one in the simulation, stand at the parts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_quant.deploy.graph.qdq import QdqGraph, hands_on
from lightning_quant.simulation import aimet

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Grid:
    """The integers that a device rounds a tensor to.

    Args:
        scale: the distance of two of them.
        zero_point: the integer that stands for 0; its type is that of all.
    """

    scale: float
    zero_point: np.ndarray

    def is_same(self, other: Grid | None) -> bool:
        """Return whether another one has the same integers for the same numbers."""
        same = other is not None and self.scale == other.scale and self.zero_point == other.zero_point
        return bool(same) and other is not None and self.zero_point.dtype == other.zero_point.dtype

    def round(self, values: np.ndarray) -> np.ndarray:
        """Return the nearest numbers on the grid."""
        return self.reals(self.integers(values)).astype(values.dtype)

    def integers(self, values: np.ndarray) -> np.ndarray:
        """Return the integers that stand for the nearest numbers."""
        limits = np.iinfo(self.zero_point.dtype)
        nearest = np.rint(values / np.float32(self.scale)) + float(self.zero_point)
        return np.clip(nearest, limits.min, limits.max).astype(self.zero_point.dtype)

    def reals(self, integers: np.ndarray) -> np.ndarray:
        """Return the numbers that integers stand for, in float32 as ONNX computes them."""
        return (integers.astype(np.float32) - np.float32(self.zero_point)) * np.float32(self.scale)


def grids_of(model: onnx.ModelProto, names: Iterable[str]) -> dict[str, Grid]:
    """Return what inputs and outputs are rounded to, where each is rounded once and the first or last thing."""
    graph = QdqGraph(model)
    found = {}
    for name in names:
        rounding = graph.consumers[name] if name not in graph.producers else [graph.producers[name]]
        kinds = {node.op_type for node in rounding}
        constants = {tuple(node.input[1:]) for node in rounding}
        if kinds in ({"QuantizeLinear"}, {"DequantizeLinear"}) and len(constants) == 1:
            grid = grid_of(graph, rounding[0])
            if grid is not None:
                found[name] = grid
    return found


def grid_of(graph: QdqGraph, node: onnx.NodeProto) -> Grid | None:
    """Return what a QuantizeLinear rounds to; ``None`` where each channel has its own."""
    scale, zero_point = (graph.array(one) for one in node.input[1:3])
    return Grid(float(scale), zero_point) if scale.size == 1 else None


def round_input(model: onnx.ModelProto, grid: Grid) -> set[str]:
    """Round the input of a graph, which has one, to a grid, and all that only moves its values.

    Args:
        model: a QDQ graph; changed in place.
        grid: that its input is on already.

    Returns:
        The names of what is rounded to it now, as they were before.
    """
    graph = QdqGraph(model)
    (name,) = (value.name for value in model.graph.input)
    for copied in graph.consumers[name]:
        if copied.op_type == "Identity" and copied.output[0] not in graph.outputs:
            for taker in graph.consumers[copied.output[0]]:
                taker.input[:] = [name if one == copied.output[0] else one for one in taker.input]
    ends = [
        graph.add(f"{name}_scale", np.asarray(grid.scale, np.float32)),
        graph.add(f"{name}_zero_point", grid.zero_point),
    ]
    return _round_first(graph, name, ends)


def _round_first(graph: QdqGraph, name: str, ends: list[str]) -> set[str]:
    """Round an input before all else, to the scale and zero point in ``ends``, and what hands it on."""
    from onnx import helper

    integers = graph.free(f"{name}_q")
    quantizer = helper.make_node("QuantizeLinear", [name, *ends], [integers], f"{integers}_node")
    dequantizer = helper.make_node("DequantizeLinear", [integers, *ends], [graph.free(f"{name}_qdq")], f"{integers}_dq")
    nodes = [copy.deepcopy(node) for node in (quantizer, dequantizer, *graph.model.graph.node)]
    del graph.model.graph.node[:]
    graph.model.graph.node.extend(nodes)
    return _round(QdqGraph(graph.model), name, graph.model.graph.node[0])


def encode_passed_inputs(model: onnx.ModelProto, encodings: dict[str, Any]) -> bool:
    """Move the encoding of an input's copy to the input, and give it to what is handed on of the input.

    Args:
        model: AIMET's float graph; a copy that is there for its encoding only is taken out.
        encodings: AIMET's encodings (version 1.0.0); changed in place.

    Returns:
        Whether anything changed.
    """
    entries = encodings["activation_encodings"]
    known = {entry["name"]: entry for entry in entries}
    changed = False
    for name in [value.name for value in model.graph.input if value.name not in known]:
        graph = QdqGraph(model)
        parts, roundings = _read_in_parts(graph, name, known.get)
        if roundings and all({**entry, "name": ""} == {**roundings[0], "name": ""} for entry in roundings):
            entries += [{**copy.deepcopy(roundings[0]), "name": part} for part in parts]
            changed = True
            continue
        copies = [node for node in graph.consumers[name] if node.op_type == "Identity" and node.output[0] in known]
        if not copies or copies[0].output[0] in graph.outputs:
            continue
        (replaced,) = copies[0].output
        for node in graph.consumers[replaced]:
            node.input[:] = [name if one == replaced else one for one in node.input]
        model.graph.node.remove(copies[0])
        entry = known.pop(replaced)
        entry["name"] = name
        known[name] = entry
        handed_on = {name}
        for node in model.graph.node:
            if hands_on(node) and node.input[0] in handed_on:
                for output in set(node.output) - known.keys():
                    handed_on.add(output)
                    known[output] = {**copy.deepcopy(entry), "name": output}
                    entries.append(known[output])
        changed = True
    return changed


def _read_in_parts(graph: QdqGraph, name: str, rounding_of: Callable[[str], Any]) -> tuple[list[str], list[Any]]:
    """Return an input and what is handed on of it before it is rounded, and then the roundings; nothing for others.

    Args:
        graph: the graph.
        name: the input.
        rounding_of: returns what rounds a tensor, or ``None``.
    """
    parts, roundings = [name], []
    for part in parts:
        for taker in graph.consumers[part]:
            outputs = list(taker.output)
            rounded = [rounding_of(output) for output in outputs]
            takes = (hands_on(taker) and taker.input[0] == part) or taker.op_type == "Concat"
            if not takes or not graph.outputs.isdisjoint(outputs):
                return [], []
            if None not in rounded:
                roundings.extend(rounded)
            elif taker.op_type == "Concat":
                return [], []
            else:
                parts.extend(outputs)
    return parts, roundings


def _round_in_parts(graph: QdqGraph, name: str) -> None:
    """Round an input, where only parts of it were rounded, all to one grid."""

    def rounding_of(tensor: str) -> Any:
        takers = graph.consumers[tensor]
        return takers[0] if {taker.op_type for taker in takers} == {"QuantizeLinear"} else None

    _, roundings = _read_in_parts(graph, name, rounding_of)
    grid = grid_of(graph, roundings[0]) if roundings else None
    if grid is None or not all(grid.is_same(grid_of(graph, one)) for one in roundings):
        return
    _round_first(graph, name, list(roundings[0].input[1:]))


def round_passed_inputs(model: onnx.ModelProto) -> dict[str, Grid]:
    """Let all that is handed on of an input be what the first operation takes of it: rounded.

    Args:
        model: a QDQ graph; changed in place.

    Returns:
        The outputs that are inputs, handed on, and the grid that they are rounded to.
    """
    passed: dict[str, Grid] = {}
    for name in [value.name for value in model.graph.input]:
        _round_in_parts(QdqGraph(model), name)
        graph = QdqGraph(model)
        paths = [(node, *graph.consumers[node.output[0]]) for node in graph.consumers[name]]
        quantizers = [one for path in paths for one in path if one.op_type == "QuantizeLinear"]
        quantizers = [one for one in quantizers if one.input[0] == name or _op(graph, one.input[0]) == "Identity"]
        handed_on = [
            path[0] for path in paths if hands_on(path[0]) and not set(map(id, path)) & set(map(id, quantizers))
        ]
        if quantizers and handed_on:
            grid = Grid(float(graph.array(quantizers[0].input[1])), graph.array(quantizers[0].input[2]))
            passed |= dict.fromkeys(_round(graph, name, quantizers[0]) & graph.outputs, grid)
    return passed


def _round(graph: QdqGraph, name: str, quantizer: onnx.NodeProto) -> set[str]:
    """Let everything that hands on the input ``name`` take it from ``quantizer``; return their outputs."""
    from onnx import helper

    quantizer.input[0] = name
    integers, scale, zero_point = quantizer.output[0], quantizer.input[1], quantizer.input[2]
    dequantizer = next(node for node in graph.consumers[integers] if node.op_type == "DequantizeLinear")
    nodes = [quantizer, dequantizer]
    rounded, grid = {name: dequantizer.output[0]}, grid_of(graph, quantizer)
    for node in graph.model.graph.node:
        if node is quantizer or node is dequantizer:
            continue
        nodes.append(node)
        takers = [taker for output in node.output for taker in graph.consumers[output]]
        quantizers = [taker for taker in takers if taker.op_type == "QuantizeLinear"]
        if quantizers and (hands_on(node) or node.op_type == "Concat"):
            if grid is not None and all(grid.is_same(grid_of(graph, one)) for one in quantizers):
                node.input[:] = [rounded.get(one, one) for one in node.input]
            continue
        if not hands_on(node) or node.input[0] not in rounded:
            continue
        if node.op_type == "Identity":
            nodes[-1] = helper.make_node(
                "DequantizeLinear", [integers, scale, zero_point], list(node.output), f"{node.output[0]}_dq"
            )
            rounded[node.output[0]] = node.output[0]
            continue
        node.input[0] = rounded[node.input[0]]
        for index, output in enumerate(node.output):
            node.output[index] = graph.free(f"{output}_qdq")
            ends, stem = [scale, zero_point], graph.free(f"{output}_q")
            nodes.append(helper.make_node("QuantizeLinear", [node.output[index], *ends], [stem], f"{output}_q"))
            nodes.append(helper.make_node("DequantizeLinear", [stem, *ends], [output], f"{output}_dq"))
            rounded[output] = output
    nodes = [copy.deepcopy(node) for node in nodes]
    del graph.model.graph.node[:]
    graph.model.graph.node.extend(nodes)
    aimet._remove_dangling_nodes_and_initializers(graph.model)
    return set(rounded)


def _op(graph: QdqGraph, name: str) -> str:
    return graph.producers[name].op_type if name in graph.producers else ""
