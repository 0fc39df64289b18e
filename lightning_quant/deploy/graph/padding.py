"""Padding and cutting, kept apart from what comes next: the NPU's compiler takes them into it, and gets it wrong.

It takes padding, a concatenation with a constant of one value and a slice or split as the padding of the operation
that reads it, or as a part of what was before (QAIRT 2.51): means over padded maps leave the zeros out, convolutions
see zeros where there are ones, of what is cut off at the left and padded there the old values come back, and windows
over what was cut begin before the cut. A choice by a mask in between is computed as it is written: it puts the one
value again where it belongs, or chooses nothing. Zeros around what was not cut are right in front of convolutions and
maxima.
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


# What is only kept apart.
_NOWHERE = _Filling(np.zeros(1, bool), 0.0)


def keep_padding_apart(model: onnx.ModelProto, encodings: dict[str, Any] | None = None) -> None:
    """Choose by a mask behind what pads and cuts, where the NPU's compiler would take it into what reads it.

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
        """Write a node, and what keeps it apart."""
        if node.op_type == "AveragePool" and self._padded_in_front(node):
            return
        fillings = {"Concat": self._joined, "Pad": self._padded, "Slice": self._cut}.get(node.op_type)
        found = {node.output[0]: [] if fillings is None else list(fillings(node))}
        if node.op_type == "Split":
            found = {part: [_NOWHERE] for part in self._averaged_parts(node)}
        grids = {name: grid for name, one in found.items() if one and (grid := self._grid_behind(name)) is not None}
        self._write(node, {name: (grid, found[name]) for name, grid in grids.items()})

    def _joined(self, node: onnx.NodeProto) -> Iterator[_Filling]:
        values = [self._one_value(name) for name in node.input]
        sizes = [self.sizes[name] for name in node.input if name in self.sizes]
        if len(sizes) < len(values):
            return
        axis = axis_of(node) % len(sizes[0])
        ends = np.cumsum([size[axis] for size in sizes])
        for size, end, value in zip(sizes, ends, values, strict=True):
            if value is not None:
                mask = np.zeros(ends[-1], bool)
                mask[end - size[axis] : end] = True
                yield _Filling(_along(mask, axis, len(size)), value)

    def _padded(self, node: onnx.NodeProto) -> Iterator[_Filling]:
        pads, size = self.graph.known(node.input[1]), self.sizes.get(node.input[0])
        value = self._one_value(node.input[2]) if len(node.input) > 2 and node.input[2] else 0.0
        mode = next((one.s for one in node.attribute if one.name == "mode"), b"constant")
        if pads is None or size is None or value is None or mode != b"constant" or len(node.input) > 3:
            return
        source = self.graph.producers.get(node.input[0])
        while source is not None and source.op_type in _ROUNDING:
            source = self.graph.producers.get(source.input[0])
        cuts = bool((pads < 0).any()) or (source is not None and source.op_type in _CUTTING)
        readers = {reader.op_type for reader in self._readers(node.output[0])}
        if pads.any() and (cuts or not readers or not readers <= {"Conv", "MaxPool"}):
            yield _around(size, pads.tolist(), value)

    def _cut(self, node: onnx.NodeProto) -> Iterator[_Filling]:
        starts, axes = (self.graph.known(name) for name in (node.input[1], (*node.input, "", "")[3]))
        rank = len(self.sizes.get(node.input[0], ()))
        if starts is None or axes is None or rank < 3:
            return
        is_cut = any(int(axis) % rank > 1 and int(start) for start, axis in zip(starts, axes, strict=True))
        if is_cut and self._is_read_by(_WINDOWS, node.output[0]):
            yield _NOWHERE

    def _averaged_parts(self, node: onnx.NodeProto) -> list[str]:
        """Return the parts of what is split that are averaged and do not begin where the whole does.

        Convolutions take parts of a split as they are, unlike slices.
        """
        rank = len(self.sizes.get(node.input[0], ()))
        if rank < 3 or axis_of(node, 0) % rank < 2:
            return []
        return [part for part in node.output[1:] if self._is_read_by(("AveragePool",), part)]

    def _is_read_by(self, kinds: Sequence[str], name: str) -> bool:
        return any(reader.op_type in kinds for reader in self._readers(name, _IN_PLACE))

    def _padded_in_front(self, node: onnx.NodeProto) -> bool:
        """Write the padding of means in front of them, where these are of blocks and count it: it would be left out.

        Returns:
            Whether it was written.
        """
        from onnx import helper

        values = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        pads, given = values.get("pads", []), node.input[0]
        is_counted = values.get("count_include_pad") and values["kernel_shape"] == values.get("strides")
        if not any(pads) or not is_counted or values.get("ceil_mode") or given not in self.sizes:
            return False
        grid = self._grid_of(given)
        if grid is None:
            return False
        size, axes = self.sizes[given], len(pads) // 2
        others = [0] * (len(size) - axes)
        around = [*others, *pads[:axes], *others, *pads[axes:]]
        padded = self.graph.free(f"{given}_padded")
        counts = self.graph.add(f"{padded}_pads", np.array(around, np.int64))
        if self.entries is not None:
            self.known[padded] = {**self.known[given], "name": padded}
            self.entries.append(self.known[padded])
        padding = helper.make_node("Pad", [given, counts], [padded], f"{padded}_node")
        self._write(padding, {padded: (grid, [_around(size, around)])})
        kept = [one for one in node.attribute if one.name not in ("pads", "count_include_pad")]
        del node.attribute[:]
        node.attribute.extend(kept)
        node.input[0] = self._rounded(padded, grid)
        self.nodes.append(node)
        return True

    def _readers(self, name: str, seen_through: Sequence[str] = ()) -> Iterator[onnx.NodeProto]:
        for reader in self.graph.consumers[name]:
            if reader.op_type in _ROUNDING or reader.op_type in seen_through:
                yield from self._readers(reader.output[0], seen_through)
            else:
                yield reader

    def _grid_of(self, name: str) -> Sequence[str] | None:
        """Return the scale and zero point that a tensor was rounded with; none where an encoding says it."""
        if self.entries is not None:
            return () if name in self.known else None
        read = self.graph.producers.get(name)
        return list(read.input[1:]) if read is not None and read.op_type == "DequantizeLinear" else None

    def _grid_behind(self, name: str) -> Sequence[str] | None:
        """Return the scale and zero point that a tensor is rounded with next."""
        takers = self.graph.consumers[name]
        if self.entries is not None:
            return self._grid_of(name)
        if not takers or any(taker.op_type != "QuantizeLinear" for taker in takers):
            return None
        return list(takers[0].input[1:])

    def _one_value(self, name: str) -> float | None:
        """Return the number that all elements of a constant are; ``None`` for other tensors."""
        array, source = self.graph.known(name), self.graph.producers.get(name)
        if array is None and of_integers(source):
            assert source is not None
            if any(one not in self.graph.constants for one in source.input):
                return None
            numbers, scale, *zero = (self.graph.array(one) for one in source.input)
            if scale.size == 1:
                array = (numbers.astype(np.float64) - (zero[0].astype(np.float64) if zero else 0)) * scale
        is_one = array is not None and array.dtype.kind == "f" and array.size > 0 and (array == array.flat[0]).all()
        return float(array.flat[0]) if array is not None and is_one else None

    def _write(self, node: onnx.NodeProto, masked: Mapping[str, tuple[Sequence[str], Sequence[_Filling]]]) -> None:
        """Write a node, and behind it the choices that put values again into its outputs, on the grids of these."""
        unmasked = {output: self.graph.free(f"{output}_unmasked") for output in masked}
        node.output[:] = [unmasked.get(output, output) for output in node.output]
        self.nodes.append(node)
        for output, (grid, fillings) in masked.items():
            self.changed = True
            self._masked(unmasked[output], output, grid, fillings)

    def _masked(self, given: str, output: str, grid: Sequence[str], fillings: Sequence[_Filling]) -> None:
        from onnx import helper

        for index, filling in enumerate(fillings):
            self._encoded_as(given, output)
            mask = self.graph.add(f"{output}_mask", filling.mask)
            inputs = [mask, self._number(f"{output}_fill", filling.value, grid, output), self._rounded(given, grid)]
            given = output if index == len(fillings) - 1 else self.graph.free(f"{output}_masked")
            self.nodes.append(helper.make_node("Where", inputs, [given], f"{given}_where"))

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

    def _rounded(self, name: str, grid: Sequence[str]) -> str:
        from onnx import helper

        if not grid:
            return name
        for kind, given, made in (("Quantize", name, f"{name}_q"), ("Dequantize", f"{name}_q", f"{name}_qdq")):
            self.nodes.append(helper.make_node(f"{kind}Linear", [given, *grid], [made], f"{made}_node"))
        return f"{name}_qdq"

    def _encoded_as(self, name: str, like: str) -> None:
        if self.entries is not None:
            self.entries.append({**self.known[like], "name": name})


def _along(mask: np.ndarray, axis: int, rank: int) -> np.ndarray:
    return mask.reshape([-1 if one == axis else 1 for one in range(rank)])


def _around(size: Sequence[int], pads: Sequence[int], value: float = 0.0) -> _Filling:
    """Return where a padding puts its value. A negative one cuts."""
    rank = len(size)
    mask = np.zeros([1] * rank, bool)
    for axis, (before, behind) in enumerate(zip(pads[:rank], pads[rank:], strict=True)):
        if before > 0 or behind > 0:
            outside = np.ones(before + size[axis] + behind, bool)
            outside[max(before, 0) : len(outside) - max(behind, 0)] = False
            mask = mask | _along(outside, axis, rank)
    return _Filling(mask, value)
