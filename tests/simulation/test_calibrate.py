"""Ranges from samples: how many, which, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.errors import CalibrationError
from lightning_quant.precision import Precision
from lightning_quant.recipe import QuantRecipe
from lightning_quant.simulation.build import quantize
from lightning_quant.simulation.calibrate import calibrate, uncalibrated
from lightning_quant.simulation.inputs import NetworkInputs
from lightning_quant.simulation.network import QuantizedNetwork
from tests.helpers.networks import Body, Chain, call, images, quantized


def ranges(network: QuantizedNetwork) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items() if name.endswith((".min", ".max"))}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def batches(data: Tensor, size: int) -> Iterator[NetworkInputs]:
    return (call(part) for part in data.split(size))


def test_uses_exactly_the_samples_asked_for() -> None:
    data = images(12)
    data[10:] *= 100  # must not be seen
    cut = quantized(Body(), calibration_samples=10)
    stream = batches(data, 4)
    assert calibrate(cut, stream) == 10
    assert cut.calibrated
    whole = quantized(Body(), calibration_samples=10)
    assert calibrate(whole, [call(data[:10])]) == 10
    assert same(ranges(cut), ranges(whole))
    everything = quantized(Body(), calibration_samples=12)
    assert calibrate(everything, batches(data, 4)) == 12
    assert not same(ranges(cut), ranges(everything))


def test_takes_no_batch_more_than_needed() -> None:
    taken = []

    def stream() -> Iterator[NetworkInputs]:
        for index in range(5):
            taken.append(index)
            yield call(images(4, seed=index))

    calibrate(quantized(Body(), calibration_samples=8), stream())
    assert taken == [0, 1]


def test_fewer_samples_than_asked_for() -> None:
    network = quantized(Body(), calibration_samples=100)
    assert calibrate(network, batches(images(6), 4)) == 6
    assert network.calibrated


@pytest.mark.parametrize(("value", "name"), [(float("nan"), "NaN"), (float("inf"), "Inf"), (float("-inf"), "Inf")])
def test_batch_with_values_that_are_not_finite_is_named(value: float, name: str) -> None:
    bad = images(4)
    bad[2, 1, 3, 3] = value
    network = quantized(Body(), calibration_samples=16)
    with pytest.raises(CalibrationError, match=rf"Calibration batch 2 holds {name}: expected finite"):
        calibrate(network, [call(images(4)), call(images(4)), call(bad)])
    assert not network.calibrated
    # nothing of the failed attempt stays behind
    fresh = quantized(Body(), calibration_samples=16)
    for one in (network, fresh):
        calibrate(one, [call(images(4, seed=5))])
    assert same(ranges(network), ranges(fresh))


def test_bad_value_beyond_the_samples_asked_for_does_not_matter() -> None:
    data = images(8)
    data[6] = float("nan")
    assert calibrate(quantized(Body(), calibration_samples=6), [call(data)]) == 6


def test_values_that_the_network_itself_makes_infinite() -> None:
    class Divides(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.relu(self.first(x)) / (x.relu().mean(1, keepdim=True) * 0))

    network = quantized(Divides())
    with pytest.raises(CalibrationError, match=r"range of '.*' is not finite.*division by zero"):
        calibrate(network, [call(images(4))])
    assert not network.calibrated


def test_no_batch() -> None:
    network = quantized(Body())
    with pytest.raises(CalibrationError, match="gave no batch: expected at least one"):
        calibrate(network, [])
    assert not network.calibrated


def test_min_max_is_the_observed_extremes() -> None:
    network = quantized(Chain(), hardware="default")
    data = images(8)
    calibrate(network, batches(data, 3))
    given = network.network.first.input_quantizers[0]
    # the grid is shifted so that zero is exactly on it: by half a step at most
    step = (data.max() - data.min()) / 255
    assert torch.allclose(given.get_min(), data.min(), rtol=0, atol=float(step) / 2 * 1.001)
    assert torch.allclose(given.get_max(), data.max(), rtol=0, atol=float(step) / 2 * 1.001)
    assert torch.allclose(given.get_scale(), step, rtol=1e-5)
    zero = float((given.get_min() / given.get_scale()).detach())
    assert zero == pytest.approx(round(zero), abs=1e-3)
    # weights: symmetric, one range per output channel
    weight = network.network.first.param_quantizers["weight"]
    peak = network.network.first.weight.detach().abs().amax((1, 2, 3), keepdim=True)
    assert torch.allclose(weight.get_scale(), peak / 127.5, rtol=1e-2)
    assert weight.get_scale().shape == (4, 1, 1, 1)


def test_an_outlier_stretches_min_max_only() -> None:
    data = images(2000)  # enough values for clipping one of them to pay off
    usual = float(data.abs().max())
    data[0, 0, 0, 0] = 3 * usual
    widths = {}
    for estimator, percentile in (("min_max", 99), ("tf_enhanced", 99), ("percentile", 99), ("percentile", 80)):
        chosen = {"percentile": {"percentile": percentile}} if estimator == "percentile" else estimator
        network = quantized(Chain(), range_estimator=chosen, calibration_samples=2000)
        calibrate(network, batches(data, 1000))
        given = network.network.first.input_quantizers[0]
        widths[estimator, percentile] = float(given.get_max() - given.get_min())
    assert widths["min_max", 99] == pytest.approx(usual * 4, rel=0.05)
    assert widths["tf_enhanced", 99] < 0.9 * widths["min_max", 99]
    # each end is a percentile: of standard normal values, 1 % lie above 2.33 and 20 % above 0.84
    assert widths["percentile", 99] == pytest.approx(2 * 2.33, rel=0.05)
    assert widths["percentile", 80] == pytest.approx(2 * 0.84, rel=0.05)


@pytest.mark.parametrize("training", [False, True])
def test_leaves_mode_gradients_and_weights_alone(training: bool) -> None:
    network = quantized(Body().train(training))
    weights = {name: p.clone() for name, p in network.named_parameters() if "quantizers" not in name}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    calibrate(network, [call(images(4))])
    assert network.training is training
    assert torch.is_grad_enabled()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, network.get_parameter(name)) for name, value in weights.items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_calibrating_under_inference_mode_leaves_a_network_that_trains() -> None:
    network = quantized(Body().train())
    with torch.inference_mode():
        data = images(8)
        assert data.is_inference()
        calibrate(network, [call(data)])
    assert not any(tensor.is_inference() for tensor in network.state_dict().values() if isinstance(tensor, Tensor))
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    network(images(4)).square().sum().backward()
    optimizer.step()
    moved = [name for name, parameter in network.named_parameters() if not torch.equal(parameter, before[name])]
    assert any("weight" in name and "quantizers" not in name for name in moved)
    assert any("quantizers" in name for name in moved)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = Chain(), Chain()

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.unused(x)) if float(x.detach().abs().sum()) == 0 else self.used(x)


def test_names_the_parts_that_never_ran() -> None:
    zeros = call(torch.zeros(1, 3, 8, 8))
    network = quantize(Branches(), zeros, QuantRecipe(Precision.parse("w8a8")), [call(images())])
    assert any("used.first" in name for name in uncalibrated(network))
    calibrate(network, [call(images(4))])
    left = uncalibrated(network)
    # weights have a range without any sample, activations have not
    assert left
    assert all(name.startswith(("unused.", "sin.")) for name in left)
    complete = quantized(Body())
    calibrate(complete, [call(images(4))])
    assert uncalibrated(complete) == []


def test_what_no_example_came_to_computes_in_float_and_is_named() -> None:
    network = quantized(Branches())
    calibrate(network, [call(images(4))])
    assert uncalibrated(network) == []
    assert network.left_in_float == {}
    float_network = network.float_network
    assert float_network is not None
    x = torch.zeros(2, 3, 8, 8)
    assert torch.equal(network(x), float_network(x))
    calibrate(network, [call(images(4)), call(x)])
    layers = {"unused.first": ["conv2d"], "unused.relu": ["relu"], "unused.second": ["conv2d"]}
    assert network.left_in_float == {"": ["sin"], **layers}


@pytest.mark.parametrize("precision", ["w8a8", "w8a16", "w4a8", "w4a16"])
def test_rounding_is_at_most_half_a_step_inside_the_range(precision: str) -> None:
    for seed in range(4):
        network = quantized(Chain(), precision=precision)
        calibrate(network, [call(images(8, seed=seed))])
        given = network.network.first.input_quantizers[0]
        steps = 2**network.recipe.precision.activation_bits - 1
        assert float((given.get_max() - given.get_min()) / given.get_scale()) == pytest.approx(steps, rel=1e-4)
        x = images(8, seed=seed)
        inside = (x >= given.get_min()) & (x <= given.get_max())
        assert inside.float().mean() > 0.99
        error = (given(x).as_subclass(Tensor) - x).abs()
        assert float(error[inside].max()) <= float(given.get_scale()) / 2 * (1 + 1e-3) + 1e-6
        # beyond it, values are clipped to its ends
        clipped = given(torch.tensor([1e3, -1e3])).as_subclass(Tensor)
        assert torch.allclose(clipped, torch.stack([given.get_max(), given.get_min()]).detach(), rtol=1e-4)

        weight = network.network.second.weight.detach()
        quantizer = network.network.second.param_quantizers["weight"]
        levels = (quantizer(weight).as_subclass(Tensor) / quantizer.get_scale()).detach()
        bits = network.recipe.precision.weight_bits
        assert torch.allclose(levels, levels.round(), atol=1e-3)
        assert -(2 ** (bits - 1)) <= round(float(levels.min())) < round(float(levels.max())) <= 2 ** (bits - 1) - 1
        rounding = (quantizer(weight).as_subclass(Tensor) - weight).abs() / quantizer.get_scale()
        # half a step, and up to one for the largest weight: a symmetric grid has one level less above zero
        assert float(rounding.max()) <= 1
        assert float(rounding.median()) <= 0.5
