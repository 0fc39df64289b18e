"""The sensitivity of layers: one at a time, against a computation by hand, and nothing left behind."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.report.sensitivity import print_sensitivity, write_sensitivity
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.precisions import quantized_layers
from lightning_quant.simulation.sensitivity import layer_sensitivity
from tests.callbacks.rung_cases import fragile_first, images, unequal
from tests.helpers.networks import calibrated, call
from tests.helpers.small import assert_same_tensors
from tests.ladder.rungs.contexts import batches, context_of


def test_the_fragile_layer_comes_first() -> None:
    network, _ = context_of(fragile_first, precision="w4a16")
    found = layer_sensitivity(network, batches(), 32)
    assert (found[0].layer, found[0].part, found[0].bits) == ("first", "weights", 4)
    assert [one.sqnr_db for one in found] == sorted(one.sqnr_db for one in found)
    assert sum(one.share for one in found if one.part == "weights") == pytest.approx(1)


def test_the_ratio_is_that_of_one_layer_alone() -> None:
    network, context = context_of(precision="w4a8")
    (second,) = (
        one for one in layer_sensitivity(network, batches(), 32) if (one.layer, one.part) == ("second", "weights")
    )
    original = context.prepared.network
    with torch.no_grad():
        expected = original(images()[:32])
        weight = original.second.weight
        quantizer = quantized_layers(network)["second"].param_quantizers["weight"]
        original.second.weight = nn.Parameter(quantizer(weight).as_subclass(Tensor))
        noise = original(images()[:32]) - expected
    ratio = 10 * math.log10(float(expected.square().sum() / noise.square().sum()))
    assert second.sqnr_db == pytest.approx(ratio, abs=1e-2)
    assert second.quantizers == ("second.param_quantizers.weight",)


@pytest.mark.parametrize("precision", ["w4a8", "w8a8", "w8a16"])
def test_every_ratio_is_that_of_rounding_by_hand_at_the_places_named(precision: str) -> None:
    network, context = context_of(unequal, precision=precision)
    found = layer_sensitivity(network, batches(), 32)
    assert {one.part for one in found} == {"weights", "activations"}
    with torch.no_grad():
        expected = context.prepared.network(images()[:32])
        for one in found:
            noise = _rounded(context.prepared.network, network, one.quantizers)(images()[:32]) - expected
            ratio = 10 * math.log10(float(expected.square().sum() / noise.square().sum()))
            assert one.sqnr_db == pytest.approx(ratio, abs=1e-2)


def _rounded(network: nn.Module, quantized: QuantizedNetwork, names: tuple[str, ...]) -> nn.Module:
    """A copy of a float network that rounds where some quantizers are, and nowhere else."""
    network = copy.deepcopy(network)
    for name in names:
        quantizer: Any = quantized.network.get_submodule(name)
        layer, kind, which = name.rsplit(".", 2)
        module: Any = network.get_submodule(layer)

        def rounded(value: Tensor, quantizer: Any = quantizer) -> Tensor:
            return quantizer(value).as_subclass(Tensor)

        if kind == "param_quantizers":
            setattr(module, which, nn.Parameter(rounded(getattr(module, which))))
        elif kind == "output_quantizers":
            module.register_forward_hook(lambda _, __, output, rounded=rounded: rounded(output))
        else:
            module.register_forward_pre_hook(lambda _, args, rounded=rounded: (rounded(args[0]), *args[1:]))
    return network


def test_a_layer_that_rounds_nothing_comes_last() -> None:
    network, _ = context_of(_on_the_grid, precision="w4a16")
    last = layer_sensitivity(network, batches(), 8)[-1]
    assert (last.layer, last.part, last.sqnr_db) == ("second", "weights", math.inf)


def _on_the_grid(network: Any) -> None:
    network.second.weight.zero_()


def test_multiply_accumulates_are_counted() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3, padding=1)
            self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
            self.head = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.depthwise(self.conv(x)).mean((2, 3)))

    network = calibrated(Net(), precision="w8a8")
    found = layer_sensitivity(network, [call(torch.randn(2, 3, 8, 8))], 2)
    shares = {one.layer: one.share for one in found if one.part == "activations"}
    operations = {"conv": 64 * 6 * 27, "depthwise": 64 * 6 * 9, "head": 6 * 4}
    total = sum(operations.values())
    # what goes into a layer gets finer where it is computed
    computed = {"conv": ["conv"], "depthwise": ["conv", "depthwise"], "head": ["head"]}
    for layer, names in computed.items():
        assert shares[layer] == pytest.approx(sum(operations[name] for name in names) / total)


def test_multiply_accumulates_of_a_transposed_convolution_are_counted() -> None:
    network = calibrated(nn.Sequential(nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 2, 2, stride=2)), precision="w8a8")
    found = layer_sensitivity(network, [call(torch.randn(2, 3, 8, 8))], 2)
    shares = {one.layer: one.share for one in found if one.part == "activations"}
    assert shares["0"] == pytest.approx(64 * 6 * 3 / (64 * 6 * 3 + 64 * 6 * 2 * 4))


@pytest.mark.parametrize("breaks", [False, True])
def test_the_network_is_left_as_it_was(breaks: bool) -> None:
    network, _ = context_of(precision="w4a8")
    snapshot = network.snapshot()
    places = _places(network)
    calls = batches()
    if breaks:
        calls[1] = call(torch.zeros(1, 5, 8, 8))
        with pytest.raises(RuntimeError):
            layer_sensitivity(network, calls, 64)
    else:
        layer_sensitivity(network, calls, 64)
    assert_same_tensors(network.state_dict(), snapshot)
    assert _places(network) == places


@pytest.mark.parametrize("passes", [1, 3, 5])
def test_a_pass_that_fails_leaves_no_trace(passes: int) -> None:
    network, _ = context_of(precision="w4a8")
    snapshot, places, answer = network.snapshot(), _places(network), network(images())
    done = 0

    def fail(*_: Any) -> None:
        nonlocal done
        done += 1
        if done == passes:
            raise RuntimeError("out of memory")

    handle = network.network.head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        layer_sensitivity(network, batches(), 32)
    handle.remove()
    assert done == passes
    assert_same_tensors(network.state_dict(), snapshot)
    assert _places(network) == places
    assert torch.equal(network(images()), answer)
    assert not any(module._forward_hooks for module in network.network.modules())


def _places(network: Any) -> list[tuple[str, int]]:
    return [(name, id(module)) for name, module in network.network.named_modules()]


def test_a_concatenation_can_be_looked_at() -> None:
    class Cat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1)
            self.last = nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.cat([self.a(x), self.b(x)], 1))

    network = calibrated(Cat(), precision="w4a8")
    found = layer_sensitivity(network, [call(torch.randn(2, 3, 8, 8))], 2)
    assert {one.layer for one in found if one.part == "weights"} == {"a", "b", "last"}
    assert any(one.part == "activations" for one in found)


def test_the_picture_and_the_table(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    network, _ = context_of(precision="w4a8")
    found = layer_sensitivity(network, batches(), 8)
    picture, table = write_sensitivity(found, tmp_path / "out", "Chain at w4a8")
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(table.read_text().splitlines()) == len(found) + 1
    print_sensitivity(found, "Chain at w4a8", rows=2)
    assert f"2 of {len(found)}, worst first" in capsys.readouterr().out


def test_masked_scores_do_not_hide_the_noise() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.second(self.first(x))
            return y, torch.full_like(y, -math.inf)

    network = calibrated(Masked(), precision="w4a16")
    found = layer_sensitivity(network, [call(torch.randn(2, 3, 8, 8))], 2)
    assert all(math.isfinite(one.sqnr_db) for one in found if one.part == "weights")


def test_multiply_accumulates_of_a_transposed_convolution() -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(3, 5, 2, stride=2)
            self.last = nn.Conv2d(5, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.up(x))

    network = calibrated(Up(), precision="w8a8")
    found = layer_sensitivity(network, [call(torch.randn(2, 3, 8, 8))], 2)
    shares = {one.layer: one.share for one in found if one.part == "activations"}
    operations = {"up": 64 * 3 * 5 * 4, "last": 256 * 5 * 2}
    assert shares["up"] == pytest.approx(operations["up"] / sum(operations.values()))
