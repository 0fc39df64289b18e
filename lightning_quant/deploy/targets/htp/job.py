"""The request to the emulator's worker process, and its result."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Graph:
    """A graph to compile and to emulate.

    Args:
        name: what is in the names of its files: ``input-<name>0.npz`` … are next to the job, outputs go to
            ``output-<name>0.npz`` …, and what is compiled is ``context<name>.onnx``.
        model: path of the ONNX file.
        samples: how many.
    """

    name: str
    model: str
    samples: int

    @property
    def context(self) -> str:
        """Name of the ONNX file that refers to the compiled binary."""
        return f"context{self.name}.onnx"


@dataclass(frozen=True)
class Job:
    """Graphs to compile for a chip, several of them into one binary that holds their weights once.

    Args:
        graphs: of one network.
        soc: the chip.
        memory_bytes: address space the process may use.
    """

    graphs: list[Graph]
    soc: str
    memory_bytes: int


@dataclass(frozen=True)
class Compiled:
    """What one graph was compiled to; the binary is next to the job.

    Args:
        npu: layers that were compiled for the NPU.
        fallen_back: layers that were not, with the reasons.
        float_islands: layers on the NPU that compute in float.
        binary: name of the compiled file.
        alone_bytes: size of the compiled file of this graph alone.
        qairt: version of the compiler.
        seconds: wall time, by step.
    """

    npu: list[str]
    fallen_back: dict[str, str]
    float_islands: list[str]
    binary: str
    alone_bytes: int
    qairt: str
    seconds: dict[str, float]


@dataclass(frozen=True)
class Results:
    """The result of the worker.

    Args:
        graphs: one for each of the job's.
    """

    graphs: list[Compiled]
