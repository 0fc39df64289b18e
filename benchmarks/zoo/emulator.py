"""The NPU's emulator for a QDQ file of any origin; :mod:`lightning_quant` reaches it by ``DeviceExport``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lightning_quant.deploy.targets.htp.job import Compiled
from lightning_quant.deploy.targets.htp.target import HtpEmulatorTarget

DEVICE = "Samsung Galaxy S24"


def available() -> bool:
    """Whether the emulator is installed here (the extra ``qnn``)."""
    return HtpEmulatorTarget(DEVICE).unavailable() is None


def emulate(
    qdq: Path, samples: list[dict[str, np.ndarray]], folder: Path, timeout: float, device: str = DEVICE
) -> tuple[Compiled, list[dict[str, np.ndarray]]]:
    """Compile a QDQ file and compute samples in a new folder; returns the placement and the outputs by name."""
    folder.mkdir()
    return HtpEmulatorTarget(device, timeout).emulate(qdq, samples, folder)


def placed(npu: list[str], cpu: list[str], islands: list[str]) -> dict[str, Any]:
    """The placement as the record keeps it: counts, and the first names where one should be zero."""
    counts = {"npu": len(npu), "cpu": len(cpu), "islands": len(islands)}
    return {**counts, "cpu_names": cpu[:8], "island_names": islands[:8]}
