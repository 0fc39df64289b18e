"""Verify that every tensor the device will quantize has an encoding, or record why none is needed.

A tensor without an encoding is filled in by the device's compiler with a guess of its own, silently. So each
one is either explained here, with the reason recorded in the bundle's manifest, or the export fails.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from lightning_quant.deploy.graph.qdq import hands_on
from lightning_quant.errors import ExportError
from lightning_quant.simulation.preflight import Finding

if TYPE_CHECKING:
    import onnx

# The hardware computes these together with the operation before them, in one step without rounding between.
_FUSED = ("Relu", "Clip", "PRelu", "LeakyRelu", "BatchNormalization", "HardSwish")
# Where an operation takes its weight, whose integers are fixed at export: never to be guessed.
_WEIGHTS = {("Conv", 1), ("ConvTranspose", 1), ("Gemm", 1), ("MatMul", 1)}
# Operations that take a constant as they take an activation: in float, it makes them compute in float.
_OPERATORS = (
    "Add",
    "Concat",
    "Div",
    "Einsum",
    "Gather",
    "GridSample",
    "MatMul",
    "Max",
    "Mean",
    "Min",
    "Mod",
    "Mul",
    "Pow",
    "ScatterElements",
    "ScatterND",
    "Sub",
    "Sum",
    "Where",
)
_BIASED = (
    "Conv",
    "ConvTranspose",
    "Gemm",
    "LayerNormalization",
    "InstanceNormalization",
    "BatchNormalization",
)


class Reason(Enum):
    """Why a tensor may reach the device without an encoding. The value is its sentence in the manifest."""

    BIAS = "bias: a 32-bit integer on the device, its scale that of the input times that of the weight"
    CONSTANT = "constant: its range follows from its values"
    LEFT_IN_FLOAT = "left in float, as the preflight said of {}"
    INTO_FLOAT = "goes into operations left in float, as the preflight said"
    UNUSED = "no operation takes it"
    PASSED = "the input {} as it is"
    FUSED = "computed together with the {} after it"
    INSIDE = "inside one operation of the simulation ({})"


@dataclass(frozen=True)
class Explanation:
    """The reason for one tensor.

    Args:
        reason: why it needs no encoding.
        detail: the operation, module or tensor that the reason names, if it names one.
    """

    reason: Reason
    detail: str = ""

    def __str__(self) -> str:
        return self.reason.value.format(self.detail)


def unexplained(
    model: onnx.ModelProto, encoded: Iterable[str], findings: Iterable[Finding] = ()
) -> tuple[dict[str, Explanation], list[str]]:
    """Sort the float tensors of ``model`` that have no encoding into explained and unexplained ones.

    Args:
        model: the exported float graph, without dangling nodes.
        encoded: names of the tensors that have an encoding.
        findings: what the preflight left in float, and has warned the user about.

    Returns:
        The reason for each tensor that needs no encoding, and the names of those that lack one.
    """
    audit = _Audit(model, set(encoded), findings)
    audit.check_initializers()
    audit.check_inputs()
    audit.check_nodes()
    return audit.explained, audit.missing


def check_encoded(
    model: onnx.ModelProto, encoded: Iterable[str], findings: Iterable[Finding]
) -> dict[str, Explanation]:
    """Return the reason for each tensor that needs no encoding, see :func:`unexplained`.

    Args:
        model: the exported float graph, without dangling nodes.
        encoded: names of the tensors that have an encoding.
        findings: what the preflight left in float, and has warned the user about.

    Raises:
        ExportError: naming tensors that lack one.
    """
    explained, missing = unexplained(model, encoded, findings)
    if missing:
        raise ExportError(
            f"{len(missing)} tensors of the exported network have no encoding, e.g. {', '.join(missing[:5])}: the "
            "device would make ranges up for them. Expected a quantizer on each. Was one removed, or is there an "
            "operation AIMET does not quantize? Use nn modules for it, or run with strict=True to find it."
        )
    return explained


class _Audit:
    """One pass over a graph: its tensors by name, and what was found out about them."""

    def __init__(self, model: onnx.ModelProto, encodings: set[str], findings: Iterable[Finding]) -> None:
        import onnx

        self.float_type = onnx.TensorProto.FLOAT
        self.graph = graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        self.encodings = encodings
        self.types = {v.name: v.type.tensor_type for v in [*graph.value_info, *graph.input, *graph.output]}
        self.sizes = {initializer.name: math.prod(initializer.dims) for initializer in graph.initializer}
        self.outputs = {value.name for value in graph.output}
        self.producers = {output: node for node in graph.node for output in node.output}
        self.consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self.consumers[name].append(node)
        self.constants = {initializer.name for initializer in graph.initializer} - encodings
        # shape computations and copies of constants are known when the model is compiled
        for node in graph.node:
            if node.op_type == "Constant" or (node.input and set(node.input) <= self.constants | {""}):
                self.constants.update(node.output)
                for tensor in (one.t for one in node.attribute if one.name == "value"):
                    self.sizes[node.output[0]] = math.prod(tensor.dims)
        self.left_open = {finding.module for finding in findings if finding.kind.leaves_open}
        self.explained: dict[str, Explanation] = {}
        self.missing: list[str] = []
        self.left: set[str] = set()  # tensors of operations left in float
        self.untouched: set[str] = set()  # inputs that no operation takes

    def check_initializers(self) -> None:
        for initializer in self.graph.initializer:
            if initializer.data_type == self.float_type and initializer.name not in self.encodings:
                self.explain_constant(initializer.name)

    def check_inputs(self) -> None:
        for name in (value.name for value in self.graph.input if self.is_open(value.name)):
            users = self.consumers[name]
            if any(self.was_left(user) for user in users):
                self.explained[name] = Explanation(Reason.INTO_FLOAT)
            elif all(user.op_type == "Identity" and set(user.output) <= self.outputs for user in users):
                self.untouched.add(name)
                self.explained[name] = Explanation(Reason.UNUSED)
            else:
                self.missing.append(name)

    def check_nodes(self) -> None:
        for node in self.graph.node:
            if set(node.output) <= self.constants:
                for name in node.output:
                    if self.is_open(name) and self.consumers[name]:
                        self.explain_constant(name)
                continue
            for name in node.output:
                if name and self.is_open(name) and (self.consumers[name] or name in self.outputs):
                    self.explain_output(node, name)

    def explain_output(self, node: onnx.NodeProto, name: str) -> None:
        after = self.consumers[name]
        if after and all(user.op_type in _FUSED and set(user.output) & self.encodings for user in after):
            self.explained[name] = Explanation(Reason.FUSED, after[0].op_type)
        elif node.op_type == "MatMul" and after and all(self.adds_bias(user) for user in after):
            self.explained[name] = Explanation(Reason.FUSED, "bias")
        elif self.was_left(node) or (after and all(self.was_left(user) for user in after)):
            self.left.add(name)
            self.explained[name] = _left_in_float(node if self.was_left(node) else after[0])
        elif hands_on(node) and node.input[0] in self.left:
            self.left.add(name)
            self.explained[name] = self.explained[node.input[0]]
        elif hands_on(node) and node.input[0] in self.untouched:
            self.explained[name] = Explanation(Reason.PASSED, node.input[0])
        elif after and module_of(node) and all(_scope(user) == _scope(node) for user in after):
            self.explained[name] = Explanation(Reason.INSIDE, module_of(node))
        else:
            self.missing.append(name)

    def explain_constant(self, name: str) -> None:
        users = self.consumers[name]
        places = [(user, (user.op_type, list(user.input).index(name))) for user in users]
        wanting = [
            user
            for user, place in places
            if not self.is_bias(user, name)
            and not set(user.output) <= self.constants
            and (place in _WEIGHTS or self.is_operand(user, name))
        ]
        if users and all((place[0] in _BIASED and place[1] >= 2) or self.is_bias(user, name) for user, place in places):
            self.explained[name] = Explanation(Reason.BIAS)
        elif not wanting:
            self.explained[name] = Explanation(Reason.CONSTANT)
        elif all(self.was_left(user) for user in wanting):
            self.explained[name] = _left_in_float(wanting[0])
        else:
            self.missing.append(name)

    def is_open(self, name: str) -> bool:
        """Return whether a tensor is float and has no encoding."""
        kind = self.types[name].elem_type if name in self.types else self.float_type
        return name not in self.encodings and kind == self.float_type

    def was_left(self, node: onnx.NodeProto) -> bool:
        """Return whether the preflight left the module of a node in float."""
        module = module_of(node)
        return module in self.left_open or re.sub(r"_\d+$", "", module) in self.left_open  # relu_1: its second call

    def is_number(self, name: str) -> bool:
        if name in self.sizes:
            return self.sizes[name] == 1
        has_shape = name in self.types and self.types[name].HasField("shape")
        return has_shape and all(axis.dim_value == 1 for axis in self.types[name].shape.dim)

    def is_bias(self, user: onnx.NodeProto, name: str) -> bool:
        products = [self.producers[other] for other in user.input if other != name and other in self.producers]
        return user.op_type == "Add" and any(n.op_type == "MatMul" and _scope(n) == _scope(user) for n in products)

    def adds_bias(self, node: onnx.NodeProto) -> bool:
        adds_constant = node.op_type == "Add" and bool(set(node.input) & self.constants)
        return adds_constant and set(node.output) <= self.encodings

    def is_operand(self, user: onnx.NodeProto, name: str) -> bool:
        """Return whether a constant meets an activation outside of what the simulation takes for one operation."""
        if user.op_type not in _OPERATORS or self.is_number(name):
            return False
        others = [other for other in user.input if other and other not in self.constants]
        producers = self.producers
        inside = [producers[other] for other in others if other in producers and other not in self.encodings]
        return not any(module_of(user) and _scope(node) == _scope(user) for node in inside)


def _left_in_float(node: onnx.NodeProto) -> Explanation:
    return Explanation(Reason.LEFT_IN_FLOAT, module_of(node) or "the network")


def _scope(node: onnx.NodeProto) -> str:
    """Return the module call a node belongs to: of ``/network/body/body.0/Conv`` the part without the operation."""
    return node.name.rpartition("/")[0]


def module_of(node: onnx.NodeProto) -> str:
    """Return the qualified name of the module a node belongs to; empty for the network's own level."""
    parts = _scope(node).split("/")[1:]
    names: list[str] = []
    for outer, part in itertools.pairwise(parts):  # body/body.0: the second within the first
        names.append(part.removeprefix(f"{re.sub(r'_[0-9]+$', '', outer)}."))
    return ".".join(names)
