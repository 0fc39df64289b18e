"""What a test of the stand-in does again and again: images, whole jobs, comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import qai_hub
from numpy.typing import NDArray
from qai_hub import Client

S24 = qai_hub.Device("Samsung Galaxy S24 (Family)")
Array = NDArray[Any]


def images(count: int = 4) -> list[Array]:
    return list(np.random.default_rng(0).normal(size=(count, 1, 3, 8, 8)).astype(np.float32))


def compiled(client: Client, model: Any, options: str = "") -> qai_hub.Model:
    """The target model of a compile job that succeeds."""
    if isinstance(model, Path):
        model = client.upload_model(model)
    job = client.submit_compile_job(model, S24, options=options)
    status = job.wait(20)
    assert status.success, status.message
    return client.get_model(job.get_target_model().model_id)


def failure(job: qai_hub.Job) -> str:
    status = job.wait(20)
    assert status.failure
    return str(status.message)


def outputs(client: Client, target: qai_hub.Model, inputs: Any) -> dict[str, list[Array]]:
    return client.submit_inference_job(target, S24, inputs=inputs).download_output_data()


def real_numbers(target: qai_hub.Model, computed: dict[str, list[Array]]) -> Array:
    """All samples of the only output, dequantized with what the client tells."""
    ((spec,),) = target.output_spec.values()
    values = np.concatenate(computed[spec.name])
    assert values.dtype == spec.dtype
    if spec.scale is None:
        return values
    return (values.astype(np.float64) - spec.zero_point) * spec.scale


def onnxruntime_outputs(file: Path, inputs: list[Array]) -> Array:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"x": value})[0] for value in inputs])


def psnr(reference: Array, values: Array) -> float:
    noise = max(float(np.sqrt(np.mean((reference.astype(np.float64) - values) ** 2))), 1e-9)
    return 20 * float(np.log10(np.abs(reference).max() / noise))
