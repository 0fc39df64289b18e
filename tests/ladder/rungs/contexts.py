"""A quantized network of the rung cases, calibrated, with the context that rungs get."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_quant.ladder.rung import RungContext
from lightning_quant.recipe import QuantRecipe
from lightning_quant.simulation.build import quantize
from lightning_quant.simulation.calibrate import calibrate
from lightning_quant.simulation.inputs import NetworkInputs
from lightning_quant.simulation.network import QuantizedNetwork
from tests.callbacks.rung_cases import images, targets_of, trained


def batches() -> list[NetworkInputs]:
    """The calibration data: all images in batches of 32."""
    return [NetworkInputs((batch,)) for batch in images().clone().split(32)]


def quality(network: nn.Module, targets: torch.Tensor) -> float:
    """10·log10(Σ t² / Σ (y − t)²)."""
    with torch.no_grad():
        error = network(images()) - targets
    return float(10 * torch.log10(targets.square().sum() / error.square().sum()))


def context_of(
    change: Callable[[Any], None] | None = None, network: nn.Module | None = None, enough: float = 1e9, **recipe: Any
) -> tuple[QuantizedNetwork, RungContext]:
    """Quantize and calibrate ``network`` (the trained one of the cases by default); ``enough`` is a quality in dB."""
    own = copy.deepcopy(trained() if network is None else network).eval()
    if change is not None:
        with torch.no_grad():
            change(own)
    calls = batches()
    targets = targets_of(own)
    float_network = copy.deepcopy(own)
    quantized = quantize(own, calls[0].first(1), QuantRecipe(**{"calibration_samples": 128, **recipe})).eval()
    with torch.no_grad():
        calibrate(quantized, calls)
    context = RungContext(
        float_network=float_network,
        inputs=calls[0].first(1),
        samples=lambda: iter(calls),
        measure=lambda: quality(quantized, targets),
        suffices=lambda metric: metric >= enough,
        measure_float=lambda network: 0.0,
    )
    return quantized, context
