"""Integer biases: one for each operation, in the one scale that the hardware adds it in, and with room for it."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_quant.deploy.graph.qdq import QdqGraph, axis_of, hands_on, of_integers

if TYPE_CHECKING:
    import onnx

# Operations that add the bias to a sum of products; they take input, weight and bias in this order.
_BIASED = ("Conv", "ConvTranspose", "Gemm")
# Operations whose bias may have any scale, but only one: the NPU's compiler refuses one for each channel.
_NORMS = ("LayerNormalization", "InstanceNormalization", "GroupNormalization")
# Largest integer of a bias: half of what 32 bits hold, the rest is for the sum that it is added to; a little less, for
# scales are rounded to float32.
_LARGEST = 2**30 - 2**8


@dataclass
class _Sum:
    """An operation that adds a bias: where the integers of its operands become floats."""

    of_input: onnx.NodeProto
    weight: onnx.NodeProto
    bias: onnx.NodeProto


def rescale_biases(model: onnx.ModelProto, biases: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    """Give every 32-bit bias the scale of its input times that of its weight, as integer hardware adds it.

    Three things go wrong otherwise, all unseen by ONNX Runtime, which computes with whatever scale is written:

    - AIMET derives that scale while it runs the network, and loses track of the input's behind operations without
      ranges of their own (padding, a reshape). There it takes the finest scale that the bias fits in; an NPU knows
      one scale only and puts out other numbers (-1 dB where 57 are right). It does so for a linear layer on more
      than two axes as well, which ONNX writes as MatMul and Add.
    - A channel whose weights are all but zero has so fine a scale that its bias does not fit in 32 bits: AIMET cuts
      it off, or an NPU overflows and the channel puts out its negative. Its weights get a coarser scale, as ONNX
      Runtime's own quantizer gives them; what they lose is below anything the bias leaves visible.
    - PyTorch's exporter merges constants of equal values, such as all biases of zeros. Where several operations take
      one bias, each gets a copy first: their scales differ. Norms get one scale for the whole bias.

    Args:
        model: a QDQ graph; changed in place.
        biases: the float biases, by the names of the parameters. Of others, what the file holds is taken.

    Returns:
        The new scales of the weights that were changed, by name, for the encodings to agree.
    """
    origins = _unshare(model)
    graph = QdqGraph(model)
    sums = [found for node in model.graph.node if (found := _sum_of(node, graph)) is not None]
    values = {one.bias.input[0]: _float_bias(one.bias, graph, biases, origins) for one in sums}
    coarser = _make_room(graph, sums, values)
    for one in sums:
        floats, before = values[one.bias.input[0]], graph.array(one.bias.input[1])
        scale = _scale(graph, one.weight) * _scale(graph, one.of_input)
        one_for_all = scale.size == before.size == 1
        scale = scale.reshape(before.shape) if one_for_all else np.tile(scale, floats.size // scale.size)
        known = _parameter(one.bias, biases, origins) is not None
        if known or before.shape != scale.shape or not np.allclose(before, scale, rtol=1e-3, atol=0):
            _requantize(graph, one.bias, floats, scale)
    for node in model.graph.node:
        bias = graph.source(node.input[2]) if node.op_type in _NORMS and len(node.input) > 2 else None
        if bias is not None and _is_bias(bias, graph) and _scale(graph, bias).size > 1:
            floats = _float_bias(bias, graph, biases, origins)
            _requantize(graph, bias, floats, np.array((np.abs(floats).max() or _LARGEST) / _LARGEST))
    return coarser


def complete_norms(model: onnx.ModelProto) -> None:
    """Write the ones and zeros of layer norms without weight or bias as integers: else the NPU computes in float.

    Args:
        model: a QDQ graph; changed in place.
    """
    from onnx import helper

    graph = QdqGraph(model)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type == "LayerNormalization" and of_integers(graph.source(node.input[0])):
            read_from = graph.producers.get(node.input[1])
            weight = graph.known(read_from.input[0] if read_from and of_integers(read_from) else node.input[1])
            shape = () if weight is None else weight.shape
            for index, (part, value, kind) in enumerate((("weight", 1, np.uint8), ("bias", 0, np.int32)), 1):
                given = graph.known(node.input[index]) if len(node.input) > index else np.zeros(shape)
                if given is None or not shape or not (given == value).all():
                    continue
                grid = {"q": np.full(shape, value, kind), "scale": np.float32(1.0), "zero_point": kind(0)}
                read = [graph.add(f"{node.name}.{part}_{name}", np.asarray(array)) for name, array in grid.items()]
                output = graph.free(f"{node.name}.{part}_qdq")
                nodes.append(helper.make_node("DequantizeLinear", read, [output], f"{output}_dq"))
                node.input[index:] = [output, *node.input[index + 1 :]]
        nodes.append(node)
    graph.replace_nodes(nodes)


def update_encodings(encodings: dict[str, Any], coarser: dict[str, list[float]]) -> None:
    """Write the scales that :func:`rescale_biases` gave weights into AIMET's encodings (version 1.0.0)."""
    for entry in encodings["param_encodings"]:
        if entry["name"] in coarser:
            entry["scale"] = coarser[entry["name"]]


def _sum_of(node: onnx.NodeProto, graph: QdqGraph) -> _Sum | None:
    """Return the integer operands of an operation that adds a bias; ``None`` for other operations and operands."""
    if node.op_type in _BIASED:
        names = list(node.input[:3])
    elif node.op_type == "Add":  # a linear layer on more than two axes
        products = [index for index in (0, 1) if _op(graph.producers.get(node.input[index])) == "MatMul"]
        names = [*graph.producers[node.input[products[0]]].input, node.input[1 - products[0]]] if products else []
    else:
        return None
    sources = [graph.source(name) for name in names]
    if len(sources) < 3 or not all(of_integers(source) for source in sources):
        return None
    of_input, weight, bias = sources
    assert of_input is not None
    assert weight is not None
    assert bias is not None
    known = all(name in graph.constants for name in (of_input.input[1], weight.input[0], *weight.input[1:]))
    if not known or not _is_bias(bias, graph) or _scale(graph, of_input).size > 1:
        return None
    size = graph.array(bias.input[0]).size
    if node.op_type == "Add" and _scale(graph, weight).size > 1 and weight.output[0] in names:
        dimensions = graph.array(weight.input[0]).ndim
        if axis_of(weight) % dimensions != dimensions - 1:  # scales along the axis that is summed over
            return None
    fits = size > 0 and size % _scale(graph, weight).size == 0 and _long_axes(graph, bias) <= 1
    return _Sum(of_input, weight, bias) if fits else None


def _make_room(graph: QdqGraph, sums: list[_Sum], values: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    """Give coarser scales to the weights of channels whose biases would not fit in 32 bits."""
    roomy: dict[str, np.ndarray] = {}
    dequantizers: dict[str, onnx.NodeProto] = {}
    for one in sums:  # a weight that several operations take has one scale: the coarsest that one of them needs
        of_weight = roomy.get(one.weight.input[0], _scale(graph, one.weight))
        needed = np.abs(values[one.bias.input[0]]).ravel() / (_scale(graph, one.of_input) * _LARGEST)
        # of a transposed convolution in groups, each group has the same scales
        roomy[one.weight.input[0]] = np.maximum(of_weight, needed.reshape(-1, of_weight.size).max(0))
        dequantizers[one.weight.input[0]] = one.weight
    coarser = {}
    for name, scale in roomy.items():
        node = dequantizers[name]
        before = _scale(graph, node)
        if (scale > before).any():
            integers = graph.array(name)
            ratio = _along(before / scale, integers.ndim, node)
            graph.write(name, np.rint(integers.astype(np.float64) * ratio).astype(integers.dtype))
            shape = graph.array(node.input[1]).shape
            graph.write(node.input[1], scale.astype(np.float32).reshape(shape))
            coarser[name.removesuffix("_q")] = scale.astype(np.float32).tolist()
    return coarser


def _requantize(graph: QdqGraph, bias: onnx.NodeProto, floats: np.ndarray, scale: np.ndarray) -> None:
    """Write a bias in other scales: one, or one for each value."""
    import onnx

    if scale.size > 1 and _scale(graph, bias).size == 1:
        axes = [attribute for attribute in bias.attribute if attribute.name == "axis"]
        for attribute in axes:
            bias.attribute.remove(attribute)
        bias.attribute.append(onnx.helper.make_attribute("axis", int(np.argmax(floats.shape))))
    steps = np.rint(floats / (scale.reshape(floats.shape if scale.size > 1 else ())))
    graph.write(bias.input[0], steps.astype(np.int32))
    graph.write(bias.input[1], scale.astype(np.float32))
    for zero_point in bias.input[2:]:
        graph.write(zero_point, np.zeros(scale.shape, np.int32))


def _unshare(model: onnx.ModelProto) -> dict[str, str]:
    """Give each operation a 32-bit bias, scale and zero point of its own.

    Returns:
        Which constant each new one is a copy of.
    """
    graph = QdqGraph(model)
    taken: set[str] = set()
    origins: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        for index, name in enumerate(node.input) if not hands_on(node) else ():
            path = _path(name, graph)
            if not path:
                continue
            needed = {step.output[0] for step in path} | set(path[0].input)
            if taken.isdisjoint(needed):
                taken |= needed
                continue
            for step in path:  # from the integers on
                twin = copy.deepcopy(step)
                twin.name, twin.output[0] = f"{step.name}_{len(nodes)}", graph.free(f"{step.output[0]}_own")
                if step is path[0]:
                    for place, constant in enumerate(step.input):
                        stem, ending = (constant[:-2], "_q") if constant.endswith("_q") else (constant, "")
                        twin.input[place] = graph.copy_constant(constant, f"{stem}_own_{len(nodes)}{ending}")
                        origins[twin.input[place]] = origins.get(constant, constant)
                else:
                    twin.input[0] = nodes[-1].output[0]
                nodes.append(twin)
                graph.producers[twin.output[0]] = twin
            node.input[index] = nodes[-1].output[0]
        nodes.append(node)
    if origins:
        nodes = [copy.deepcopy(node) for node in nodes]
        del model.graph.node[:]
        model.graph.node.extend(nodes)
    return origins


def _path(name: str, graph: QdqGraph) -> list[onnx.NodeProto]:
    """Return the nodes from the integers of a bias to the tensor ``name``; none if that is not a bias."""
    path: list[onnx.NodeProto] = []
    node = graph.producers.get(name)
    while node is not None and hands_on(node) and len(node.output) == 1:
        path.append(node)
        node = graph.producers.get(node.input[0])
    return [node, *reversed(path)] if node is not None and _is_bias(node, graph) else []


def _is_bias(node: onnx.NodeProto, graph: QdqGraph) -> bool:
    """Return whether a node outputs a constant of 32-bit integers as floats."""
    from onnx import TensorProto

    constant = of_integers(node) and all(name in graph.constants for name in node.input)
    return constant and graph.constants[node.input[0]].data_type == TensorProto.INT32


def _float_bias(
    bias: onnx.NodeProto, graph: QdqGraph, biases: Mapping[str, np.ndarray], origins: Mapping[str, str]
) -> np.ndarray:
    """Return the bias before it was rounded, where it is known; AIMET may have cut its integers off."""
    integers, scale = graph.array(bias.input[0]).astype(np.float64), _scale(graph, bias)
    rounded = integers * (_along(scale, integers.ndim, bias) if scale.size > 1 else scale.reshape(()))
    given = _parameter(bias, biases, origins)
    return rounded if given is None or given.shape != rounded.shape else given.astype(np.float64)


def _parameter(bias: onnx.NodeProto, biases: Mapping[str, np.ndarray], origins: Mapping[str, str]) -> np.ndarray | None:
    name = origins.get(bias.input[0], bias.input[0]).removesuffix("_q")
    # AIMET numbers what it copies where one bias has several scales
    return biases.get(name, biases.get(re.sub(r"_dup_\d+$", "", name)))


def _scale(graph: QdqGraph, node: onnx.NodeProto) -> np.ndarray:
    """Return the scales of a DequantizeLinear, flat."""
    return graph.array(node.input[1]).astype(np.float64).reshape(-1)


def _long_axes(graph: QdqGraph, node: onnx.NodeProto) -> int:
    return sum(size > 1 for size in graph.array(node.input[0]).shape)


def _op(node: onnx.NodeProto | None) -> str:
    return "" if node is None else node.op_type


def _along(values: np.ndarray, dimensions: int, dequantize: onnx.NodeProto) -> np.ndarray:
    """Return values per channel, in the shape that multiplies a weight."""
    if values.size == 1:
        return values.reshape(())
    axis = axis_of(dequantize) % dimensions
    return values.reshape([-1 if index == axis else 1 for index in range(dimensions)])
