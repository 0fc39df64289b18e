"""Checkpoints of a version whose simulation rounds other tensors are refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.errors import CheckpointError
from tests.helpers.networks import calibrated, call, images, seeded


class Joined(nn.Module):
    """A depthwise convolution with its activation, beside another convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, groups=3), nn.Conv2d(3, 4, 3)
        self.head = nn.Conv2d(7, 4, 1)
        seeded(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.first(x).relu(), self.second(x)], 1))


def state_and_network() -> tuple[dict[str, Any], Any]:
    network = calibrated(Joined().eval(), call(images(8)))
    return network.snapshot(), network


def test_its_own_state_is_loaded() -> None:
    state, network = state_and_network()
    network.restore(state)
    nn.ModuleDict({"inner": network.network}).load_state_dict({f"inner.{name}": value for name, value in state.items()})


@pytest.mark.parametrize("strict", [True, False])
def test_a_range_too_many_or_too_few(strict: bool) -> None:
    state, network = state_and_network()
    added = {
        name.replace("second.output", "first.output"): value for name, value in state.items() if "second.o" in name
    }
    with pytest.raises(CheckpointError, match=r"'first.output_quantizers.0' is rounded there and not here"):
        network.network.load_state_dict(state | added, strict=strict)
    fewer = {name: value for name, value in state.items() if not name.startswith("second.output_quantizers")}
    with pytest.raises(
        CheckpointError, match=r"written by lightning_quant '\d.*'second.output_quantizers.0' is rounded here"
    ):
        network.network.load_state_dict(fewer, strict=strict)


def test_two_ranges_that_are_one_now() -> None:
    state, network = state_and_network()
    state["second.output_quantizers.0.max"] = state["second.output_quantizers.0.max"] * 2
    with pytest.raises(CheckpointError, match=r"second.output_quantizers.0.max' are one range here and two there"):
        network.network.load_state_dict(state)


def test_of_the_weights_of_another_network_pytorch_lists_the_keys() -> None:
    state, network = state_and_network()
    del state["head.weight"], state["second.output_quantizers.0.max"]
    with pytest.raises(RuntimeError, match="Missing key"):
        network.network.load_state_dict(state)
