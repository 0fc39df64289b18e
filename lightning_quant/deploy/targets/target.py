"""The base class of targets: what each does with a bundle, whether it is a phone, an emulator or this machine."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lightning_quant.deploy.device_report import DeviceReport
from lightning_quant.utilities.registry import Registry

if TYPE_CHECKING:  # a worker process needs none of what these import: PyTorch, which takes seconds
    from lightning_quant.deploy.bundle import Bundle
    from lightning_quant.deploy.samples import Tensors
    from lightning_quant.recipe import QuantRecipe

REPORT_NAME = "report.json"
# Seconds of a limit, at most; systems cannot wait for ever.
LONGEST = 1e7


@dataclass
class Measured:
    """What a target returns for one network on one device.

    Args:
        report: everything but the comparison of outputs.
        outputs: for each sample the outputs by name, in float; empty while pending or failed.
        folder: where its artifacts are, and its report goes.
    """

    report: DeviceReport
    outputs: list[Tensors]
    folder: Path

    def write(self) -> Path:
        """Write the report next to its artifacts."""
        return self.report.write(self.folder / REPORT_NAME)


def folder_name(*parts: str) -> str:
    """Make a folder name of free text: ``("Samsung Galaxy S24", "tflite")`` → ``samsung-galaxy-s24-tflite``."""
    plain = " ".join(parts).lower().replace("+", "-plus")  # Galaxy S24 and S24+ are two phones
    return re.sub(r"[^a-z0-9_]+", "-", plain).strip("-")


class Target(ABC):
    """A place where an exported network can run.

    Subclass it, with a ``name`` and :meth:`run`, for a target of your own. It is registered by its name as soon as its
    module is imported, and given to ``DeviceExport(target=...)`` as an instance, by name or by dotted path. If its
    constructor names ``device``, ``devices`` or ``timeout``, it gets those of ``DeviceExport``.

    Examples:
        >>> class Board(Target):
        ...     name = "board"
        ...
        ...     def __init__(self, device: str) -> None:
        ...         self.device = device
        ...
        ...     def run(self, bundle, inputs, folder):
        ...         outputs = [infer(bundle.device_file, sample) for sample in inputs]  # {name: array} for each
        ...         report = DeviceReport(self.name, self.device, bundle.manifest.precision)
        ...         report.statement = "measured on the board on my desk"
        ...         return [Measured(report, outputs, folder)]
        >>> DeviceExport("export", target=Board("desk"))  # doctest: +SKIP

    Attributes:
        name: what it is called in ``target=...``, and the tier of its reports.
    """

    name: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        TARGETS.register(cls)

    def unavailable(self) -> str | None:
        """Return why this target cannot be used here and now, or ``None`` if it can. Costs seconds at most."""
        return None

    def check_recipe(self, recipe: QuantRecipe) -> None:  # noqa: B027
        """Refuse, before a network is trained, what cannot run here however it is trained. Costs seconds at most.

        Args:
            recipe: how the network will be quantized.

        Raises:
            UnknownDeviceError: for a device that does not exist here, with near names.
            ConfigurationError: for a device that lacks what the network or the options need.
            DeviceError: when that cannot be found out now. It is logged, and found out when the bundle is run.
        """

    def check(self, bundle: Bundle) -> None:  # noqa: B027
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
            DeviceError: when there is no result.
        """

    def run_sizes(self, graphs: Sequence[tuple[Bundle, list[Tensors]]], folder: Path) -> list[list[Measured]]:
        """Run the graphs of one bundle, see :attr:`~lightning_quant.deploy.bundle.Bundle.sizes`: one after the other.

        Override it for a target whose graphs share their weights.

        Args:
            graphs: the bundle, then it at each further size, with samples of that size.
            folder: as of :meth:`run`.

        Returns:
            What :meth:`run` returns, of each.

        Raises:
            DeviceError: when there is no result.
        """
        (bundle, inputs), *further = graphs
        return [
            self.run(bundle, inputs, folder),
            *(self.run(one, given, folder / one.manifest.size) for one, given in further),
        ]


# This package's, best first: what target="auto" tries.
TARGETS: Registry[Target] = Registry(
    "target",
    Target,  # type: ignore[type-abstract]
    {
        "aihub": "lightning_quant.deploy.targets.aihub.target.AiHubTarget",
        "htp_emulator": "lightning_quant.deploy.targets.htp.target.HtpEmulatorTarget",
        "onnxruntime": "lightning_quant.deploy.targets.onnxruntime.OnnxRuntimeTarget",
    },
    keywords=["auto"],
)
