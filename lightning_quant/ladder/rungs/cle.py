"""Cross-layer equalization: the same function with weights that round better."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Set
from contextlib import contextmanager
from typing import ClassVar, Literal

import torch
from torch import nn
from typing_extensions import override

from lightning_quant.errors import LightningQuantError
from lightning_quant.ladder.rung import Cost, Rung, RungContext, calibration
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
    def cost(self, network: QuantizedNetwork, context: RungContext) -> Cost:
        return Cost(calibration(network))

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
        prepared.inputs.call(equalized)  # call sites hold what the last call passed: here, copies of it
        scalable = owners_of_weights(equalized)
        computed = {one for one in equalized.modules() if "_takes_weights" in vars(one) and one not in scalable}
        flat = FlatNetwork(equalized, prepared.inputs).eval()
        with weights_attached(equalized), _left_alone(computed):
            groups = aimet.CrossLayerScaling.scale_model(flat, dummy_input=tuple(prepared.inputs.tensors))
        difference = relative_difference(prepared.output, prepared.inputs.call(equalized))
    if difference > TOLERANCE:
        raise LightningQuantError(f"equalizing changed what the float network computes by {difference:.1e}")
    return equalized, len(groups)


@contextmanager
def _left_alone(layers: Set[nn.Module]) -> Iterator[None]:
    """Let AIMET scale no layer whose weights are computed, or used elsewhere too, nor what would make up for it."""
    search = aimet.GraphSearchUtils
    original = search.__dict__["convert_layer_group_to_cls_sets"]

    def scaled(group: list[nn.Module]) -> list[tuple[nn.Module, ...]]:
        return [one for one in original.__func__(group) if layers.isdisjoint(one)]

    search.convert_layer_group_to_cls_sets = staticmethod(scaled)
    try:
        yield
    finally:
        search.convert_layer_group_to_cls_sets = original
