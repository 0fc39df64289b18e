"""The process that holds the NPU's compiler and emulator. Not to be imported: :mod:`.target` starts it.

Every way in which the emulator silently computes on the CPU instead, or for another chip, is an error here.
"""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np

from lightning_quant.deploy.socs import QNN_SOC_IDS
from lightning_quant.deploy.targets.htp.job import Compiled, Graph, Job, Results
from lightning_quant.deploy.targets.worker import serve
from lightning_quant.errors import DeviceError, DeviceFallbackError

_PROVIDER = "QNNExecutionProvider"
# Types of tensors in the QNN graph (QnnTypes.h): 32- and 16-bit float.
_FLOAT = {562, 534}
# The host converts between float and integers at the graph's ends, as an app does: no layers that fell back.
_ENDS = ("consume a graph input", "generate a graph output")


def work(job: Job, folder: Path) -> Results:
    """Compile, check that it was compiled as asked, compute the samples."""
    memory = job.memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    devices = _devices()
    shared = len(job.graphs) > 1
    alone = [_bytes_alone(graph, job.soc, devices, folder) if shared else 0 for graph in job.graphs]
    sessions = []
    for index, graph in enumerate(job.graphs):  # all before the first is run: the last one writes the binary
        # of weights that are shared between sessions each is in the file once
        entries = {"ep.share_ep_contexts": "1"} if shared else {}
        if shared and index + 1 == len(job.graphs):
            entries["ep.stop_share_ep_contexts"] = "1"
        started = time.perf_counter()
        session = _session(graph, job.soc, devices, folder, folder / f"traces{index}", entries)
        sessions.append((session, time.perf_counter() - started, _checked(graph, job.soc, session, folder)))
    binary = next(folder.glob("*.bin"))
    compiled = []
    for index, (graph, (session, seconds, version)) in enumerate(zip(job.graphs, sessions, strict=True)):
        started = time.perf_counter()
        _compute(graph, session, folder)
        npu, fallen_back = _placement(folder / f"traces{index}")
        compiled.append(
            Compiled(
                npu=npu,
                fallen_back=fallen_back,
                float_islands=_float_islands(folder / f"traces{index}"),
                binary=binary.name,
                alone_bytes=alone[index] or binary.stat().st_size,
                qairt=version,
                seconds={"compile": round(seconds, 2), "emulate": round(time.perf_counter() - started, 2)},
            )
        )
    return Results(compiled)


def _bytes_alone(graph: Graph, soc: str, devices: list[Any], folder: Path) -> int:
    """Return how large the binary of one graph is that shares nothing."""
    place = folder / f"alone{graph.name}"
    place.mkdir()
    _session(graph, soc, devices, place, place, {})
    return sum(file.stat().st_size for file in place.glob("*.bin"))


def _checked(graph: Graph, soc: str, session: Any, folder: Path) -> str:
    """Refuse what was not compiled for the NPU of the chip; return the version of the compiler."""
    assigned: dict[str, int] = {}
    for part in session.get_provider_graph_assignment_info():
        assigned[part.ep_name] = assigned.get(part.ep_name, 0) + len(part.get_nodes())
    if not assigned.get(_PROVIDER):
        raise DeviceFallbackError(
            f"No layer of {Path(graph.model).name} was compiled for the NPU of {soc}: the emulator fell back "
            "to the CPU for all of it, which its session does not report. Expected a network with fixed shapes and "
            "quantized layers."
        )
    version, number = _compatibility(folder / graph.context)
    if number != QNN_SOC_IDS.get(soc):
        raise DeviceError(
            f"The network was compiled for chip number {number}, expected {QNN_SOC_IDS.get(soc)} "
            f"({soc}): the installed compiler does not know this chip. Choose another device or install a newer "
            "onnxruntime-qnn."
        )
    return version


def _compute(graph: Graph, session: Any, folder: Path) -> None:
    names = [value.name for value in session.get_outputs()]
    wanted = {value.name for value in session.get_inputs()}
    for sample in range(graph.samples):
        with np.load(folder / f"input-{graph.name}{sample}.npz") as file:
            feeds = {name: file[name] for name in file.files if name in wanted}
        try:
            outputs = session.run(None, feeds)
        except Exception as error:  # of classes of the library's own
            raise DeviceError(
                f"The NPU's emulator failed in sample {sample}: {type(error).__name__}: {error}"
            ) from error
        np.savez(folder / f"output-{graph.name}{sample}.npz", **dict(zip(names, outputs, strict=True)))


def _devices() -> list[Any]:
    import onnxruntime
    import onnxruntime_qnn

    name = onnxruntime_qnn.get_ep_name()
    onnxruntime.register_execution_provider_library(name, onnxruntime_qnn.get_library_path())
    return [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]


def _session(graph: Graph, soc: str, devices: list[Any], folder: Path, traces: Path, further: dict[str, str]) -> Any:
    import onnxruntime
    import onnxruntime_qnn

    traces.mkdir(exist_ok=True)
    options = onnxruntime.SessionOptions()
    entries = {
        "session.record_ep_graph_assignment_info": "1",
        # Else it makes one rounding of two, to a grid of neither, and the layer before it is computed in float.
        "session.disable_double_qdq_remover": "1",
        "ep.context_enable": "1",
        "ep.context_file_path": str(folder / graph.context),
        "ep.context_embed_mode": "0",
        **further,
    }
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    provider = {
        "backend_path": onnxruntime_qnn.get_qnn_htp_path(),
        "soc_model": soc,
        "enable_framework_op_trace": "1",
        "framework_op_trace_dir": str(traces),
        "dump_json_qnn_graph": "1",
        "json_qnn_graph_dir": str(traces),
    }
    options.add_provider_for_devices(devices, provider)
    try:
        session = onnxruntime.InferenceSession(graph.model, sess_options=options)
    except Exception as error:  # the library raises classes of its own, one for each status code
        raise DeviceError(f"The NPU's compiler refused the network: {type(error).__name__}: {error}") from error
    session.disable_fallback()  # else after an error ONNX Runtime continues on the CPU, silently
    return session


def _compatibility(context: Path) -> tuple[str, int | None]:
    """Return the version of the SDK and the number of the chip that a compiled model names."""
    import onnx

    if not context.is_file():
        return "", None
    properties = {entry.key: entry.value for entry in onnx.load(context, load_external_data=False).metadata_props}
    # v2:6:2.51.0:5.51.0:<arch>:<chip>:0:0
    fields = properties.get(f"ep_compatibility_info.{_PROVIDER}", "").split(":")
    return (fields[2], int(fields[5])) if len(fields) > 5 else ("", None)


def _placement(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Return the layers that were compiled for the NPU, and those that were not with the reasons."""
    trace = json.loads((folder / "qnn_op_trace.json").read_text())
    npu = [op["dst_name"] for part in trace["subgraph_traces"] for op in part["op_mappings"]]
    fallen_back = {
        node["node_name"]: node["reason"]
        for node in trace["unsupported_nodes"]
        if not any(end in node["reason"] for end in _ENDS)
    }
    return npu, fallen_back


def _float_islands(folder: Path) -> list[str]:
    """Return the layers of the compiled graph that output float; the conversions around them are not named."""
    islands = []
    for file in sorted(folder.glob(f"{_PROVIDER}*.json")):
        if file.name.endswith("_tensor_log.json"):
            continue
        graph = json.loads(file.read_text())["graph"]
        for name, node in graph["nodes"].items():
            kinds = {graph["tensors"][output]["data_type"] for output in node["output_names"]}
            if kinds & _FLOAT and node["type"] != "Dequantize":
                islands.append(name)
    return islands


if __name__ == "__main__":
    serve(work, Job)
