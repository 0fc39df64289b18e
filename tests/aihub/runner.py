"""What the stand-in's phone computes: a compiled model in ONNX Runtime.

A compiled model is a zip with one ONNX file, which has its quantization in it as quantize-dequantize pairs; the file's
metadata tells what a program sees of its inputs and outputs: names, types, layouts.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper

Tensors = dict[str, list[NDArray[Any]]]
"""For each tensor's name the values of all samples, as in ``qai_hub.DatasetEntries``."""

_IO = "aihub.io"  # key of the ONNX file's metadata


class JobFailure(Exception):
    """Why a job failed, as its ``failure_reason`` tells."""


@dataclass(frozen=True)
class Tensor:
    """One input or output of a compiled model.

    Args:
        name: its name in the compiled model.
        dtype: name of its numpy type.
        shape: its shape, after a change of layout.
        scale, zero_point: of an integer tensor that stands for real numbers.
        inner: its name in the ONNX graph.
        channel_last: whether axis 1 of the graph's tensor was moved to the end.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    scale: float | None = None
    zero_point: int | None = None
    inner: str = ""
    channel_last: bool = False

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Tensor:
        return cls(**{**values, "shape": tuple(values["shape"])})

    def quantize(self, values: NDArray[Any]) -> NDArray[Any]:
        """Integers of this tensor's type for real numbers; other types pass unchanged."""
        if self.scale is None or self.zero_point is None:
            return values
        limits = np.iinfo(self.dtype)
        steps = np.rint(values / np.float32(self.scale)) + self.zero_point
        return np.clip(steps, limits.min, limits.max).astype(self.dtype)

    def dequantize(self, values: NDArray[Any]) -> NDArray[Any]:
        """The inverse of :meth:`quantize`."""
        if self.scale is None or self.zero_point is None:
            return values
        return (values.astype(np.float32) - np.float32(self.zero_point)) * np.float32(self.scale)

    def to_graph(self, values: NDArray[Any]) -> NDArray[Any]:
        return np.moveaxis(values, -1, 1) if self.channel_last else values

    def from_graph(self, values: NDArray[Any]) -> NDArray[Any]:
        return np.ascontiguousarray(np.moveaxis(values, 1, -1)) if self.channel_last else values


@dataclass(frozen=True)
class Interface:
    """Inputs and outputs of a compiled model, in order."""

    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Interface:
        return cls(*(tuple(map(Tensor.from_json, values.get(side, ()))) for side in ("inputs", "outputs")))


def pack(model: onnx.ModelProto, interface: Interface, folder: str = "", beside: bytes | None = None) -> bytes:
    """Make the file of a compiled model.

    Args:
        model: the graph, quantization included.
        interface: what is to be seen of it.
        folder: where in the archive it lies, with a slash at the end.
        beside: content of a ``model.bin`` in the same folder.
    """
    helper.set_model_props(model, {_IO: json.dumps(interface.to_json())})
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{folder}model.onnx", model.SerializeToString())
        if beside is not None:
            archive.writestr(f"{folder}model.bin", beside)
    return content.getvalue()


def interface(compiled: bytes) -> Interface:
    """Inputs and outputs of a compiled model."""
    return _opened(compiled)[1]


def run(compiled: bytes, samples: Tensors, float_outputs: bool = False) -> Tensors:
    """Outputs of a compiled model, sample by sample.

    Inputs of a quantized type may be given in float too, and are quantized then. Outputs have the type of the
    model's interface, or with ``float_outputs`` are dequantized.

    Raises:
        JobFailure: if names, shapes or types do not fit.
    """
    model, interface = _opened(compiled)
    if set(samples) != {tensor.name for tensor in interface.inputs}:
        expected = ", ".join(tensor.name for tensor in interface.inputs)
        raise JobFailure(f"The dataset holds {', '.join(samples)}; the model's inputs are {expected}.")
    running = session(model)
    outputs: Tensors = {tensor.name: [] for tensor in interface.outputs}
    for index in range(len(next(iter(samples.values()), []))):
        feeds = {tensor.inner: _feed(tensor, samples[tensor.name][index]) for tensor in interface.inputs}
        for tensor, value in zip(interface.outputs, running.run(None, feeds), strict=True):
            steps = tensor.quantize(tensor.from_graph(value))
            outputs[tensor.name].append(tensor.dequantize(steps) if float_outputs else steps)
    return outputs


def linked(graphs: Mapping[str, bytes]) -> bytes:
    """Make one file of compiled models, by the names of their graphs."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, compiled in graphs.items():
            archive.writestr(name, compiled)
    return content.getvalue()


def graph_of(content: bytes, options: str) -> bytes:
    """Return the compiled model in a :func:`linked` file that the options of a job choose.

    Raises:
        JobFailure: if they choose none of its graphs.
    """
    _, _, chosen = options.partition("--qnn_options context_enable_graphs=")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if chosen not in archive.namelist():
            raise JobFailure(f"The model has the graphs {', '.join(archive.namelist())}; '{chosen}' was chosen.")
        return archive.read(chosen)


def random_samples(inputs: Iterable[Tensor]) -> Tensors:
    """What a job without a dataset runs on."""
    generator = np.random.default_rng(0)
    return {t.name: [generator.integers(0, 2, t.shape).astype(t.dtype)] for t in inputs}


def _feed(tensor: Tensor, value: NDArray[Any]) -> NDArray[Any]:
    if value.shape != tensor.shape:
        raise JobFailure(f"Input '{tensor.name}' has shape {value.shape}; the model takes {tensor.shape}.")
    if tensor.scale is not None and value.dtype == np.float32:
        value = tensor.quantize(value)
    if str(value.dtype) != tensor.dtype:
        raise JobFailure(f"Input '{tensor.name}' has type {value.dtype}; the model takes {tensor.dtype}.")
    return tensor.to_graph(tensor.dequantize(value))


def _opened(compiled: bytes) -> tuple[onnx.ModelProto, Interface]:
    try:
        with zipfile.ZipFile(io.BytesIO(compiled)) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".onnx"))
            model = onnx.load_from_string(archive.read(name))
        properties = {entry.key: entry.value for entry in model.metadata_props}
        return model, Interface.from_json(json.loads(properties[_IO]))
    except Exception as error:
        raise JobFailure(f"This is not a model that was compiled here: {error!r}.") from None


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    # fused integer kernels saturate on some CPUs, and compute something else than the encodings say
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise JobFailure(f"The model cannot be loaded: {error}") from None
