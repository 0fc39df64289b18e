"""From a float network to its quantized simulation, in place: prepare, fold batch norms, insert quantizers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.errors import PreflightError
from lightning_quant.recipe import QuantRecipe
from lightning_quant.simulation import aimet, preflight
from lightning_quant.simulation.callsites import quantizers
from lightning_quant.simulation.callsites.aimet_views import (
    converted_in_place,
    operations_named,
    shapes_from_traces,
    weights_attached,
)
from lightning_quant.simulation.callsites.attributes import BUFFERS
from lightning_quant.simulation.callsites.watching import written_buffers
from lightning_quant.simulation.exportable import not_in_onnx
from lightning_quant.simulation.inplace import copied, state_kept, undone_on_error
from lightning_quant.simulation.inputs import NetworkInputs, tensors_in
from lightning_quant.simulation.network import FlatNetwork, QuantizedNetwork, set_range_estimator
from lightning_quant.simulation.operators import off_the_npu
from lightning_quant.simulation.precisions import matching, set_precisions
from lightning_quant.simulation.prepare import prepare_in_place
from lightning_quant.simulation.range_estimators import MinMax, Percentile, TfEnhanced
from lightning_quant.simulation.second_operands import hexagon_simulated

log = logging.getLogger(__name__)

# AIMET's own; under post_training_percentile it keeps min and max for the outputs of ReLU.
_SCHEMES: dict[type, str] = {
    MinMax: "min_max",
    TfEnhanced: "post_training_tf_enhanced",
    Percentile: "post_training_percentile",
}


def quantize(
    network: nn.Module, inputs: NetworkInputs, recipe: QuantRecipe, others: Sequence[NetworkInputs] = ()
) -> QuantizedNetwork:
    """Quantize ``network`` in place; its activation ranges are not calibrated yet.

    It stays the object it was, in the training mode it was in; how it is changed says
    :func:`~lightning_quant.simulation.prepare.prepare_in_place`. If anything fails it is as it was.

    Args:
        network: the float network, on any device.
        inputs: an example call of it; one sample is enough.
        recipe: how to quantize.
        others: calls of other structure that it is given too.

    Returns:
        What is known of the quantized network, with the findings of the preflight.

    Raises:
        PreflightError: if the network cannot be run, holds weights that are not finite or cannot be quantized by
            AIMET, and with ``recipe.strict`` for every finding.
        ConfigurationError: for an override that matches no layer.
    """
    preflight.check_plain(network)
    preflight.check_finite(network)
    modes = {name: module.training for name, module in network.named_modules()}
    before = copied(network)
    with undone_on_error(network):
        prepared = prepare_in_place(network, inputs, others)
        inputs = prepared.inputs
        with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]), aimet.quiet():
            findings = prepared.findings + preflight.inspect(network)
            with state_kept(network):
                findings += not_in_onnx(network, inputs)
            if recipe.strict:
                preflight.refuse(findings)
            sim = _simulate(network, inputs, recipe)
        if next(sim.quantizers(), None) is None:
            raise PreflightError(
                f"{type(network).__name__} computes nothing that could be quantized: expected layers or arithmetic. "
                "Name the module that computes, in network=..."
            )
        calls = [call.to(torch.device("cpu")) for call in (inputs, *others)]
        quantized = QuantizedNetwork(network, sim, recipe, calls[0], prepared.output, findings, before, calls[1:])
        set_precisions(quantized, matching(quantized, recipe.overrides))
        off = off_the_npu(quantized, hexagon_simulated(sim))
        if recipe.strict:
            preflight.refuse(off)
    findings += off
    quantized.remember_bitwidths()
    network.__dict__[BUFFERS] = written_buffers(network)
    _accelerate(network)
    if findings:
        log.warning("Preflight of %s:\n%s", type(network).__name__, preflight.table(findings))
    network.train(modes[""])
    for name, module in network.named_modules():
        module.training = modes.get(name, module.training)  # frozen parts stay in eval mode
    return quantized


def _simulate(network: nn.Module, inputs: NetworkInputs, recipe: QuantRecipe) -> aimet.Simulation:
    """Return AIMET's QuantizationSimModel around the flat form of ``network``, whose modules it changes in place."""
    estimator = recipe.range_estimator
    flat = FlatNetwork(network, inputs).eval()
    with state_kept(network):
        returned = _returned(flat, inputs)
    ignored_before = aimet.QuantizationMixin._ignore_unknown_modules
    try:
        # A class AIMET does not know is the user's own, whose operations are call sites.
        aimet.QuantizationMixin.ignore_unknown_modules(True)
        with (
            state_kept(network),
            converted_in_place(),
            operations_named(),
            shapes_from_traces(),
            weights_attached(network),
        ):
            sim = aimet.QuantizationSimModel(
                flat,
                tuple(inputs.tensors),
                quant_scheme=aimet.QuantScheme[_SCHEMES.get(type(estimator), "min_max")],
                default_param_bw=recipe.precision.weight_bits,
                default_output_bw=recipe.precision.activation_bits,
                config_file=recipe.hardware,
                in_place=True,
            )
    except Exception as error:  # AIMET raises RuntimeError, KeyError, AssertionError … for the same cause
        raise PreflightError(
            f"AIMET cannot quantize {type(network).__name__} with hardware config {recipe.hardware!r}: "
            f"{type(error).__name__}: {str(error).rstrip('.')}. Expected a network whose forward pass torch.jit.trace "
            "accepts; quantize a part of it (network='model.backbone') or move what cannot be traced out of it."
        ) from error
    finally:
        aimet.QuantizationMixin.ignore_unknown_modules(ignored_before)
    if isinstance(estimator, Percentile):
        sim.set_percentile_value(estimator.percentile)
    quantizers.complete(sim, returned)
    if type(estimator) not in _SCHEMES:
        set_range_estimator(network, estimator)
    return sim


def _returned(network: FlatNetwork, inputs: NetworkInputs) -> set[nn.Module]:
    """Return the layers whose outputs a network returns, as they are or as views, whatever else takes them."""
    made: list[tuple[nn.Module, Tensor, int]] = []

    def note(module: nn.Module, _: Any, output: Any) -> None:
        made.extend((module, tensor, tensor._version) for tensor in tensors_in(output))

    layers = [module for module in network.modules() if not any(module.children())]
    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        memory = {tensor.untyped_storage().data_ptr() for tensor in network(*inputs.tensors)}
    finally:
        for handle in handles:
            handle.remove()
    return {
        module
        for module, tensor, version in made
        if tensor.untyped_storage().data_ptr() in memory and tensor._version == version  # not changed in place since
    }


def _accelerate(network: nn.Module) -> None:
    """Put a simulation on the short path, see :mod:`lightning_quant.simulation.fast`."""
    from lightning_quant.simulation.fast.short_path import accelerate

    if left := accelerate(network):
        log.info("%d quantizers, e.g. %s, run on AIMET's own kernels: block sizes or other kinds.", len(left), left[0])
