"""What does not depend on the network's inputs: computed when the file is written, and given a grid where it has none.

PyTorch's exporter leaves much of it to be computed on the device: masks for a window that is shifted, positions taken
out of a table, queries that are learned. The NPU's compiler computes that in float, and whatever it meets in float
makes the operation next to it compute in float.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_quant.deploy.graph.fixed import random_operations
from lightning_quant.deploy.graph.qdq import QdqGraph, exact_session, hands_on, of_integers, sizes_of

if TYPE_CHECKING:
    import onnx

# Operations whose operands are of one kind: a constant in float among them makes them compute in float.
_ALIKE = ("Add", "Concat", "Div", "MatMul", "Max", "Min", "Mul", "Sub", "Where")

# Of these, the ones that scale a product only: how far apart the scales of their operands are does not matter.
_PRODUCTS = ("Div", "MatMul", "Mul")

# How far a value on a grid may be from the constant, relative to the largest: 32 bits hold seven digits.
_ROUNDING = 1e-6


def fold_constants(model: onnx.ModelProto) -> set[str]:
    """Compute what depends on constants and sizes alone, in place. Weights stay integers, with a scale behind them.

    Args:
        model: a graph in topological order, of floats or with QuantizeLinear and DequantizeLinear.

    Returns:
        The names of tensors that are no longer in the graph.
    """
    before = {name for node in model.graph.node for name in node.output}
    while _fold(model):  # sizes that were not known become known
        pass
    return (
        before - {name for node in model.graph.node for name in node.output} - {c.name for c in model.graph.initializer}
    )


def _fold(model: onnx.ModelProto) -> bool:
    """Fold what is known now; return whether there was anything."""
    from onnx import helper, numpy_helper

    graph = QdqGraph(model)
    sizes = sizes_of(model)
    drawing = {id(node) for node in random_operations(model)}
    known = set(graph.constants)
    fixed: list[onnx.NodeProto] = []
    measured: dict[str, np.ndarray] = {}
    for node in model.graph.node:
        has_body = any(attribute.HasField("g") for attribute in node.attribute)
        if id(node) in drawing or has_body or not graph.outputs.isdisjoint(node.output):
            continue
        if node.op_type == "Shape" and node.input[0] in sizes and not node.attribute:
            measured[node.output[0]] = np.array(sizes[node.input[0]], np.int64)
        elif not all(name in known or not name for name in node.input):
            continue
        fixed.append(node)
        known.update(node.output)
    ids = {id(node) for node in fixed}
    used = {name for node in fixed for name in node.output if any(id(n) not in ids for n in graph.consumers[name])}
    # what only says how integers are read stays, as constants do that are written as such
    stays = {id(node) for node in fixed if node.op_type in ("Constant", "DequantizeLinear") and used & set(node.output)}
    wanted = {name for name in used if id(graph.producers[name]) not in stays}
    wanted |= {
        name
        for node in fixed
        if id(node) in stays
        for name in node.input
        if name in graph.producers and graph.producers[name].op_type != "Constant"
    }
    if not wanted:
        return False
    values = _computed(model, [node for node in fixed if node.output[0] not in measured], measured, wanted)
    read = []
    for name in sorted(wanted):
        array, source = values[name], _integers_of(graph, name)
        tensor = name
        if source is not None:  # moved about, it is on the grid it was read from
            scale, zero_point = (graph.array(one) for one in source.input[1:3])
            tensor = graph.free(f"{name}_q")
            read.append(helper.make_node("DequantizeLinear", [tensor, *source.input[1:3]], [name], f"{name}_dq"))
            array = (np.rint(array / scale) + zero_point).astype(zero_point.dtype)
        model.graph.initializer.append(numpy_helper.from_array(array, tensor))
    graph.replace_nodes([*read, *(node for node in model.graph.node if not wanted & set(node.output))])
    return True


def _computed(
    model: onnx.ModelProto, nodes: list[onnx.NodeProto], measured: dict[str, np.ndarray], wanted: set[str]
) -> dict[str, np.ndarray]:
    """Return the values of tensors that depend on constants, and on sizes that were measured."""
    from onnx import helper, numpy_helper

    needed, part = wanted - measured.keys(), []
    for node in reversed(nodes):
        if needed & set(node.output):
            part.append(node)
            needed |= set(node.input)
    constants = [one for one in model.graph.initializer if one.name in needed]
    constants += [numpy_helper.from_array(array, name) for name, array in measured.items() if name in needed]
    names = sorted(wanted - measured.keys())
    outputs = [helper.make_empty_tensor_value_info(name) for name in names]
    made = helper.make_graph(part[::-1], "constants", [], outputs, constants)
    whole = helper.make_model(made, opset_imports=model.opset_import, ir_version=model.ir_version)
    narrow = _widen(whole)
    arrays = exact_session(whole).run(None, {}) if names else []
    found = {name: array.astype(narrow.get(name, array.dtype)) for name, array in zip(names, arrays, strict=True)}
    return {**measured, **found}


def _widen(model: onnx.ModelProto) -> dict[str, np.dtype]:
    """Output 4-bit integers as bytes, since ONNX Runtime has no array of them; return the types that they had."""
    from onnx import TensorProto, helper, shape_inference

    wide = {TensorProto.INT4: TensorProto.INT8, TensorProto.UINT4: TensorProto.UINT8}
    typed = {one.name: one.type.tensor_type.elem_type for one in shape_inference.infer_shapes(model).graph.output}
    narrow = {name: kind for name, kind in typed.items() if kind in wide}
    for output in model.graph.output:
        if output.name in narrow:
            bytes_name = f"{output.name}_bytes"
            model.graph.node.append(helper.make_node("Cast", [output.name], [bytes_name], to=wide[narrow[output.name]]))
            output.name = bytes_name
    return {name: helper.tensor_dtype_to_np_dtype(kind) for name, kind in narrow.items()}


def _integers_of(graph: QdqGraph, name: str) -> onnx.NodeProto | None:
    """Return the node that reads integers by one scale, if a constant holds its values, moved about; else ``None``."""
    node = graph.producers[name]
    source = graph.source(name) if hands_on(node) else None
    if source is None or not of_integers(source) or len(source.input) < 3:
        return None
    grid = source.input[1:3]
    return source if all(one in graph.constants and graph.array(one).size == 1 for one in grid) else None


def encode_constants(model: onnx.ModelProto) -> dict[str, dict[str, Any]]:
    """Give a grid to constants in float that meet integers, by their least and largest value.

    Numbers, masks of two values: those that are on such a grid. What rounding would change has to be rounded in the
    simulation.

    Args:
        model: a QDQ graph, its constants folded; changed in place.

    Returns:
        The grids by the constants' names, as entries of AIMET's encodings (version 1.0.0).
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = QdqGraph(model)
    values = {
        name: numpy_helper.to_array(one) for name, one in graph.constants.items() if one.data_type == TensorProto.FLOAT
    }
    for node in model.graph.node:
        tensor = next((one.t for one in node.attribute if node.op_type == "Constant" and one.name == "value"), None)
        if tensor is not None and tensor.data_type == TensorProto.FLOAT:
            values[node.output[0]] = numpy_helper.to_array(tensor)
    made: dict[tuple[str, str, float | None], str] = {}
    entries: dict[str, dict[str, Any]] = {}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        beside = [graph.producers.get(name) for name in node.input if name not in values]
        read = [one for one in beside if one and of_integers(one) and _is_activation(graph, one)]
        if node.op_type in _ALIKE and read and len(node.input) > 1:
            kind = graph.array(read[0].input[2]).dtype
            for index, name in enumerate(node.input):
                if name not in values or not values[name].size or not np.isfinite(values[name]).all():
                    continue
                # the NPU adds what is of far apart scales inexactly
                near = None if node.op_type in _PRODUCTS else graph.array(read[0].input[1]).item()
                key = (name, str(kind), near)
                if key not in made:
                    scale, zero_point, integers = _on_grid(values[name], kind, near)
                    read_back = (integers.astype(np.float32) - zero_point) * scale
                    if not np.allclose(read_back, values[name], rtol=0, atol=_ROUNDING * np.abs(values[name]).max()):
                        continue
                    integers_name = graph.add(f"{name}_q", integers)
                    parts = [
                        integers_name, graph.add(f"{name}_scale", scale), graph.add(f"{name}_zero_point", zero_point),
                    ]  # fmt: skip
                    output = f"{name}_qdq{integers_name.removeprefix(f'{name}_q')}"
                    nodes.append(helper.make_node("DequantizeLinear", parts, [output], f"{output}_dq"))
                    made[key] = output
                    entries[name] = {
                        "name": name, "dtype": "INT", "bw": kind.itemsize * 8, "is_sym": False,
                        "scale": [float(scale)], "offset": [-int(zero_point)], "enc_type": "PER_TENSOR",
                    }  # fmt: skip
                node.input[index] = made[key]
        nodes.append(node)
    if entries:
        graph.replace_nodes(nodes)
    return entries


def _is_activation(graph: QdqGraph, node: onnx.NodeProto) -> bool:
    """Return whether a node reads integers of 8 or 16 bits by one scale and zero point: a bias has 32."""
    grid = [graph.array(name) for name in node.input[1:] if name in graph.constants]
    return len(grid) == 2 and grid[0].size == 1 and grid[1].dtype.itemsize <= 2


def _on_grid(values: np.ndarray, kind: np.dtype[Any], near: float | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return scale, zero point and integers; a single value is hit exactly, whole numbers if they are not too many.

    Args:
        values: at least one.
        kind: type of the integers.
        near: what the scale of a single value should be close to, and that of zeros is; ``None`` if it does not matter.
    """
    least, largest = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    steps: float = np.iinfo(kind).max
    if values.size == 1:
        largest_power = 8 * kind.itemsize - 1
        power = 0 if near is None or least == largest else math.log2((largest - least) / near)
        steps = 2 ** min(max(round(power), 0), largest_power)  # by which a number is divided exactly
    whole = np.rint(values)
    if np.array_equal(whole, values) and (divisor := int(np.gcd.reduce(whole.astype(np.int64), axis=None))):
        whole_steps = (largest - least) / divisor
        steps = steps // whole_steps * whole_steps or steps
    scale = np.float32((largest - least) / steps or near or 1)
    zero_point = np.rint(-least / scale)
    integers = np.clip(np.rint(values / scale) + zero_point, 0, np.iinfo(kind).max)
    return np.array(scale), np.array(zero_point, kind), integers.astype(kind)


def update_encodings(encodings: dict[str, Any], gone: set[str], added: Mapping[str, dict[str, Any]]) -> None:
    """Remove the encodings of tensors that no longer exist, and add those of constants."""
    for part in ("activation_encodings", "param_encodings"):
        encodings[part] = [entry for entry in encodings[part] if entry["name"] not in gone]
    known = {entry["name"] for part in ("activation_encodings", "param_encodings") for entry in encodings[part]}
    encodings["activation_encodings"] += [entry for name, entry in added.items() if name not in known]
