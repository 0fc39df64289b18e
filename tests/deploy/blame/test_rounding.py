"""What rounding costs each layer: a layer that is quantized badly is named, with the cause and what helps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.deploy.blame.blame import blame
from lightning_quant.deploy.blame.reasons import Cause, Change, Remedy
from lightning_quant.deploy.blame.result import Against, Blame, read_blames, write_blames
from lightning_quant.errors import ConfigurationError, DataError
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.precisions import quantized_layers
from lightning_quant.simulation.switched_off import unrounded
from lightning_quant.utilities.modules import on_cpu_in_eval
from tests.helpers.networks import Body, calibrated, call, images, seeded


class Deep(nn.Module):
    """Convolutions with and without an activation function, a sum, a mean and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.second = nn.Conv2d(12, 12, 3, padding=1)
        self.third = nn.Conv2d(12, 12, 1)
        self.relu = nn.ReLU()
        self.fourth = nn.Conv2d(12, 16, 3, padding=1)
        self.fc = nn.Linear(16, 5)
        seeded(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.relu(self.first(x)))
        x = x + self.third(x)
        return self.fc(self.fourth(self.relu(x)).flatten(2).mean(2))


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 1),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, groups=16),
            nn.ReLU(),
            nn.Conv2d(16, 8, 1),
            nn.ReLU(),
            nn.Conv2d(8, 4, 3, padding=1),
        )
        seeded(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


NETWORKS: dict[str, Callable[[], nn.Module]] = {"body": Body, "deep": Deep, "depthwise": Depthwise}


class Place(NamedTuple):
    """Where a fault is planted: a layer with weights, what rounds its output, and the layer that takes that."""

    weighted: str
    rounding: str
    taker: str


PLACES = {
    "body": Place("branch", "branch", "relu.relu_1"),
    "deep": Place("first", "relu_1", "second"),
    "depthwise": Place("body.4", "body.5", "body.6"),
}


def look(network: QuantizedNetwork, seed: int = 0, count: int = 8) -> Blame:
    return blame(network, images(count, seed=seed), against="float", count=4)


@pytest.mark.parametrize("name", NETWORKS)
def test_no_layer_stands_out_where_all_are_alike(name: str) -> None:
    found = look(calibrated(NETWORKS[name](), call(images(8)), precision="w8a8"))
    assert not found.guilty, str(found)
    assert found.against is Against.FLOAT
    assert found.remedies == [Remedy(Change.PRECISION, value="w8a16")]
    assert 'Try precision="w8a16".' in str(found)


def quantized_with(network: nn.Module, **recipe: Any) -> QuantizedNetwork:
    return calibrated(network, call(images(8)), precision="w8a8", **recipe)


def outlier_channel(network: nn.Module, place: Place) -> QuantizedNetwork:
    with torch.no_grad():
        for parameter in network.get_submodule(place.weighted).parameters():
            parameter[2] *= 60
    return quantized_with(network)


def range_too_narrow(network: nn.Module, place: Place) -> QuantizedNetwork:
    made = quantized_with(network)
    scale_range(made, place.rounding, 0.25)
    return made


def range_too_narrow_by_an_estimator(network: nn.Module, place: Place) -> QuantizedNetwork:
    made = quantized_with(network, range_estimator="percentile")
    scale_range(made, place.rounding, 0.25)
    return made


def range_too_wide(network: nn.Module, place: Place) -> QuantizedNetwork:
    made = quantized_with(network)
    scale_range(made, place.rounding, 40)
    return made


def weights_of_4_bits(network: nn.Module, place: Place) -> QuantizedNetwork:
    return quantized_with(network, overrides={place.weighted: "w4a8"})


def scale_range(network: QuantizedNetwork, layer: str, factor: float) -> None:
    quantizer = quantized_layers(network)[layer].output_quantizers[0]
    assert quantizer is not None
    with torch.no_grad():
        for end in quantizer.parameters():
            end *= factor


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    ("fault", "cause", "line"),
    [
        (outlier_channel, Cause.OUTLIER_CHANNEL, 'overrides={{"{0.taker}": "w8a16"}}'),
        (range_too_narrow, Cause.CLIPPED, "calibration_samples=32"),
        (range_too_narrow_by_an_estimator, Cause.CLIPPED, 'range_estimator="min_max"'),
        (range_too_wide, Cause.TOO_WIDE, 'range_estimator="percentile"'),
        (weights_of_4_bits, Cause.COARSE_GRID, 'overrides={{"{0.weighted}": "w8a8"}}'),
    ],
)
def test_the_layer_with_a_fault_is_named(
    fault: Callable[[nn.Module, Place], QuantizedNetwork], cause: Cause, line: str, name: str
) -> None:
    place = PLACES[name]
    network = fault(NETWORKS[name](), place)
    before = network.snapshot()
    found = look(network)
    assert found.first is not None, str(found)
    assert found.first.layer == (place.weighted if fault is weights_of_4_bits else place.rounding), str(found)
    reasons = [reason for one in found.guilty for reason in one.reasons]
    assert {reason.cause for reason in reasons} == {cause}, str(found)
    if cause is Cause.OUTLIER_CHANNEL:  # behind a layer that keeps channels apart it is there again
        assert {reason.channels for reason in reasons} == {(2,)}
    else:
        assert len(reasons) == 1
    assert reasons[0].remedy is not None
    assert reasons[0].remedy.line == line.format(place)
    assert reasons[0].remedy.line in str(found)
    after = network.snapshot()
    assert all(torch.equal(before[key], after[key]) for key in before if isinstance(before[key], Tensor))


def test_what_helps_does() -> None:
    """The line is pasted: the layer does not stand out any more."""
    network = Deep()
    with torch.no_grad():  # the same function, as cross-layer equalization would undo it
        for parameter in network.first.parameters():
            parameter[2] *= 600
        network.second.weight[:, 2] /= 600
    found = look(quantized_with(network))
    (remedy,) = found.remedies
    again = look(quantized_with(network, **eval(f"dict({remedy.line})")))
    assert "relu_1" not in [one.layer for one in again.guilty], str(again)
    assert again.output.psnr_db > found.output.psnr_db + 10


def test_both_figures_are_those_of_the_layer_computed_by_hand() -> None:
    network = calibrated(Deep(), call(images(8)), precision="w4a8")
    found = {one.layer: one for one in blame(network, images(1), against="float", count=1).layers}["second"]
    own = quantized_layers(network)["second"]
    with on_cpu_in_eval(network.network):
        with unrounded(network):
            before = torch.relu(network.network.first(images(1)))
            expected = network.network.second(before)
        rounded, arrived = own(before), own(network.network.relu_1(network.network.first(images(1))))
    for actual, figure in ((rounded, found.own), (arrived, found.arrived)):
        noise = (actual - expected).square().mean().sqrt()
        assert figure.psnr_db == pytest.approx(float(20 * torch.log10(expected.abs().max() / noise)), abs=1e-3)
    channels = [(one.square().sum((0, 2, 3))) for one in (rounded - expected, expected)]
    assert found.lost == pytest.approx(float((channels[0] / channels[1]).mean()), rel=1e-5)
    assert (found.weight_bits, found.activation_bits) == (4, 8)


def test_the_float_network_is_the_reference() -> None:
    network = calibrated(Deep(), call(images(8)), precision="w4a8")
    found = blame(network, images(1), against="float")
    with on_cpu_in_eval(network.network):
        with unrounded(network):
            expected = network.network(images(1))
        noise = (network.network(images(1)) - expected).square().mean().sqrt()
    assert found.output.psnr_db == pytest.approx(float(20 * torch.log10(expected.abs().max() / noise)), abs=1e-3)


def test_layers_that_change_their_input_in_place() -> None:
    inplace = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1), nn.ReLU6(inplace=True))
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU6())
    found = [look(calibrated(seeded(one), call(images(8)))) for one in (inplace, plain)]
    assert found[0] == found[1]


class Sequences(nn.Module):
    """Attention, a norm, a recurrent layer and a softmax: layers without channels along the second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 2, stride=2)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.lstm = nn.LSTM(16, 8, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        tokens = self.layer(self.embed(x).flatten(2).transpose(1, 2))
        return {"scores": self.out(self.lstm(tokens)[0]), "mean": torch.softmax(tokens.mean(1), -1)}


def test_attention_norms_and_recurrent_layers() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = calibrated(Sequences().eval(), call(images(8)))
    found = look(network)
    layers = [one.layer for one in found.layers]
    assert {"embed", "layer.norm1", "layer.linear1", "out"} <= set(layers)
    assert any("lstm" in name for name in layers)
    assert all(one.own.psnr_db >= 25 for one in found.layers), str(found)
    with on_cpu_in_eval(network.network), unrounded(network):
        expected = network.network(images(1))
    again = blame(network, images(1), against="float")  # nothing is left switched off, or changed
    with on_cpu_in_eval(network.network):
        rounded = network.network(images(1))
    noise = {name: (rounded[name] - expected[name]).square().mean().sqrt() for name in expected}
    peaks = {name: 20 * torch.log10(expected[name].abs().max() / noise[name]) for name in expected}
    assert again.output.psnr_db == pytest.approx(float(min(peaks.values())), abs=1e-3)


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    network = outlier_channel(Body(), PLACES["body"])
    found = [look(network), blame(network, images(2))]
    path = write_blames(tmp_path / "blame.json", found)
    assert [one.to_dict() for one in read_blames(path)] == [one.to_dict() for one in found]
    values = json.loads(path.read_text())
    assert values["float"]["lines"] == [found[0].remedies[0].line]
    path.write_text(path.read_text().replace('"outlier_channel"', '"something"'))
    with pytest.raises(DataError, match=r"holds no comparison of layers: .*cause is 'something', expected one of"):
        read_blames(path)
    with pytest.raises(ConfigurationError, match="against='device': expected one of float, file"):
        blame(network, images(2), against="device")  # type: ignore[arg-type]
