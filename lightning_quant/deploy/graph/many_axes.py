"""Tensors of more axes than the NPU has, without those of size one.

Windows of an image, heads of an attention, its keys by row and column: six axes and more, the first of which is the
one sample that a device computes at a time. The NPU has five. Its compiler leaves what has more to the CPU.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_quant.deploy.graph.qdq import QdqGraph, axis_of, sizes_of

if TYPE_CHECKING:
    import onnx

_MOST = 5
_RESHAPING = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")
_ELEMENTWISE = ("Add", "Div", "Max", "Min", "Mul", "Pow", "Sub", "Where")
# Operations on each value alone, whatever the axes; the grid of a whole tensor included.
_VALUES = (
    "Cast", "Clip", "DequantizeLinear", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "Identity",
    "LeakyRelu", "Log", "Neg", "QuantizeLinear", "Relu", "Sigmoid", "Softplus", "Sqrt", "Tanh",
)  # fmt: skip
_ALONG = ("Concat", "Gather", "Softmax", "Split")


class _Unknown(Exception):
    """Something has more axes than five, of which it is not known what becomes of them."""


def leave_out_ones(model: onnx.ModelProto) -> dict[str, str]:
    """Write tensors of more than five axes without axes of size one; all or none of them.

    Args:
        model: a graph of known sizes, with or without QuantizeLinear; changed in place.

    Returns:
        For tensors that are new because something needs another one's values in another form: whose values they are,
        for the encodings. Those of the rest keep their names.
    """
    graph, sizes = QdqGraph(model), sizes_of(model)
    if all(len(size) <= _MOST for size in sizes.values()):
        return {}
    try:
        rewriting = _Rewriting(graph, sizes)
        for node in model.graph.node:
            rewriting.take(node)
    except _Unknown:
        return {}
    for name, array in rewriting.constants.items():
        graph.add(name, array)
    for value in list(model.graph.value_info):  # the sizes that an exporter wrote down
        if len(sizes.get(value.name, ())) > _MOST:
            model.graph.value_info.remove(value)
    graph.replace_nodes(rewriting.nodes)
    return rewriting.copies


class _Rewriting:
    """Rewrite the nodes, one after another, with the axes that are left of each tensor."""

    def __init__(self, graph: QdqGraph, sizes: Mapping[str, Sequence[int]]) -> None:
        self.graph = graph
        self.sizes = sizes
        self.left: dict[str, list[int]] = {}  # of tensors of too many axes
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.copies: dict[str, str] = {}

    def take(self, node: onnx.NodeProto) -> None:
        """Write a node, or what takes its place."""
        wide = [name for name in (*node.input, *node.output) if len(self.sizes.get(name, ())) > _MOST]
        if not wide:
            self.nodes.append(node)
        elif node.op_type in _RESHAPING:
            self._reshaped(node)
        elif node.op_type in _VALUES:
            self._by_value(node)
        elif node.op_type == "Transpose":
            self._transposed(node)
        elif node.op_type in _ELEMENTWISE:
            self._elementwise(node)
        elif node.op_type == "Slice":
            self._sliced(node)
        elif node.op_type == "MatMul":
            self._product(node)
        elif node.op_type in _ALONG:
            self._along(node)
        else:
            raise _Unknown(node.op_type)

    def _size(self, name: str) -> Sequence[int]:
        if name not in self.sizes:
            raise _Unknown(name)
        return self.sizes[name]

    def _form(self, name: str) -> list[int]:
        """Return the sizes that a tensor has now."""
        size = self._size(name)
        return [size[axis] for axis in self.left.get(name, range(len(size)))]

    def _leave(self, name: str, axes: Sequence[int]) -> None:
        if len(axes) > _MOST or name in self.graph.outputs:
            raise _Unknown(name)
        self.left[name] = list(axes)

    def _reshaped(self, node: onnx.NodeProto) -> None:
        (output,) = node.output
        size = self._size(output)
        if len(size) > _MOST:
            self._leave(output, [axis for axis, length in enumerate(size) if length != 1])
        self._add_reshape(node.input[0], self._form(output), output, node.name)

    def _by_value(self, node: onnx.NodeProto) -> None:
        if any(math.prod(self.sizes.get(name, (1,))) != 1 for name in node.input[1:]):
            raise _Unknown(node.op_type)
        if node.input[0] in self.left:
            self._leave(node.output[0], self.left[node.input[0]])
        elif node.input[0] not in self.graph.constants:  # of these, each user takes the form that it needs
            raise _Unknown(node.op_type)
        self.nodes.append(node)

    def _transposed(self, node: onnx.NodeProto) -> None:
        order = list(node.attribute[0].ints)
        if node.input[0] not in self.left:
            raise _Unknown(node.op_type)
        before = self.left[node.input[0]]
        after = [axis for axis, origin in enumerate(order) if origin in before]
        self._leave(node.output[0], after)
        perm = [before.index(order[axis]) for axis in after]
        self.nodes.append(_node("Transpose", node.input, node.output[0], node.name, perm=perm))

    def _elementwise(self, node: onnx.NodeProto) -> None:
        (output,) = node.output
        size = self._size(output)
        axes = [axis for axis, length in enumerate(size) if length != 1]
        self._leave(output, axes)
        inputs = []
        for name in node.input:
            given = list(self._size(name))
            aligned = [1] * (len(size) - len(given)) + given
            form = [aligned[axis] for axis in axes]
            inputs.append(self._in_form(name, form))
        self.nodes.append(_node(node.op_type, inputs, output, node.name))

    def _in_form(self, name: str, form: list[int]) -> str:
        """Return a tensor, or one of its values in another form."""
        given = self._form(name)
        if len(given) <= len(form) and [1] * (len(form) - len(given)) + given == form:  # ones in front are understood
            return name
        new = self.graph.free(f"{name}_in_form_{len(self.nodes)}")
        read = self.graph.producers.get(name)
        if read is None or read.op_type != "DequantizeLinear":
            self._add_reshape(name, form, new)
            self.copies[new] = name
            return new
        if read.input[0] in self.graph.constants:  # the integers themselves
            self._add_reshape(read.input[0], form, f"{new}_q")
        else:
            self._add_reshape(name, form, new)
            self.nodes.append(_node("QuantizeLinear", [new, *read.input[1:]], f"{new}_q"))
        self.nodes.append(_node("DequantizeLinear", [f"{new}_q", *read.input[1:]], f"{new}_qdq"))
        return f"{new}_qdq"

    def _add_reshape(self, name: str, form: Sequence[int], output: str, title: str = "") -> None:
        wanted = self.graph.free(f"{output}_form")
        self.constants[wanted] = np.array(form, np.int64)
        self.nodes.append(_node("Reshape", [name, wanted], output, title))

    def _along(self, node: onnx.NodeProto) -> None:
        """Rewrite an operation along one axis, which has to be left in every input."""
        first = node.input[0]
        given = node.input if node.op_type == "Concat" else [first]
        axis = axis_of(node, -1 if node.op_type == "Softmax" else 0) % len(self._size(first))
        left = self.left.get(first, [])
        if axis not in left or any(self.left.get(name) != left for name in given):
            raise _Unknown(node.op_type)
        from onnx import helper

        new = copy.deepcopy(node)
        kept = [attribute for attribute in node.attribute if attribute.name != "axis"]
        del new.attribute[:]
        new.attribute.extend([*kept, helper.make_attribute("axis", left.index(axis))])
        if node.op_type == "Gather":
            self._gathered(new, [one - (one > axis) for one in left if one != axis])
            return
        for output in node.output:
            self._leave(output, left)
        self.nodes.append(new)

    def _on_grid_of(self, output: str, name: str) -> str:
        """Return a tensor rounded as the one is that it becomes."""
        read = next((one for one in self.graph.consumers[output] if one.op_type == "QuantizeLinear"), None)
        if read is None:
            self.copies[name] = output
            return name
        self.nodes.append(_node("QuantizeLinear", [name, *read.input[1:]], f"{name}_q"))
        self.nodes.append(_node("DequantizeLinear", [f"{name}_q", *read.input[1:]], f"{name}_qdq"))
        return f"{name}_qdq"

    def _product(self, node: onnx.NodeProto) -> None:
        """Rewrite a linear layer: the last axis of a tensor times a matrix."""
        tensor, matrix = node.input
        left = self.left.get(tensor, [])
        last = len(self._size(tensor)) - 1
        if last not in left or len(self._size(matrix)) != 2:
            raise _Unknown(node.op_type)
        self._leave(node.output[0], left)
        self.nodes.append(node)

    def _sliced(self, node: onnx.NodeProto) -> None:
        axes = self.graph.known(node.input[3]) if len(node.input) > 3 else None
        left = self.left.get(node.input[0], [])
        rank = len(self._size(node.input[0]))
        if axes is None or not {int(axis) % rank for axis in axes} <= set(left):
            raise _Unknown(node.op_type)
        self._leave(node.output[0], left)
        new = copy.deepcopy(node)
        new.input[3] = self.graph.free(f"{node.output[0]}_axes")
        self.constants[new.input[3]] = np.array([left.index(int(axis) % rank) for axis in axes], np.int64)
        self.nodes.append(new)

    def _gathered(self, node: onnx.NodeProto, left: list[int]) -> None:
        (output,) = node.output
        if self._size(node.input[1]):  # several along the axis
            raise _Unknown(node.op_type)
        size = self._size(output)
        if len(size) > _MOST:
            self._leave(output, left)
        elif len(left) < len(size):
            between = self.graph.free(f"{output}_without_ones")
            node.output[0] = between
            self.nodes.append(node)
            self._add_reshape(self._on_grid_of(output, between), size, output, f"{output}_with_ones")
            return
        self.nodes.append(node)


def _node(kind: str, inputs: Sequence[str], output: str, title: str = "", **attributes: Any) -> onnx.NodeProto:
    from onnx import helper

    return helper.make_node(kind, list(inputs), [output], title or f"{output}_node", **attributes)
