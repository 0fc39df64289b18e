"""Real runs of a small network, and faults planted in what they leave."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

import lightning_quant as lq
from lightning_quant.deploy.bundle import Bundle
from lightning_quant.deploy.compare.bounds import UNITS, Part
from lightning_quant.deploy.device_report import DeviceReport
from lightning_quant.deploy.graph.qdq import QdqGraph, exact_session
from lightning_quant.deploy.manifest import BundleManifest
from lightning_quant.deploy.targets.target import Measured
from lightning_quant.report.record import RunRecord
from lightning_quant.utilities.hashing import file_sha256
from tests.helpers.small import SmallModule, small_data, small_loader
from tests.helpers.trainers import quiet_trainer

# A bound on everything, so that whatever else changes is noticed.
STRICT: dict[str, str] = {
    **{part.value: "unchanged" for part in Part if "unchanged" in [unit.value for unit in UNITS[part]]},
    **{"metric": "-0.5 pt", "class": "-2 pt", "psnr": "-3 dB", "parity": "-10 dB", "agreement": "-1 pt"},
    **{"latency": "+10 %", "memory": "+10 %", "size": "+2 %"},
    **{"layers_cpu": "0", "layers_float": "0", "parameters_lost": "0"},
}
DEVICE = "a desk"


class Desk(lq.Target):
    """This machine's CPU, timed, with the layers and the memory that a phone's report has."""

    name = "desk"

    def run(self, bundle: Bundle, inputs: list[dict[str, np.ndarray]], folder: Path) -> list[Measured]:
        """Compute all samples, and one of them a thousand times more."""
        session = exact_session(bundle.qdq)
        names = bundle.manifest.output_names
        outputs = [dict(zip(names, session.run(None, sample), strict=True)) for sample in inputs]
        report = DeviceReport(self.name, DEVICE, bundle.manifest.precision, versions={"QAIRT": "2.51.0"})
        for _ in range(50):  # the best of some: other processes take turns on this machine
            report.latency_us.append(min(_microseconds(session, inputs[0]) for _ in range(20)))
        report.memory_bytes = [2**20, 2**24]
        report.layers = {"NPU": ["/stem/Conv", "/head/Gemm"], "GPU": [], "CPU": []}
        report.float_islands, report.fallen_back = [], {}
        report.bytes = {"compiled": 10_000}
        return [Measured(report, outputs, folder)]


def _microseconds(session: Any, sample: dict[str, np.ndarray]) -> int:
    start = time.perf_counter_ns()
    session.run(None, sample)
    return (time.perf_counter_ns() - start) // 1000 + 1


def run(folder: Path, **quantization: Any) -> Path:
    """Quantize the small network in a Trainer of its own, export it and run it; return the folder of the bundle."""
    arguments = {"precision": "w8a8", "max_drop": 10.0, "monitor": "val_loss", "mode": "min", "rungs": ("ptq",)}
    callback = lq.QuantizationAwareTraining(**{**arguments, **quantization})
    export = lq.DeviceExport(folder, target=Desk(), name="net", samples=4)
    trainer = quiet_trainer(folder.parent, callback, export, max_epochs=1)
    trainer.fit(SmallModule(), small_loader(), small_loader(small_data(16, seed=2)))
    edit_record(
        folder / "net", lambda record: replace(record, class_figures={"ptq": {"IoU": {"road": 0.9, "pole": 0.4}}})
    )
    return folder / "net"


def copied(bundle: Path, folder: Path) -> Path:
    """Copy a bundle with all that lies beside it."""
    shutil.copytree(bundle.parent, folder)
    return folder / bundle.name


def edit_record(bundle: Path, edit: Callable[[RunRecord], RunRecord]) -> None:
    folder = bundle.with_name("net.report")
    edit(RunRecord.read(folder / "results.json")).write(folder)


def edit_device(bundle: Path, **values: Any) -> None:
    """Change what the device reported."""

    def edit(record: RunRecord) -> RunRecord:
        return replace(record, device=[replace(record.device[0], **values)])

    edit_record(bundle, edit)


def edit_manifest(bundle: Path, **values: Any) -> None:
    """Change the manifest, and let it and the record stand for the files as they are."""
    path = bundle / "manifest.json"
    given = json.loads(path.read_text())
    for name, entry in given["files"].items():
        entry |= {"sha256": file_sha256(bundle / name), "bytes": (bundle / name).stat().st_size}
    given["bytes"]["quantized"] = (bundle / "net.onnx").stat().st_size
    path.write_text(json.dumps({**given, **values}))
    manifest = BundleManifest.from_dict(json.loads(path.read_text()))
    edit_record(
        bundle,
        lambda record: replace(record, export=manifest.files_sha256, bytes=manifest.bytes, parity=manifest.parity),
    )


def edit_graph(bundle: Path, edit: Callable[[QdqGraph], None], file: str = "net.onnx") -> None:
    """Change one of the ONNX files of a bundle."""
    model = onnx.load(bundle / file)
    edit(QdqGraph(model))
    onnx.save(model, bundle / file)
    edit_manifest(bundle)


def edit_encoding(bundle: Path, tensor: str, **values: Any) -> None:
    """Change AIMET's encoding of one tensor."""
    path = bundle / "net.aimet/model.encodings"
    given = json.loads(path.read_text())
    for part in ("activation_encodings", "param_encodings"):
        for entry in given[part]:
            if entry["name"] == tensor:
                entry |= values
    path.write_text(json.dumps(given))
    edit_manifest(bundle)


def without_bias(graph: QdqGraph) -> None:
    """Let the first convolution add nothing."""
    node = next(one for one in graph.model.graph.node if one.op_type == "Conv")
    del node.input[2:]


def zero(name: str) -> Callable[[QdqGraph], None]:
    """Set all values of a constant to 0."""
    return lambda graph: graph.write(name, np.zeros_like(graph.array(name)))


def scaled(name: str) -> Callable[[QdqGraph], None]:
    """Make a grid 5 % coarser."""
    return lambda graph: graph.write(name, graph.array(name) * np.float32(1.05))


def one_more(name: str) -> Callable[[QdqGraph], None]:
    """Add 1 to the first value of a constant."""

    def edit(graph: QdqGraph) -> None:
        array = graph.array(name).copy()
        array.flat[0] = array.flat[0].item() + (1 if array.flat[0] < 100 else -1)
        graph.write(name, array)

    return edit


def padded(graph: QdqGraph) -> None:
    """Let the first convolution pad on other sides."""
    node = next(one for one in graph.model.graph.node if one.op_type == "Conv")
    pads = next(one for one in node.attribute if one.name == "pads")
    pads.ints[:] = [2, 1, 0, 1]


def larger(graph: QdqGraph) -> None:
    """Add a constant that nothing takes."""
    graph.model.graph.initializer.append(numpy_helper.from_array(np.zeros(10_000, np.uint8), "unused"))
