"""Inputs of one layer that look alike are told apart: by the place that they have, not by their size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.deploy.blame.blame import blame
from tests.helpers.networks import calibrated, call, images, seeded

WORDS = torch.randint(0, 30, (8, 6), generator=torch.Generator().manual_seed(0))


class Words(nn.Module):
    """Two embeddings of one size, of which the file rounds one: the other is the same in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.head = nn.Embedding(30, 8), nn.Embedding(6, 8), nn.Linear(8, 4)
        self.register_buffer("order", torch.arange(6)[None])
        seeded(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.words(x) + self.places(self.order))


class ZeroBias(nn.Module):
    """A scaled tensor and a bias that has not learned anything, with the smallest range there is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
        seeded(self)
        self.bias = nn.Parameter(torch.zeros(1, 6, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x) * 0.25 + self.bias)


class Dense(nn.Module):
    """Every layer reads all before it: tensors of one size and one grid go into each concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 * (index + 1), 3, 3, padding=1) for index in range(4))
        seeded(self)

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for layer in self.layers:
            found.append(layer(torch.cat(found, 1)))
        return torch.cat(found[::-1], 1)


@pytest.mark.parametrize(("make", "given"), [(Words, WORDS), (ZeroBias, images(8)), (Dense, images(8))])
@pytest.mark.parametrize("precision", ["w8a8", "w8a16"])
def test_no_layer_is_named(make: Callable[[], nn.Module], given: Tensor, precision: str) -> None:
    found = blame(calibrated(make(), call(given), precision=precision), [call(given[:2])], against="file")
    assert not found.guilty, str(found)
    assert max(one.own.differing for one in found.layers) < 0.01, str(found)
