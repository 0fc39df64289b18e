"""Means of blocks, computed in another way where the NPU's compiler gets them wrong.

Of maps that were cut off at the beginning, or padded, it takes the means of other blocks, and of blocks side by side it
leaves out the zeros around the map (QAIRT 2.51). Means of windows one step apart are right if these have even sides,
and every k-th of them is that of a block, on the same grid. A depthwise convolution with equal weights is right if
they have odd ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_quant.deploy.graph.qdq import QdqGraph, axis_of, sizes_of

if TYPE_CHECKING:
    import onnx

# What leaves each value where it is.
_IN_PLACE = (
    "Clip", "DequantizeLinear", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mul", "QuantizeLinear", "Relu",
    "Sigmoid", "Tanh", "Where",
)  # fmt: skip
_WEIGHT = 127


def write_means_in_another_way(model: onnx.ModelProto, encodings: dict[str, Any] | None = None) -> None:
    """Compute means of blocks by windows or convolutions where they would be others on the NPU.

    Args:
        model: a graph with or without QuantizeLinear; changed in place.
        encodings: AIMET's (version 1.0.0), of a graph without; changed in place.
    """
    graph, sizes = QdqGraph(model), sizes_of(model)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        size = sizes.get(node.input[0]) if node.input else None
        if node.op_type != "AveragePool" or size is None or not _is_wrong(graph, sizes, node):
            nodes.append(node)
        elif any(side % 2 and side > 1 for side in _values(node)["kernel_shape"]):
            nodes += _as_convolution(graph, node, size[1], encodings)
        else:
            nodes += _as_windows(graph, node, encodings)
    graph.replace_nodes(nodes)


def _values(node: onnx.NodeProto) -> dict[str, Any]:
    from onnx import helper

    return {one.name: helper.get_attribute_value(one) for one in node.attribute}


def _as_convolution(
    graph: QdqGraph, node: onnx.NodeProto, channels: int, encodings: dict[str, Any] | None
) -> list[onnx.NodeProto]:
    from onnx import helper

    values = _values(node)
    shape = [channels, 1, *values["kernel_shape"]]
    scale = np.float32(1 / (math.prod(shape[2:]) * _WEIGHT))
    name, nodes = graph.free(f"{node.output[0]}_weight"), []
    if encodings is None:
        parts = {"q": np.full(shape, _WEIGHT, np.int8), "scale": scale, "zero_point": np.int8(0)}
        names = [graph.add(f"{name}_{part}", np.asarray(array)) for part, array in parts.items()]
        nodes.append(helper.make_node("DequantizeLinear", names, [name], f"{name}_dq"))
    else:
        name = graph.add(name, np.full(shape, _WEIGHT * scale, np.float32))
        kind = {"dtype": "INT", "enc_type": "PER_TENSOR", "bw": 8, "is_sym": True}
        encodings["param_encodings"].append({"name": name, **kind, "scale": [float(scale)], "offset": [-128]})
    kept = {one: values[one] for one in ("kernel_shape", "strides", "pads") if one in values}
    nodes.append(helper.make_node("Conv", [node.input[0], name], node.output, node.name, group=channels, **kept))
    return nodes


def _as_windows(graph: QdqGraph, node: onnx.NodeProto, encodings: dict[str, Any] | None) -> list[onnx.NodeProto]:
    from onnx import helper

    values, (output,) = _values(node), node.output
    steps = values.get("strides", [1] * len(values["kernel_shape"]))
    every = graph.free(f"{output}_of_windows")
    nodes = [helper.make_node("AveragePool", node.input, [every], node.name, **{**values, "strides": [1] * len(steps)})]
    if encodings is not None:
        entries = encodings["activation_encodings"]
        entries += [{**entry, "name": every} for entry in entries if entry["name"] == output]
    takers = graph.consumers[output]
    if takers and all(taker.op_type == "QuantizeLinear" for taker in takers):
        grid = list(takers[0].input[1:])
        nodes.append(helper.make_node("QuantizeLinear", [every, *grid], [f"{every}_q"], f"{every}_q"))
        nodes.append(helper.make_node("DequantizeLinear", [f"{every}_q", *grid], [f"{every}_qdq"], f"{every}_qdq"))
        every = f"{every}_qdq"
    axes = [2 + axis for axis in range(len(steps))]
    limits = {"starts": [0] * len(steps), "ends": [np.iinfo(np.int64).max] * len(steps), "axes": axes, "steps": steps}
    names = [graph.add(f"{output}_{part}", np.array(value, np.int64)) for part, value in limits.items()]
    nodes.append(helper.make_node("Slice", [every, *names], [output], f"{output}_of_blocks"))
    return nodes


def _is_wrong(graph: QdqGraph, sizes: Mapping[str, Sequence[int]], node: onnx.NodeProto) -> bool:
    """Return whether the compiler is known to compute a mean otherwise, and another way is known."""
    values = _values(node)
    is_padded, block = any(values.get("pads", [])), values["kernel_shape"]
    if values.get("ceil_mode") or max(block) == 1 or (is_padded and not values.get("count_include_pad")):
        return False
    return (is_padded and block == values.get("strides")) or _is_moved(graph, sizes, node.input[0])


def _is_moved(graph: QdqGraph, sizes: Mapping[str, Sequence[int]], name: str) -> bool:
    """Return whether a map is a part of another one or padded, whatever was done to each of its values since."""
    node = graph.producers.get(name)
    if node is None or _moves(graph, len(sizes.get(name, ())), node):
        return node is not None
    return node.op_type in _IN_PLACE and any(_is_moved(graph, sizes, one) for one in node.input)


def _moves(graph: QdqGraph, rank: int, node: onnx.NodeProto) -> bool:
    """Return whether a node cuts, pads or joins along height or width; channels are no matter."""
    if node.op_type in ("Concat", "Split"):
        return not rank or axis_of(node, 0) % rank > 1
    if node.op_type == "Slice":
        axes = graph.known(node.input[3]) if len(node.input) > 3 else None
        return axes is None or not rank or any(int(axis) % rank > 1 for axis in axes)
    if node.op_type == "Pad":
        pads = graph.known(node.input[1])
        return pads is None or any(pads[index] for index in range(len(pads)) if index % (len(pads) // 2) > 1)
    return False
