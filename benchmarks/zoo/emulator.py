"""The NPU's emulator for a QDQ file of any origin; :mod:`lightning_quant` reaches it by ``DeviceExport``."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from lightning_quant.deploy.targets.htp.job import Compiled, Job
from lightning_quant.deploy.targets.worker import run_worker

SOC = "SM8650"
DEVICE = "Samsung Galaxy S24"


def available() -> bool:
    """Whether the emulator is installed here (the extra ``qnn``)."""
    return importlib.util.find_spec("onnxruntime_qnn") is not None


def emulate(
    qdq: Path, samples: list[dict[str, np.ndarray]], folder: Path, timeout: float, soc: str = SOC
) -> tuple[Compiled, Any]:
    """Compile a QDQ file and compute samples; returns the placement and the outputs by name, sample by sample."""
    folder.mkdir()
    for index, sample in enumerate(samples):
        np.savez(folder / f"input-{index}.npz", **sample)  # type: ignore[arg-type]
    job = Job(str(qdq), soc, len(samples), memory_bytes=int(16e9))
    placement = run_worker("lightning_quant.deploy.targets.htp.worker", job, folder, timeout, Compiled)
    outputs = []
    for index in range(len(samples)):
        with np.load(folder / f"output-{index}.npz") as file:
            outputs.append({name: file[name] for name in file.files})
    return placement, outputs


def placed(npu: list[str], cpu: list[str], islands: list[str]) -> dict[str, Any]:
    """The placement as the record keeps it: counts, and the first names where one should be zero."""
    counts = {"npu": len(npu), "cpu": len(cpu), "islands": len(islands)}
    return {**counts, "cpu_names": cpu[:8], "island_names": islands[:8]}
