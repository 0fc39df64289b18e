"""What every rung has to leave as it found it, and what each changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lightning_quant.errors import LightningQuantError
from lightning_quant.ladder.registry import parse_rungs
from lightning_quant.ladder.rung import RUNGS, Rung
from lightning_quant.ladder.rungs.layer_outputs import hooked, statistics
from lightning_quant.simulation.inputs import NetworkInputs
from lightning_quant.simulation.precisions import quantized_layers
from lightning_quant.simulation.switched_off import unrounded, weights_only
from tests.callbacks.rung_cases import dead_outliers, halfway, images, unequal
from tests.helpers.small import assert_same_tensors
from tests.ladder.rungs.contexts import batches, context_of

QUICK: dict[str, Any] = {
    "rounding": {"rounding": {"iterations": 5}},
    "adaround": {"adaround": {"iterations": 5}},
    "mixed": {"mixed": {"budget": 1.0}},
}


def rung(name: str) -> Rung:
    (made,) = parse_rungs([QUICK.get(name, name)])
    return made


@pytest.mark.parametrize("name", RUNGS.homes)
def test_it_is_rolled_back_bit_for_bit_and_can_be_trained(name: str) -> None:
    network, context = context_of(precision="w4a8")
    network.train()
    network.network.head.eval()  # a part that is frozen stays so
    snapshot = network.snapshot()
    parameters = dict(network.named_parameters())
    flags = {key: value.requires_grad for key, value in parameters.items()}
    modes = {key: module.training for key, module in network.named_modules()}
    before = copy.deepcopy(context.float_network.state_dict())
    with torch.no_grad():
        changed = rung(name).apply(network, context)
    assert changed
    assert network.calibrated
    changed = any(not torch.equal(value, snapshot[key]) for key, value in network.named_parameters())
    assert changed != (name in ("ptq", "min_max", "attention", "joins"))  # as it was; more steps in the same ranges
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
def test_outliers_that_never_matter_are_clipped(name: str, gain: float) -> None:
    network, context = context_of(dead_outliers, precision="w4a16")
    before = context.measure()
    maximum = network.network.head.param_quantizers["weight"].get_max().clone()
    with torch.no_grad():
        rung(name).apply(network, context)
    assert context.measure() > before + gain
    assert bool((network.network.head.param_quantizers["weight"].get_max() < 0.7 * maximum).all())
    assert network.range_estimator.name == (name if name == "tf_enhanced" else "min_max")


def test_percentiles_clip_the_outermost_values() -> None:
    network, context = context_of(precision="w8a8")
    before = network.network.relu2.output_quantizers[0].get_max().clone()
    with torch.no_grad():
        rung("percentile").apply(network, context)
    assert network.network.relu2.output_quantizers[0].get_max() < before


def test_activations_are_clipped_for_the_weights_as_they_are() -> None:
    network, context = context_of(precision="w4a8")
    spoiled = [NetworkInputs((call.tensors[0].clone(),)) for call in batches()]
    spoiled[0].tensors[0][0, 0, 0, 0] = 1000.0  # one pixel of one image that nothing is measured on
    context.samples = lambda: iter(spoiled)
    with torch.no_grad():
        rung("rounding").apply(network, context)
        before, measured = copy.deepcopy(network.state_dict()), context.measure()
        assert rung("clipping").skip_reason(network, context) is None
        said = rung("clipping").apply(network, context)
    assert said == "percentile ranges of activations from 128 samples"
    assert context.measure() > measured + 10
    after = network.state_dict()
    of_weights = [key for key in before if "weight" in key or "bias" in key]
    assert_same_tensors({key: after[key] for key in of_weights}, {key: before[key] for key in of_weights})
    assert any("param_quantizers" in key for key in of_weights)
    assert rung("clipping").skip_reason(network, context) == "its ranges are those of percentile already"


def test_adaptive_rounding_rounds_up_and_down() -> None:
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


def test_activations_are_promoted_at_8_bit_weights() -> None:
    network, context = context_of(unequal, precision="w8a8")
    before = context.measure()
    with torch.no_grad():
        rung("mixed").apply(network, context)
    assert {str(precision) for precision in network.promoted.values()} == {"w8a16"}
    assert context.measure() > before + 5


def test_the_finest_precision_cannot_be_promoted() -> None:
    network, context = context_of(precision="w8a16")
    assert rung("mixed").skip_reason(network, context) == "w8a16 is the finest precision there is"


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
