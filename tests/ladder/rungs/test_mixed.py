"""Mixed precision on networks whose weakness is known: which layers are raised, and that it is said and kept."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.ladder.rung import Rung, RungContext
from lightning_quant.ladder.rungs.mixed import MixedPrecision
from lightning_quant.precision import Precision
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.precisions import layer_precision, quantized_layers
from lightning_quant.simulation.sensitivity import layer_sensitivity
from tests.callbacks.rung_cases import fragile_first, images, trained, unequal
from tests.helpers.small import assert_same_tensors
from tests.ladder.rungs.contexts import batches, context_of


class Branches(nn.Module):
    """Two convolutions side by side: their outputs share one range."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.a(x), self.b(x)], 1)).mean((2, 3))


def branches() -> Branches:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Branches().eval()


def wide_in_the_middle(network: Any) -> None:
    """A channel of huge numbers between the convolutions that the second hardly looks at: activations suffer."""
    network.norm.weight[0] *= 1e3
    network.norm.bias[0] *= 1e3
    network.second.weight[:, 0] /= 1e3


def bits(network: QuantizedNetwork) -> dict[str, int]:
    modules = network.network.named_modules(remove_duplicate=False)
    return {name: module.bitwidth for name, module in modules if hasattr(module, "bitwidth")}


def raised_bits(network: QuantizedNetwork, before: dict[str, int]) -> dict[str, int]:
    """Other bits than before, but for what converts between them."""
    return {name: now for name, now in bits(network).items() if name in before and now != before[name]}


def apply(rung: Rung, network: QuantizedNetwork, context: RungContext) -> str:
    with torch.no_grad():
        return rung.apply(network, context)


def counted(context: RungContext) -> list[float]:
    """Every measurement from now on."""
    measure, found = context.measure, []

    def measured() -> float:
        found.append(measure())
        return found[-1]

    context.measure = measured
    return found


def test_only_activations_are_promoted_where_only_they_suffer() -> None:
    network, context = context_of(wide_in_the_middle, precision="w8a8", enough=25.0)
    assert context.measure() < 10
    before = bits(network)
    weights = {name: value.clone() for name, value in network.named_parameters() if name.endswith(".weight")}
    ranges = {name: value.clone() for name, value in network.named_parameters() if "param_quantizers" in name}
    changed = apply(MixedPrecision(budget=1.0), network, context)
    assert context.measure() > 25
    assert changed.startswith("raised 1 (")
    assert changed.endswith("of the multiply-accumulates): second (activations)")
    assert network.promoted == {"second": Precision(8, 16)}
    # the layer before it computes at 16 bits too, to give it more; the one behind it converts
    assert raised_bits(network, before) == dict.fromkeys(
        ("first.input_quantizers.0", "relu.output_quantizers.0", "relu2.output_quantizers.0"), 16
    )
    assert bits(network)["head.input_quantizers.0"] == 8
    # nothing but bit widths and ranges of activations
    assert all(torch.equal(network.get_parameter(name), value) for name, value in weights.items())
    assert all(torch.equal(network.get_parameter(name), value) for name, value in ranges.items())


def test_the_fewest_layers_that_suffice_are_promoted() -> None:
    network, context = context_of(precision="w4a8")
    order = [one for one in layer_sensitivity(network, batches()) if one.part == "weights" or one.bits == 8]
    mixed = MixedPrecision(budget=1.0)
    # what each number of layers, in order of sensitivity, reaches
    start, reached = network.snapshot(), []
    for count in range(1, len(order) + 1):
        with torch.no_grad():
            mixed._raise(network, order[:count], start, context)
        reached.append(context.measure())
    network.restore(start)
    assert reached[-1] > reached[0] + 5
    for count, metric in enumerate(reached, start=1):
        if metric <= max(reached[: count - 1], default=0):
            continue  # fewer do as well
        context.suffices = lambda value, enough=metric: value >= enough - 1e-6
        measured = counted(context)
        assert apply(mixed, network, context).startswith(f"raised {count} (")
        assert context.measure() == pytest.approx(metric, abs=1e-4)
        assert len(measured) <= 2 * len(order).bit_length() + 1
        network.restore(start)


def test_the_budget_bounds_weights_and_operations_each() -> None:
    for budget in (0.01, 0.2, 0.5, 1.0):
        network, context = context_of(precision="w4a8")
        shares = {(one.layer, one.part): one.shares for one in layer_sensitivity(network, batches())}
        before = bits(network)
        apply(MixedPrecision(budget), network, context)
        spent: dict[str, dict[str, float]] = {"weights": {}, "activations": {}}
        for layer, precision in network.promoted.items():
            assert layer_precision(network, layer) == precision
            if precision.weight_bits == 8:
                spent["weights"] |= shares[layer, "weights"]
            if precision.activation_bits == 16:
                spent["activations"] |= shares[layer, "activations"]
        parts = {part: sum(found.values()) for part, found in spent.items()}
        assert all(share <= budget + 1e-9 for share in parts.values())
        assert bool(raised_bits(network, before)) is bool(network.promoted)
        if budget == 1.0:
            assert parts == {"weights": pytest.approx(1), "activations": pytest.approx(1)}


def test_a_budget_that_nothing_fits_changes_nothing() -> None:
    network, context = context_of(precision="w4a16")
    before, metric = bits(network), context.measure()
    assert apply(MixedPrecision(0.001), network, context) == "raised nothing: no layer fits the budget"
    assert (network.promoted, bits(network), context.measure()) == ({}, before, metric)


def test_layers_that_share_a_range_are_promoted_together_and_the_weights_stay() -> None:
    network, context = context_of(network=branches(), precision="w8a8")
    before = bits(network)
    apply(MixedPrecision(1.0), network, context)
    layers = quantized_layers(network)
    assert [layers[name].output_quantizers[0].bitwidth for name in ("a", "b")] == [16, 16]
    assert not any("param" in name for name in raised_bits(network, before))


def test_what_was_promoted_is_not_promoted_again_and_more_can_be() -> None:
    network, context = context_of(fragile_first, precision="w4a16", enough=32.5)
    coarse = bits(network)
    apply(MixedPrecision(), network, context)
    assert network.promoted == {"first": Precision(8, 16)}
    assert raised_bits(network, coarse) == {"first.param_quantizers.weight": 8}
    assert context.measure() > 32.5
    context.suffices = lambda metric: False
    before = bits(network)
    apply(MixedPrecision(1.0), network, context)
    assert network.promoted == dict.fromkeys(("first", "second", "head"), Precision(8, 16))
    assert raised_bits(network, before) == {"second.param_quantizers.weight": 8, "head.param_quantizers.weight": 8}
    with torch.no_grad():
        network.reset_to(context.prepared.network)
    assert network.promoted == {}
    assert bits(network) == bits(context_of(fragile_first, precision="w4a16")[0])


@pytest.mark.parametrize("change", [unequal, fragile_first])
@pytest.mark.parametrize("precision", ["w4a8", "w8a8"])
def test_promoted_layers_survive_a_snapshot(change: Callable[[Any], None], precision: str) -> None:
    network, context = context_of(change, precision=precision)
    snapshot, before = network.snapshot(), bits(network)
    apply(MixedPrecision(1.0), network, context)
    raised, finer, answer = network.snapshot(), bits(network), context.measure()
    for state, expected in itertools.islice(itertools.cycle([(snapshot, before), (raised, finer)]), 4):
        network.restore(state)
        assert bits(network) == expected
        assert_same_tensors(network.state_dict(), state)
    assert context.measure() == answer
    other, _ = context_of(change, precision=precision)
    other.load_state_dict(raised)
    assert other.promoted == network.promoted
    assert torch.equal(other(images()), network(images()))


def test_the_float_network_is_not_touched() -> None:
    network, context = context_of(precision="w4a8")
    apply(MixedPrecision(1.0), network, context)
    assert_same_tensors(context.float_network.state_dict(), trained().state_dict())
