"""Sines of angles that 8 bits round to a large part of a turn are found when ranges are known."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.preflight import FindingKind
from lightning_quant.simulation.switched_off import unrounded
from tests.helpers.networks import calibrated, call, seeded


class TimeStep(nn.Module):
    """The embedding of a time step, as diffusion has it."""

    def __init__(self, longest: float) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 8)
        self.register_buffer("frequencies", torch.logspace(0, -4, 8))
        self.longest = longest

    def forward(self, time: Tensor) -> Tensor:
        angles = time * self.longest * self.frequencies
        return self.linear(torch.cat([angles.sin(), angles.cos()], -1))  # type: ignore[no-any-return]


TIMES = torch.rand(16, 1, generator=torch.Generator().manual_seed(0))


def far_from_float(network: QuantizedNetwork) -> float:
    with torch.no_grad(), unrounded(network):
        expected = network.network(TIMES)
    return float((network.network(TIMES).detach() - expected).norm() / expected.norm())


def test_angles_of_many_turns_are_found() -> None:
    network = calibrated(seeded(TimeStep(1000.0)), call(TIMES))
    findings = [one for one in network.findings if one.kind is FindingKind.COARSE_ANGLES]
    assert [one.module for one in findings] == ["sin", "cos"]
    assert "radians in steps of 3." in findings[0].problem
    assert far_from_float(network) > 0.2  # which is why


def test_what_the_table_says_helps() -> None:
    overrides = {"mul*": "w8a16", "sin": "w8a16", "cos": "w8a16"}
    network = calibrated(seeded(TimeStep(1000.0)), call(TIMES), overrides=overrides)
    assert not network.findings
    assert far_from_float(network) < 0.03


def test_angles_of_one_turn_are_fine() -> None:
    network = calibrated(seeded(TimeStep(6.0)), call(TIMES))
    assert not [one for one in network.findings if one.kind is FindingKind.COARSE_ANGLES]
    assert far_from_float(network) < 0.03
