"""The edges written into a graph: pixels in front of it, classes behind it, on integers that the NPU computes with.

An image is normalized by one 1x1 convolution: ``(pixel / 255 - mean) / std`` for each channel, rounded to the network's
own input grid, as a host rounds it. Its weights are exact (127 times the scale of the channel). Its bias is a whole
number of steps: where that would round a pixel the other way than a host does, scale and bias are moved a little.
Folded into the network's first convolution it would change the grid of that one's weights, and its border, which is
zero after normalization. Only pixels that are the network's integers as they are need no convolution.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from lightning_quant.deploy.edges.host import nearest, normalized, resized_axes
from lightning_quant.deploy.edges.plan import InputPlan, OutputPlan
from lightning_quant.deploy.edges.spec import ImageInput, OutputEdge, OwnModule
from lightning_quant.deploy.graph.passed_inputs import Grid, grid_of
from lightning_quant.deploy.graph.qdq import QdqGraph
from lightning_quant.errors import ExportError

if TYPE_CHECKING:
    import onnx

# Pixels are integers that stand for 0…1. With 16 bits they are 257 times as large, exactly.
PIXELS, _FINE_PIXELS = Grid(1 / 255, np.zeros((), np.uint8)), Grid(1 / 65535, np.zeros((), np.uint16))
# The highest weight of 8 bits, symmetric.
_HIGHEST = 127
_EVERY = np.arange(256, dtype=np.uint8)
# Where scale and bias of a normalization are searched: relative to the true scale, and in steps; nearest first.
_STRETCHES = np.array([0.0, *(sign * 1.5e-7 * 1.3**power for power in range(26) for sign in (1, -1))])
_NUDGES = np.array(sorted(range(-3, 4), key=abs))


class AppGraph(NamedTuple):
    """A graph with edges.

    Args:
        model: the graph.
        codes: for each input with an edge, the tensor of integers that the network's first layer takes.
    """

    model: onnx.ModelProto
    codes: dict[str, str]


def attach_edges(model: onnx.ModelProto, inputs: Sequence[InputPlan], outputs: Sequence[OutputPlan]) -> AppGraph:
    """Return a QDQ graph with edges.

    Args:
        model: the network's, which stays as it is.
        inputs: one for each of its inputs.
        outputs: one for each of its outputs.

    Raises:
        ExportError: for an input or output that is not rounded, so that it has no integers.
    """
    model = copy.deepcopy(model)
    codes = {}
    for entry in inputs:
        if entry.edge is not None:
            codes[entry.name] = _Front(model, entry).write(entry.edge, _grid_of(entry))
    for output in outputs:
        if output.edge is not None and output.edge.module is not None:
            _Behind(model, output).join(output.edge.module, _grid_of(output))
        elif output.edge is not None:
            _Behind(model, output).write(output.edge, _grid_of(output))
    return AppGraph(model, codes)


def _grid_of(plan: InputPlan | OutputPlan) -> Grid:
    if plan.grid is None:
        what = "inputs" if isinstance(plan, InputPlan) else "outputs"
        raise ExportError(
            f"{plan.name!r} is not rounded to one grid where it enters or leaves the network, so there are no "
            f"integers to give a device: expected a quantized tensor of numbers. Give None for it in {what}=[…]."
        )
    return plan.grid


class _Writer:
    """Adds operations to a graph.

    Args:
        model: changed when what was added goes into it.
        stem: what names start with.
    """

    def __init__(self, model: onnx.ModelProto, stem: str) -> None:
        self.model = model
        self.graph = QdqGraph(model)
        self.stem = stem
        self.nodes: list[onnx.NodeProto] = []
        self._names = {node.name for node in model.graph.node}

    def free(self, name: str) -> str:
        """Return ``name``, or one like it that is not taken, and take it."""
        candidate, number = name, 0
        while candidate in self._names or self.graph.free(candidate) != candidate:
            candidate, number = f"{name}_{number}", number + 1
        self._names.add(candidate)
        return candidate

    def constant(self, array: Any, name: str) -> str:
        """Add a constant and return its name."""
        return self.graph.add(self.free(f"{self.stem}_{name}"), np.asarray(array))

    def node(self, operation: str, taken: Sequence[str], name: str, output: str | None = None, **how: Any) -> str:
        """Add an operation and return its output: ``output``, or one named after ``name``."""
        from onnx import helper

        given = output or self.free(f"{self.stem}_{name}")
        self.nodes.append(helper.make_node(operation, list(taken), [given], self.free(f"{self.stem}/{name}"), **how))
        return given

    def constants(self, grid: Grid, name: str) -> tuple[str, str]:
        """Add a grid's scale and zero point."""
        scale = self.constant(np.float32(grid.scale), f"{name}_scale")
        return scale, self.constant(grid.zero_point, f"{name}_zero_point")

    def rounded(self, tensor: str, grid: Grid, name: str) -> str:
        """Round a tensor to a grid."""
        ends = self.constants(grid, name)
        return self.node("DequantizeLinear", [self.node("QuantizeLinear", [tensor, *ends], f"{name}_q"), *ends], name)

    def rename(self, old: str, new: str) -> None:
        """Give a tensor another name wherever it is."""
        for node in (*self.model.graph.node, *self.nodes):
            for names in (node.input, node.output):
                for place, name in enumerate(names):
                    if name == old:
                        names[place] = new


class _Front(_Writer):
    """Writes in front of an input."""

    def __init__(self, model: onnx.ModelProto, plan: InputPlan) -> None:
        super().__init__(model, plan.name)
        self.plan = plan

    def write(self, edge: ImageInput | Literal["quantized"], grid: Grid) -> str:
        """Let the input be what the edge says; return the tensor of the integers that the network takes."""
        from onnx import helper

        plan, name, shape, kind = self.plan, self.plan.name, self.plan.shape, grid.zero_point.dtype
        quantizers, integers = self.graph.consumers[name], name
        if isinstance(edge, ImageInput):
            kind = np.dtype(np.uint8)
            if edge.layout == "nhwc":
                shape = (shape[0], *shape[2:], shape[1])
                integers = self.node("Transpose", [name], "planes", perm=[0, 3, 1, 2])
            if not _is_its_own_grid(edge, plan.shape[1], grid):
                tensor = self._normalize(integers, edge, grid)
                for one in quantizers:
                    one.input[0] = tensor
                integers, quantizers = quantizers[0].output[0], []
        for one in quantizers:  # what is given are its integers
            self.model.graph.node.remove(one)
            self.rename(one.output[0], integers)
        (value,) = (one for one in self.model.graph.input if one.name == name)
        value.CopyFrom(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(kind), shape))
        self.graph.replace_nodes([*self.nodes, *self.model.graph.node])
        return integers

    def _normalize(self, planes: str, image: ImageInput, grid: Grid) -> str:
        """Write the convolution; return what the network's own quantizer takes."""
        pixels = _pixel_grid(grid)
        tensor = self.node("DequantizeLinear", [planes, *self.constants(PIXELS, "pixels")], "pixels")
        if pixels is not PIXELS:
            tensor = self.rounded(tensor, pixels, "fine_pixels")
        weights, bias = _weights(image, self.plan.shape[1], grid)
        taken = [tensor, self._by_channel(weights, "weight"), self._by_channel(bias, "bias")]
        return self.node("Conv", taken, "normalized", kernel_shape=[1, 1])

    def _by_channel(self, given: _ByChannel, name: str) -> str:
        zeros = np.zeros(len(given.scales), given.integers.dtype)
        parts = {"q": given.integers, "scale": given.scales, "zero_point": zeros}
        taken = [self.constant(array, f"{name}_{part}") for part, array in parts.items()]
        return self.node("DequantizeLinear", taken, name, axis=0)


class _ByChannel(NamedTuple):
    """Integers with one scale for each output channel."""

    integers: np.ndarray
    scales: np.ndarray


def _is_its_own_grid(image: ImageInput, channels: int, grid: Grid) -> bool:
    """Return whether a host rounds each pixel to the integer that it is."""
    return bool(not image.reverses and (_on_a_host(image, channels, grid) == _EVERY).all())


def _on_a_host(image: ImageInput, channels: int, grid: Grid) -> np.ndarray:
    """Return what a host rounds each pixel to, (channels, 256), by the channels of the network."""
    plain = replace(image, layout="nchw", color=image.trained_on)
    return grid.integers(normalized(np.broadcast_to(_EVERY, (1, channels, 1, 256)), plain))[0, :, 0]


def _pixel_grid(grid: Grid) -> Grid:
    """Return the grid on which pixels are normalized: the NPU convolves with as many bits as it puts out."""
    return PIXELS if grid.zero_point.dtype.itemsize == 1 else _FINE_PIXELS


def _weights(image: ImageInput, channels: int, grid: Grid) -> tuple[_ByChannel, _ByChannel]:
    """Return weights and bias of the convolution that normalizes.

    The bias is a whole number of steps, about a hundredth of the input's. Scale and bias are searched next to the true
    ones so that as many of the 256 pixels as possible, mostly all, are rounded as a host rounds them.
    """
    mean, std = (np.asarray(one, np.float32) for one in image.of_channels(channels))
    weights = np.zeros((channels, channels, 1, 1), np.int8)
    weights[range(channels), range(channels)[::-1] if image.reverses else range(channels)] = _HIGHEST
    found = [_affine(*one, grid) for one in zip(mean, std, _on_a_host(image, channels, grid), strict=True)]
    scales = np.array([scale for scale, _ in found], np.float32)
    of_bias = (scales * np.float32(_pixel_grid(grid).scale)).astype(np.float32)
    return _ByChannel(weights, scales), _ByChannel(np.array([bias for _, bias in found], np.int32), of_bias)


def _affine(mean: np.float32, std: np.float32, wanted: np.ndarray, grid: Grid) -> tuple[np.float32, int]:
    """Return the scale of a channel's weight and its bias, in whole steps."""
    pixels = _pixel_grid(grid)
    true = np.float32(1 / (std * _HIGHEST))
    scales = (true * (1 + _STRETCHES)).astype(np.float32)
    of_bias = scales * np.float32(pixels.scale)
    steps = np.rint(-mean / std / (true * np.float32(pixels.scale))) + _NUDGES[:, None]
    tensors = _EVERY.astype(np.float32) * np.float32(PIXELS.scale)
    values = tensors * (np.float32(_HIGHEST) * scales)[:, None] + (steps * of_bias).astype(np.float32)[..., None]
    wrong = (grid.integers(values) != wanted).sum(-1)
    nudge, stretch = np.unravel_index(np.argmin(wrong), wrong.shape)  # of several, those next to the true ones
    return scales[stretch], int(steps[nudge, 0])


class _Behind(_Writer):
    """Writes behind an output."""

    def __init__(self, model: onnx.ModelProto, plan: OutputPlan) -> None:
        super().__init__(model, plan.name)
        self.plan = plan
        self.nodes += model.graph.node

    def write(self, edge: OutputEdge, grid: Grid) -> None:
        """Write what the edge asks for, and make it the output."""
        plan, name, shape = self.plan, self.plan.name, list(self.plan.shape)
        tensor = self.free(f"{name}_of_the_network")
        self.rename(name, tensor)
        if edge.resize == "before":
            tensor = self._bilinear(tensor, shape, grid)
        if edge.function == "argmax":
            tensor = self.node("ArgMax", [tensor], "class", axis=plan.axis, keepdims=0)
            del shape[plan.axis]
            self._give_classes(tensor, name, shape)
        elif edge.function == "top_k":
            count = self.constant(np.array([edge.k]), "k")
            tensor = self.node("TopK", [tensor, count], "values", axis=plan.axis)
            classes = self.free(f"{name}_indices")
            self.nodes[-1].output.append(classes)
            shape[plan.axis] = edge.k
            self._give_numbers(self.rounded(tensor, grid, "top"), name, shape, grid)
            self._give_classes(classes, f"{name}_classes", shape)
        else:
            operation = {"softmax": "Softmax", "sigmoid": "Sigmoid"}.get(edge.function)
            if operation is not None:
                how: dict[str, Any] = {"axis": plan.axis} if operation == "Softmax" else {}
                tensor = self.node(operation, [tensor], edge.function, **how)
                grid = plan.function_grid or grid
                tensor = self.rounded(tensor, grid, "probabilities")
            self._give_numbers(tensor, name, shape, grid)
        self.graph.replace_nodes(self.nodes)

    def join(self, module: OwnModule, grid: Grid) -> None:
        """Put a module's graph behind the network, without rounding again what is on the network's grid already."""
        from onnx import compose, helper

        tensor = self.free(f"{self.plan.name}_of_the_network")
        self.rename(self.plan.name, tensor)
        integers = next(node for node in self.nodes if tensor in node.output).input[0]
        own = compose.add_prefix(module.model, self.free(f"{self.plan.name}_module") + "/").graph
        self.model.graph.initializer.extend(own.initializer)
        self.nodes += own.node
        (given,) = own.input
        behind = QdqGraph(self.model)
        for node in own.node:
            if node.op_type == "QuantizeLinear" and node.input[0] == given.name and grid.is_same(grid_of(behind, node)):
                self.nodes.remove(node)
                self.rename(node.output[0], integers)
        self.rename(given.name, tensor)
        declared = []
        for value, name, rounded in zip(own.output, self.plan.names, module.grids, strict=True):
            kind, old = value.type.tensor_type.elem_type, value.name
            if rounded is not None and self.plan.edge is not None and self.plan.edge.quantized:
                kind = helper.np_dtype_to_tensor_dtype(rounded.zero_point.dtype)
                old = next(node for node in self.nodes if old in node.output).input[0]
            self.rename(old, name)
            sizes = [axis.dim_value for axis in value.type.tensor_type.shape.dim]
            declared.append(helper.make_tensor_value_info(name, kind, sizes))
        others = [[one] if one.name != self.plan.name else declared for one in self.model.graph.output]
        values = [copy.deepcopy(one) for ones in others for one in ones]
        del self.model.graph.output[:]
        self.model.graph.output.extend(values)
        self.graph.replace_nodes(self.nodes)

    def _bilinear(self, tensor: str, shape: list[int], grid: Grid) -> str:
        assert self.plan.size is not None
        for axis, length in zip(self.plan.spatial, self.plan.size, strict=True):
            shape[axis] = length
        sizes = self.constant(np.array(shape), "sizes")
        how: dict[str, Any] = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
        return self.rounded(self.node("Resize", [tensor, "", "", sizes], "resize", **how), grid, "resized")

    def _nearest(self, tensor: str, shape: list[int], grid: Grid | None) -> str:
        """Pick rows, then columns, on a grid if there is one: the NPU has no other resize for classes."""
        assert self.plan.size is not None
        for axis, length in zip(resized_axes(self.plan), self.plan.size, strict=True):
            places = self.constant(nearest(shape[axis], length), f"places_{axis}")
            tensor = self.node("Gather", [tensor, places], f"picked_{axis}", axis=axis)
            shape[axis] = length
            if grid is not None:
                tensor = self.rounded(tensor, grid, f"resized_{axis}")
        return tensor

    def _give_classes(self, tensor: str, name: str, shape: list[int]) -> None:
        from onnx import TensorProto, helper

        if self._resizes_after:
            # the NPU picks from 32-bit integers, from smaller ones it does not
            tensor = self.node("Cast", [tensor], "class_32", to=TensorProto.INT32)
            tensor = self._nearest(tensor, shape, None)
        kind = helper.np_dtype_to_tensor_dtype(self.plan.classes_dtype)
        self.node("Cast", [tensor], "cast", output=name, to=kind)
        self._declare(name, kind, shape)

    def _give_numbers(self, tensor: str, name: str, shape: list[int], grid: Grid) -> None:
        from onnx import TensorProto, helper

        if self._resizes_after:
            tensor = self._nearest(tensor, shape, grid)
        if self.plan.edge is not None and self.plan.edge.quantized:
            dequantizer = next(node for node in self.nodes if tensor in node.output)
            if not any(tensor in node.input for node in self.nodes):
                self.nodes.remove(dequantizer)
            self.rename(dequantizer.input[0], name)
            self._declare(name, helper.np_dtype_to_tensor_dtype(grid.zero_point.dtype), shape)
        else:
            self.rename(tensor, name)
            self._declare(name, TensorProto.FLOAT, shape)

    @property
    def _resizes_after(self) -> bool:
        return self.plan.edge is not None and self.plan.edge.resize == "after"

    def _declare(self, name: str, kind: int, shape: Sequence[int]) -> None:
        """Give an output its type and size, or add one."""
        from onnx import helper

        value = helper.make_tensor_value_info(name, kind, shape)
        old = next((one for one in self.model.graph.output if one.name == name), None)
        if old is None:
            self.model.graph.output.append(value)
        else:
            old.CopyFrom(value)
