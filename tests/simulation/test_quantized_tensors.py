"""What quantizers see, against the same computed by hand, and nothing left behind."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lightning_quant.simulation.precisions import quantized_layers
from lightning_quant.simulation.quantized_tensors import QuantizedTensor, quantized_tensors
from tests.helpers.networks import Body, calibrated, call, images
from tests.helpers.small import assert_same_tensors


def by_place(found: list[QuantizedTensor]) -> dict[tuple[str, str], QuantizedTensor]:
    return {(one.layer, one.tensor): one for one in found}


@pytest.mark.parametrize("precision", ["w8a8", "w4a16"])
def test_a_weight_lies_on_its_grid_as_computed_by_hand(precision: str) -> None:
    network = calibrated(Body(), precision=precision)
    found = by_place(quantized_tensors(network, [call(images(2))]))["head", "weight"]
    layer = quantized_layers(network)["head"]
    quantizer, weight = layer.param_quantizers["weight"], layer.weight.detach().double()
    scale = quantizer.get_scale().detach().double()
    integers = weight / scale
    assert (found.bits, found.qmin, found.qmax) == ((8, -128, 127) if precision == "w8a8" else (4, -8, 7))
    assert found.channels == scale.numel() == weight.shape[0]
    assert found.scale == pytest.approx((float(scale.min()), float(scale.max())))
    expected = np.histogram(integers.numpy(), len(found.counts), found.bins)[0]
    assert sum(found.counts) == weight.numel()  # once, however many samples were run
    assert np.abs(expected - found.counts).sum() <= 0.02 * weight.numel() + 2  # float32 moves some over an edge
    if precision == "w4a16":  # every integer has a bin of its own, and is in its middle
        assert (found.bins[1] - found.bins[0]) / len(found.counts) == 1
    rounded = integers.round().clamp(found.qmin, found.qmax) * scale
    ratio = 10 * math.log10(float(weight.square().sum() / (weight - rounded).square().sum()))
    assert found.sqnr_db == pytest.approx(ratio, abs=0.05)


def test_values_beyond_the_grid_are_counted_as_clipped() -> None:
    network = calibrated(Body())
    seen = by_place(quantized_tensors(network, [call(images(2))]))
    assert max(one.clipped for one in seen.values()) < 0.05
    first = next(place for place in seen if place[1].startswith("input"))
    wide = by_place(quantized_tensors(network, [call(4 * images(2))]))[first]
    low, high = seen[first].low, seen[first].high
    values = 4 * images(2)
    step = seen[first].scale[0]
    outside = ((values < low - step / 2) | (values > high + step / 2)).double().mean()
    assert wide.clipped == pytest.approx(float(outside), abs=1e-3)
    assert wide.clipped > 0.1
    edges = np.linspace(*wide.bins, len(wide.counts) + 1)
    beyond = (edges[:-1] > wide.qmax) | (edges[1:] < wide.qmin)
    assert np.asarray(wide.counts)[beyond].sum() == pytest.approx(wide.clipped * values.numel(), rel=0.1)


def test_the_network_is_left_as_it_was() -> None:
    network = calibrated(Body()).eval()
    before, expected = network.snapshot(), network(images(1))
    found = quantized_tensors(network, [call(images(1)) for _ in range(9)], count=2)
    assert_same_tensors(before, network.snapshot())
    assert torch.equal(network(images(1)), expected)
    assert not any(module._forward_hooks for module in network.modules())
    (entry,) = (one for one in found if one.layer == found[0].layer and one.tensor.startswith("input"))
    assert sum(entry.counts) == 2 * images(1).numel()
