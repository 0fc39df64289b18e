"""The request to AI Hub's worker process, and its result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

# What AI Hub compiles to, and the framework a device must offer for it.
RUNTIMES = {
    "qnn_dlc": "qnn",
    "qnn_context_binary": "qnn",
    "tflite": "tflite",
    "onnx": "onnx",
    "precompiled_qnn_onnx": "onnx",
}


@dataclass(frozen=True)
class DeviceCheck:
    """Devices to find before anything is trained for them.

    Args:
        profile: name of the client's configuration.
        devices: their names.
        runtimes: what to compile to, of :data:`RUNTIMES`.
        int16_activations: the part of the network with 16-bit activations, if any.
        timeout: seconds for everything.
    """

    profile: str | None
    devices: list[str]
    runtimes: list[str]
    int16_activations: str | None
    timeout: float


@dataclass(frozen=True)
class DevicesFound:
    """The devices that can run the network.

    Args:
        devices: their names.
    """

    devices: list[str]


@dataclass(frozen=True)
class Source:
    """A file to upload.

    Args:
        path: where it is.
        hash: of what makes it the same to AI Hub; names the upload.
    """

    path: str
    hash: str


@dataclass(frozen=True)
class Graph:
    """The network for one input size.

    Args:
        size: what it is called; empty for the bundle's own graph.
        quantized: the network to measure.
        float_network: the float network to compare it with; ``None``: do not.
        inputs: name of the file with the samples, next to the job.
        inputs_hash: of the samples; names their upload.
        output_shapes: by name, one sample each, to recognize a layout that the compiler changed.
    """

    size: str
    quantized: Source
    float_network: Source | None
    inputs: str
    inputs_hash: str
    output_shapes: dict[str, list[int]]


@dataclass(frozen=True)
class Job:
    """One bundle to compile and run on its devices.

    Args:
        profile: name of the client's configuration.
        graphs: the network, for each input size.
        link: whether the graphs are linked into one context binary, which holds their weights once.
        input_names: of the graphs, in order.
        output_names: of the graphs, in order.
        activation_bits: of the network.
        int16_activations: the part of the network with 16-bit activations, if any.
        devices: their names, as AI Hub lists them.
        runtimes: what to compile to, of :data:`RUNTIMES`.
        options: more options for the compile job.
        wait: wait for the results, or return when everything that can be is submitted.
        timeout: seconds for everything.
        patience: seconds for which a failing service is asked again.
        poll_seconds: between questions for a job's state, at most.
        journal: path of the journal.
        locks: folder of the locks by which a user's processes on this machine upload a model once.
        folder: where artifacts go, in a folder for each device and runtime.
    """

    profile: str | None
    graphs: list[Graph]
    link: bool
    input_names: list[str]
    output_names: list[str]
    activation_bits: int
    int16_activations: str | None
    devices: list[str]
    runtimes: list[str]
    options: str
    wait: bool
    timeout: float
    patience: float
    poll_seconds: float
    journal: str
    locks: str
    folder: str


@dataclass
class Outcome:
    """The result on one device with one runtime.

    Args:
        device: its name.
        runtime: of :data:`RUNTIMES`.
        size: which graph.
        status: as in :class:`~lightning_quant.deploy.device_report.DeviceReport`.
        soc: the chip, if AI Hub names it.
        jobs: links by what they did.
        profile: of the quantized network, as the client returned it.
        float_profile: the same of the float network.
        versions: of the service's tools.
        artifacts: files by what they are, in the folder of the device and runtime.
        warnings: what the user should know.
        error: why it failed.
    """

    device: str
    runtime: str
    size: str
    status: Literal["finished", "pending", "failed"]
    soc: str | None = None
    jobs: dict[str, str] = field(default_factory=dict)
    profile: dict[str, Any] | None = None
    float_profile: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    error: str | None = None


@dataclass
class Outcomes:
    """The result of the worker.

    Args:
        results: one for every graph, device and runtime.
    """

    results: list[Outcome]
