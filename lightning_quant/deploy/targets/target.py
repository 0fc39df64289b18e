"""What every target does with a bundle, whether it is a phone, an emulator or this machine."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from lightning_quant.deploy.device_report import DeviceReport

if TYPE_CHECKING:  # a worker process needs none of what these import: PyTorch, which takes seconds
    from lightning_quant.deploy.bundle import Bundle
    from lightning_quant.deploy.samples import Tensors

REPORT_NAME = "report.json"
# Seconds of a limit, at most; systems cannot wait for ever.
LONGEST = 1e7


@dataclass
class Measured:
    """What a target brings back of one network on one device.

    Args:
        report: everything but the comparison of outputs.
        outputs: for each sample the outputs by name, in float; empty while pending or failed.
        folder: where its artifacts are, and its report goes.
    """

    report: DeviceReport
    outputs: list[Tensors]
    folder: Path

    def write(self) -> Path:
        """Write the report beside its artifacts."""
        return self.report.write(self.folder / REPORT_NAME)


def folder_name(*parts: str) -> str:
    """A name for a folder made of free text: ``("Samsung Galaxy S24", "tflite")`` → ``samsung-galaxy-s24-tflite``."""
    plain = " ".join(parts).lower().replace("+", "-plus")  # Galaxy S24 and S24+ are two phones
    return re.sub(r"[^a-z0-9_]+", "-", plain).strip("-")


class Target(ABC):
    """A place where an exported network can run.

    Attributes:
        tier: its name, see :data:`~lightning_quant.deploy.device_report.TIERS`.
    """

    tier: ClassVar[str]

    @abstractmethod
    def unavailable(self) -> str | None:
        """Why this target cannot be used here and now, or ``None`` if it can. Costs seconds at most."""

    @abstractmethod
    def check(self, bundle: Bundle) -> None:
        """Refuse what cannot work before any work is spent on it.

        Raises:
            ConfigurationError, DeviceError: saying what was given and what was expected.
        """

    @abstractmethod
    def run(self, bundle: Bundle, inputs: list[Tensors], folder: Path) -> list[Measured]:
        """Compile the bundle, compute the inputs, profile.

        Args:
            bundle: the exported network.
            inputs: samples, tensors by the names of the graph's inputs.
            folder: where artifacts are kept, in a folder for each device and runtime.

        Returns:
            One result for every device and runtime asked for.

        Raises:
            DeviceError: when nothing came of it.
        """
