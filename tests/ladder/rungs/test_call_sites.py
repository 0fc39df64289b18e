"""Rungs do the same to a layer of PyTorch and to a module that calls the function itself: all networks are alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.ladder.registry import parse_rungs
from lightning_quant.ladder.rung import RungContext
from lightning_quant.simulation.network import QuantizedNetwork
from tests.callbacks.rung_cases import images
from tests.ladder.rungs.contexts import context_of


class OwnConv(nn.Conv2d):
    """A subclass with a forward of its own, as EfficientNet, timm and detectron2 have."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Block(nn.Module):
    """A bottleneck with a shortcut, whose middle layer is depthwise."""

    def __init__(self, conv: Callable[..., nn.Conv2d], channels: int) -> None:
        super().__init__()
        self.expand = conv(channels, 12, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(12)
        self.depthwise = conv(12, 12, 3, padding=1, groups=12, bias=False)
        self.norm2 = nn.BatchNorm2d(12)
        self.project = conv(12, channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.expand(x)))
        y = F.relu(self.norm2(self.depthwise(y)))
        return x + self.norm3(self.project(y))


class Net(nn.Module):
    def __init__(self, conv: Callable[..., nn.Conv2d], linear: Callable[..., nn.Linear]) -> None:
        super().__init__()
        self.stem = conv(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.blocks = nn.Sequential(Block(conv, 6), Block(conv, 6))
        self.head = linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.head(y.mean((2, 3)))


def build(own: bool) -> Net:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        network = Net(OwnConv, OwnLinear) if own else Net(nn.Conv2d, nn.Linear)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.2, 3)
                nn.init.normal_(module.bias)
        for _ in range(10):
            network.train()(images())
    return network.eval()


def applied(name: str, own: bool, **options: Any) -> tuple[QuantizedNetwork, RungContext, str]:
    (rung,) = parse_rungs([{name: options} if options else name])
    network, context = context_of(network=build(own), precision="w4a8")
    assert rung.skip_reason(network, context) is None
    torch.manual_seed(0)  # AIMET draws samples
    with torch.no_grad():
        note = rung.apply(network, context)
    return network, context, note


QUICK = {
    "cle": {},
    "bias_correction": {},
    "bn_reestimation": {},
    "seq_mse": {"candidates": 5, "samples": 32},
    "mixed": {},
    "rounding": {"iterations": 20, "samples": 32},
}


@pytest.mark.parametrize("name", QUICK)
def test_a_rung_does_to_a_function_what_it_does_to_a_layer(name: str) -> None:
    plain, _, plain_note = applied(name, own=False, **QUICK[name])
    own, _, own_note = applied(name, own=True, **QUICK[name])
    weights = {key: value for key, value in plain.network.named_parameters() if "quantizers" not in key}
    other = {key: value for key, value in own.network.named_parameters() if "quantizers" not in key}
    assert weights.keys() == other.keys()
    for key, value in weights.items():
        assert torch.allclose(value, other[key], rtol=1e-5, atol=1e-6), (key, plain_note, own_note)
    with torch.no_grad():
        assert torch.allclose(plain.network(images()), own.network(images()), rtol=1e-4, atol=1e-4)


def test_adaround_says_that_it_cannot() -> None:
    (rung,) = parse_rungs(["adaround"])
    plain, context = context_of(network=build(own=False), precision="w4a8")
    assert rung.skip_reason(plain, context) is None
    own, context = context_of(network=build(own=True), precision="w4a8")
    assert "stem.conv2d" in (rung.skip_reason(own, context) or "")
