"""What stands in the way of quantizing a network fully: found by running it once, reported as a table.

AIMET leaves some things in float with a warning at most, or without a word. Every one of them costs accuracy
or speed on the device, so each becomes a row that names the module, the problem and the remedy.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_quant.errors import PreflightError
from lightning_quant.simulation.callsites.attributes import FOLDED


class FindingKind(Enum):
    """What a finding says of a module: code decides by it, its words are for people."""

    LEFT_IN_FLOAT = "left in float"
    NO_RANGES = "no ranges"
    UNFOLDED = "unfolded"
    SHARED = "shared"
    NOT_IN_ONNX = "not in ONNX"
    FLOAT_ON_NPU = "in float on the NPU"
    ON_CPU = "on the CPU"
    REFUSED = "refused by the NPU's compiler"
    WRONG_ON_NPU = "wrong on the NPU"
    UNLIKE_RANGES = "unlike values in one range"
    COARSE_ANGLES = "angles in large steps"

    @property
    def leaves_open(self) -> bool:
        """Return whether tensors of the module have no encoding, and the user was warned."""
        return self in (FindingKind.LEFT_IN_FLOAT, FindingKind.NO_RANGES)


@dataclass(frozen=True)
class Finding:
    """One row of the preflight table.

    Args:
        module: qualified name of the module in the network; empty for the network itself.
        problem: what is wrong with it.
        remedy: what to do about it.
        kind: what that means for the export.
    """

    module: str
    problem: str
    remedy: str
    kind: FindingKind = field(kw_only=True)


def table(findings: Iterable[Finding]) -> str:
    """Return the findings as an aligned text table, one row each."""
    rows = [("module", "problem", "what to do")]
    rows += [(finding.module or "(network)", finding.problem, finding.remedy) for finding in findings]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows)


def check_finite(network: nn.Module) -> None:
    """Refuse weights and batch norm statistics that are not finite. Other buffers may be: masks of -inf are common."""
    statistics = ("running_mean", "running_var")
    buffers = [(name, buffer) for name, buffer in network.named_buffers() if name.endswith(statistics)]
    for name, tensor in [*network.named_parameters(), *buffers]:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise PreflightError(
                f"{name!r} of {type(network).__name__} holds NaN or Inf: expected finite weights. Was the right "
                "checkpoint loaded, and did its training diverge?"
            )


def check_plain(network: nn.Module) -> None:
    """Refuse compiled parts, which run where nothing can be quantized."""
    for name, module in network.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise PreflightError(
                f"{name or 'The network itself'} of {type(network).__name__} is compiled by TorchScript: expected "
                "plain modules, since nothing inside can be quantized. Leave torch.jit.script and torch.jit.trace away."
            )


def refuse(findings: list[Finding]) -> None:
    """Raise for the findings, for ``strict=True``.

    Raises:
        PreflightError: with the whole table, if there is any finding.
    """
    if findings:
        raise PreflightError(
            f"The network cannot be quantized fully, and strict=True was given:\n{table(findings)}\n"
            "Expected a network without findings: change it as the table says, or pass strict=False to "
            "leave these parts as they are."
        )


def inspect(network: nn.Module) -> list[Finding]:
    """Report what of a prepared network will stay in float or unfolded.

    Args:
        network: the network as it goes into the simulation: batch norms folded, call sites found.
    """
    findings = []
    for name, module in network.named_modules():
        # BatchNorm without the d is AIMET's own, for torch.nn.functional.batch_norm
        if isinstance(module, _BatchNorm) or type(module).__name__ == "BatchNorm":
            if FOLDED in vars(module) or "watched" in vars(type(module)):
                continue  # its call site is the one
            problem = f"{type(module).__name__} could not be folded into a convolution or linear layer"
            findings.append(
                Finding(
                    name,
                    problem,
                    "put it directly after one, or expect a depthwise convolution on the device",
                    kind=FindingKind.UNFOLDED,
                )
            )
    return findings


def sharing_siblings(root: nn.Module, network: nn.Module, name: str) -> list[Finding]:
    """Find modules outside the network that hold some of its parameters: they compute with them unrounded.

    Args:
        root: the LightningModule.
        network: the network inside it that is about to be quantized.
        name: its dotted attribute.
    """
    inside = {id(module) for module in network.modules()}
    parameters = {id(parameter) for parameter in network.parameters()}
    findings = []
    for path, module in root.named_modules(remove_duplicate=False):
        if path == "" or path == name or path.startswith(f"{name}.") or name.startswith(f"{path}."):
            continue
        direct = {id(parameter) for parameter in module.parameters(recurse=False)}
        if id(module) not in inside and direct & parameters:
            findings.append(
                Finding(
                    path,
                    f"shares parameters with {name!r}, which are rounded there only",
                    f"reach them through self.{name} instead",
                    kind=FindingKind.SHARED,
                )
            )
    return findings
