"""What the stand-in's compiler makes of an upload: the same graph with the encodings written into it.

Of an AIMET bundle the weights are rounded to their grids and a quantize-dequantize pair is put behind every tensor
with an activation encoding; a graph that has such pairs already stays as it is.
"""

from __future__ import annotations

import io
import json
import shlex
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from qai_hub import public_api_pb2 as pb

from tests.aihub.runner import Interface, JobFailure, Tensor, pack, session

AIMET, ONNX = pb.MODEL_TYPE_AIMET_ONNX, pb.MODEL_TYPE_ONNX


@dataclass(frozen=True)
class Runtime:
    """What ``--target_runtime`` asks for: the type of the target model, its file name's end, the device attribute."""

    model_type: pb.ModelType.ValueType
    suffix: str
    framework: str


RUNTIMES = {
    "qnn_dlc": Runtime(pb.MODEL_TYPE_QNN_DLC, ".dlc", "framework:qnn"),
    "qnn_context_binary": Runtime(pb.MODEL_TYPE_QNN_CONTEXT_BINARY, ".bin", "framework:qnn"),
    "tflite": Runtime(pb.MODEL_TYPE_TFLITE, ".tflite", "framework:tflite"),
    "onnx": Runtime(pb.MODEL_TYPE_ONNX, ".onnx.zip", "framework:onnx"),
    "precompiled_qnn_onnx": Runtime(pb.MODEL_TYPE_ONNX, ".onnx.zip", "framework:onnx"),
}
_FLAGS = {"quantize_io", "truncate_64bit_io", "truncate_64bit_tensors"}
_VALUED = {
    "compute_unit", "force_channel_last_input", "force_channel_last_output", "output_names", "qairt_version",
    "qnn_context_binary_optimization_level", "qnn_context_binary_vtcm", "qnn_graph_name", "qnn_options",
    "quantize_full_type", "quantize_io_type", "quantize_weight_type", "target_runtime",
}  # fmt: skip


@dataclass(frozen=True)
class CompileOptions:
    """The options of a compile job that change what its target model looks like; the others are only checked."""

    target_runtime: str = "qnn_dlc"
    output_names: tuple[str, ...] = ()
    channel_last: frozenset[str] = frozenset()
    quantize_io: bool = False
    quantize_io_type: str = ""
    graph_name: str = ""

    @property
    def runtime(self) -> Runtime:
        return RUNTIMES[self.target_runtime]

    @classmethod
    def parse(cls, text: str) -> CompileOptions:
        """Read ``--name value`` options.

        Raises:
            ValueError: for an option that AI Hub does not have, and for one whose value is missing or wrong.
        """
        found: dict[str, str] = {}
        words = shlex.split(text)
        while words:
            word = words.pop(0)
            name = word.removeprefix("--")
            if not word.startswith("--") or name not in _FLAGS | _VALUED:
                raise ValueError(f"Unrecognized compile option '{word}'.")
            if name in _VALUED and (not words or words[0].startswith("--")):
                raise ValueError(f"Compile option '{word}' needs a value.")
            found[name] = words.pop(0) if name in _VALUED else ""
        runtime, io_type = found.get("target_runtime", cls.target_runtime), found.get("quantize_io_type", "")
        if runtime not in RUNTIMES:
            raise ValueError(f"Unknown target runtime '{runtime}'. Choose one of {', '.join(RUNTIMES)}.")
        if io_type not in ("", "int8", "uint8", "int16", "uint16"):
            raise ValueError(f"Unknown type '{io_type}' for --quantize_io_type.")
        last = [found.get(f"force_channel_last_{side}", "") for side in ("input", "output")]
        return cls(
            target_runtime=runtime,
            output_names=tuple(filter(None, found.get("output_names", "").split(","))),
            channel_last=frozenset(filter(None, ",".join(last).split(","))),
            quantize_io="quantize_io" in found,
            quantize_io_type=io_type,
            graph_name=found.get("qnn_graph_name", ""),
        )


# --- the uploaded model ---


@dataclass(frozen=True)
class Encoding:
    """How a tensor is quantized: ``value = scale · (q − zero_point)`` with ``q`` in ``0 … 2^bits − 1``."""

    bits: int
    scale: NDArray[Any]
    zero_point: NDArray[Any]

    @classmethod
    def from_aimet(cls, entry: Mapping[str, Any]) -> Encoding:
        """Read an entry of AIMET's encodings file 1.0.0, whose offset is the negative zero point."""
        scale, offset = np.float32(entry["scale"]), np.int64(entry["offset"])
        return cls(int(entry["bw"]), np.atleast_1d(scale), -np.atleast_1d(offset))

    def fake_quantize(self, values: NDArray[Any], axis: int) -> NDArray[Any]:
        """Round values to the grid, each slice along ``axis`` to its own if there are several."""
        shape = [1] * values.ndim
        if self.scale.size > 1:
            shape[axis] = self.scale.size
        scale, zero_point = self.scale.reshape(shape), self.zero_point.reshape(shape)
        steps = np.clip(np.rint(values / scale) + zero_point, 0, 2**self.bits - 1)
        return ((steps - zero_point) * scale).astype(np.float32)


@dataclass
class Source:
    """An uploaded model, opened.

    Args:
        model: the graph.
        activations, parameters: encodings by tensor.
    """

    model: onnx.ModelProto
    activations: dict[str, Encoding] = field(default_factory=dict)
    parameters: dict[str, Encoding] = field(default_factory=dict)


def open_source(upload: bytes, model_type: int, is_directory: bool) -> Source:
    """Open an ONNX model or an AIMET bundle.

    Raises:
        JobFailure: if it is neither, or is broken.
    """
    if not is_directory:
        if model_type != ONNX:
            raise JobFailure("Expected an ONNX model or an AIMET model (a directory with .onnx and .encodings).")
        return Source(_load_onnx(upload, {}))
    files = _directory(upload)
    graphs, encodings, data = (
        [name for name in files if name.endswith(end)] for end in (".onnx", ".encodings", ".data")
    )
    wrong = len(graphs) != 1 or len(encodings) > 1 or len(data) > 1 or len(files) != 1 + len(encodings) + len(data)
    if wrong or bool(encodings) != (model_type == AIMET):
        wanted = "one .onnx and one .encodings" if model_type == AIMET else "one .onnx"
        raise JobFailure(f"The model directory must hold {wanted} file; it holds {', '.join(sorted(files)) or 'none'}.")
    source = Source(_load_onnx(files[graphs[0]], {name: files[name] for name in data}))
    return _with_encodings(source, files[encodings[0]]) if encodings else source


def _directory(upload: bytes) -> dict[str, bytes]:
    """Files of a zip with exactly one folder at its top."""
    try:
        with zipfile.ZipFile(io.BytesIO(upload)) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
            contents = {name: archive.read(name) for name in names}
    except (zipfile.BadZipFile, EOFError) as error:
        raise JobFailure(f"The model archive cannot be read: {error}.") from None
    if len({name.split("/")[0] for name in names}) != 1 or any(name.count("/") != 1 for name in names):
        raise JobFailure("The model archive must hold exactly one directory, and files only directly in it.")
    return {name.split("/")[1]: content for name, content in contents.items()}


def _load_onnx(content: bytes, data: Mapping[str, bytes]) -> onnx.ModelProto:
    try:
        model = onnx.load_from_string(content)
        for tensor in model.graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                where = {entry.key: entry.value for entry in tensor.external_data}
                start = int(where.get("offset", 0))
                tensor.raw_data = data[where["location"]][start : start + int(where["length"])]
                tensor.data_location = TensorProto.DEFAULT
                del tensor.external_data[:]
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf's, onnx's and KeyError have nothing in common
        raise JobFailure(
            f"The ONNX model is invalid: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from None
    return model


def _with_encodings(source: Source, content: bytes) -> Source:
    try:
        encodings = json.loads(content)
        version = encodings["version"]
        if version != "1.0.0":
            raise JobFailure(f"Encodings of version {version} are not supported; expected 1.0.0.")
        parts = [
            {e["name"]: Encoding.from_aimet(e) for e in encodings[part] if e["dtype"] == "INT"}
            for part in ("activation_encodings", "param_encodings")
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise JobFailure(f"The encodings file is invalid: {error!r}.") from None
    graph = source.model.graph
    known = {name for node in graph.node for name in (*node.input, *node.output)}
    unknown = sorted({name for part in parts for name in part} - known)
    if unknown:
        raise JobFailure(f"The encodings name tensors that the model does not have: {', '.join(unknown[:3])}.")
    if any(encoding.bits not in (8, 16) or encoding.scale.size != 1 for encoding in parts[0].values()):
        raise JobFailure("Activations can be quantized to 8 or 16 bits with one scale for each tensor.")
    return replace(source, activations=parts[0], parameters=parts[1])


# --- compiling ---


def compile_source(source: Source, options: CompileOptions, shapes: Mapping[str, Sequence[int]], name: str) -> bytes:
    """Make the file that a compile job's target model holds.

    Args:
        source: the opened upload; its graph is changed.
        options: the job's options.
        shapes: shapes of inputs that the job was given; may be empty for a graph with fixed shapes.
        name: name of the target model's file.

    Raises:
        JobFailure: if options and model do not fit.
    """
    graph = source.model.graph
    _fix_shapes(graph, shapes)
    constants = {tensor.name for tensor in graph.initializer}
    fixed = {name: encoding for name, encoding in source.activations.items() if name in constants}
    _quantize_parameters(graph, {**source.parameters, **fixed})
    _quantize_activations(source.model, {n: e for n, e in source.activations.items() if n not in constants})
    encodings = {**_pairs_at_the_border(graph), **source.activations}
    interface = _interface(source.model, encodings, options)
    folder = f"{name.removesuffix('.zip')}/" if options.runtime.suffix.endswith(".zip") else ""
    precompiled = b"context binary" if options.target_runtime == "precompiled_qnn_onnx" else None
    return pack(source.model, interface, folder, precompiled)


def _fix_shapes(graph: onnx.GraphProto, shapes: Mapping[str, Sequence[int]]) -> None:
    inputs = {value.name: value.type.tensor_type.shape.dim for value in graph.input}
    if shapes and set(shapes) != set(inputs):
        raise JobFailure(f"The input specs name {sorted(shapes)}, the model's inputs are {sorted(inputs)}.")
    for name, dims in inputs.items():
        wanted = tuple(shapes.get(name, ())) or tuple(dim.dim_value for dim in dims)
        fits = len(wanted) == len(dims) and all(d.dim_value in (0, w) for d, w in zip(dims, wanted, strict=True))
        if not fits or 0 in wanted:
            raise JobFailure(f"Input '{name}' needs a fixed shape that agrees with the model; got {wanted}.")
        for dim, size in zip(dims, wanted, strict=True):
            dim.dim_value = size


def _quantize_parameters(graph: onnx.GraphProto, encodings: Mapping[str, Encoding]) -> None:
    users = {name: (node, place) for node in graph.node for place, name in enumerate(node.input)}
    tensors: dict[str, TensorProto] = {tensor.name: tensor for tensor in graph.initializer}
    constants = (node for node in graph.node if node.op_type == "Constant" and node.attribute[0].name == "value")
    tensors.update({node.output[0]: node.attribute[0].t for node in constants})
    for name, encoding in encodings.items():
        if name not in tensors:
            raise JobFailure(f"The encodings name the parameter '{name}', which the model computes.")
        values = numpy_helper.to_array(tensors[name])
        axis = _channel_axis(*users[name], values.ndim)
        if encoding.scale.size not in (1, values.shape[axis]):
            raise JobFailure(
                f"Parameter '{name}' of shape {values.shape} has {encoding.scale.size} encodings; expected 1 or one "
                f"for each of its {values.shape[axis]} channels."
            )
        tensors[name].CopyFrom(numpy_helper.from_array(encoding.fake_quantize(values, axis), tensors[name].name))


def _channel_axis(user: onnx.NodeProto, place: int, rank: int) -> int:
    """The axis of a weight along which its output channels lie; encodings 1.0.0 do not tell it."""
    if rank < 2 or place != 1:
        return 0
    if user.op_type == "Gemm":
        return 0 if any(a.name == "transB" and a.i for a in user.attribute) else 1
    return {"ConvTranspose": 1, "MatMul": rank - 1}.get(user.op_type, 0)


def _quantize_activations(model: onnx.ModelProto, encodings: Mapping[str, Encoding]) -> None:
    """Put a quantize-dequantize pair behind every tensor that has an encoding.

    A computed tensor keeps its name behind the pair, so that its users and the graph's outputs need no change. The
    pairs are ONNX Runtime's own operators: they take 16 bits whatever the graph's opset is.
    """
    graph = model.graph
    inputs = {value.name for value in graph.input}
    renamed = {name: f"{name}/dequantized" if name in inputs else f"{name}/computed" for name in encodings}
    nodes: list[onnx.NodeProto] = []
    for name in inputs & set(encodings):
        nodes += _pair(graph, name, renamed[name], encodings[name])
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name in inputs:
                node.input[place] = renamed.get(name, name)
        nodes.append(node)
        for place, name in enumerate(node.output):
            if name in encodings:
                node.output[place] = renamed[name]
                nodes += _pair(graph, renamed[name], name, encodings[name])
    unquantized = len(graph.node)
    graph.node.extend(nodes)
    del graph.node[:unquantized]
    if encodings and "com.microsoft" not in {opset.domain for opset in model.opset_import}:
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def _pair(graph: onnx.GraphProto, source: str, result: str, encoding: Encoding) -> list[onnx.NodeProto]:
    scale, zero_point, steps = (f"{source}/{part}" for part in ("scale", "zero_point", "steps"))
    graph.initializer.extend([
        numpy_helper.from_array(np.float32(encoding.scale[0]), scale),
        numpy_helper.from_array(encoding.zero_point[0].astype(f"uint{encoding.bits}"), zero_point),
    ])  # fmt: skip
    return [
        helper.make_node("QuantizeLinear", [source, scale, zero_point], [steps], domain="com.microsoft"),
        helper.make_node("DequantizeLinear", [steps, scale, zero_point], [result], domain="com.microsoft"),
    ]


def _pairs_at_the_border(graph: onnx.GraphProto) -> dict[str, Encoding]:
    """Encodings of the inputs and outputs of a graph that came with its own quantize-dequantize pairs."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    inputs, outputs = ({value.name for value in side} for side in (graph.input, graph.output))
    found: dict[str, Encoding] = {}
    for node in graph.node:
        at_input = node.op_type == "QuantizeLinear" and node.input[0] in inputs
        at_output = node.op_type == "DequantizeLinear" and node.output[0] in outputs
        if (at_input or at_output) and len(node.input) == 3 and all(name in tensors for name in node.input[1:]):
            scale, zero_point = (numpy_helper.to_array(tensors[name]) for name in node.input[1:])
            bits, signed = zero_point.dtype.itemsize * 8, zero_point.dtype.kind == "i"
            unsigned = zero_point.astype(np.int64) + (2 ** (bits - 1) if signed else 0)
            name = node.input[0] if at_input else node.output[0]
            found[name] = Encoding(bits, np.atleast_1d(scale), np.atleast_1d(unsigned))
    return found


def _interface(model: onnx.ModelProto, encodings: Mapping[str, Encoding], options: CompileOptions) -> Interface:
    """Names, types and layouts that the options ask for; shapes and types of outputs by computing them once."""
    running = session(model)
    zeros = {
        value.name: np.zeros(value.shape, onnx.helper.tensor_dtype_to_np_dtype(graph_input.type.tensor_type.elem_type))
        for value, graph_input in zip(running.get_inputs(), model.graph.input, strict=True)
    }
    try:
        computed = running.run(None, zeros)
    except Exception as error:  # ONNX Runtime's errors share no type
        raise JobFailure(f"The model cannot be computed: {error}") from None
    inner = [value.name for value in running.get_outputs()]
    names = options.output_names or tuple(inner)
    if len(names) != len(inner):
        raise JobFailure(f"--output_names gives {len(names)} names for {len(inner)} outputs.")
    unknown = options.channel_last - set(names) - set(zeros)
    if unknown:
        raise JobFailure(f"--force_channel_last_… names {', '.join(sorted(unknown))}, which the model does not have.")
    inputs = (_tensor(name, name, value, encodings, options) for name, value in zeros.items())
    outputs = (_tensor(*three, encodings, options) for three in zip(names, inner, computed, strict=True))
    return Interface(tuple(inputs), tuple(outputs))


def _tensor(
    name: str, inner: str, value: NDArray[Any], encodings: Mapping[str, Encoding], options: CompileOptions
) -> Tensor:
    channel_last = name in options.channel_last
    if channel_last and value.ndim < 3:
        raise JobFailure(f"'{name}' has {value.ndim} dimensions and thus no channels to put last.")
    tensor = Tensor(name, str(value.dtype), value.shape, inner=inner, channel_last=channel_last)
    tensor = replace(tensor, shape=tensor.from_graph(value).shape)
    encoding = encodings.get(inner)
    if not options.quantize_io or encoding is None or value.dtype != np.float32:
        return tensor
    signed = options.target_runtime == "tflite"
    dtype = options.quantize_io_type or f"{'' if signed else 'u'}int{encoding.bits}"
    if np.dtype(dtype).itemsize * 8 != encoding.bits:
        raise JobFailure(f"--quantize_io_type {dtype} does not fit '{name}', which has {encoding.bits} bits.")
    zero_point = int(encoding.zero_point[0]) - (2 ** (encoding.bits - 1) if dtype.startswith("int") else 0)
    return replace(tensor, dtype=dtype, scale=float(encoding.scale[0]), zero_point=zero_point)
