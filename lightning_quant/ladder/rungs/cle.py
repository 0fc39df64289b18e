"""Cross-layer equalization: the same function with weights that round better."""

from __future__ import annotations

import copy
from typing import ClassVar, Literal

import torch
from torch import nn
from typing_extensions import override

from lightning_quant.errors import LightningQuantError
from lightning_quant.ladder.rung import Rung, RungContext
from lightning_quant.simulation import aimet
from lightning_quant.simulation.callsites.aimet_views import weights_attached
from lightning_quant.simulation.network import FlatNetwork, QuantizedNetwork
from lightning_quant.simulation.prepare import TOLERANCE, PreparedNetwork, owners_of_weights, relative_difference


class CrossLayerEqualization(Rung):
    """Shift scale between the channels of consecutive convolutions until their ranges are alike.

    Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, section 4.1. Exact
    in float where nothing but ReLU or PReLU lies between the layers; AIMET finds the pairs. Helps where ranges are
    per tensor and within depthwise convolutions.
    """

    name = "cle"
    start: ClassVar[Literal["best", "float"]] = "float"

    @override
    def apply(self, network: QuantizedNetwork, context: RungContext) -> str:
        equalized, groups = equalize(context.prepared)
        network.reset_to(equalized)
        network.equalized = True
        context.calibrate(network)
        return f"equalized {groups} groups of layers"


def equalize(prepared: PreparedNetwork) -> tuple[nn.Module, int]:
    """An equalized copy of a prepared float network, and how many groups of layers exchanged scale.

    Raises:
        LightningQuantError: if the copy does not compute the same.
    """
    equalized = copy.deepcopy(prepared.network)
    with torch.no_grad(), aimet.quiet(), aimet.failing_as("cross-layer equalization"):
        owners_of_weights(equalized)  # the others are hidden from AIMET
        flat = FlatNetwork(equalized, prepared.inputs).eval()
        with weights_attached(equalized):
            groups = aimet.CrossLayerScaling.scale_model(flat, dummy_input=tuple(prepared.inputs.tensors))
        difference = relative_difference(prepared.output, prepared.inputs.call(equalized))
    if difference > TOLERANCE:
        raise LightningQuantError(f"equalizing changed what the float network computes by {difference:.1e}")
    return equalized, len(groups)
