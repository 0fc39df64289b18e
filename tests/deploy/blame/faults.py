"""Faults planted in exported files, one kind each, in a layer that is chosen by name."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import onnx
from onnx import helper, numpy_helper

from lightning_quant.deploy.audit import module_of
from lightning_quant.deploy.graph.qdq import QdqGraph, axis_of

Fault = Callable[["Planted"], None]
FAULTS: dict[str, Fault] = {}


class NotThere(Exception):
    """The layer has nothing that this fault could change."""


class Planted:
    """A file in which one layer is about to be damaged.

    Args:
        model: changed in place.
        layer: name of the layer.
    """

    def __init__(self, model: onnx.ModelProto, layer: str) -> None:
        self.model = model
        self.graph = QdqGraph(model)
        self.nodes = [one for one in model.graph.node if module_of(one) == layer and not _is_rounding(one)]

    @property
    def node(self) -> onnx.NodeProto:
        """The operation of the layer."""
        return self.nodes[0]

    @property
    def quantizer(self) -> onnx.NodeProto:
        """What rounds its output: behind an activation function that is computed with it, if there is one."""
        name = self.nodes[-1].output[0]
        for _ in range(6):
            takers = self.graph.consumers[name]
            if not takers:
                break
            rounds = next((taker for taker in takers if taker.op_type == "QuantizeLinear"), None)
            name = (rounds or takers[0]).output[0]
            if rounds is not None:
                (reader, *_) = self.graph.consumers[name]
                behind = [one for node in self.graph.consumers[reader.output[0]] for one in self._rounding(node)]
                if not any(one.input[1] == rounds.input[1] for one in behind):
                    return rounds  # the last one of this grid
        raise NotThere

    def _rounding(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        takers = self.graph.consumers[node.output[0]] if node.op_type in ("Relu", "Clip") else []
        return [taker for taker in takers if taker.op_type == "QuantizeLinear"]

    def dequantizer(self, place: int) -> onnx.NodeProto:
        """Where the integers of the weight (1) or the bias (2) become floats."""
        if len(self.node.input) <= place or self.node.op_type not in ("Conv", "Gemm", "ConvTranspose"):
            raise NotThere
        return self.graph.producers[self.node.input[place]]

    def integers(self, place: int) -> tuple[str, np.ndarray]:
        name = self.dequantizer(place).input[0]
        return name, self.graph.array(name).copy()

    def write(self, name: str, array: np.ndarray) -> None:
        self.graph.write(name, array)

    def own_constant(self, node: onnx.NodeProto, index: int, array: np.ndarray) -> None:
        """Give one node a constant that no other node takes."""
        node.input[index] = self.graph.add(f"{node.name}_planted_{index}", array)

    def pair(self) -> list[onnx.NodeProto]:
        quantizer = self.quantizer
        return [quantizer, *self.graph.consumers[quantizer.output[0]]]

    def insert(self, name: str, nodes: list[onnx.NodeProto], output: str) -> None:
        """Put nodes behind the tensor ``name``, whose values the rest takes from ``output`` then."""
        all_nodes: list[onnx.NodeProto] = []
        for node in self.model.graph.node:
            all_nodes.append(copy.deepcopy(node))
            if all_nodes[-1].op_type != "" and name in node.input:
                all_nodes[-1].input[:] = [output if one == name else one for one in node.input]
            if name in node.output:
                all_nodes += nodes
        del self.model.graph.node[:]
        self.model.graph.node.extend(all_nodes)


def _is_rounding(node: onnx.NodeProto) -> bool:
    return node.op_type in ("QuantizeLinear", "DequantizeLinear")


def fault(function: Fault) -> Fault:
    FAULTS[function.__name__] = function
    return function


def _scaled(planted: Planted, factor: float, nodes: list[onnx.NodeProto]) -> None:
    for node in nodes:
        planted.own_constant(node, 1, planted.graph.array(node.input[1]) * np.float32(factor))


@fault
def encoding_doubled(planted: Planted) -> None:
    _scaled(planted, 2, planted.pair())


@fault
def encoding_5_percent_off(planted: Planted) -> None:
    _scaled(planted, 1.05, planted.pair())


@fault
def encoding_of_the_reader_only(planted: Planted) -> None:
    _scaled(planted, 1.1, planted.pair()[1:])


@fault
def zero_point_off_by_one(planted: Planted) -> None:
    _refuse_before_a_clip(planted)
    for node in planted.pair():
        zero_point = planted.graph.array(node.input[2])
        off = zero_point + 1 if zero_point < np.iinfo(zero_point.dtype).max else zero_point - 1
        planted.own_constant(node, 2, off.astype(zero_point.dtype))


def _refuse_before_a_clip(planted: Planted) -> None:
    """What is rounded to the grid of a Clip behind it makes no difference: the Clip cuts off, and is rounded again."""
    readers = planted.pair()[1:]
    if any(taker.op_type == "Clip" for one in readers for taker in planted.graph.consumers[one.output[0]]):
        raise NotThere


@fault
def zero_point_of_the_reader_only(planted: Planted) -> None:
    for node in planted.pair()[1:]:
        zero_point = planted.graph.array(node.input[2])
        planted.own_constant(node, 2, (zero_point + 1).astype(zero_point.dtype))


@fault
def signed_grid(planted: Planted) -> None:
    for node in planted.pair():
        zero_point = planted.graph.array(node.input[2])
        kind = np.dtype(zero_point.dtype.name.removeprefix("u"))
        planted.own_constant(node, 2, np.asarray(min(int(zero_point), np.iinfo(kind).max), kind))


@fault
def float_left_in(planted: Planted) -> None:
    _refuse_before_a_clip(planted)
    quantizer, *readers = planted.pair()
    before = quantizer.input[0]
    if planted.graph.producers[before].op_type == "MaxPool":  # its values are on the grid of its input
        raise NotThere
    values = {reader.output[0] for reader in readers}
    if values & planted.graph.outputs:
        for reader in readers:  # the output keeps its name
            reader.op_type, reader.input[:] = "Identity", [before]
        planted.model.graph.node.remove(quantizer)
        return
    for node in planted.model.graph.node:
        node.input[:] = [before if one in values else one for one in node.input]
    for node in (quantizer, *readers):
        planted.model.graph.node.remove(node)


@fault
def bias_dropped(planted: Planted) -> None:
    name, bias = planted.integers(2)
    planted.write(name, bias * 0)


@fault
def bias_input_removed(planted: Planted) -> None:
    planted.dequantizer(2)
    del planted.node.input[2]


@fault
def one_bias_off(planted: Planted) -> None:
    name, bias = planted.integers(2)
    bias[1] += int(np.abs(bias).max()) // 4
    planted.write(name, bias)


@fault
def bias_overflows(planted: Planted) -> None:
    name, bias = planted.integers(2)
    planted.write(name, -bias)


@fault
def bias_scale_doubled(planted: Planted) -> None:
    _scaled(planted, 2, [planted.dequantizer(2)])


@fault
def one_weight_rounded_the_other_way(planted: Planted) -> None:
    name, weight = planted.integers(1)
    flat = weight.reshape(-1)
    place = int(np.argmin(np.abs(flat)))
    flat[place] += 1
    planted.write(name, weight)


@fault
def weights_negated_in_a_channel(planted: Planted) -> None:
    name, weight = planted.integers(1)
    weight[0] = np.clip(-weight[0].astype(int), -7, 7) if np.abs(weight).max() <= 8 else -weight[0].clip(-127)
    planted.write(name, weight)


@fault
def output_channels_swapped(planted: Planted) -> None:
    name, weight = planted.integers(1)
    weight[[0, 1]] = weight[[1, 0]]
    planted.write(name, weight)


@fault
def input_channels_reversed(planted: Planted) -> None:
    name, weight = planted.integers(1)
    if weight.shape[1] < 2:
        raise NotThere
    planted.write(name, np.ascontiguousarray(weight[:, ::-1]))


@fault
def kernel_transposed(planted: Planted) -> None:
    name, weight = planted.integers(1)
    if weight.ndim < 4 or weight.shape[-1] < 2:
        raise NotThere
    planted.write(name, np.ascontiguousarray(weight.swapaxes(-1, -2)))


@fault
def scales_in_reverse(planted: Planted) -> None:
    reader = planted.dequantizer(1)
    scale = planted.graph.array(reader.input[1])
    if scale.size < 2:
        raise NotThere
    planted.own_constant(reader, 1, np.ascontiguousarray(scale[::-1]))


@fault
def scales_along_another_axis(planted: Planted) -> None:
    reader = planted.dequantizer(1)
    scale, weight = planted.graph.array(reader.input[1]), planted.graph.array(reader.input[0])
    if scale.size < 2 or weight.shape[0] != weight.shape[1]:
        raise NotThere
    for attribute in reader.attribute:
        if attribute.name == "axis":
            attribute.i = 1 - axis_of(reader)


@fault
def one_scale_off(planted: Planted) -> None:
    reader = planted.dequantizer(1)
    scale = planted.graph.array(reader.input[1]).copy()
    scale.reshape(-1)[0] *= np.float32(1.1)
    planted.own_constant(reader, 1, scale)


@fault
def channel_pruned(planted: Planted) -> None:
    name, weight = planted.integers(1)
    weight[-1] = 0
    planted.write(name, weight)


@fault
def weight_zero_point(planted: Planted) -> None:
    reader = planted.dequantizer(1)
    zero_point = planted.graph.array(reader.input[2])
    planted.own_constant(reader, 2, np.ones_like(zero_point))


@fault
def padding_shifted(planted: Planted) -> None:
    for attribute in planted.node.attribute:
        if attribute.name == "pads" and any(attribute.ints) and planted.node.op_type == "Conv":
            top, left, bottom, right = attribute.ints
            attribute.ints[:] = [top + bottom, left + right, 0, 0]
            return
    raise NotThere


@fault
def activation_lost(planted: Planted) -> None:
    node = _activation(planted)
    zero_point = planted.graph.array(planted.quantizer.input[2])
    if zero_point == np.iinfo(zero_point.dtype).min:  # rounding alone cuts off what is below zero
        raise NotThere
    node.op_type = "Identity"
    del node.input[1:]


@fault
def activation_cut_off(planted: Planted) -> None:
    node = _activation(planted)
    node.op_type = "Clip"
    zero = planted.graph.add(f"{node.name}_low", np.float32(0))
    high = np.float32(planted.graph.array(planted.quantizer.input[1]) * 100)
    del node.input[1:]
    node.input.extend([zero, planted.graph.add(f"{node.name}_high", high)])


def _activation(planted: Planted) -> onnx.NodeProto:
    before = planted.graph.producers[planted.quantizer.input[0]]
    if before.op_type not in ("Relu", "Clip"):
        raise NotThere
    return before


@fault
def sum_became_difference(planted: Planted) -> None:
    if planted.node.op_type != "Add":
        raise NotThere
    planted.node.op_type = "Sub"


@fault
def operand_taken_twice(planted: Planted) -> None:
    if planted.node.op_type not in ("Add", "Mul", "Concat"):
        raise NotThere
    planted.node.input[1] = planted.node.input[0]


@fault
def activations_transposed(planted: Planted) -> None:
    """Height and width mistaken for each other."""
    name = planted.quantizer.input[0]
    if planted.node.op_type != "Conv":
        raise NotThere
    planted.insert(
        name, [helper.make_node("Transpose", [name], [f"{name}_t"], "planted", perm=[0, 1, 3, 2])], f"{name}_t"
    )


@fault
def activation_channels_swapped(planted: Planted) -> None:
    name = planted.quantizer.input[0]
    if planted.node.op_type != "Conv":
        raise NotThere
    channels = np.arange(planted.graph.array(planted.dequantizer(1).input[0]).shape[0])
    channels[[0, 1]] = 1, 0
    order = numpy_helper.from_array(channels, "planted_order")
    planted.model.graph.initializer.append(order)
    planted.insert(
        name, [helper.make_node("Gather", [name, "planted_order"], [f"{name}_g"], "planted", axis=1)], f"{name}_g"
    )


@fault
def mean_became_maximum(planted: Planted) -> None:
    nodes = [node for node in planted.nodes if node.op_type in ("GlobalAveragePool", "ReduceMean", "AveragePool")]
    if not nodes:
        raise NotThere
    nodes[0].op_type = nodes[0].op_type.replace("Average", "Max").replace("Mean", "Max")


@fault
def weights_in_half_precision(planted: Planted) -> None:
    """Weights as floats, not those that were rounded."""
    reader = planted.dequantizer(1)
    integers, scale = planted.graph.array(reader.input[0]), planted.graph.array(reader.input[1])
    along = [-1] + [1] * (integers.ndim - 1) if scale.size > 1 else []
    noise = np.random.default_rng(0).uniform(-0.49, 0.49, integers.shape)
    floats = ((integers + noise) * scale.reshape(along)).astype(np.float32)
    planted.model.graph.initializer.append(numpy_helper.from_array(floats, f"{reader.output[0]}_floats"))
    reader.op_type, reader.input[:] = "Identity", [f"{reader.output[0]}_floats"]
    del reader.attribute[:]


@fault
def stride_offset(planted: Planted) -> None:
    """A resize that begins elsewhere."""
    nodes = [node for node in planted.nodes if node.op_type == "Resize"]
    if not nodes:
        raise NotThere
    for attribute in nodes[0].attribute:
        if attribute.name == "coordinate_transformation_mode":
            attribute.s = b"align_corners"
