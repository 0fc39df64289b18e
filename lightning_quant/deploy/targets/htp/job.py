"""The request to the emulator's worker process, and its result."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    """A network to compile for a chip and to emulate.

    Args:
        model: path of the ONNX file.
        soc: the chip.
        samples: how many; they are in ``input-0.npz`` … next to the job, outputs go to ``output-0.npz`` ….
        memory_bytes: address space the process may use.
    """

    model: str
    soc: str
    samples: int
    memory_bytes: int


@dataclass(frozen=True)
class Compiled:
    """What was compiled; ``context.onnx`` and the binary are next to the job.

    Args:
        npu: layers that were compiled for the NPU.
        fallen_back: layers that were not, with the reasons.
        float_islands: layers on the NPU that compute in float.
        binary: name of the compiled file.
        qairt: version of the compiler.
        seconds: wall time, by step.
    """

    npu: list[str]
    fallen_back: dict[str, str]
    float_islands: list[str]
    binary: str
    qairt: str
    seconds: dict[str, float]
