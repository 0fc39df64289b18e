"""A graph in the writing, in which tensors may have other forms than they had: the same values, other axes."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_quant.deploy.graph.axis_groups import Groups, form_of
from lightning_quant.deploy.graph.qdq import QdqGraph

if TYPE_CHECKING:
    import onnx

# Axes that the NPU has.
MOST = 5


class UnknownForm(Exception):
    """It is not known how an operation works on a tensor in another form."""


class Forms:
    """Writes nodes one after another, and brings what they take into the form that they take.

    Args:
        graph: what is rewritten.
        sizes: of its tensors.

    Attributes:
        groups: of the tensors that have another form by now, the axes of it.
        nodes: what is written.
        constants: what these take besides.
        copies: for tensors that are new and not rounded, whose values they are.
    """

    def __init__(self, graph: QdqGraph, sizes: Mapping[str, Sequence[int]]) -> None:
        self.graph = graph
        self.sizes = {name: list(size) for name, size in sizes.items()}
        self.groups: dict[str, Groups] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.copies: dict[str, str] = {}
        self._grids: dict[str, Sequence[str]] = {}  # scale and zero point of what is new and rounded
        self._made: dict[tuple[str, tuple[int, ...]], str] = {}

    def size(self, name: str) -> list[int]:
        """Return the sizes that a tensor had."""
        if name not in self.sizes:
            raise UnknownForm(name)
        return self.sizes[name]

    def form(self, name: str) -> list[int]:
        """Return the sizes that a tensor has now."""
        size = self.size(name)
        return form_of(size, self.groups[name]) if name in self.groups else size

    def in_form(self, name: str, form: Sequence[int], spread: bool = False) -> str:
        """Return a tensor, or one of its values in another form.

        Args:
            name: the tensor.
            form: the sizes that it should have.
            spread: whether fewer axes will do, which stand for the last ones.
        """
        given, wanted = self.form(name), list(form)
        if given == wanted or (spread and len(given) <= len(wanted) and aligned(given, len(wanted)) == wanted):
            return name
        if (name, tuple(form)) in self._made:
            return self._made[name, tuple(form)]
        new = self.graph.free(f"{name}_in_form_{len(self.nodes)}")
        read = self.graph.producers.get(name)
        if name in self.graph.constants:
            self.constants[new] = self.graph.array(name).reshape(wanted)
            self.sizes[new], self.copies[new] = wanted, name
            made = new
        elif read is not None and read.op_type == "DequantizeLinear" and read.input[0] in self.graph.constants:
            grid = self._grid(name) or ()
            self.constants[f"{new}_q"] = self.graph.array(read.input[0]).reshape(wanted)
            self.nodes.append(new_node("DequantizeLinear", [f"{new}_q", *grid], new))
            self.sizes[new], self._grids[new] = wanted, grid
            made = new
        else:
            self.add_reshape(name, wanted, new)
            made = self.rounded_as(name, new, wanted)
        self._made[name, tuple(form)] = made
        return made

    def rounded_as(self, name: str, new: str, form: list[int]) -> str:
        """Return a new tensor with the values of another one, rounded as that is.

        Args:
            name: the tensor.
            new: what was written, in floats.
            form: its sizes.
        """
        self.sizes[new] = form
        grid = self._grid(name)
        if grid is None:
            self.copies[new] = self.copies.get(name, name)
            return new
        return self._on_grid(new, grid)

    def emit(self, node: onnx.NodeProto, groups: Sequence[Groups]) -> None:
        """Write a node, and what brings its outputs back to their sizes where the NPU takes these.

        Args:
            node: puts out tensors in forms.
            groups: of each output.
        """
        changed = {}
        for index, (output, own) in enumerate(zip(list(node.output), groups, strict=True)):
            size = self.size(output)
            # the sum of a linear layer before its bias is not rounded: nothing may come between the two
            is_sum = node.op_type == "MatMul" and self._rounding(output) is None and bool(self.graph.consumers[output])
            if (len(size) > MOST or is_sum) and output not in self.graph.outputs:
                self.groups[output] = own
            elif form_of(size, own) != size:
                node.output[index] = changed[output] = self.graph.free(f"{output}_in_other_form")
                self.sizes[changed[output]] = form_of(size, own)
        self.nodes.append(node)
        for output, new in changed.items():
            rounding = self._rounding(output)
            if rounding is None:
                self.copies[new] = output
            back = new if rounding is None else self._on_grid(new, list(rounding.input[1:]))
            self.add_reshape(back, self.size(output), output, f"{output}_reshaped")

    def _rounding(self, name: str) -> onnx.NodeProto | None:
        return next((one for one in self.graph.consumers[name] if one.op_type == "QuantizeLinear"), None)

    def _grid(self, name: str) -> Sequence[str] | None:
        """Return the scale and zero point of what rounded a tensor; ``None`` if nothing did."""
        read = self.graph.producers.get(name)
        if name in self._grids or read is None or read.op_type != "DequantizeLinear":
            return self._grids.get(name)
        grid = list(read.input[1:])
        if any(math.prod(self.size(one)) != 1 for one in grid):  # along an axis that the form may not have
            raise UnknownForm(name)
        return grid

    def _on_grid(self, name: str, grid: Sequence[str]) -> str:
        self.nodes.append(new_node("QuantizeLinear", [name, *grid], f"{name}_q"))
        self.nodes.append(new_node("DequantizeLinear", [f"{name}_q", *grid], f"{name}_qdq"))
        self.sizes[f"{name}_qdq"] = self.sizes[name]
        self._grids[f"{name}_qdq"] = grid
        return f"{name}_qdq"

    def forget(self, mark: int) -> None:
        """Take back what was written since there were ``mark`` nodes."""
        written = {name for node in self.nodes[mark:] for name in node.output}
        self._made = {key: name for key, name in self._made.items() if name not in written}
        del self.nodes[mark:]

    def add_reshape(self, name: str, form: Sequence[int], output: str, title: str = "") -> None:
        """Write what brings a tensor, as it is by now, into another form."""
        self.nodes.append(new_node("Reshape", [name, self.constant(f"{output}_form", form)], output, title))

    def constant(self, name: str, values: Sequence[int]) -> str:
        """Return the name of a tensor of whole numbers."""
        free = self.graph.free(name)
        self.constants[free] = np.array(values, np.int64)
        return free


def aligned(size: Sequence[int], rank: int) -> list[int]:
    """Return sizes with ones in front, as operations understand tensors of fewer axes."""
    return [1] * (rank - len(size)) + list(size)


def like(node: onnx.NodeProto, inputs: Sequence[str], **attributes: Any) -> onnx.NodeProto:
    """Return a copy of a node with other inputs, and some attributes of other values."""
    from onnx import helper

    new = copy.deepcopy(node)
    kept = [one for one in node.attribute if one.name not in attributes]
    del new.attribute[:]
    new.attribute.extend([*kept, *(helper.make_attribute(name, value) for name, value in attributes.items())])
    del new.input[:]
    new.input.extend(inputs)
    return new


def new_node(kind: str, inputs: Sequence[str], output: str, title: str = "", **attributes: Any) -> onnx.NodeProto:
    """Return a node, named as its output unless it has a title."""
    from onnx import helper

    return helper.make_node(kind, list(inputs), [output], title or f"{output}_node", **attributes)
