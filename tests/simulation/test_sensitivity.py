"""The sensitivity of layers: one at a time, against a computation by hand, and nothing left behind."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.report.sensitivity import print_sensitivity, write_sensitivity
from lightning_quant.simulation.precisions import quantized_layers
from lightning_quant.simulation.sensitivity import layer_sensitivity
from tests.callbacks.rung_cases import fragile_first, images
from tests.simulation.networks import calibrated, call
from tests.simulation.techniques.benches import batches, bench_of
from tests.small import assert_same_tensors


def test_the_fragile_layer_comes_first() -> None:
    network, _ = bench_of(fragile_first, precision="w4a16")
    found = layer_sensitivity(network, batches(), 32)
    assert (found[0].layer, found[0].part, found[0].bits) == ("first", "weights", 4)
    assert [one.sqnr_db for one in found] == sorted(one.sqnr_db for one in found)
    assert sum(one.share for one in found if one.part == "weights") == pytest.approx(1)


def test_the_ratio_is_that_of_one_layer_alone() -> None:
    network, bench = bench_of(precision="w4a8")
    (second,) = (
        one for one in layer_sensitivity(network, batches(), 32) if (one.layer, one.part) == ("second", "weights")
    )
    original = bench.prepared.network
    with torch.no_grad():
        expected = original(images()[:32])
        weight = original.second.weight
        quantizer = quantized_layers(network)["second"].param_quantizers["weight"]
        original.second.weight = nn.Parameter(quantizer(weight).as_subclass(Tensor))
        noise = original(images()[:32]) - expected
    ratio = 10 * math.log10(float(expected.square().sum() / noise.square().sum()))
    assert second.sqnr_db == pytest.approx(ratio, abs=1e-2)
    assert second.quantizers == ("second.param_quantizers.weight",)


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
    for layer, count in operations.items():
        assert shares[layer] == pytest.approx(count / total)


@pytest.mark.parametrize("breaks", [False, True])
def test_the_network_is_left_as_it_was(breaks: bool) -> None:
    network, _ = bench_of(precision="w4a8")
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
    network, _ = bench_of(precision="w4a8")
    found = layer_sensitivity(network, batches(), 8)
    picture, table = write_sensitivity(found, tmp_path / "out", "Chain at w4a8")
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(table.read_text().splitlines()) == len(found) + 1
    print_sensitivity(found, "Chain at w4a8", rows=2)
    assert f"2 of {len(found)}, worst first" in capsys.readouterr().out
