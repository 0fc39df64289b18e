"""What surrounds the values of a tensor, written again behind what joins it to them: the NPU's compiler gets it wrong.

It takes padding, and concatenations with a constant of one value, as the padding of what comes next, or as a part of
what was before (QAIRT 2.51): means over padded maps leave the zeros out, convolutions see zeros where there are ones,
of what is cut off at the left and padded there the old values come back, and windows over what was cut begin before the
cut. A choice by a mask in between is computed as it is written. Zeros around what was not cut are right in front of
convolutions and maxima.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_quant.deploy.graph.qdq import QdqGraph, axis_of, of_integers, sizes_of

if TYPE_CHECKING:
    import onnx

_ROUNDING = ("QuantizeLinear", "DequantizeLinear")
_CUTTING = ("Slice", "Split")
_WINDOWS = ("AveragePool", "Conv", "ConvTranspose")
# What leaves each value where it is.
_IN_PLACE = ("Clip", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mul", "Relu", "Sigmoid", "Tanh", "Where")


@dataclass(frozen=True)
class _Filling:
    """Where a node puts one value.

    Args:
        mask: true there, to spread over the tensor.
        value: what it puts.
    """

    mask: np.ndarray
    value: float


def write_padding_again(model: onnx.ModelProto, encodings: dict[str, Any] | None = None) -> None:
    """Choose by a mask between what a node joins and the one value that it joins it with.

    Args:
        model: a graph with or without QuantizeLinear; changed in place.
        encodings: AIMET's (version 1.0.0), of a graph without; changed in place.
    """
    graph = QdqGraph(model)
    writing = _Writing(graph, sizes_of(model), encodings)
    for node in list(model.graph.node):
        writing.take(node)
    if writing.changed:
        graph.replace_nodes(writing.nodes)


class _Writing:
    """Write the nodes, one after another."""

    def __init__(self, graph: QdqGraph, sizes: Mapping[str, Sequence[int]], encodings: dict[str, Any] | None) -> None:
        self.graph = graph
        self.sizes = sizes
        self.entries: list[dict[str, Any]] | None = None if encodings is None else encodings["activation_encodings"]
        self.known = {entry["name"]: entry for entry in self.entries or ()}
        self.nodes: list[onnx.NodeProto] = []
        self.changed = False

    def take(self, node: onnx.NodeProto) -> None:
        """Write a node, and what comes behind it."""
        fillings = list(self._fillings(node))
        if fillings and (grid := self._grid_behind(node.output[0])) is not None:
            self._masked(node, node.output[0], grid, fillings)
        else:
            self.nodes.append(node)

    def _grid_behind(self, name: str) -> Sequence[str] | None:
        """Return the scale and zero point of what rounds a tensor, none for one with an encoding."""
        if self.entries is not None:
            return () if name in self.known else None
        takers = self.graph.consumers[name]
        if not takers or any(taker.op_type != "QuantizeLinear" for taker in takers):
            return None
        return list(takers[0].input[1:])

    def _fillings(self, node: onnx.NodeProto) -> Iterator[_Filling]:
        if node.op_type == "Concat":
            found = [self._one_value(name) for name in node.input]
            sizes = [self.sizes.get(name) for name in node.input]
            if all(one is None for one in found) or any(size is None for size in sizes):
                return
            rank = len(sizes[0] or ())
            axis = axis_of(node) % rank
            lengths = [size[axis] for size in sizes if size is not None]
            for index, value in enumerate(found):
                if value is not None:
                    mask = np.zeros(sum(lengths), bool)
                    mask[sum(lengths[:index]) : sum(lengths[: index + 1])] = True
                    yield _Filling(mask.reshape([-1 if one == axis else 1 for one in range(rank)]), value)
        elif node.op_type == "Pad" and not self._is_right(node):
            pads = self.graph.known(node.input[1])
            size = self.sizes.get(node.input[0])
            value = 0.0 if len(node.input) < 3 or not node.input[2] else self._one_value(node.input[2])
            mode = next((one.s for one in node.attribute if one.name == "mode"), b"constant")
            if (
                pads is not None
                and size is not None
                and value is not None
                and mode == b"constant"
                and len(node.input) < 4
            ):
                yield from _around(size, pads.tolist(), value)
        elif node.op_type == "Slice" and self._cuts_the_beginning(node):
            yield _Filling(np.zeros(1, bool), 0.0)  # nowhere: what comes next is kept apart from the cut

    def _cuts_the_beginning(self, node: onnx.NodeProto) -> bool:
        """Return whether a slice takes a map from which the compiler lets what comes next begin too early."""
        starts, axes = (
            self.graph.known(name) for name in (node.input[1], node.input[3] if len(node.input) > 3 else "")
        )
        rank = len(self.sizes.get(node.input[0], ()))
        if starts is None or axes is None or rank < 3:
            return False
        is_cut = any(int(axis) % rank > 1 and int(start) for start, axis in zip(starts, axes, strict=True))
        return is_cut and any(reader.op_type in _WINDOWS for reader in self._readers(node.output[0], _IN_PLACE))

    def _is_right(self, node: onnx.NodeProto) -> bool:
        """Return whether the compiler computes a padding as it is written."""
        readers = {reader.op_type for reader in self._readers(node.output[0])}
        source = self.graph.producers.get(node.input[0])
        while source is not None and source.op_type in _ROUNDING:
            source = self.graph.producers.get(source.input[0])
        is_cut = source is not None and source.op_type in _CUTTING
        return bool(readers) and readers <= {"Conv", "MaxPool"} and not is_cut

    def _readers(self, name: str, seen_through: Sequence[str] = ()) -> Iterator[onnx.NodeProto]:
        for reader in self.graph.consumers[name]:
            if reader.op_type in _ROUNDING or reader.op_type in seen_through:
                yield from self._readers(reader.output[0], seen_through)
            else:
                yield reader

    def _one_value(self, name: str) -> float | None:
        """Return the number that all elements of a constant are; ``None`` for other tensors."""
        array = self.graph.known(name)
        if array is None:
            source = self.graph.producers.get(name)
            if (
                source is None
                or not of_integers(source)
                or any(one not in self.graph.constants for one in source.input)
            ):
                return None
            numbers, scale, *zero = (self.graph.array(one) for one in source.input)
            if scale.size != 1:
                return None
            array = (numbers.astype(np.float64) - (zero[0].astype(np.float64) if zero else 0)) * scale
        is_one = array.dtype.kind == "f" and array.size > 0 and bool((array == array.flat[0]).all())
        return float(array.flat[0]) if is_one else None

    def _is_times_zero(self, name: str) -> bool:
        """Return whether a tensor is another one times zero: an idiom for zeros of its size."""
        node = self.graph.producers.get(name)
        while node is not None and node.op_type in _ROUNDING:
            node = self.graph.producers.get(node.input[0])
        return node is not None and node.op_type == "Mul" and any(self._one_value(one) == 0 for one in node.input)

    def _masked(self, node: onnx.NodeProto, output: str, grid: Sequence[str], fillings: Sequence[_Filling]) -> None:
        """Write a node, and the choices that put its values again, on the grid of what it puts out."""
        from onnx import helper

        self.changed = True
        given = self.graph.free(f"{output}_unmasked")
        node.output[0] = given
        self.nodes.append(node)
        for index, filling in enumerate(fillings):
            mask = self.graph.add(f"{output}_mask", filling.mask)
            value = self._number(f"{output}_fill", filling.value, grid, output)
            made = output if index == len(fillings) - 1 else self.graph.free(f"{output}_masked")
            inputs = [mask, value, self._rounded(given, grid, output)]
            self.nodes.append(helper.make_node("Where", inputs, [made], f"{made}_where"))
            given = made

    def _number(self, name: str, value: float, grid: Sequence[str], like: str) -> str:
        from onnx import helper

        if not grid:
            made = self.graph.add(name, np.array([value], np.float32))
            self._encoded_as(made, like)
            return made
        scale, zero = (self.graph.array(one) for one in grid)
        ends = np.iinfo(zero.dtype)
        steps = np.clip(np.rint(value / scale) + zero, ends.min, ends.max).astype(zero.dtype)
        made = self.graph.add(f"{name}_q", steps.reshape(1))
        self.nodes.append(helper.make_node("DequantizeLinear", [made, *grid], [f"{made}dq"], f"{made}dq_node"))
        return f"{made}dq"

    def _rounded(self, name: str, grid: Sequence[str], like: str) -> str:
        from onnx import helper

        if not grid:
            self._encoded_as(name, like)
            return name
        for kind, given, made in (("Quantize", name, f"{name}_q"), ("Dequantize", f"{name}_q", f"{name}_qdq")):
            self.nodes.append(helper.make_node(f"{kind}Linear", [given, *grid], [made], f"{made}_node"))
        return f"{name}_qdq"

    def _encoded_as(self, name: str, like: str) -> None:
        if self.entries is not None and like in self.known:
            self.entries.append({**self.known[like], "name": name})


def _around(size: Sequence[int], pads: Sequence[int], value: float) -> Iterator[_Filling]:
    """Yield where a padding puts its value; nothing where it puts none, or cuts."""
    rank = len(size)
    before, behind = pads[:rank], pads[rank:]
    if not any(pads) or min(pads) < 0:
        return
    mask = np.zeros([1] * rank, bool)
    for axis in range(rank):
        if before[axis] or behind[axis]:
            outside = np.ones(before[axis] + size[axis] + behind[axis], bool)
            outside[before[axis] : before[axis] + size[axis]] = False
            mask = mask | outside.reshape([-1 if one == axis else 1 for one in range(rank)])
    yield _Filling(mask, value)
