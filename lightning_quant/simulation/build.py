"""From a float network to its quantized simulation: prepare, fold batch norms, insert quantizers."""

from __future__ import annotations

import copy
import fnmatch
import inspect
import io
import logging
import operator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_quant.errors import ConfigurationError, PreflightError
from lightning_quant.precision import Precision
from lightning_quant.recipe import QuantRecipe
from lightning_quant.simulation import aimet, preflight
from lightning_quant.simulation.inputs import NetworkInputs, tensors_in
from lightning_quant.simulation.network import FlatNetwork, QuantizedNetwork
from lightning_quant.simulation.normalize import use_torch_classes
from lightning_quant.simulation.preflight import Finding

log = logging.getLogger(__name__)

# Largest change, relative to the largest output, that rewriting in float32 may cause: folding a batch norm
# or tracing reorders sums, which moves results by some 1e-6; a wrong fold moves them by 1e-1.
_TOLERANCE = 1e-3


def quantize(network: nn.Module, inputs: NetworkInputs, recipe: QuantRecipe) -> QuantizedNetwork:
    """Build the quantized simulation of ``network``; its activation ranges are not calibrated yet.

    The network given is not changed. Functional operations become modules (``prepare_model``) where
    tracing allows, batch norms are folded, and every rewriting is checked to compute the same numbers.

    Args:
        network: the float network, on any device.
        inputs: an example call of it; one sample is enough.
        recipe: how to quantize.

    Returns:
        The quantized network, in the training mode of the float one, with the findings of the preflight.

    Raises:
        PreflightError: if the network cannot be run or AIMET cannot quantize it, and with
            ``recipe.strict`` for every finding.
        ConfigurationError: for an override that matches no layer.
    """
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    inputs = inputs.to(device).map(torch.Tensor.detach)
    modes = {name: module.training for name, module in network.named_modules()}
    float_network = network
    # isolated from the caller: hooks, grad mode and the random state stay as they are
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]), aimet.quiet():
        network = copy.deepcopy(network).eval()
        output = inputs.call(network)
        if not tensors_in(output):
            raise PreflightError(
                f"The network {type(network).__name__} returned {type(output).__name__} without any tensor "
                "in it: expected a tensor or a structure of tensors."
            )
        use_torch_classes(network, inputs)
        network, findings = _prepare(network, inputs, output)
        network, unfolded = _fold_batch_norms(network, inputs)
        findings += unfolded + preflight.inspect(network, inputs)
        if recipe.strict:
            preflight.refuse(findings)
        sim = _simulate(network, inputs, recipe)
        _apply_overrides(sim, recipe)
    quantized = QuantizedNetwork(sim, recipe, inputs.to(torch.device("cpu")), output, findings, float_network)
    if findings:
        log.warning("Preflight of %s:\n%s", type(float_network).__name__, preflight.table(findings))
    quantized.train(modes[""])
    for name, module in quantized.network.named_modules():
        module.training = modes.get(name, module.training)  # frozen parts stay in eval mode
    return quantized


def _prepare(network: nn.Module, inputs: NetworkInputs, output: Any) -> tuple[nn.Module, list[Finding]]:
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
        difference = _relative_difference(output, inputs.call(prepared))
    except Exception as error:  # tracing runs arbitrary user code: anything may come out of it
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return network, [
            Finding(
                "",
                f"could not be traced ({type(error).__name__}: {reason[:120]})",
                "avoid control flow that depends on tensor values; functional operations stay in float",
            )
        ]
    if difference > _TOLERANCE:
        return network, [
            Finding(
                "",
                f"computes something else when traced (relative difference {difference:.1e})",
                "avoid forward passes that depend on state or the mode; functional operations stay in float",
            )
        ]
    findings = [
        Finding(
            name,
            "holds weights and is called more than once: each call got a copy of its own",
            "expect the copies to differ after QAT, or use one module per call",
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


def _fold_batch_norms(network: nn.Module, inputs: NetworkInputs) -> tuple[nn.Module, list[Finding]]:
    """Fold batch norms into their convolutions; give the network back unfolded if the numbers change."""
    from aimet_torch.batch_norm_fold import fold_all_batch_norms

    if not any(isinstance(module, _BatchNorm) for module in network.modules()):
        return network, []
    folded = copy.deepcopy(network)
    tensors = tuple(inputs.tensors)
    try:
        fold_all_batch_norms(FlatNetwork(folded, inputs).eval(), None, dummy_input=tensors)
        difference = _relative_difference(inputs.call(network), inputs.call(folded))
    except Exception as error:  # AIMET raises whatever its graph builder met
        return network, [
            Finding(
                "",
                f"batch norms could not be folded ({type(error).__name__}: {str(error)[:120]})",
                "fold them yourself, or expect them as extra operations on the device",
            )
        ]
    if difference > _TOLERANCE:
        return network, [
            Finding(
                "",
                f"folding batch norms changed the output by {difference:.1e} (relative); left unfolded",
                "check for batch norms whose convolution is used elsewhere too",
            )
        ]
    return folded, []


def _relative_difference(expected: Any, actual: Any) -> float:
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


def _simulate(network: nn.Module, inputs: NetworkInputs, recipe: QuantRecipe) -> Any:
    """AIMET's QuantizationSimModel around the flat form of ``network``."""
    from aimet_torch import QuantizationSimModel
    from aimet_torch.common.defs import QuantScheme
    from aimet_torch.nn import QuantizationMixin

    schemes = {
        "min_max": QuantScheme.min_max,
        "tf_enhanced": QuantScheme.post_training_tf_enhanced,
        "percentile": QuantScheme.post_training_percentile,
    }
    ignored_before = QuantizationMixin._ignore_unknown_modules
    try:
        # A class AIMET does not know is left in float; the preflight has already named it.
        QuantizationMixin.ignore_unknown_modules(True)
        sim = QuantizationSimModel(
            FlatNetwork(network, inputs).eval(),
            tuple(inputs.tensors),
            quant_scheme=schemes[recipe.range_estimator],
            default_param_bw=recipe.precision.weight_bits,
            default_output_bw=recipe.precision.activation_bits,
            config_file=recipe.hardware,
            in_place=True,
        )
    except Exception as error:  # AIMET raises RuntimeError, KeyError, AssertionError … for the same cause
        raise PreflightError(
            f"AIMET cannot quantize {type(network).__name__} with hardware config {recipe.hardware!r}: "
            f"{type(error).__name__}: {error}. Expected a network whose forward pass torch.jit.trace accepts "
            "with fixed control flow; quantize a part of it (network='model.backbone') or move what cannot "
            "be traced out of it."
        ) from error
    finally:
        QuantizationMixin.ignore_unknown_modules(ignored_before)
    if recipe.range_estimator == "percentile":
        sim.set_percentile_value(recipe.percentile)
    return sim


def _apply_overrides(sim: Any, recipe: QuantRecipe) -> None:
    """Set the precision of single layers, with what the hardware requires of their neighbours."""
    if not recipe.overrides:
        return
    from aimet_torch.mixed_precision import MixedPrecisionConfigurator
    from aimet_torch.nn.base import BaseQuantizationMixin

    layers = {
        name: module for name, module in sim.model.network.named_modules() if isinstance(module, BaseQuantizationMixin)
    }
    chosen: dict[Any, Precision] = {}
    for glob, precision in recipe.overrides.items():
        matched = [module for name, module in layers.items() if fnmatch.fnmatchcase(name, glob)]
        if not matched:
            names = ", ".join(list(layers)[:8])
            raise ConfigurationError(
                f"overrides: {glob!r} matches no layer of the network. Expected a glob on module names such "
                f"as: {names}, …"
            )
        chosen.update(dict.fromkeys(matched, precision))
    configurator = MixedPrecisionConfigurator(sim)
    # AIMET hands the request for an activation up to its convolution, and so undoes an earlier one for the weight
    for module, precision in sorted(chosen.items(), key=lambda item: "weight" in item[0].param_quantizers):
        weights = {name: f"int{precision.weight_bits}" for name in module.param_quantizers if name == "weight"}
        configurator.set_precision(module, activation=f"int{precision.activation_bits}", param=weights or None)
    observers = {
        module: module.encoding_analyzer for module in sim.model.modules() if hasattr(module, "encoding_analyzer")
    }
    configurator.apply(log_file=io.StringIO(), strict=False)
    for quantizer, observer in observers.items():  # AIMET replaces the one for percentile by that for tf_enhanced
        quantizer.encoding_analyzer = observer
