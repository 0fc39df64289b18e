"""A file cut into pieces at the tensors that it rounds: each piece computes one of them from those before it.

All pieces are one graph. What a DequantizeLinear returns becomes an input of it, to be given from elsewhere, and the
same node under another name an output: one run then computes every piece on inputs that carry no error of the pieces
before.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lightning_quant.deploy.graph.qdq import QdqGraph, sizes_of

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Cut:
    """A float tensor that a file rounds to integers.

    Args:
        tensor: its name, before rounding.
        quantizer: the node that rounds it; ``None`` where the simulation rounds it and the file does not.
        values: the names under which the rest of the graph takes it, as floats after rounding.
        position: where the simulation's tensor is among all that it rounds in one pass. Of one that is handed on, where
            its origin is.
        handed_on: whether it holds values that were rounded to this grid before, in another form: a reshape, a slice.
            The simulation rounds it a single time, and there is nothing to compare it with but itself.
    """

    tensor: str
    quantizer: onnx.NodeProto | None
    values: tuple[str, ...]
    position: int = -1
    handed_on: bool = False


def rounded_in(graph: QdqGraph) -> list[Cut]:
    """Return the activations that a file rounds, in the order of computation."""
    found = []
    for node in graph.model.graph.node:
        if node.op_type == "QuantizeLinear":
            takers = [taker for taker in graph.consumers[node.output[0]] if taker.op_type == "DequantizeLinear"]
            found.append(Cut(node.input[0], node, tuple(taker.output[0] for taker in takers)))
    return [cut for cut in found if cut.values]


def piece_of(graph: QdqGraph, tensor: str, cuts: Iterable[Cut]) -> list[onnx.NodeProto]:
    """Return the nodes that compute a tensor from the cuts before it, constants included, in the file's order."""
    ends = {name for cut in cuts for name in cut.values}
    needed: set[int] = set()
    open_names = [tensor]
    while open_names:
        name = open_names.pop()
        node = graph.producers.get(name)
        if node is None or id(node) in needed or (name in ends and name != tensor):
            continue
        needed.add(id(node))
        open_names += node.input
    return [node for node in graph.model.graph.node if id(node) in needed]


def watched(model: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """Return the whole file with inner tensors among its outputs: what has arrived there."""
    twin = copy.deepcopy(model)
    known = {value.name for value in (*twin.graph.output, *twin.graph.input)}
    twin.graph.output.extend(_named(name) for name in dict.fromkeys(names) if name not in known)
    return twin


def pieces(model: onnx.ModelProto, cuts: Sequence[Cut]) -> onnx.ModelProto:
    """Return all pieces as one graph.

    Its inputs are those of the file and the ``values`` of each cut that is not handed on. Its outputs are what the
    pieces compute for all ``values`` (:func:`own`), the tensors before rounding, and the file's outputs that are not
    rounded. What is handed on goes into the next piece as it was before it was rounded once more.
    """
    from onnx import helper

    twin = copy.deepcopy(model)
    given = dict.fromkeys(name for cut in cuts if not cut.handed_on for name in cut.values)
    handed_on = {name: cut.tensor for cut in cuts if cut.handed_on for name in cut.values}
    for name, source in handed_on.items():
        while source in handed_on:  # handed on by what was handed on
            source = handed_on[source]
        handed_on[name] = source
    for node in twin.graph.node:
        node.input[:] = [handed_on.get(name, name) for name in node.input]
        node.output[:] = [own(name) if name in given or name in handed_on else name for name in node.output]
    inputs = {value.name for value in twin.graph.input} | given.keys()
    before = dict.fromkeys(cut.tensor for cut in cuts if cut.tensor not in inputs)
    again = [name for name in before if name in handed_on]  # what is handed on is rounded once more behind it
    twin.graph.node.extend(helper.make_node("Identity", [handed_on[name]], [name]) for name in again)
    computed = {*given, *handed_on, *before}
    kept = [value for value in twin.graph.output if value.name not in computed]
    del twin.graph.output[:]
    twin.graph.output.extend(_named(name) for name in [*map(own, [*given, *handed_on]), *before])
    twin.graph.output.extend(kept)
    twin.graph.input.extend(_float(name) for name in given)
    return twin


def watched_on_grid(model: onnx.ModelProto, cuts: Sequence[Cut]) -> onnx.ModelProto:
    """Return the whole file with the first of each cut's values as an output :func:`seen`, for the NPU's compiler.

    All sizes are written down: of a graph with open ones it takes nothing.
    A second node makes it of the same integers: what a graph outputs itself the compiler does not take together with
    the operations that take it.
    """
    twin = copy.deepcopy(model)
    sizes = sizes_of(model)
    readers = {node.output[0]: node for node in twin.graph.node if node.op_type == "DequantizeLinear"}
    for name in (cut.values[0] for cut in cuts):
        reader = copy.deepcopy(readers[name])
        reader.name, reader.output[:] = seen(reader.name or name), [seen(name)]
        twin.graph.node.append(reader)
        twin.graph.output.append(_float(seen(name), sizes[name]))
    return twin


def pieces_on_grid(model: onnx.ModelProto, cuts: Sequence[Cut]) -> onnx.ModelProto:
    """Return all pieces as one graph, as :func:`pieces` does, for the NPU's compiler.

    What is given is rounded in the graph, to the grid that it is on: the compiler wants operations between integers.
    Its outputs are what the pieces compute for the first of each cut's values (:func:`own`).
    """
    twin = copy.deepcopy(model)
    writers = {node.output[0]: node for node in twin.graph.node if node.op_type == "QuantizeLinear"}
    readers = {node.output[0]: node for node in twin.graph.node if node.op_type == "DequantizeLinear"}
    sizes, added = sizes_of(model), []
    for cut in cuts:
        first = cut.values[0]
        writer = copy.deepcopy(writers[readers[first].input[0]])
        writer.input[0], writer.output[0], writer.name = given(first), f"{given(first)}_q", given(writer.name)
        added.append(writer)
        twin.graph.input.append(_float(given(first), sizes[first]))
        for name in cut.values:
            reader = copy.deepcopy(readers[name])
            reader.input[0], reader.name = writer.output[0], given(reader.name or name)
            added.append(reader)
            readers[name].output[0] = own(name)
    constants = [node for node in twin.graph.node if node.op_type == "Constant"]
    others = [node for node in twin.graph.node if node.op_type != "Constant"]
    nodes = [copy.deepcopy(node) for node in [*constants, *added, *others]]
    del twin.graph.node[:], twin.graph.output[:]
    twin.graph.node.extend(nodes)
    twin.graph.output.extend(_float(own(cut.values[0]), sizes[cut.values[0]]) for cut in cuts)
    return twin


def given(name: str) -> str:
    """Return the name of the input that is rounded in :func:`pieces_on_grid`."""
    return f"{name}__given"


def seen(name: str) -> str:
    """Return the name of the output in :func:`watched_on_grid`."""
    return f"{name}__seen"


def own(name: str) -> str:
    """Return the name of what a piece computes, where ``name`` is given to the pieces behind it."""
    return f"{name}__of_the_piece"


def grid_of(graph: QdqGraph, node: onnx.NodeProto) -> tuple[np.ndarray, np.ndarray]:
    """Return scale and zero point of a QuantizeLinear or DequantizeLinear; NaN for a scale that is computed."""
    scale = graph.known(node.input[1])
    zero_point = graph.known(node.input[2]) if len(node.input) > 2 else np.uint8(0)
    if scale is None or zero_point is None:
        return np.asarray(np.float32(np.nan)), np.asarray(np.uint8(0))
    return scale, np.asarray(zero_point)


def _named(name: str) -> onnx.ValueInfoProto:
    from onnx import helper

    return helper.make_empty_tensor_value_info(name)


def _float(name: str, sizes: Sequence[int] | None = None) -> onnx.ValueInfoProto:
    from onnx import TensorProto, helper

    return helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes)
