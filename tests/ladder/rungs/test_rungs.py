"""What every rung has to leave as it found it, and what each changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lightning_quant.errors import ConfigurationError, LightningQuantError
from lightning_quant.ladder.registry import RUNGS, parse_rungs
from lightning_quant.ladder.rung import Rung
from lightning_quant.ladder.rungs.layer_outputs import hooked, statistics, unrounded, weights_only
from lightning_quant.simulation.precisions import quantized_layers
from tests.callbacks.rung_cases import dead_outliers, fragile_first, halfway, images, unequal
from tests.helpers.small import assert_same_tensors
from tests.ladder.rungs.contexts import batches, context_of

QUICK: dict[str, Any] = {"adaround": {"adaround": {"iterations": 5}}, "mixed": {"mixed": {"budget": 1.0}}}


def rung(name: str) -> Rung:
    (made,) = parse_rungs([QUICK.get(name, name)])
    return made


@pytest.mark.parametrize("name", RUNGS)
def test_it_can_be_taken_back_bit_for_bit_and_trained_on(name: str) -> None:
    network, context = context_of(precision="w4a8")
    network.train()
    network.network.head.eval()  # a part that is frozen stays so
    snapshot = network.snapshot()
    parameters = dict(network.named_parameters())
    flags = {key: value.requires_grad for key, value in parameters.items()}
    modes = {key: module.training for key, module in network.named_modules()}
    before = copy.deepcopy(context.float_network.state_dict())
    with torch.no_grad():
        told = rung(name).apply(network, context)
    assert told
    assert network.calibrated
    changed = any(not torch.equal(value, snapshot[key]) for key, value in network.named_parameters())
    assert changed != (name in ("ptq", "min_max"))  # which is what it started with
    assert_same_tensors(context.float_network.state_dict(), before)
    assert {key: value.requires_grad for key, value in network.named_parameters()} == flags
    assert {key: module.training for key, module in network.named_modules()} == modes
    assert all(value is parameters[key] for key, value in network.named_parameters())
    network(images()).square().sum().backward()
    assert network.network.first.weight.grad is not None

    network.restore(snapshot)
    assert_same_tensors(network.state_dict(), snapshot)
    assert all(value is parameters[key] for key, value in network.named_parameters())
    # calibrating again gives the same: nothing is left behind
    with torch.no_grad():
        rung("ptq").apply(network, context)
    assert_same_tensors(network.state_dict(), snapshot)


def test_biases_are_moved_until_the_means_are_right() -> None:
    network, context = context_of(halfway, precision="w4a16")
    layers = {name: quantized_layers(network)[name] for name in ("first", "second", "head")}
    wanted: dict[str, torch.Tensor] = {}
    found: dict[str, torch.Tensor] = {}
    everything = batches()[0].map(lambda _: images())
    with torch.no_grad(), unrounded(network), hooked(layers, lambda n, y: _keep(wanted, n, y)):
        everything.call(network)
    with torch.no_grad():
        rung("bias_correction").apply(network, context)
    with torch.no_grad(), weights_only(network), hooked(layers, lambda n, y: _keep(found, n, y)):
        everything.call(network)
    for name in layers:
        spread = wanted[name].abs().max()
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=0.01 * float(spread))


def _keep(where: dict[str, torch.Tensor], name: str, output: torch.Tensor) -> None:
    where[name] = statistics(output, 1)[0]


def test_equalization_changes_no_float_result() -> None:
    network, context = context_of(unequal, precision="w8a8")
    before = context.measure()
    with torch.no_grad():
        assert rung("cle").apply(network, context) == "equalized 1 groups of layers"
        expected = context.float_network(images())
        with unrounded(network):
            torch.testing.assert_close(network(images()), expected, rtol=1e-4, atol=1e-4)
    assert network.equalized
    assert context.measure() > before + 20


@pytest.mark.parametrize(("name", "gain"), [("tf_enhanced", 5), ("seq_mse", 10)])
def test_ranges_leave_dead_outliers_out(name: str, gain: float) -> None:
    network, context = context_of(dead_outliers, precision="w4a16")
    before = context.measure()
    maximum = network.network.head.param_quantizers["weight"].get_max().clone()
    with torch.no_grad():
        rung(name).apply(network, context)
    assert context.measure() > before + gain
    assert bool((network.network.head.param_quantizers["weight"].get_max() < 0.7 * maximum).all())
    assert network.range_estimator.name == (name if name == "tf_enhanced" else "min_max")


def test_percentiles_leave_the_outermost_values_out() -> None:
    network, context = context_of(precision="w8a8")
    before = network.network.relu2.output_quantizers[0].get_max().clone()
    with torch.no_grad():
        rung("percentile").apply(network, context)
    assert network.network.relu2.output_quantizers[0].get_max() < before


def test_adaptive_rounding_goes_to_either_side() -> None:
    network, context = context_of(halfway, precision="w4a16")
    layer = network.network.head
    scale = layer.param_quantizers["weight"].get_scale().clone()
    nearest = (layer.weight / scale).round().clamp(-8, 7)
    before = context.measure()
    with torch.no_grad():
        (adaround,) = parse_rungs([{"adaround": {"iterations": 200}}])
        adaround.apply(network, context)
    moved = (layer.weight / scale).round() - nearest
    assert torch.equal(layer.param_quantizers["weight"].get_scale(), scale)
    assert set(moved.unique().tolist()) <= {-1.0, 0.0, 1.0}
    assert float((moved != 0).float().mean()) > 0.03
    assert context.measure() > before + 2


def test_seq_mse_is_for_coarse_weights() -> None:
    network, context = context_of(precision="w8a8")
    assert rung("seq_mse").skip_reason(network, context) == "AIMET's SeqMSE is for weights of at most 4 bits"


# Mixed precision


def bits(network: Any) -> dict[str, int]:
    return {name: module.bitwidth for name, module in network.network.named_modules() if hasattr(module, "bitwidth")}


def test_the_one_fragile_layer_is_raised_and_nothing_else() -> None:
    network, context = context_of(fragile_first, precision="w4a16", enough=32.5)
    before = bits(network)
    with torch.no_grad():
        told = rung("mixed").apply(network, context)
    after = bits(network)
    assert {name: after[name] for name in after if after[name] != before[name]} == {"first.param_quantizers.weight": 8}
    assert {layer: str(precision) for layer, precision in network.promoted.items()} == {"first": "w8a16"}
    assert told.startswith("raised 1 (")
    assert context.measure() > 32.5


def test_no_more_is_raised_than_the_metric_asks_for() -> None:
    counts = []
    for enough in (34.0, 36.5, 1e9):
        network, context = context_of(precision="w4a8", enough=enough)
        with torch.no_grad():
            rung("mixed").apply(network, context)
        counts.append(sum(after != before for after, before in zip(bits(network).values(), _plain_bits(), strict=True)))
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def _plain_bits() -> list[int]:
    return list(bits(context_of(precision="w4a8")[0]).values())


def test_the_budget_is_kept() -> None:
    network, context = context_of(precision="w4a16")
    (mixed,) = parse_rungs([{"mixed": {"budget": 0.15}}])
    with torch.no_grad():
        mixed.apply(network, context)
    sizes = {name: quantized_layers(network)[name].weight.numel() for name in ("first", "second", "head")}
    raised = sum(sizes[name] for name in network.promoted)
    assert 0 < raised / sum(sizes.values()) <= 0.15


def test_activations_are_raised_at_8_bit_weights() -> None:
    network, context = context_of(unequal, precision="w8a8")
    before = context.measure()
    with torch.no_grad():
        rung("mixed").apply(network, context)
    assert {str(precision) for precision in network.promoted.values()} == {"w8a16"}
    assert 16 in bits(network).values()
    assert context.measure() > before + 5


def test_the_finest_precision_cannot_be_raised() -> None:
    network, context = context_of(precision="w8a16")
    assert rung("mixed").skip_reason(network, context) == "w8a16 is the finest precision there is"


# Names


class Mine(Rung):
    name = "mine"

    def __init__(self, strength: float = 1.0) -> None:
        self.strength = strength

    def apply(self, network: Any, context: Any) -> str:
        return "nothing"


def test_names_options_and_classes_of_ones_own() -> None:
    made = parse_rungs(["ptq", {"mixed": {"budget": 0.05}}, {f"{__name__}.Mine": {"strength": 2.0}}])
    assert [one.name for one in made] == ["ptq", "mixed", "mine"]
    assert made[1].budget == 0.05  # type: ignore[attr-defined]
    assert made[2].strength == 2.0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("rungs", "message"),
    [
        ("ptq", "rungs='ptq': expected a list"),
        ([], r"rungs=\[\]: expected a list of at least one"),
        (["ptq", "ptq"], "names 'ptq' twice"),
        (["seqmse"], "Unknown rung 'seqmse'.*Did you mean 'seq_mse'"),
        (["qat"], "training follows the rungs by itself"),
        ([3], "Rung 3: expected a name"),
        ([{"mixed": {}, "cle": {}}], "expected one name with its options"),
        ([{"mixed": {"depth": 3}}], "Rung 'mixed' with options .*depth"),
        ([{"mixed": {"budget": 0}}], "budget=0: expected a share above 0"),
        ([{"adaround": {"iterations": 0}}], "iterations=0: expected a whole number"),
        ([{"seq_mse": {"samples": -1}}], "samples=-1: expected a whole number"),
        (["no_such_package.Rung"], "Rung 'no_such_package.Rung' cannot be imported"),
        (["torch.nn.Linear"], "Rung 'torch.nn.Linear' is not a subclass of lightning_quant.Rung"),
    ],
)
def test_wrong_rungs_are_told_at_once(rungs: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        parse_rungs(rungs)


def test_equalization_that_changes_the_function_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from aimet_torch.cross_layer_equalization import CrossLayerScaling

    def wrong(flat: nn.Module, **_: Any) -> list[Any]:
        with torch.no_grad():
            flat.network.first.weight.mul_(2)
        return []

    network, context = context_of(precision="w8a8")
    monkeypatch.setattr(CrossLayerScaling, "scale_model", wrong)
    with (
        pytest.raises(LightningQuantError, match="equalizing changed what the float network computes"),
        torch.no_grad(),
    ):
        rung("cle").apply(network, context)


def test_tied_weights_can_be_reset() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(192, 192), nn.Linear(192, 192)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.relu(self.a(x.flatten(1))))

    network, context = context_of(network=Tied(), precision="w8a8")
    snapshot = network.snapshot()
    with torch.no_grad():
        network.network.a.weight.zero_()
        network.reset_to(context.prepared.network)
    assert_same_tensors(network.state_dict(), snapshot)


def test_a_batch_of_one_sample_does_not_end_the_float_reference() -> None:
    pooled = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4),
        nn.Flatten(),
    )
    _, context = context_of(network=pooled, precision="w4a16")
    calls = [*batches(), batches()[0].first(1)]
    context.samples = lambda: iter(calls)
    with torch.no_grad():
        assert rung("bn_reestimation").float_reference(context) is not None


def test_names_must_be_ones_own() -> None:
    with pytest.raises(ConfigurationError, match="is named 'ptq', as one of this package is"):
        parse_rungs([f"{__name__}.Borrowed"])
    with pytest.raises(ConfigurationError, match="has no name"):
        parse_rungs([f"{__name__}.Nameless"])


class Borrowed(Mine):
    name = "ptq"


class Nameless(Rung):
    def apply(self, network: Any, context: Any) -> str:
        return "nothing"
