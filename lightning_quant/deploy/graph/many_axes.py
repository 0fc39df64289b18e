"""Tensors of more axes than the NPU has, in a form of fewer.

Windows of an image, heads of an attention, its keys by row and column: six axes and more. The NPU has five; its
compiler leaves what has more to the CPU. Here each such tensor is written in another form: axes of size one are left
out, and neighbors that an operation does not tell apart are one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lightning_quant.deploy.graph.axis_groups import (
    Groups,
    alone,
    form_of,
    is_made_of,
    joined,
    moves,
    moving_together,
    separate,
)
from lightning_quant.deploy.graph.forms import MOST, Forms, UnknownForm, aligned, like, new_node
from lightning_quant.deploy.graph.qdq import QdqGraph, axis_of, sizes_of

if TYPE_CHECKING:
    import onnx

# Of operations for which the NPU has fewer.
_MOST_FOR = dict.fromkeys(
    (
        "Cos", "Elu", "Gelu", "HardSwish", "LayerNormalization", "LogSoftmax", "Neg", "PRelu", "Sin", "Softplus",
        "Sqrt", "Tanh",
    ),
    4,
)  # fmt: skip
_RESHAPING = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")
_ELEMENTWISE = (
    "Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Mul", "Or",
    "PRelu", "Pow", "Sub", "Where",
)  # fmt: skip
# Operations on each value alone, whatever the axes; the grid of a whole tensor included.
_VALUES = (
    "Abs", "Cast", "Clip", "Cos", "DequantizeLinear", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish",
    "Identity", "LeakyRelu", "Log", "Neg", "Not", "QuantizeLinear", "Reciprocal", "Relu", "Sigmoid", "Sin", "Softplus",
    "Sqrt", "Tanh",
)  # fmt: skip
_ALONG = {"Concat": 0, "Gather": 0, "LogSoftmax": -1, "Softmax": -1, "Split": 0}  # and the axis if none is named
_REDUCING = ("ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum")


def write_in_fewer_axes(model: onnx.ModelProto) -> dict[str, str]:
    """Write tensors of more than five axes in a form of five or fewer, where all that it takes is known.

    Args:
        model: a graph of known sizes, with or without QuantizeLinear; changed in place.

    Returns:
        For tensors that are new because something needs another one's values in another form: whose values they are,
        for the encodings. Those of the rest keep their names.
    """
    graph = QdqGraph(model)
    rewriting = _Rewriting(Forms(graph, sizes_of(model)))
    if not any(rewriting.is_wide(node) for node in model.graph.node):
        return {}
    for node in model.graph.node:
        rewriting.take(node)
    forms = rewriting.forms
    for name, array in forms.constants.items():
        graph.add(name, array)
    for value in list(model.graph.value_info):  # the sizes that an exporter wrote down
        if value.name in forms.groups:
            model.graph.value_info.remove(value)
    graph.replace_nodes(forms.nodes)
    return forms.copies


def rewrite_encoded(model: onnx.ModelProto, encodings: dict[str, Any]) -> None:
    """Write the tensors of a graph without QuantizeLinear in fewer axes, with the encodings that it stands beside.

    Args:
        model: changed in place.
        encodings: AIMET's, of the same tensors; changed in place.
    """
    before = _tensors(model)
    copies = write_in_fewer_axes(model)
    gone = before - _tensors(model)
    entries = encodings["activation_encodings"]
    known = {entry["name"]: entry for entry in entries}
    entries += [{**known[origin], "name": name} for name, origin in copies.items() if origin in known]
    for part in ("activation_encodings", "param_encodings"):
        encodings[part] = [entry for entry in encodings[part] if entry["name"] not in gone]


def _tensors(model: onnx.ModelProto) -> set[str]:
    return {name for node in model.graph.node for name in (*node.input, *node.output)}


class _Rewriting:
    """Rewrite the nodes, one after another.

    Attributes:
        most: axes that the NPU has for the operation that is being written.
    """

    def __init__(self, forms: Forms) -> None:
        self.forms = forms
        self.graph = forms.graph
        self.most = MOST
        self.ways: dict[str, Callable[[onnx.NodeProto], None]] = {
            **dict.fromkeys(_RESHAPING, self._reshaped),
            **dict.fromkeys(_VALUES, self._by_value),
            **dict.fromkeys(_ELEMENTWISE, self._elementwise),
            **dict.fromkeys(_ALONG, self._along),
            **dict.fromkeys(_REDUCING, self._reduced),
            "Expand": self._expanded,
            "LayerNormalization": self._normalized,
            "MatMul": self._product,
            "Slice": self._sliced,
            "Tile": self._tiled,
            "Transpose": self._transposed,
        }

    def is_wide(self, node: onnx.NodeProto) -> bool:
        """Return whether a node has to do with more axes than the NPU has for it."""
        most = self._most(node)
        names = (*node.input, *node.output)
        return any(name in self.forms.groups or len(self.forms.sizes.get(name, ())) > most for name in names)

    def _most(self, node: onnx.NodeProto) -> int:
        if node.op_type == "MatMul" and len(self.forms.sizes.get(node.input[1], ())) == 2:
            return 4  # a linear layer without a bias
        return _MOST_FOR.get(node.op_type, MOST)

    def take(self, node: onnx.NodeProto) -> None:
        """Write a node, or what takes its place."""
        if not self.is_wide(node):
            self.forms.nodes.append(node)
            return
        mark, self.most = len(self.forms.nodes), self._most(node)
        try:
            if node.op_type not in self.ways:
                raise UnknownForm(node.op_type)
            self.ways[node.op_type](node)
        except UnknownForm:
            self.forms.forget(mark)
            self._as_it_is(node)

    def _as_it_is(self, node: onnx.NodeProto) -> None:
        new = copy.deepcopy(node)
        for index, name in enumerate(node.input):
            if name in self.forms.groups:
                new.input[index] = self.forms.in_form(name, self.forms.size(name))
        self.forms.nodes.append(new)

    def _reshaped(self, node: onnx.NodeProto) -> None:
        (output,) = node.output
        size = self.forms.size(output)
        if len(size) > MOST and output not in self.graph.outputs:
            self.forms.groups[output] = self._expected(output) or separate(size, MOST) or joined(size)
        self.forms.add_reshape(node.input[0], self.forms.form(output), output, node.name)

    def _expected(self, name: str) -> Groups | None:
        """Return the groups that the transposition takes which a tensor goes to, if it goes to one alone."""
        size = self.forms.size(name)
        if separate(size, MOST) is not None:
            return None
        node = None
        while len(self.graph.consumers[name]) == 1 and name not in self.graph.outputs:
            (node,) = self.graph.consumers[name]
            if node.op_type not in ("DequantizeLinear", "QuantizeLinear"):
                break
            name = node.output[0]
        if node is None or node.op_type != "Transpose":
            return None
        together = moving_together(size, _order(node, len(size)))
        return together if len(together) <= MOST else moves(size, _order(node, len(size)))[0].groups

    def _by_value(self, node: onnx.NodeProto) -> None:
        if any(math.prod(self.forms.sizes.get(name, (1,))) != 1 for name in node.input[1:]):
            raise UnknownForm(node.op_type)
        (given, *rest), size = node.input, self.forms.size(node.input[0])
        own = self.forms.groups.get(given)
        if own is None and (len(size) > MOST or given in self.graph.constants):
            raise UnknownForm(node.op_type)  # of constants, each user takes the form that it needs
        if own is None or len(own) > self.most:
            own = separate(size, self.most) or joined(size)
        self.forms.emit(like(node, [self.forms.in_form(given, form_of(size, own)), *rest]), [own])

    def _transposed(self, node: onnx.NodeProto) -> None:
        (given,), (output,) = node.input, node.output
        size = self.forms.size(given)
        order = _order(node, len(size))
        together = moving_together(size, order)
        own = self.forms.groups.get(given)
        if own is not None and is_made_of(own, together):
            together = own
        if len(together) <= MOST:
            wanted = sorted(together, key=lambda group: order.index(group[0]))
            perm = [together.index(group) for group in wanted]
            moved = [[order.index(axis) for axis in group] for group in wanted]
            inputs = [self.forms.in_form(given, form_of(size, together))]
            self.forms.emit(new_node("Transpose", inputs, output, node.name, perm=perm), [moved])
            return
        *steps, last = moves(size, order)
        for step in steps:  # each brings a block of axes to its place
            between = self.graph.free(f"{output}_moved_{len(self.forms.nodes)}")
            form = form_of(size, step.groups)
            inputs = [self.forms.in_form(given, form)]
            self.forms.nodes.append(new_node("Transpose", inputs, between, perm=step.perm))
            given = self.forms.rounded_as(given, between, [form[axis] for axis in step.perm])
        inputs = [self.forms.in_form(given, form_of(size, last.groups))]
        moved = [[order.index(axis) for axis in last.groups[place]] for place in last.perm]
        self.forms.emit(new_node("Transpose", inputs, output, node.name, perm=last.perm), [moved])

    def _elementwise(self, node: onnx.NodeProto) -> None:
        size = self.forms.size(node.output[0])
        given = [aligned(self.forms.size(name), len(size)) for name in node.input]
        groups = self._told_apart(size, given, node.input)
        inputs = [
            self.forms.in_form(name, form_of(one, groups), spread=True)
            for name, one in zip(node.input, given, strict=True)
        ]
        self.forms.emit(like(node, inputs), [groups])

    def _told_apart(self, size: Sequence[int], given: Sequence[Sequence[int]], names: Iterable[str]) -> Groups:
        """Return groups of axes along each of which a tensor has all values or one, for each of some tensors."""
        kinds = [tuple(one[axis] == 1 for one in given) for axis in range(len(size))]
        for name in names:
            own = self.forms.groups.get(name)
            if own is None or len(own) > self.most or self.forms.size(name) != size:
                continue
            if all(len({kinds[axis] for axis in group}) == 1 for group in own):
                return own
        return self._at_most(separate(size, self.most) or joined(size, kinds))

    def _expanded(self, node: onnx.NodeProto) -> None:
        size = self.forms.size(node.output[0])
        given = aligned(self.forms.size(node.input[0]), len(size))
        groups = self._told_apart(size, [given], [])
        shape = self.forms.constant(f"{node.output[0]}_sizes", form_of(size, groups))
        self.forms.emit(like(node, [self.forms.in_form(node.input[0], form_of(given, groups)), shape]), [groups])

    def _tiled(self, node: onnx.NodeProto) -> None:
        counts = self.graph.known(node.input[1])
        if counts is None:
            raise UnknownForm(node.op_type)
        size = self.forms.size(node.input[0])
        groups = self._alone(node.input[0], [axis for axis, count in enumerate(counts.tolist()) if count > 1])
        repeats = self.forms.constant(f"{node.output[0]}_repeats", form_of(counts.tolist(), groups))
        self.forms.emit(like(node, [self.forms.in_form(node.input[0], form_of(size, groups)), repeats]), [groups])

    def _along(self, node: onnx.NodeProto) -> None:
        """Rewrite an operation along one axis."""
        given = node.input if node.op_type == "Concat" else node.input[:1]
        axis = axis_of(node, _ALONG[node.op_type]) % len(self.forms.size(given[0]))
        groups = self._alone(given[0], [axis])
        inputs = [self.forms.in_form(name, form_of(self.forms.size(name), groups)) for name in given]
        new = like(node, [*inputs, *node.input[len(given) :]], axis=groups.index([axis]))
        after = groups
        if node.op_type == "Gather":
            if len(self.forms.size(node.input[1])) > 1:
                raise UnknownForm(node.op_type)
            if not self.forms.size(node.input[1]):
                after = [[one - (one > axis) for one in group] for group in groups if group != [axis]]
        self.forms.emit(new, [after] * len(node.output))

    def _sliced(self, node: onnx.NodeProto) -> None:
        known = self.graph.known(node.input[3]) if len(node.input) > 3 else None
        size = self.forms.size(node.input[0])
        if known is None:
            raise UnknownForm(node.op_type)
        axes = [int(axis) % len(size) for axis in known]
        groups = self._alone(node.input[0], axes)
        places = self.forms.constant(f"{node.output[0]}_axes", [groups.index([axis]) for axis in axes])
        inputs = [self.forms.in_form(node.input[0], form_of(size, groups)), *node.input[1:3], places, *node.input[4:]]
        self.forms.emit(like(node, inputs), [groups])

    def _product(self, node: onnx.NodeProto) -> None:
        """Rewrite a linear layer, the last axis of a tensor times a matrix, or products of matrices."""
        size = self.forms.size(node.output[0])
        left, right = (self.forms.size(name) for name in node.input)
        rank = len(size)
        if len(right) == 2:
            groups = self._alone(node.input[0], [rank - 1])
            inputs = [self.forms.in_form(node.input[0], form_of(left, groups)), node.input[1]]
        else:
            if min(len(left), len(right)) < 2 or rank < 2:
                raise UnknownForm(node.op_type)
            given = [aligned(one, rank) for one in (left, right)]
            kinds = [tuple(one[axis] == 1 for one in given) for axis in range(rank - 2)]
            groups = self._at_most([*joined(size[:-2], kinds), [rank - 2], [rank - 1]])
            inputs = [
                self.forms.in_form(name, form_of(one, groups)) for name, one in zip(node.input, given, strict=True)
            ]
        self.forms.emit(like(node, inputs), [groups])

    def _reduced(self, node: onnx.NodeProto) -> None:
        size = self.forms.size(node.input[0])
        named = {attribute.name: attribute for attribute in node.attribute}
        known = self.graph.known(node.input[1]) if len(node.input) > 1 else None
        axes = known.tolist() if known is not None else list(named["axes"].ints) if "axes" in named else None
        if axes is None:
            raise UnknownForm(node.op_type)
        gone = {int(axis) % len(size) for axis in axes}
        kinds = [(axis in gone,) for axis in range(len(size))]
        own = self.forms.groups.get(node.input[0])
        if own is None or any(len({kinds[axis] for axis in group}) > 1 for group in own):
            own = self._at_most(joined(size, kinds))
        inputs = [self.forms.in_form(node.input[0], form_of(size, own))]
        places = [place for place, group in enumerate(own) if group[0] in gone]
        if not places:
            raise UnknownForm(node.op_type)
        new = like(node, inputs, keepdims=0)
        if known is not None:
            new.input.append(self.forms.constant(f"{node.output[0]}_axes", places))
        else:
            new = like(new, inputs, axes=places)
        left = [group for group in own if group[0] not in gone]
        if "keepdims" in named and not named["keepdims"].i:
            left = [[axis - sum(one < axis for one in gone) for axis in group] for group in left]
        self.forms.emit(new, [left])

    def _normalized(self, node: onnx.NodeProto) -> None:
        size = self.forms.size(node.input[0])
        if axis_of(node, -1) % len(size) != len(size) - 1 or len(node.output) > 1:
            raise UnknownForm(node.op_type)
        groups = self._alone(node.input[0], [len(size) - 1])
        inputs = [self.forms.in_form(node.input[0], form_of(size, groups)), *node.input[1:]]
        self.forms.emit(like(node, inputs, axis=-1), [groups])

    def _alone(self, name: str, axes: Sequence[int]) -> Groups:
        """Return groups of a tensor in which some axes are alone, those that it has by now if they are."""
        own = self.forms.groups.get(name)
        if own is not None and len(own) <= self.most and all([axis] in own for axis in axes):
            return own
        size = self.forms.size(name)
        return self._at_most(separate(size, self.most, axes) or alone(size, axes))

    def _at_most(self, groups: Groups) -> Groups:
        if len(groups) > self.most:
            raise UnknownForm(f"{len(groups)} axes")
        return groups


def _order(node: onnx.NodeProto, rank: int) -> list[int]:
    """Return for each axis of what a transposition puts out which one of its input it is."""
    return next((list(one.ints) for one in node.attribute if one.name == "perm"), list(range(rank))[::-1])
