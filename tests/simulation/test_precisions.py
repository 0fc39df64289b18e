"""The precision of single layers: what changes with them, and what AIMET cannot change."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.errors import ConfigurationError
from lightning_quant.precision import Precision
from lightning_quant.simulation.calibrate import calibrate
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.precisions import layer_precision, matching, quantized_layers, set_precisions
from tests.helpers.networks import Body, Chain, Untraceable, calibrated, call, images, seeded
from tests.helpers.small import assert_same_tensors

FINEST = Precision(8, 16)


class Cat(nn.Module):
    """Two convolutions, their outputs side by side, and a convolution of both."""

    def __init__(self, last: int = 8) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 1)
        self.b = nn.Conv2d(3, 4, 3, padding=1)
        self.last = nn.Conv2d(last, 2, 1)
        seeded(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.a(x), self.b(x)], 1))


class CatInput(Cat):
    """The images themselves next to the output of a convolution of them."""

    def __init__(self) -> None:
        super().__init__(last=7)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.a(x), x], 1))


class CatLater(Cat):
    """Something between the convolutions and the concatenation."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.a(x).relu(), self.b(x).sigmoid()], 1))


def bits(network: QuantizedNetwork) -> dict[str, int]:
    """Bit width of every quantizer; a quantizer that is shared counts under each of its names."""
    modules = network.network.named_modules(remove_duplicate=False)
    return {name: module.bitwidth for name, module in modules if hasattr(module, "bitwidth")}


def changed(network: QuantizedNetwork, before: dict[str, int]) -> dict[str, int]:
    """Other bits than before, conversions among them."""
    after = bits(network)
    return {name: after[name] for name in after if after[name] != before.get(name)}


def test_a_layers_weights_change_with_what_it_takes_and_returns_and_its_taker_converts() -> None:
    network = calibrated(Chain(), precision="w4a8")
    before = bits(network)
    set_precisions(network, {"first": FINEST})
    assert changed(network, before) == {
        "first.param_quantizers.weight": 8,
        "first.input_quantizers.0": 16,
        "relu.output_quantizers.0": 16,  # computed with it
        "second.input_quantizers.0": 8,
    }
    set_precisions(network, {"second": FINEST})
    assert bits(network)["second.output_quantizers.0"] == 16
    assert "second.input_quantizers.0" not in bits(network)


def test_a_layer_that_an_override_gives_the_networks_own_precision_keeps_it() -> None:
    network = calibrated(Chain(), precision="w8a8", overrides={"first": "w8a8"})
    before = bits(network)
    set_precisions(network, {"second": FINEST})
    assert changed(network, before) == {"second.input_quantizers.0": 16, "second.output_quantizers.0": 16}
    raised = Precision(8, 16)
    set_precisions(network, {"first": raised})  # a rung may raise it all the same, and the next one leaves it so
    network.promoted = {"first": raised}
    set_precisions(network, {"second": raised})
    assert bits(network)["first.input_quantizers.0"] == 16


def test_finer_weights_of_such_a_layer_raise_nothing_else() -> None:
    overrides = {"first": "w4a8", "second": "w4a16"}
    network = calibrated(Chain(), precision="w4a16", overrides=overrides)
    before = bits(network)
    set_precisions(network, {"second": Precision(8, 16)})
    assert changed(network, before) == {"second.param_quantizers.weight": 8}


def test_weights_alone_can_change() -> None:
    network = calibrated(Chain(), precision="w4a8")
    before = bits(network)
    set_precisions(network, {"second": Precision(8, 8)})
    assert changed(network, before) == {"second.param_quantizers.weight": 8}


def test_what_goes_into_a_layer_behind_a_concatenation_is_raised_at_both_branches() -> None:
    network = calibrated(Cat(), precision="w4a8")
    before = bits(network)
    set_precisions(network, {"last": FINEST})
    after = changed(network, before)
    assert after["last.param_quantizers.weight"] == 8
    layers = quantized_layers(network)
    assert [layers[name].output_quantizers[0].bitwidth for name in ("a", "b")] == [16, 16]
    assert not [name for name in after if name.startswith(("a.param", "b.param"))]


@pytest.mark.parametrize("kind", [Cat, CatInput, CatLater])
@pytest.mark.parametrize(("precision", "gain"), [("w4a8", 10), ("w8a8", 3)])
def test_a_concatenation_still_runs_restores_and_has_finer_outputs(
    kind: type[Cat], precision: str, gain: float
) -> None:
    float_network = kind().eval()
    network = calibrated(float_network, precision=precision)
    snapshot = network.snapshot()

    def error() -> float:
        with torch.no_grad():
            return float((network(images(8)) - float_network(images(8))).square().sum())

    coarse = error()
    names = [name for name in ("a", "b", "last") if name in quantized_layers(network)]
    set_precisions(network, dict.fromkeys(names, FINEST))
    calibrate(network, [call(images(8))])
    assert error() < coarse / gain
    network.restore(snapshot)
    assert_same_tensors(network.state_dict(), snapshot)
    assert error() == coarse


def test_a_layer_between_functional_operations_is_made_finer() -> None:
    network = calibrated(Untraceable(Body()), precision="w4a8")
    before = bits(network)
    set_precisions(network, {"inner.head": FINEST})
    assert changed(network, before) == {
        "inner.head.param_quantizers.weight": 8,
        "inner.head.output_quantizers.0": 16,
        "inner.relu.relu_1.output_quantizers.0": 16,
        "inner.add.input_quantizers.0": 16,
        "inner.add.input_quantizers.1": 16,
    }
    calibrate(network, [call(images(8))])
    network(images(2)).sum().backward()


def test_a_concatenation_itself_is_made_finer_with_all_that_it_joins() -> None:
    network = calibrated(Cat(), precision="w4a8")
    before = bits(network)
    (cat,) = (name for name in quantized_layers(network) if "cat" in name)
    set_precisions(network, {cat: FINEST})
    layers = quantized_layers(network)
    assert [layers[name].output_quantizers[0].bitwidth for name in ("a", "b")] == [16, 16]
    assert not [name for name in changed(network, before) if "param" in name]
    calibrate(network, [call(images(8))])
    network(images(2)).sum().backward()


def test_a_copy_of_a_network_can_be_changed_too() -> None:
    network = calibrated(Body(), precision="w4a8")
    other = copy.deepcopy(network)
    for one in (network, other):
        set_precisions(one, {"branch": FINEST})
    assert bits(other) == bits(network)
    assert torch.equal(other(images(2)), network(images(2)))


@pytest.mark.parametrize("estimator", ["min_max", "percentile", "tf_enhanced"])
def test_how_ranges_are_observed_stays(estimator: str) -> None:
    network = calibrated(Chain(), precision="w4a8", range_estimator=estimator)
    observers = {name: m.encoding_analyzer for name, m in network.network.named_modules() if hasattr(m, "bitwidth")}
    set_precisions(network, {"second": FINEST})
    assert all(network.network.get_submodule(name).encoding_analyzer is one for name, one in observers.items())


def test_globs_name_layers_and_the_last_wins() -> None:
    network = calibrated(Body(), precision="w4a8")
    chosen = matching(network, {"*": Precision(8, 8), "h*": FINEST})
    assert chosen.keys() == quantized_layers(network).keys()
    assert chosen["head"] == FINEST
    assert {value for name, value in chosen.items() if name != "head"} == {Precision(8, 8)}
    with pytest.raises(ConfigurationError, match=r"overrides: 'stem\*' matches no layer.*conv"):
        matching(network, {"stem*": FINEST})


def test_the_precision_asked_for_is_that_of_the_raise_the_override_or_the_network() -> None:
    network = calibrated(Body(), precision="w4a8", overrides={"branch": Precision(8, 8), "head": Precision(8, 8)})
    network.promoted = {"head": FINEST}
    assert [layer_precision(network, name) for name in ("conv", "branch", "head")] == [
        Precision(4, 8),
        Precision(8, 8),
        FINEST,
    ]
