"""Whether a network can be written as ONNX: asked before calibration and training, not after."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.onnx.utils
from torch import nn

import lightning_quant
from lightning_quant.simulation import aimet
from lightning_quant.simulation.callsites.aimet_views import weights_attached
from lightning_quant.simulation.callsites.read_out import ReadOut
from lightning_quant.simulation.inputs import NetworkInputs
from lightning_quant.simulation.network import FlatNetwork
from lightning_quant.simulation.preflight import Finding, FindingKind

# Of the float graph that AIMET's encodings belong to.
FLOAT_OPSET = 17
# An export writes them of truth values, under names without the last underscore, which the question does not look up.
_OF_TRUTH_VALUES = frozenset(("aten::__and__", "aten::__or__", "aten::__xor__"))


def not_in_onnx(network: nn.Module, inputs: NetworkInputs) -> list[Finding]:
    """Name the operations of a network that PyTorch's exporter cannot write, with their lines in the code.

    Args:
        network: the network with its call sites, in eval mode.
        inputs: an example call.
    """
    _know_all_operations()
    flat = FlatNetwork(network, inputs).eval()
    try:
        with weights_attached(network):  # as in the export: what a parametrization computes is a constant
            graph, kinds = torch.onnx.utils.unconvertible_ops(flat, tuple(inputs.tensors), opset_version=FLOAT_OPSET)
    except torch.onnx.OnnxExporterError:  # it cannot be traced: AIMET says why
        return []
    lines = {node.kind(): str(node.sourceRange()) for node in graph.nodes() if not _is_of_truth_values(node)}
    findings = [
        Finding(
            "",
            f"{kind.removeprefix('aten::')}{_place(lines[kind])} is not in ONNX: the export will fail",
            "compute it of other operations, or leave it out of the network: let it return what goes in",
            kind=FindingKind.NOT_IN_ONNX,
        )
        for kind in dict.fromkeys(kinds)
        if kind in lines
    ]
    return findings + _uneven_pooling(graph)


def read_out(places: Sequence[ReadOut]) -> list[Finding]:
    """Say where a network takes values out of PyTorch, which an exported file holds as they were for one sample."""
    return [
        Finding(
            "",
            f"{one.function} in {one.file}, line {one.line}, takes values out of PyTorch: an exported file holds those "
            "of one sample, for all",
            "keep them in tensors and compute with PyTorch, or leave it out of the network",
            kind=FindingKind.NOT_IN_ONNX,
        )
        for one in places
    ]


def _is_of_truth_values(node: torch.Node) -> bool:
    if node.kind() not in _OF_TRUTH_VALUES:
        return False
    return all(value.type().scalarType() == "Bool" for value in node.inputs())


def _uneven_pooling(graph: torch.Graph) -> list[Finding]:
    """Name adaptive pooling whose windows differ in size, which ONNX has no operation for."""
    findings = []
    for node in graph.nodes():
        if "adaptive_" not in node.kind():
            continue
        pooled: list[int] = next(node.outputs()).type().sizes()  # type: ignore[attr-defined]
        given: list[int] = node.inputsAt(0).type().sizes()  # type: ignore[attr-defined]
        axes = int(node.kind()[-2])  # adaptive_avg_pool2d
        before, after = ("x".join(map(str, sizes[-axes:])) for sizes in (given, pooled))
        if any(size % windows for size, windows in zip(given[-axes:], pooled[-axes:], strict=True)):
            operation = f"{node.kind().removeprefix('aten::')}{_place(str(node.sourceRange()))}"
            findings.append(
                Finding(
                    "",
                    f"{operation} of {before} to {after} is not in ONNX, where all windows have one size: the export "
                    "will fail",
                    "choose an input size, or a number of windows, that divides without a remainder",
                    kind=FindingKind.NOT_IN_ONNX,
                )
            )
    return findings


@functools.cache
def _know_all_operations() -> None:
    """Import PyTorch's tables of what it can write; by itself it does so in an export only."""
    for module in pkgutil.iter_modules(torch.onnx.__path__):
        if module.name.startswith("symbolic_opset"):
            importlib.import_module(f"torch.onnx.{module.name}")


def _place(source: str) -> str:
    """Return the innermost line of the user's code, of ``file(line): function`` in a row each."""
    libraries = (torch, aimet.load(), lightning_quant)
    others = tuple(str(Path(library.__file__).parent) for library in libraries if library.__file__)
    for line in source.splitlines():
        file, _, rest = line.partition("(")
        if file.endswith(".py") and not file.startswith(others) and Path(file).name != "typing_extensions.py":
            return f" in {Path(file).name}, line {rest.partition(')')[0]},"
    return ""
