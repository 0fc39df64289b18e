"""A target as a user writes one, in a file of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime

import lightning_quant as lq
from lightning_quant.deploy.bundle import Bundle
from lightning_quant.deploy.device_report import DeviceReport
from lightning_quant.deploy.targets.target import Measured


class Board(lq.Target):
    """A board on a desk; here its outputs come from ONNX Runtime, a little off."""

    name = "board"

    def __init__(self, device: str = "a board", port: int = 80, noise: float = 0.0) -> None:
        self.device = device
        self.port = port
        self.noise = noise

    def run(self, bundle: Bundle, inputs: list[dict[str, np.ndarray]], folder: Path) -> list[Measured]:
        """Return the outputs and a report."""
        session = onnxruntime.InferenceSession(str(bundle.qdq), providers=["CPUExecutionProvider"])
        names = bundle.manifest.output_names
        outputs = [
            {name: value + self.noise for name, value in zip(names, session.run(None, sample), strict=True)}
            for sample in inputs
        ]
        report = DeviceReport(self.name, f"{self.device} at {self.port}", bundle.manifest.precision)
        report.latency_us = [1200, 1100]
        report.statement = "measured on a board on a desk"
        return [Measured(report, outputs, folder)]
