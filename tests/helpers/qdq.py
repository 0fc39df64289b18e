"""QDQ graphs made by hand, and what ONNX Runtime and the NPU's emulator make of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from lightning_quant.deploy.blame.file import compare_file
from lightning_quant.deploy.bundle import Bundle
from lightning_quant.deploy.graph.files import write_onnx
from lightning_quant.deploy.graph.qdq import exact_session
from lightning_quant.deploy.manifest import BundleManifest
from lightning_quant.deploy.parity import Parity
from lightning_quant.deploy.targets.htp.target import HtpEmulatorTarget
from lightning_quant.precision import Precision
from lightning_quant.simulation.manifest import Manifest
from lightning_quant.simulation.network import QuantizedNetwork
from tests.helpers.networks import call

NO_EMULATOR = HtpEmulatorTarget("SM8650").unavailable()
# Of a bundle that no network was exported to.
MANIFEST = BundleManifest(
    **Manifest.versions(),
    precision=Precision(8, 8),
    hardware="htp_v75",
    overrides={},
    range_estimator="min_max",
    calibrated=True,
    float_sha256=None,
    equalized=False,
    promoted={},
    inputs=None,
    other_inputs=[],
    name="",
    encodings_version="1.0.0",
    opset={},
    onnx="",
    onnxruntime="",
    input_names=[],
    output_names=[],
    bytes={},
    parity=Parity(math.inf),
    without_encoding={},
    files={},
)


class QdqModel:
    """A graph in the making; each method returns the name of the float tensor that it adds.

    Names are AIMET's: ``a`` is quantized to ``a_q`` by ``a_scale`` and ``a_zero_point``, and dequantized to ``a_qdq``.
    """

    def __init__(self, **inputs: tuple[int, ...]) -> None:
        self.inputs = inputs
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, name: str, array: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def node(self, operation: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operation, inputs, [output], f"/{output}/{operation}", **attributes))
        return output

    def pair(self, tensor: str, scale: float, zero_point: int = 128, name: str = "", output: str = "") -> str:
        """Quantize a tensor to 8 bits and dequantize it."""
        name = name or tensor
        self.constant(f"{name}_scale", np.float32(scale))
        self.constant(f"{name}_zero_point", np.uint8(zero_point))
        grid = [f"{name}_scale", f"{name}_zero_point"]
        self.nodes.append(helper.make_node("QuantizeLinear", [tensor, *grid], [f"{name}_q"], f"{name}_q"))
        self.nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", *grid], [output or f"{name}_qdq"]))
        return output or f"{name}_qdq"

    def integers(self, name: str, values: np.ndarray, scale: Any, axis: int | None = None) -> str:
        """A constant of integers, dequantized."""
        scale = np.asarray(scale, np.float32)
        self.constant(f"{name}_q", values)
        self.constant(f"{name}_scale", scale)
        self.constant(f"{name}_zero_point", np.zeros(scale.shape, values.dtype))
        names = [f"{name}_q", f"{name}_scale", f"{name}_zero_point"]
        attributes = {} if axis is None else {"axis": axis}
        self.nodes.append(helper.make_node("DequantizeLinear", names, [f"{name}_qdq"], f"{name}_dq", **attributes))
        return f"{name}_qdq"

    def model(self, **outputs: tuple[int, ...]) -> onnx.ModelProto:
        infos = [
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in values.items()]
            for values in (self.inputs, outputs)
        ]
        graph = helper.make_graph(self.nodes, "g", *infos, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        return model


def operations(model: onnx.ModelProto, kind: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == kind]


def values(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}


def computed(model: onnx.ModelProto, folder: Path, **inputs: np.ndarray) -> list[np.ndarray]:
    """What ONNX Runtime makes of a graph, node by node."""
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, folder / "computed.onnx")
    return list(exact_session(folder / "computed.onnx").run(None, inputs))


def emulated(model: onnx.ModelProto, folder: Path, **inputs: np.ndarray) -> Any:
    """What the NPU makes of it: the report's placement, and the outputs."""
    folder.mkdir()
    bundle = Bundle(folder, MANIFEST)
    onnx.save(model, bundle.qdq)
    (measured,) = HtpEmulatorTarget("SM8650", timeout=120).run(bundle, [inputs], folder)
    assert measured.outputs is not None
    return measured.report, list(measured.outputs[0].values())


def equal_everywhere(
    known: QuantizedNetwork, given: Tensor, folder: Path, *, npu_db: float, file_db: float = 100, float_db: float = 10
) -> onnx.ModelProto:
    """Compare a network's simulation with both files and the NPU; return the quantized file.

    Args:
        known: calibrated.
        given: a sample.
        folder: for the files, ``float.onnx`` and ``qdq.onnx``.
        npu_db: how close the NPU has to come, all of it in integers.
        file_db: how close the quantized file has to come.
        float_db: how close the other file has to come, which does not round.
    """
    write_onnx(known, call(given), folder / "float.onnx", folder / "qdq.onnx")
    in_float, model = onnx.load(folder / "float.onnx"), onnx.load(folder / "qdq.onnx")
    inputs = {model.graph.input[0].name: given.numpy()}
    with torch.no_grad():
        expected = known(given).numpy()
    assert psnr(expected, computed(model, folder, **inputs)[0]) > file_db
    assert psnr(expected, computed(in_float, folder, **inputs)[0]) > float_db
    names = [one["name"] for one in json.loads((folder / "float.encodings").read_text())["activation_encodings"]]
    assert len(names) == len(set(names))
    assert {*names} <= {one for node in in_float.graph.node for one in (*node.input, *node.output)}
    assert not compare_file(known, model, list(inputs), [call(given)]).guilty
    if NO_EMULATOR is None:
        report, (output,) = emulated(model, folder / "npu", **inputs)
        assert not report.float_islands
        assert not report.layers["CPU"]
        assert psnr(expected, output) > npu_db
    return model


def psnr(expected: np.ndarray, actual: np.ndarray) -> float:
    error = np.sqrt(((expected - actual) ** 2).mean())
    return float("inf") if error == 0 else float(20 * np.log10(np.abs(expected).max() / error))


def tamper(file: Path, factor: float) -> None:
    """Scale the first weight's scale in a QDQ file."""
    model = onnx.load(file)
    for initializer in model.graph.initializer:
        if initializer.data_type == TensorProto.FLOAT and "scale" in initializer.name and initializer.dims:
            array = numpy_helper.to_array(initializer) * np.float32(factor)
            initializer.CopyFrom(numpy_helper.from_array(array, initializer.name))
            onnx.save(model, file)
            return
    raise AssertionError([initializer.name for initializer in model.graph.initializer])
