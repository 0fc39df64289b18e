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
from lightning_quant.ladder.rungs.cle import equalize
from lightning_quant.simulation.inputs import NetworkInputs
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.prepare import prepare
from lightning_quant.simulation.switched_off import weights_only
from tests.callbacks.rung_cases import images
from tests.ladder.rungs.contexts import context_of


class OwnConv(nn.Conv2d):
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class PaddingConv(nn.Conv2d):
    """One that pads by itself, as EfficientNet's and timm's do: no convolution of PyTorch computes the same."""

    def __init__(self, *args: Any, padding: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pads = [padding] * 4

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, self.pads), self.weight, self.bias, groups=self.groups)


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class OwnNorm(nn.BatchNorm2d):
    """A batch norm with its activation, as timm has them."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))  # type: ignore[no-any-return]


def activated(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    return norm(x) if isinstance(norm, OwnNorm) else F.relu(norm(x))  # type: ignore[no-any-return]


class Block(nn.Module):
    """A bottleneck with a shortcut, whose middle layer is depthwise."""

    def __init__(self, conv: Callable[..., nn.Conv2d], norm: Callable[..., nn.BatchNorm2d], channels: int) -> None:
        super().__init__()
        self.expand = conv(channels, 12, 1, bias=False)
        self.norm1 = norm(12)
        self.depthwise = conv(12, 12, 3, padding=1, groups=12, bias=False)
        self.norm2 = norm(12)
        self.project = conv(12, channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = activated(self.norm1, self.expand(x))
        y = activated(self.norm2, self.depthwise(y))
        return x + self.norm3(self.project(y))


class Net(nn.Module):
    def __init__(
        self,
        conv: Callable[..., nn.Conv2d],
        linear: Callable[..., nn.Linear],
        norm: Callable[..., nn.BatchNorm2d],
    ) -> None:
        super().__init__()
        self.stem = conv(3, 6, 3, padding=1)
        self.norm = norm(6)
        self.blocks = nn.Sequential(Block(conv, norm, 6), Block(conv, norm, 6))
        self.head = linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(activated(self.norm, self.stem(x)))
        return self.head(y.mean((2, 3)))


def build(own: type[nn.Conv2d] | None) -> Net:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        network = Net(own, OwnLinear, OwnNorm) if own else Net(nn.Conv2d, nn.Linear, nn.BatchNorm2d)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.2, 3)
                nn.init.normal_(module.bias)
        for _ in range(10):
            network.train()(images())
    return network.eval()


def applied(name: str, own: type[nn.Conv2d] | None, **options: Any) -> tuple[QuantizedNetwork, RungContext, str]:
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


@pytest.mark.parametrize(
    ("name", "conv"),
    # AIMET equalizes no layers that have a Pad between them
    [*((name, OwnConv) for name in QUICK), *((name, PaddingConv) for name in QUICK if name != "cle")],
)
def test_a_rung_does_to_a_function_what_it_does_to_a_layer(name: str, conv: type[nn.Conv2d]) -> None:
    plain, _, plain_note = applied(name, own=None, **QUICK[name])
    own, _, own_note = applied(name, own=conv, **QUICK[name])
    own.restore(own.snapshot())  # as after a rung that is no better
    weights = {key: value for key, value in plain.network.named_parameters() if "quantizers" not in key}
    other = {key: value for key, value in own.network.named_parameters() if "quantizers" not in key}
    assert weights.keys() == other.keys()
    for key, value in weights.items():
        assert torch.allclose(value, other[key], rtol=1e-5, atol=1e-6), (key, plain_note, own_note)
    with torch.no_grad():
        assert torch.allclose(plain.network(images()), own.network(images()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["bias_correction", "bn_reestimation"])
def test_a_correction_behind_equalization_does_the_same(name: str) -> None:
    """It compares the float network before and after, which was called in between."""
    corrected = []
    for conv in (None, OwnConv):
        quantized, context, _ = applied("cle", own=conv)
        assert quantized.equalized
        (rung,) = parse_rungs([name])
        with torch.no_grad():
            rung.apply(quantized, context)
            corrected.append(quantized.network(images()))
    assert torch.allclose(*corrected, rtol=1e-4, atol=1e-4)


def test_adaround_says_that_it_cannot() -> None:
    (rung,) = parse_rungs(["adaround"])
    plain, context = context_of(network=build(own=None), precision="w4a8")
    assert rung.skip_reason(plain, context) is None
    own, context = context_of(network=build(own=OwnConv), precision="w4a8")
    assert "stem.conv2d" in (rung.skip_reason(own, context) or "")


class SharedTwice(nn.Module):
    """A convolution that is called twice, and one whose bias is computed in each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.twice = nn.Conv2d(6, 6, 3, padding=1)
        self.weight = nn.Parameter(torch.empty(6, 6, 1, 1))
        self.bias, self.gain = nn.Parameter(torch.empty(6)), nn.Parameter(torch.empty(6))
        self.head = nn.Linear(6, 4)
        for one in (self.weight, self.bias, self.gain):
            nn.init.normal_(one)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.twice(F.relu(self.twice(F.relu(self.stem(x))))))
        return self.head(F.conv2d(y, self.weight, self.bias * self.gain).mean((2, 3)))


def test_a_bias_is_corrected_once_and_only_where_it_is_a_parameter() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        network = SharedTwice().eval()
    (rung,) = parse_rungs(["bias_correction"])
    quantized, context = context_of(network=network, precision="w4a16")
    before = {name: value.clone() for name, value in quantized.network.named_parameters()}
    with torch.no_grad():
        assert rung.apply(quantized, context) == "corrected 3 biases"  # of the stem, the one called twice, and the head
        now: Any = quantized.network
        shift = now.twice.bias - before["twice.bias"]
        with weights_only(quantized):
            left = mean_of_calls(context.float_network, images()) - mean_of_calls(now, images())
    # the mean of what both calls were off by; the sum would be as wrong as nothing
    assert float(left.abs().max()) < 0.2 * float(shift.abs().max())
    assert torch.equal(now.gain, before["gain"])
    assert torch.equal(now.bias, before["bias"])


def mean_of_calls(network: Any, x: Tensor) -> Tensor:
    """The mean of each channel over both calls of the layer that is called twice."""
    outputs: list[Tensor] = []
    handle = network.twice.register_forward_hook(lambda module, args, output: outputs.append(output.mean((0, 2, 3))))
    network(x)
    handle.remove()
    return torch.stack(outputs).mean(0)


def test_equalization_leaves_computed_weights_alone() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        convs = [nn.Conv2d(channels, 8, 3, padding=1) for channels in (3, 8, 8, 8)]
        nn.utils.parametrizations.weight_norm(convs[0])
        nn.utils.parametrizations.weight_norm(convs[2])
        network = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), *(nn.Conv2d(8, 8, 1), nn.ReLU()), *convs[2:])
    prepared = prepare(network.eval(), NetworkInputs((images()[:1],)))
    equalized, groups = equalize(prepared)  # or it raises, since it computes something else
    assert groups == 1
    before = dict(prepared.network.named_parameters())
    changed = {name for name, value in equalized.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {"2.weight", "2.bias", "4.weight"}
