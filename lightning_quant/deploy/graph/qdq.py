"""A graph of QuantizeLinear and DequantizeLinear, looked up by name."""

from __future__ import annotations

import copy
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_quant.errors import ExportError
from lightning_quant.simulation import aimet

if TYPE_CHECKING:
    import onnx


# Operations that output the values of their first input as they are, in another order or form.
_HANDS_ON = (
    "DepthToSpace",
    "Expand",
    "Flatten",
    "Gather",
    "Identity",
    "Reshape",
    "Slice",
    "SpaceToDepth",
    "Split",
    "Squeeze",
    "Tile",
    "Transpose",
    "Unsqueeze",
)


class QdqGraph:
    """The nodes and constants of an ONNX model by the names of tensors; what it adds goes into the model.

    Args:
        model: changed in place.

    Attributes:
        producers: the node that puts a tensor out.
        consumers: the nodes that take a tensor in.
        constants: initializers by name.
        outputs: names of the graph's outputs.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.producers: dict[str, onnx.NodeProto] = {}
        self.consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        self.constants: dict[str, onnx.TensorProto] = {one.name: one for one in model.graph.initializer}
        self.outputs = {value.name for value in model.graph.output}
        for node in model.graph.node:
            for name in node.output:
                self.producers[name] = node
            for name in dict.fromkeys(node.input):
                self.consumers[name].append(node)

    def array(self, name: str) -> np.ndarray:
        """Return the values of an initializer."""
        from onnx import numpy_helper

        return numpy_helper.to_array(self.constants[name])

    def known(self, name: str) -> np.ndarray | None:
        """Return the values of a constant, an initializer's or a Constant's; ``None`` for others."""
        from onnx import numpy_helper

        node = self.producers.get(name)
        if name in self.constants:
            return self.array(name)
        if node is not None and node.op_type == "Constant" and node.attribute[0].name == "value":
            return numpy_helper.to_array(node.attribute[0].t)
        return None

    def number(self, name: str) -> float | None:
        """Return the value of a constant that is a single number; ``None`` for others."""
        array = self.known(name)
        return float(array.item()) if array is not None and array.size == 1 else None

    def add(self, name: str, array: np.ndarray) -> str:
        """Add an initializer and return its name: ``name``, or that with a number where it is taken."""
        from onnx import numpy_helper

        free = self.free(name)
        self.model.graph.initializer.append(numpy_helper.from_array(array, free))
        self.constants[free] = self.model.graph.initializer[-1]
        return free

    def replace_nodes(self, nodes: list[onnx.NodeProto]) -> None:
        """Give the model other nodes, some of them its own; what nothing uses any more is removed."""
        copies = [copy.deepcopy(node) for node in nodes]
        del self.model.graph.node[:]
        self.model.graph.node.extend(copies)
        aimet._remove_dangling_nodes_and_initializers(self.model)

    def write(self, name: str, array: np.ndarray) -> None:
        """Give an initializer other values, of any shape."""
        from onnx import numpy_helper

        self.constants[name].CopyFrom(numpy_helper.from_array(array, name))

    def copy_constant(self, name: str, as_name: str) -> str:
        """Add a copy of an initializer and return its name: ``as_name``, or that with a number where it is taken."""
        twin = copy.deepcopy(self.constants[name])
        twin.name = self.free(as_name)
        self.model.graph.initializer.append(twin)
        self.constants[twin.name] = self.model.graph.initializer[-1]
        return twin.name

    def free(self, name: str) -> str:
        """Return ``name``, or that with a number appended if a tensor of that name is there already."""
        candidate, number = name, 0
        while candidate in self.constants or candidate in self.producers or candidate in self.consumers:
            candidate, number = f"{name}_{number}", number + 1
        return candidate

    def source(self, name: str) -> onnx.NodeProto | None:
        """Return the node that computes the values of a tensor, before those that only hand them on."""
        node = self.producers.get(name)
        while node is not None and hands_on(node):
            node = self.producers.get(node.input[0])
        return node


def exact_session(model: Path | onnx.ModelProto) -> Any:
    """Return an ONNX Runtime session on the host's CPU that computes every node as it is written.

    Raises:
        ExportError: with the reason, when ONNX Runtime does not load it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # The optimized integer kernels saturate on CPUs without VNNI (57 → 35 dB).
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of a class of its own for each cause
        raise written_wrongly("load", error) from error


def written_wrongly(verb: str, error: Exception) -> ExportError:
    """Return what to raise where ONNX Runtime does not ``"load"`` or ``"run"`` a graph."""
    said = str(error).strip().splitlines()[0]
    return ExportError(
        f"ONNX Runtime does not {verb} the graph that was written: {type(error).__name__}: {said} Expected operations "
        "that PyTorch's exporter and AIMET write correctly. Please report it with the network; until then, quantize "
        "the part without that operation (network='model.backbone')."
    )


def hands_on(node: onnx.NodeProto) -> bool:
    """Return whether a node outputs the values of its first input as they are."""
    return node.op_type in _HANDS_ON


def of_integers(node: onnx.NodeProto | None) -> bool:
    """Return whether a node turns integers into floats by a scale that it takes as an input."""
    return node is not None and node.op_type == "DequantizeLinear" and len(node.input) > 1


def axis_of(node: onnx.NodeProto, default: int = 1) -> int:
    """Return the axis along which a node works; 1 for a QuantizeLinear or DequantizeLinear that does not say."""
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == "axis"), default)


def sizes_of(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Return the sizes of tensors, constants among them, as far as they are known."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    found = {one.name: list(one.dims) for one in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and all(axis.HasField("dim_value") for axis in tensor.shape.dim):
            found[value.name] = [axis.dim_value for axis in tensor.shape.dim]
    return found
