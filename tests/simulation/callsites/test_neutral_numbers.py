"""Arithmetic that leaves a tensor as it is: exporters drop it, so nothing is rounded there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.helpers.networks import calibrated, call
from tests.helpers.qdq import NO_EMULATOR, equal_everywhere, operations

IMAGES = torch.randn(8, 8, 12, 12, generator=torch.Generator().manual_seed(0))
Neutral = Callable[[Tensor], Tensor]


def augmented(y: Tensor) -> Tensor:
    y = y.clone()  # views that a chunk is one of cannot be written into
    y += 0
    y *= 1.0
    y -= 0.0
    y /= 1
    return y


NEUTRAL: dict[str, Neutral] = {
    "nothing is added": lambda y: y + 0,
    "added to nothing": lambda y: 0.0 + y,
    "sum of one": lambda y: sum([y]),  # type: ignore[return-value]
    "nothing is subtracted": lambda y: y - 0.0,
    "times one": lambda y: y * 1,
    "one times": lambda y: 1.0 * y,
    "times truth": lambda y: torch.mul(y, True),
    "over one": lambda y: y / 1.0,
    "by function": lambda y: torch.div(torch.add(y, 0), 1),
    "first power": lambda y: y**1,
    "by keyword": lambda y: torch.add(y, other=0),
    "all by keyword": lambda y: torch.mul(input=y, other=1),
    "so many times nothing": lambda y: torch.sub(y, 0, alpha=3),
    "not rounded": lambda y: torch.div(y, 1, rounding_mode=None),
    "a number of NumPy": lambda y: y * np.float32(1),
    "power by keyword": lambda y: torch.pow(y, exponent=1.0),
    "in place": augmented,
    "in place, by method": lambda y: y.clone().mul_(1.0).add_(0, alpha=2).div_(1),
}
# What looks like it.
OTHER: dict[str, Neutral] = {
    "subtracted from nothing": lambda y: 0 - y,
    "over the tensor": lambda y: 1 / (y + 2),
    "one is added": lambda y: y + 1,
    "power of zero": lambda y: y**2,
    "so many times another": lambda y: torch.add(y, y, alpha=0.5),
}


class Between(nn.Module):
    """An operation between a part of what one convolution computes, and the next one."""

    def __init__(self, operation: Neutral) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 16, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.operation = operation
        with torch.no_grad():  # the other part decides on the range of both
            self.first.weight[:8] *= 4

    def forward(self, x: Tensor) -> Tensor:
        part = self.first(x).relu().chunk(2, 1)[1]
        made: Tensor = self.second(self.operation(part))
        return made


class Running(nn.Module):
    """A running sum that begins with a number: the first addition does nothing, those after it do."""

    def __init__(self, first: float | None) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(2, 2, 3, padding=1) for _ in range(3))
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.tensor([4.0] * 2 + [1.0] * 6)[:, None, None]
        parts, made = x.chunk(4, 1), []
        known: Tensor | float | None = self.first
        for convolution, part in zip(self.convolutions, parts[1:], strict=True):
            known = convolution(part if known is None else part + known).relu()
            made.append(known)
        return torch.cat([parts[0], *made], 1)


def between(operation: Neutral) -> Between:
    torch.manual_seed(0)
    return Between(operation).eval()


def running(first: float | None) -> Running:
    torch.manual_seed(0)
    return Running(first).eval()


@pytest.mark.parametrize("name", NEUTRAL)
def test_nothing_is_rounded_there(name: str, tmp_path: Path) -> None:
    networks = [calibrated(between(one), call(IMAGES)) for one in (NEUTRAL[name], lambda y: y)]
    assert len(set(networks[0].quantizers())) == len(set(networks[1].quantizers()))
    with torch.no_grad():
        assert torch.equal(networks[0](IMAGES), networks[1](IMAGES))


@pytest.mark.parametrize("name", OTHER)
def test_other_numbers_are_rounded(name: str) -> None:
    networks = [calibrated(between(one), call(IMAGES)) for one in (OTHER[name], lambda y: y)]
    assert len(set(networks[0].quantizers())) > len(set(networks[1].quantizers()))


def test_running_sum_keeps_its_places() -> None:
    one, other = (calibrated(running(first), call(IMAGES)) for first in (0, None))
    with torch.no_grad():
        assert torch.equal(one(IMAGES), other(IMAGES))


def test_copy_can_be_written_into() -> None:
    def written(y: Tensor) -> Tensor:
        made = y + 0.0
        made[:, 0] = 0.25
        return made * y

    network = between(written)
    with torch.no_grad():
        expected = network(IMAGES)
        actual = calibrated(between(written), call(IMAGES))(IMAGES)
    assert np.abs((actual - expected).numpy()).max() < 0.1


@pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))
@pytest.mark.parametrize("name", ["nothing is added", "by keyword", "in place"])
def test_on_the_npu_with_16_bits(name: str, tmp_path: Path) -> None:
    known = calibrated(between(NEUTRAL[name]), call(IMAGES), precision="w8a16")
    model = equal_everywhere(known, IMAGES[:1], tmp_path, npu_db=80)
    assert not operations(model, "Add")
