"""The host's CPU: computes what the device should, for checking; says nothing about a phone's speed."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from typing_extensions import override

from lightning_quant.deploy.bundle import Bundle
from lightning_quant.deploy.device_report import DeviceReport
from lightning_quant.deploy.graph.qdq import exact_session
from lightning_quant.deploy.samples import Tensors
from lightning_quant.deploy.targets.target import Measured, Target
from lightning_quant.errors import DeviceError


class OnnxRuntimeTarget(Target):
    """Run the QDQ file in ONNX Runtime, every node as it is written."""

    name = "onnxruntime"

    @override
    def run(self, bundle: Bundle, inputs: list[Tensors], folder: Path) -> list[Measured]:
        try:
            return [Measured(self._report(bundle), _computed(bundle, inputs), folder)]
        except Exception as error:  # the library raises classes of its own, one for each status code
            raise DeviceError(
                f"ONNX Runtime cannot compute {bundle.device_file}: {type(error).__name__}: {error} Expected the file "
                "and the samples of one export. Export it again."
            ) from error

    def _report(self, bundle: Bundle) -> DeviceReport:
        return DeviceReport(
            tier=self.name,
            device="host CPU",
            precision=bundle.manifest.precision,
            versions={"onnxruntime": importlib.metadata.version("onnxruntime")},
        )


def _computed(bundle: Bundle, inputs: list[Tensors]) -> list[Tensors]:
    session = exact_session(bundle.device_file)
    names = [value.name for value in session.get_outputs()]
    wanted = {value.name for value in session.get_inputs()}
    outputs = []
    for tensors in inputs:
        feeds = {name: value for name, value in tensors.items() if name in wanted}
        outputs.append(dict(zip(names, session.run(None, feeds), strict=True)))
    return outputs
