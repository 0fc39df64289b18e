"""The float network in the form that AIMET can quantize: traced, its batch norms folded, checked to be the same."""

from __future__ import annotations

import copy
import inspect
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_quant.errors import PreflightError
from lightning_quant.simulation import aimet, preflight
from lightning_quant.simulation.inputs import NetworkInputs, tensors_in
from lightning_quant.simulation.network import FlatNetwork
from lightning_quant.simulation.normalize import use_torch_classes
from lightning_quant.simulation.preflight import Finding, FindingKind

# Largest change, relative to the largest output, that rewriting in float32 may cause: folding a batch norm
# or tracing reorders sums, which moves results by some 1e-6; a wrong fold moves them by 1e-1.
TOLERANCE = 1e-3


@dataclass
class PreparedNetwork:
    """A float network whose layers have the names and weights of its simulation.

    Args:
        network: computes what the user's network computes in eval mode.
        inputs: the example call it was traced with.
        output: what the user's network answered to it.
        batch_norms: those that were folded, as they were, by the name of the layer that holds them now.
        findings: what could not be rewritten, and how it will be quantized.
    """

    network: nn.Module
    inputs: NetworkInputs
    output: Any
    batch_norms: dict[str, _BatchNorm]
    findings: list[Finding]


def prepare(network: nn.Module, inputs: NetworkInputs) -> PreparedNetwork:
    """Rewrite a copy of ``network`` for quantization.

    Functional operations become modules (``prepare_model``) where tracing allows, batch norms are folded, and every
    rewriting is checked to compute the same numbers.

    Args:
        network: the float network, on any device; not changed.
        inputs: an example call of it; one sample is enough.

    Raises:
        PreflightError: if the network cannot be run, or answers without a tensor.
    """
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    inputs = inputs.to(device).map(torch.Tensor.detach)
    # isolated from the caller: hooks, grad mode and the random state stay as they are
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]), aimet.quiet():
        own = copy.deepcopy(network).eval()
        try:
            output = inputs.call(own)
        except Exception as error:
            raise PreflightError(
                f"The float network {type(network).__name__} cannot be run on one sample: {type(error).__name__}: "
                f"{error}. Expected a network that runs in eval mode; mend it, or give it other data."
            ) from error
        if not tensors_in(output):
            raise PreflightError(
                f"The network {type(network).__name__} returned {type(output).__name__} without any tensor "
                "in it: expected a tensor or a structure of tensors."
            )
        use_torch_classes(own, inputs)
        traced, findings = _trace(own, inputs, output)
        folded, batch_norms, unfolded = _fold_batch_norms(traced, inputs)
    return PreparedNetwork(folded, inputs, output, batch_norms, findings + unfolded)


def _trace(network: nn.Module, inputs: NetworkInputs, output: Any) -> tuple[nn.Module, list[Finding]]:
    """Give every functional operation and every reuse of a module its own module, if fx can trace it."""
    from aimet_torch.model_preparer import prepare_model

    if preflight.known_to_aimet(network):  # a single layer: tracing would take it apart
        return network, []
    try:
        # What is not a tensor in the example is fixed for good, or fx takes `if mask is None` for False.
        bound = inspect.signature(network.forward).bind(*inputs.args, **inputs.kwargs)
        bound.apply_defaults()
        constants = {name: value for name, value in bound.arguments.items() if _is_constant(value)}
        prepared = prepare_model(copy.deepcopy(network), concrete_args=constants or None)
        _restore_arguments(prepared, set(constants), set(bound.signature.parameters))
        difference = relative_difference(output, inputs.call(prepared))
    except Exception as error:  # tracing runs arbitrary user code: anything may come out of it
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return network, [
            Finding(
                "",
                f"could not be traced ({type(error).__name__}: {reason[:120]})",
                "avoid control flow that depends on tensor values; functional operations stay in float",
                kind=FindingKind.UNTRACED,
            )
        ]
    if difference > TOLERANCE:
        return network, [
            Finding(
                "",
                f"computes something else when traced (relative difference {difference:.1e})",
                "avoid forward passes that depend on state or the mode; functional operations stay in float",
                kind=FindingKind.UNTRACED,
            )
        ]
    findings = [
        Finding(
            name,
            "holds weights and is called more than once: each call got a copy of its own",
            "expect the copies to differ after QAT, or use one module per call",
            kind=FindingKind.COPIED,
        )
        for name in _reused_with_weights(network, inputs)
    ]
    return prepared, findings


def _restore_arguments(prepared: torch.fx.GraphModule, constants: set[str], parameters: set[str]) -> None:
    """Undo what fx does to arguments that are fixed for good."""
    for node in prepared.graph.nodes:
        if node.op == "placeholder":  # fx calls a fixed argument mask_1: it could not be given by name
            name, _, number = node.target.rpartition("_")
            if name in constants and number.isdigit() and node.target not in parameters:
                node.target = name
        elif getattr(node.target, "__name__", "") == "_assert_is_none":
            # once unpickled, this check makes every later tracing in the process fail (KeyError)
            value, message = node.args
            with prepared.graph.inserting_before(node):
                is_none = prepared.graph.call_function(operator.eq, (value, None))
            node.target, node.args = torch._assert, (is_none, message)
    prepared.recompile()


def _is_constant(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _reused_with_weights(network: nn.Module, inputs: NetworkInputs) -> list[str]:
    calls: dict[str, int] = {}
    handles = []
    for name, module in network.named_modules():
        if next(module.parameters(recurse=False), None) is not None:

            def count(*_: Any, name: str = name) -> None:
                calls[name] = calls.get(name, 0) + 1

            handles.append(module.register_forward_pre_hook(count))
    inputs.call(network)
    for handle in handles:
        handle.remove()
    return [name for name, count_ in calls.items() if count_ > 1]


def _fold_batch_norms(
    network: nn.Module, inputs: NetworkInputs
) -> tuple[nn.Module, dict[str, _BatchNorm], list[Finding]]:
    """Fold batch norms into their convolutions; give the network back unfolded if the numbers change."""
    from aimet_torch.batch_norm_fold import fold_all_batch_norms

    if not any(isinstance(module, _BatchNorm) for module in network.modules()):
        return network, {}, []
    folded = copy.deepcopy(network)
    for module in folded.modules():
        if isinstance(module, _BatchNorm) and not module.affine:  # AIMET folds those with parameters only
            module.weight = nn.Parameter(torch.ones(module.num_features, device=inputs.tensors[0].device))
            module.bias = nn.Parameter(torch.zeros(module.num_features, device=inputs.tensors[0].device))
            module.affine = True
    tensors = tuple(inputs.tensors)
    try:
        pairs = fold_all_batch_norms(FlatNetwork(folded, inputs).eval(), None, dummy_input=tensors)
        difference = relative_difference(inputs.call(network), inputs.call(folded))
    except Exception as error:  # AIMET raises whatever its graph builder met
        return (
            network,
            {},
            [
                Finding(
                    "",
                    f"batch norms could not be folded ({type(error).__name__}: {str(error)[:120]})",
                    "fold them yourself, or expect them as extra operations on the device",
                    kind=FindingKind.UNFOLDED,
                )
            ],
        )
    if difference > TOLERANCE:
        return (
            network,
            {},
            [
                Finding(
                    "",
                    f"folding batch norms changed the output by {difference:.1e} (relative); left unfolded",
                    "check for batch norms whose convolution is used elsewhere too",
                    kind=FindingKind.UNFOLDED,
                )
            ],
        )
    names = {module: name for name, module in folded.named_modules()}
    batch_norms = {
        names[layer]: norm for layer, norm in pairs if _follows(norm, network.get_submodule(names[layer]), layer)
    }
    return folded, batch_norms, []


def _follows(norm: _BatchNorm, layer: Any, folded: Any) -> bool:
    """Whether the batch norm took the output of its layer: AIMET also folds those that come before one."""
    scale = output_factors(norm)
    weight = layer.weight.detach()
    if isinstance(layer, nn.modules.conv._ConvTransposeNd) or weight.shape[0] != scale.numel():
        return False  # channels lie on another axis, in groups
    expected = weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
    return torch.allclose(folded.weight.detach(), expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


def output_factors(norm: _BatchNorm) -> torch.Tensor:
    """What a batch norm in eval mode multiplies each channel with: weight / sqrt(running_var + eps)."""
    assert norm.running_var is not None
    scale = (norm.running_var.detach() + norm.eps).rsqrt()
    return scale if norm.weight is None else norm.weight.detach() * scale


def relative_difference(expected: Any, actual: Any) -> float:
    """Largest absolute difference between two outputs, relative to the largest expected value."""
    pairs = list(zip(tensors_in(expected), tensors_in(actual), strict=True))
    worst = 0.0
    for a, b in pairs:
        if a.shape != b.shape:
            return float("inf")
        if not a.is_floating_point():
            continue
        finite = a.isfinite()
        if not torch.equal(finite, b.isfinite()):
            return float("inf")
        a, b = a[finite], b[finite]
        if a.numel():
            scale = a.abs().max().clamp_min(torch.finfo(a.dtype).tiny)
            worst = max(worst, float((a - b).abs().max() / scale))
    return worst
