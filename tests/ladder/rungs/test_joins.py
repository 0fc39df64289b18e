"""16 bits for what joins values of unlike size: where it is needed, and nowhere else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.ladder.rungs.joins import JoinedPrecision
from tests.helpers.networks import seeded
from tests.ladder.rungs.contexts import batches, context_of
from tests.ladder.rungs.test_mixed import apply, bits, raised_bits


class Detector(nn.Module):
    """Boxes in pixels and scores of 0 to 1 in one tensor, as YOLO's exported head returns them."""

    def __init__(self, pixels: float = 640.0) -> None:
        super().__init__()
        self.body, self.boxes, self.classes = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 3, 1)
        self.pixels = pixels
        seeded(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x).relu()
        return torch.cat((self.boxes(x).sigmoid() * self.pixels, self.classes(x).sigmoid()), 1).flatten(2)


def scores_off(network: nn.Module, expected: Tensor) -> float:
    """The largest error of a score."""
    with torch.no_grad():
        return float((network(batches()[0].tensors[0])[:, 4:] - expected[:, 4:]).abs().max())


@pytest.mark.parametrize("precision", ["w8a8", "w4a8"])
def test_it_suffices_where_scores_are_rounded_to_nothing(precision: str) -> None:
    network, context = context_of(network=Detector(), precision=precision)
    with torch.no_grad():
        expected = copy.deepcopy(context.float_network)(batches()[0].tensors[0])
    assert scores_off(network.network, expected) > 0.3
    before = bits(network)
    rung = JoinedPrecision()
    assert rung.skip_reason(network, context) is None
    assert apply(rung, network, context) == "16 bits for cat"
    assert scores_off(network.network, expected) < (0.05 if precision == "w8a8" else 0.2)
    assert [*network.promoted] == ["cat"]
    assert set(raised_bits(network, before).values()) == {16}
    assert rung.skip_reason(network, context) == "no concatenation joins values of unlike size"


def test_it_is_skipped_where_values_are_alike_or_have_16_bits() -> None:
    rung = JoinedPrecision()
    alike, context = context_of(network=Detector(pixels=2.0), precision="w8a8")
    assert rung.skip_reason(alike, context) == "no concatenation joins values of unlike size"
    fine, context = context_of(network=Detector(), precision="w8a16")
    assert rung.skip_reason(fine, context) == "activations have 16 bits"
