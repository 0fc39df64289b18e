"""What stands in the way of quantizing a network fully: found by running it once, told as a table.

AIMET leaves some things in float with a warning at most, or without a word. Every one of them costs accuracy
or speed on the device, so each becomes a row that names the module, the problem and the remedy.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from lightning_quant.errors import PreflightError
from lightning_quant.simulation import aimet
from lightning_quant.simulation.inputs import NetworkInputs, tensors_in


class FindingKind(Enum):
    """What a finding says of a module, for what goes by it: the words are for people."""

    LEFT_IN_FLOAT = "left in float"
    NO_RANGES = "no ranges"
    UNTRACED = "untraced"
    UNFOLDED = "unfolded"
    COPIED = "copied"
    SHARED = "shared"
    NARROW = "narrow"

    @property
    def leaves_open(self) -> bool:
        """Whether tensors of the module have no encoding, and the user was told."""
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
    """The findings as an aligned text table, one row each."""
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


def inspect(network: nn.Module, inputs: NetworkInputs) -> list[Finding]:
    """Run ``network`` once in eval mode and tell what will stay float, shared or unfolded.

    Args:
        network: the network as it goes into the simulation: prepared, batch norms folded.
        inputs: an example call.
    """
    findings = []
    with _watch(network) as (calls, functions), torch.no_grad():
        inputs.call(network)
    for name, count in calls.items():
        if count > 1:
            findings.append(
                Finding(
                    name,
                    f"called {count} times in one pass: its activations have no ranges",
                    "use one module instance per call",
                    kind=FindingKind.NO_RANGES,
                )
            )
    for name, used in functions.items():
        operations = ", ".join(sorted(used))
        findings.append(
            Finding(
                name,
                f"functional operations stay in float: {operations}",
                "use the nn.Module form (or aimet_torch.nn.modules.custom) for each",
                kind=FindingKind.LEFT_IN_FLOAT,
            )
        )
    for name, module in network.named_modules():
        # BatchNorm without the d is AIMET's own, for torch.nn.functional.batch_norm
        if name in calls and (isinstance(module, _BatchNorm) or type(module).__name__ == "BatchNorm"):
            findings.append(
                Finding(
                    name,
                    f"{type(module).__name__} could not be folded into a convolution or linear layer",
                    "put it directly after one, or expect an extra operation on the device",
                    kind=FindingKind.UNFOLDED,
                )
            )
        if name in calls and not known_to_aimet(module):
            findings.append(
                Finding(
                    name,
                    f"AIMET has no quantized form of {type(module).__name__}: it stays in float",
                    "build it from nn modules, or register it with QuantizationMixin.implements",
                    kind=FindingKind.LEFT_IN_FLOAT,
                )
            )
    return findings


def single_channels(layers: Mapping[str, Any]) -> list[Finding]:
    """Convolutions with one output channel and weights below 8 bits, which the NPU's compiler does not take.

    Seen with QAIRT 2.51: the one scale of such a weight is taken for that of a whole tensor.

    Args:
        layers: the quantized layers by name, at the precision they are to have.
    """
    findings = []
    for name, layer in layers.items():
        is_narrow = isinstance(layer, nn.modules.conv._ConvNd) and layer.out_channels == 1
        quantizer: Any = layer.param_quantizers["weight"] if is_narrow else None
        if quantizer is not None and quantizer.bitwidth < 8:
            problem = f"one output channel with {quantizer.bitwidth}-bit weights: the NPU's compiler refuses it"
            remedy = f'give it 8-bit weights, which costs few bytes: overrides={{"{name}": "w8a8"}}'
            findings.append(Finding(name, problem, remedy, kind=FindingKind.NARROW))
    return findings


def sharing_siblings(root: nn.Module, network: nn.Module, name: str) -> list[Finding]:
    """Modules beside the network that hold some of its parameters: they would keep the float ones.

    Args:
        root: the LightningModule.
        network: the network inside it that is about to be replaced.
        name: its dotted attribute.
    """
    inside = {id(module) for module in network.modules()}
    parameters = {id(parameter) for parameter in network.parameters()}
    findings = []
    for path, module in root.named_modules(remove_duplicate=False):
        if path == "" or path == name or path.startswith(f"{name}.") or name.startswith(f"{path}."):
            continue
        direct = {id(parameter) for parameter in module.parameters(recurse=False)}
        if id(module) in inside or direct & parameters:
            findings.append(
                Finding(
                    path,
                    f"shares parameters with {name!r} and will keep the float ones",
                    f"reach them through self.{name} instead",
                    kind=FindingKind.SHARED,
                )
            )
    return findings


# Functions that hand values on as they are: what was rounded before stays rounded.
_MOVES = frozenset(
    """
    alpha_dropout as_strided bfloat16 broadcast_to chunk clone contiguous cpu cuda detach double dropout dropout1d
    dropout2d dropout3d empty_like expand expand_as feature_alpha_dropout feature_dropout flatten flip float full_like
    gather get getitem half index_select masked_select movedim moveaxis narrow new_empty new_full new_ones new_tensor
    new_zeros ones_like permute pixel_shuffle pixel_unshuffle rand_like randn_like ravel repeat repeat_interleave
    requires_grad reshape reshape_as roll select split split_with_sizes squeeze swapaxes swapdims t take tensor_split
    tile to transpose type type_as unbind unflatten unsqueeze view view_as zeros_like
    """.split()  # noqa: SIM905
)


def _is_float(data: Any) -> bool:
    return any(tensor.is_floating_point() for tensor in tensors_in(data))


def known_to_aimet(module: nn.Module) -> bool:
    """Whether AIMET has a quantized form of this very class."""
    aimet.load()
    from aimet_torch.nn import QuantizationMixin

    return type(module) in QuantizationMixin.cls_to_qcls or isinstance(module, nn.Identity)


def _is_leaf(module: nn.Module) -> bool:
    return known_to_aimet(module) or next(module.children(), None) is None


@contextmanager
def _watch(network: nn.Module) -> Iterator[tuple[Counter[str], dict[str, set[str]]]]:
    """Count the calls of each leaf module and collect the functional operations between them, by module."""
    calls: Counter[str] = Counter()
    functions: dict[str, set[str]] = defaultdict(set)
    running = [("", False)]  # (qualified name, is leaf) of the modules being run, innermost last

    class Recorder(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = getattr(func, "__name__", "").strip("_")
            where, inside_leaf = running[-1]
            result = func(*args, **(kwargs or {}))
            if not inside_leaf and name not in _MOVES and _is_float((args, kwargs)) and _is_float(result):
                functions[where].add(name)
            return result

    def enter(name: str, module: nn.Module) -> Callable[..., None]:
        leaf = _is_leaf(module)

        def hook(*_: Any) -> None:
            inside_leaf = running[-1][1]
            if leaf and not inside_leaf:
                calls[name] += 1
            running.append((name, leaf or inside_leaf))

        return hook

    def leave(*_: Any) -> None:
        running.pop()

    with ExitStack() as handles:
        for name, module in network.named_modules():
            if not isinstance(module, nn.Identity):
                handles.callback(module.register_forward_pre_hook(enter(name, module)).remove)
                handles.callback(module.register_forward_hook(leave).remove)
        with Recorder():
            yield calls, functions
