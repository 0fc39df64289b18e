"""Calibration: run samples through the simulation and set every range from what was seen."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext

import torch

from lightning_quant.errors import CalibrationError
from lightning_quant.simulation import aimet, calibration_cache, preflight
from lightning_quant.simulation.calibration_cache import DataHash, Statistics, StatisticsCache
from lightning_quant.simulation.callsites.attributes import IN_TRACES_ONLY
from lightning_quant.simulation.callsites.passes import noting
from lightning_quant.simulation.callsites.traces import run_in_trace
from lightning_quant.simulation.coarse_angles import coarse_angles
from lightning_quant.simulation.conversions import leave_room, without_conversions
from lightning_quant.simulation.fixed_ranges import set_fixed_ranges
from lightning_quant.simulation.inputs import NetworkInputs, counted, take_samples
from lightning_quant.simulation.masks import inputs_in_softmax, leave_room_for_masks, masks_left_out
from lightning_quant.simulation.narrow_ranges import widen_narrow_ranges
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.precisions import quantized_layers
from lightning_quant.simulation.preflight import FindingKind
from lightning_quant.simulation.unlike_ranges import Ends, noting_joined, unlike_ranges
from lightning_quant.utilities.full_precision import full_precision

log = logging.getLogger(__name__)

_SHOWN_BY_CALIBRATION = (FindingKind.UNLIKE_RANGES, FindingKind.COARSE_ANGLES)


def calibrate(
    network: QuantizedNetwork,
    batches: Iterable[NetworkInputs],
    *,
    weights: bool = True,
    cache: StatisticsCache | None = None,
) -> int:
    """Set the ranges of all weights and activations, and mark the network as calibrated.

    Args:
        network: the quantized network.
        batches: calls of the network with representative samples. They are consumed until
            ``network.recipe.calibration_samples`` samples were seen; the last one is cut to fit. The calls of one
            step count once.
        weights: ``False`` keeps the ranges of the weights as they are.
        cache: where to keep what was seen, and to look for it first. ``batches`` are then iterated over more than once:
            expected is what gives the same ones each time, not an iterator.

    Returns:
        The number of samples used, which is less than asked for when the batches ran out.

    Raises:
        CalibrationError: if there was no sample, or one with NaN or Inf in it (the batch is named), or the
            network computed such values (the quantizer is named). It is not marked as calibrated then.
        PreflightError: with ``recipe.strict``, if a range is one for unlike values, or of angles in large steps.
    """
    wanted = network.recipe.calibration_samples
    seen = 0
    joined: dict[str, Ends] = {}

    def run(_: object) -> None:
        nonlocal seen, joined
        if cache is None:
            with noting_joined(network) as joined:
                seen = _observe(network, batches)
            return
        with cache.locked(network) as path:
            known = calibration_cache.read(path)
            if known is not None and not known.fits(network):
                log.warning("Calibrating again: %s was not seen by the quantizers of this network.", path)
                known = None
            if known is not None and known.data == _hash(network, batches, wanted):
                # layers learn in a forward pass whose outputs they read, see AIMET's protection against overflow
                next(iter(batches)).batched_like(network.inputs).first(1).call(network.network)
                known.give(network)
                seen, joined = known.samples, known.joined
                log.info("Calibrated with what was seen of the same %d samples before.", seen)
                return
            digest = DataHash()
            with noting_joined(network) as joined:
                seen = _observe(network, batches, digest)
            calibration_cache.write(path, Statistics.of(network, str(digest), seen, joined))

    # ranges must be ordinary tensors: made under inference_mode they would break training later
    kept = nullcontext() if weights else _kept(weight_quantizers(network))
    # what is kept on disk is for networks with finer grids too
    exact = full_precision() if network.has_fine_grids or cache is not None else nullcontext()
    alone = without_conversions(network.network, network.dataflow)  # their ranges are those that are looked for
    modes = (torch.inference_mode(False), aimet.quiet(), kept, exact, alone, masks_left_out(network.network))
    with ExitStack() as stack:
        for mode in (*modes, network.cached_weights()):
            stack.enter_context(mode)
        noted = stack.enter_context(noting())
        set_fixed_ranges(network.quantizers())  # their bits may have changed
        network.sim.compute_encodings(run)
        leave_room_for_masks(network.sim)
        widen_narrow_ranges(network.sim)
        leave_room(network.network, network.dataflow)
    names = {module: name for name, module in network.network.named_modules()}
    network.left_in_float = {names[module]: list(dict.fromkeys(found)) for module, found in noted.items()}
    if endless := [name for name, quantizer in _quantizers(network) if not _finite(quantizer)]:
        raise CalibrationError(
            f"The range of {endless[0]!r} is not finite: expected finite activations, but the network itself made NaN "
            "or Inf of finite samples. Look for a division by zero, log(0) or a mask of -inf there (use a finite "
            "value instead)."
        )
    if seen < wanted:
        log.info("Calibrated with %d samples; %d were asked for.", seen, wanted)
    _report_coarse_ranges(network, joined)
    network.calibrated = True
    return seen


def _report_coarse_ranges(network: QuantizedNetwork, joined: Mapping[str, Ends]) -> None:
    """Add to the findings of the preflight what only calibration shows; warn of what is new.

    Raises:
        PreflightError: instead of the warning, with ``strict=True``.
    """
    known = {one.module for one in network.findings if one.kind in _SHOWN_BY_CALIBRATION}
    found = unlike_ranges(network, joined) + coarse_angles(network)
    if network.recipe.strict:
        preflight.refuse(found)
    if new := [one for one in found if one.module not in known]:
        log.warning("Preflight of %s, calibrated:\n%s", network.float_class.__name__, preflight.table(new))
    # at other bits, or with another estimator, there may be fewer
    network.findings[:] = [one for one in network.findings if one.kind not in _SHOWN_BY_CALIBRATION] + found


def _observe(network: QuantizedNetwork, batches: Iterable[NetworkInputs], digest: DataHash | None = None) -> int:
    """Run the samples through the network; return how many there were."""
    seen = index = 0
    masks = inputs_in_softmax(network.sim)
    known = (batch.batched_like(network.inputs) for batch in batches)
    for new, batch in counted(take_samples(known, network.recipe.calibration_samples)):
        for place, tensor in enumerate(batch.tensors):
            if place in masks:
                tensor = tensor.masked_fill(tensor == -torch.inf, 0.0)  # which masks
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                what = "NaN" if torch.isnan(tensor).any() else "Inf"
                raise CalibrationError(
                    f"Calibration batch {index} holds {what}: expected finite numbers. One such value "
                    "would stretch a range over all others; find the sample and fix or remove it."
                )
        if digest is not None:
            digest.add(batch)
        batch.call(network.network)
        if index == 0 and any(IN_TRACES_ONLY in vars(module) for module in network.network.modules()):
            # code for exporters alone, which wants its ranges too
            run_in_trace(network.sim.model, tuple(batch.first(1).tensors))
        seen += new
        index += batch.last
    if seen == 0:
        # AIMET itself would continue with ranges for the weights only, and fail at the first use.
        raise CalibrationError(
            "The calibration data loader gave no batch: expected at least one. Check its data set, its "
            "sampler and drop_last (a data set smaller than the batch size leaves nothing)."
        )
    return seen


def _hash(network: QuantizedNetwork, batches: Iterable[NetworkInputs], wanted: int) -> str:
    digest = DataHash()
    for batch in take_samples((batch.batched_like(network.inputs) for batch in batches), wanted):
        digest.add(batch)
    return str(digest)


def uncalibrated(network: QuantizedNetwork) -> list[str]:
    """Return the names of quantizers that no calibration sample reached: parts of the network that were never run."""
    return [name for name, quantizer in _quantizers(network) if not quantizer.is_initialized()]


def calibrate_weights(network: QuantizedNetwork, names: Iterable[str] | None = None) -> None:
    """Set the ranges of the weights from the weights alone: of all layers, or of those that are named."""
    layers = quantized_layers(network)
    for layer in layers.values() if names is None else [layers[name] for name in names]:
        for name, quantizer in layer.param_quantizers.items():
            if quantizer is not None:
                with quantizer.compute_encodings():
                    quantizer(getattr(layer, name))


def weight_quantizers(network: QuantizedNetwork) -> list[aimet.Quantizer]:
    """Return the quantizers of all parameters that are quantized."""
    layers = quantized_layers(network).values()
    return [quantizer for layer in layers for quantizer in layer.param_quantizers.values() if quantizer is not None]


@contextmanager
def _kept(quantizers: list[aimet.Quantizer]) -> Iterator[None]:
    """Let AIMET compute no new range for these quantizers."""
    for quantizer in quantizers:
        quantizer.allow_overwrite(False)
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.allow_overwrite(True)


def _quantizers(network: QuantizedNetwork) -> list[tuple[str, aimet.Quantizer]]:
    return [
        (name, module) for name, module in network.network.named_modules() if isinstance(module, aimet.QuantizerBase)
    ]


def _finite(quantizer: aimet.Quantizer) -> bool:
    return all(bool(torch.isfinite(end).all()) for end in quantizer.parameters())
