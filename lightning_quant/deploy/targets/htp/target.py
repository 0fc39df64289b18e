"""The NPU without a phone: the compiler and emulator of Snapdragon's Hexagon NPU, from ``onnxruntime-qnn``.

It compiles the QDQ file for the chip of the named device and computes what the NPU would. Its library is closed, so it
runs in a process of its own (:mod:`~lightning_quant.deploy.targets.htp.worker`) with limits on time and memory. It
knows nothing of latency: none is reported.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from typing_extensions import override

from lightning_quant.deploy.bundle import Bundle
from lightning_quant.deploy.device_report import DeviceReport
from lightning_quant.deploy.samples import Tensors
from lightning_quant.deploy.socs import check_activations, soc_of
from lightning_quant.deploy.targets.htp.job import Compiled, Graph, Job, Results
from lightning_quant.deploy.targets.target import Measured, Target, folder_name
from lightning_quant.deploy.targets.worker import run_worker
from lightning_quant.errors import DeviceError, DeviceTimeoutError
from lightning_quant.recipe import QuantRecipe
from lightning_quant.utilities.parsing import read_arrays

# Emulating takes some 0.3 to 4 s for 3×256×512 numbers: of larger samples fewer are taken.
_MOST_NUMBERS = 8 * 3 * 512 * 1024


class HtpEmulatorTarget(Target):
    """Compiles for a chip and emulates its NPU.

    Args:
        device: name of a phone, or of a chip such as ``"SM8650"``.
        timeout: seconds for compiling and all samples.
        memory_gb: address space the process may use, in 10^9 bytes.

    Raises:
        UnknownDeviceError: for a device whose chip is not known.
    """

    name = "htp_emulator"

    def __init__(self, device: str, timeout: float = 1800.0, memory_gb: float = 16.0) -> None:
        self.device = device
        self.soc = soc_of(device)
        self.timeout = timeout
        self.memory_gb = memory_gb

    @override
    def unavailable(self) -> str | None:
        if sys.platform != "linux" or platform.machine() != "x86_64":
            return f"the NPU emulator exists for Linux on x86_64, not for {sys.platform} on {platform.machine()}"
        if importlib.util.find_spec("onnxruntime_qnn") is None:
            return (
                "the NPU emulator is not installed: pip install 'lightning-quant[qnn]' "
                "(its libraries come under Qualcomm's AI Stack License)"
            )
        return None

    @override
    def check_recipe(self, recipe: QuantRecipe) -> None:
        check_activations(self.device, recipe.int16_activations)

    @override
    def check(self, bundle: Bundle) -> None:
        check_activations(self.device, bundle.manifest.int16_activations)

    @override
    def run(self, bundle: Bundle, inputs: list[Tensors], folder: Path) -> list[Measured]:
        return self.run_sizes([(bundle, inputs)], folder)[0]

    @override
    def run_sizes(self, graphs: Sequence[tuple[Bundle, list[Tensors]]], folder: Path) -> list[list[Measured]]:
        """Compile the sizes of a network into one binary that holds their weights once, and those with edges likewise.

        An app ships the graph with edges, so that one is not in a binary with the network's own.
        """
        folder = folder / folder_name(self.device)
        kinds = [[one for one in graphs if one[0].edged is edged] for edged in (False, True)]
        found = {
            graph.stem: [measured]
            for kind in kinds
            if kind
            for (graph, _), measured in zip(kind, self._run_one_kind(kind, folder), strict=True)
        }
        return [found[graph.stem] for graph, _ in graphs]

    def _run_one_kind(self, graphs: Sequence[tuple[Bundle, list[Tensors]]], folder: Path) -> list[Measured]:
        """Compile all graphs into one binary; each into its own where that fails."""
        try:
            return self._run_together(graphs, _place(folder, graphs[0][0]))
        except DeviceTimeoutError:
            raise
        except DeviceError as error:
            if len(graphs) == 1:
                raise
            reason = str(error)
        found = [one for graph in graphs for one in self._run_together([graph], _place(folder, graph[0]))]
        for measured in found:
            measured.report.warnings.append(f"The sizes share no weights, each was compiled alone: {reason}")
        return found

    def _run_together(self, graphs: Sequence[tuple[Bundle, list[Tensors]]], folder: Path) -> list[Measured]:
        started = time.perf_counter()
        taken = []
        for bundle, inputs in graphs:
            size = sum(value.size for value in inputs[0].values())
            taken.append((bundle.qdq, inputs[: max(1, _MOST_NUMBERS // size)]))
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="lightning-quant-htp-") as scratch:
            work = Path(scratch)
            names = [f".{bundle.manifest.size}" if index else "" for index, (bundle, _) in enumerate(graphs)]
            found = self._emulate(dict(zip(names, taken, strict=True)), work)
            binary = found[0][1].binary
            for file_name in [*(graph.context for graph, _, _ in found), binary]:
                shutil.move(work / file_name, folder / file_name)
        apart = sum(result.alone_bytes for _, result, _ in found)
        measured = []
        for (bundle, _), (graph, result, outputs) in zip(graphs, found, strict=True):
            report = self._report(bundle, result)
            report.seconds["all"] = round(time.perf_counter() - started, 2)
            report.bytes["compiled"] = (folder / binary).stat().st_size
            if len(found) > 1:
                report.bytes |= {"compiled_alone": result.alone_bytes, "compiled_apart": apart}
            place = folder if graph is found[0][0] else folder / bundle.manifest.size
            place.mkdir(exist_ok=True)
            artifacts = {"context": graph.context, "context_binary": binary}
            report.artifacts = {what: os.path.relpath(folder / name, place) for what, name in artifacts.items()}
            measured.append(Measured(report, outputs, place))
        return measured

    def _report(self, bundle: Bundle, result: Compiled) -> DeviceReport:
        on_cpu = result.fallen_back
        report = DeviceReport(
            tier=self.name,
            device=self.device,
            soc=self.soc,
            precision=bundle.manifest.precision,
            runtime="qnn_context_binary",
            versions={name: importlib.metadata.version(name) for name in ("onnxruntime", "onnxruntime-qnn")},
            layers={"NPU": result.npu, "GPU": [], "CPU": list(on_cpu)},
            float_islands=result.float_islands,
            fallen_back=on_cpu,
            seconds=dict(result.seconds),
        )
        report.versions["QAIRT"] = result.qairt
        if on_cpu:
            report.warnings.append(f"{len(on_cpu)} layers are left to the CPU, e.g. {next(iter(on_cpu))}.")
        if result.float_islands:
            report.warnings.append(
                f"{len(result.float_islands)} layers on the NPU compute in float between quantized ones, e.g. "
                f"{result.float_islands[0]}: slower than integers."
            )
        return report

    def emulate(self, model: Path, inputs: Sequence[Tensors], work: Path) -> tuple[Compiled, list[Tensors]]:
        """Compile a QDQ file for the chip, and compute samples as its NPU would.

        Args:
            model: the ONNX file.
            inputs: samples, tensors by the names of the graph's inputs.
            work: an empty folder; what was compiled is left in it.

        Raises:
            DeviceError: when it cannot be compiled or computed.
        """
        ((_, result, outputs),) = self._emulate({"": (model, inputs)}, work)
        return result, outputs

    def _emulate(
        self, models: Mapping[str, tuple[Path, Sequence[Tensors]]], work: Path
    ) -> list[tuple[Graph, Compiled, list[Tensors]]]:
        graphs = [Graph(name, str(model), len(inputs)) for name, (model, inputs) in models.items()]
        for name, (_, inputs) in models.items():
            for index, tensors in enumerate(inputs):
                np.savez(work / f"input-{name}{index}.npz", **tensors)  # type: ignore[arg-type]
        job = Job(graphs, self.soc, int(self.memory_gb * 1e9))
        results = run_worker("lightning_quant.deploy.targets.htp.worker", job, work, self.timeout, Results)
        return [
            (graph, one, [read_arrays(work / f"output-{graph.name}{index}.npz") for index in range(graph.samples)])
            for graph, one in zip(graphs, results.graphs, strict=True)
        ]


def _place(folder: Path, bundle: Bundle) -> Path:
    """Return where the report of a graph goes: that of a further size, in a folder below."""
    return folder / bundle.manifest.size if bundle.stem != bundle.path.name else folder
