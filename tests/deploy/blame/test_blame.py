"""A layer that computes something else is named; where nothing is wrong, none is."""

from __future__ import annotations

import copy
import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.deploy.blame.blame import blame
from lightning_quant.deploy.blame.file import compare_file
from lightning_quant.deploy.blame.reasons import Cause
from lightning_quant.deploy.blame.result import Blame
from lightning_quant.deploy.export import export_bundle
from lightning_quant.deploy.graph.files import OnnxFiles, write_onnx
from lightning_quant.errors import ConfigurationError, ExportError
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.rounded_tensors import rounded_tensors
from lightning_quant.utilities.modules import on_cpu_in_eval
from tests.deploy.blame.faults import FAULTS, NotThere, Planted
from tests.helpers.members import in_turn
from tests.helpers.networks import Body, Chain, SharedConv, calibrated, call, images, seeded
from tests.helpers.small import SmallModule, small_net


class Branches(nn.Module):
    """Depthwise, pooled, resized, concatenated; a ReLU6 and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.act = nn.ReLU6()
        self.point = nn.Conv2d(8, 8, 1)
        self.pool = nn.MaxPool2d(2)
        self.low = nn.Conv2d(8, 8, 3, padding=1)
        self.mix = nn.Conv2d(16, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)
        seeded(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(self.act(self.depthwise(F.relu(self.first(x)))))
        low = torch.relu(self.low(self.pool(x)))
        up = F.interpolate(low, scale_factor=2.0, mode="nearest")
        return self.fc(torch.sigmoid(self.mix(torch.cat([x, up], 1))).mean((2, 3)))


NETWORKS = {"body": Body, "small": small_net, "branches": Branches}
PRECISIONS = ("w8a8", "w8a16", "w4a16")


@dataclass
class Exported:
    network: QuantizedNetwork
    model: onnx.ModelProto
    written: OnnxFiles

    def blame(self, model: onnx.ModelProto | None = None) -> Blame:
        calls = [call(images(1, seed=seed)) for seed in (3, 4)]
        with on_cpu_in_eval(self.network.network):
            return compare_file(self.network, model or self.model, self.written.input_names, calls)


@functools.cache
def exported(name: str, precision: str, folder: Path) -> Exported:
    network = calibrated(NETWORKS[name](), precision=precision)
    with on_cpu_in_eval(network.network):
        written = write_onnx(network, call(images(1)), folder / f"{name}.onnx", folder / f"{name}_qdq.onnx")
    return Exported(network, onnx.load(folder / f"{name}_qdq.onnx"), written)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", NETWORKS)
def test_no_layer_is_named_where_nothing_is_wrong(name: str, precision: str, folder: Path) -> None:
    found = exported(name, precision, folder).blame()
    assert not found.guilty, str(found)
    assert not found.unmatched
    assert found.observed_runs
    assert found.first is None


def planted_everywhere(exported: Exported, fault: str) -> list[tuple[str, Blame]]:
    """What is found after planting a fault in each layer that can have it, one at a time."""
    found = []
    for layer in dict.fromkeys(one.layer for one in exported.blame().layers):
        planted = Planted(copy.deepcopy(exported.model), layer)
        try:
            if not planted.nodes:
                continue
            FAULTS[fault](planted)
        except NotThere:
            continue
        found.append((layer, exported.blame(planted.model)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "name", "precision"), in_turn(FAULTS, NETWORKS, ["w8a8", "w4a16"]))
def test_the_layer_with_a_fault_is_named(fault: str, name: str, precision: str, folder: Path) -> None:
    for other in (name, *NETWORKS):  # the first in which a layer can have it
        if found := planted_everywhere(exported(other, precision, folder), fault):
            break
    assert found
    for layer, result in found:
        assert {one.layer for one in result.guilty} == {layer}, f"{fault} in {layer}:\n{result}"


def test_a_fault_is_not_blamed_on_the_layers_behind_it(folder: Path) -> None:
    made = exported("body", "w8a8", folder)
    planted = Planted(copy.deepcopy(made.model), "conv")
    FAULTS["channel_pruned"](planted)
    found = made.blame(planted.model)
    assert [one.layer for one in found.guilty] == ["conv"]
    assert found.first is not None
    (reason,) = found.first.reasons
    assert reason.cause is Cause.WEIGHTS
    assert reason.parameter == "conv.weight"
    assert reason.channels == (5,)
    by_layer = {one.layer: one for one in found.layers}
    assert by_layer["head"].own.differing < 0.01 < by_layer["head"].arrived.differing
    assert by_layer["conv"].own.psnr_db == by_layer["conv"].arrived.psnr_db < 40
    assert "conv" in str(found)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["layers"][1]["reasons"][0]["cause"] == "weights"


@pytest.mark.parametrize(
    ("fault", "cause", "said"),
    [
        ("encoding_doubled", Cause.SCALE, "scale .* instead of"),
        ("zero_point_off_by_one", Cause.ZERO_POINT, "zero point .* instead of"),
        ("float_left_in", Cause.NOT_ROUNDED, "an encoding is missing"),
        ("bias_dropped", Cause.BIAS_MISSING, "branch.bias is missing"),
        ("bias_input_removed", Cause.BIAS_MISSING, "branch.bias is missing"),
        ("one_bias_off", Cause.BIAS, r"16.67% of the values of branch.bias differ \(channel 1\)"),
        ("one_weight_rounded_the_other_way", Cause.WEIGHTS, "of the values of branch.weight differ"),
        ("one_scale_off", Cause.SCALE, r"scale of branch.weight .* instead of .* \(channel 0\)"),
        ("output_channels_swapped", Cause.WEIGHTS_PERMUTED, r"in another order \(channel 0, 1\)"),
        ("activation_channels_swapped", Cause.OPERATION, "same parameters and grids"),
    ],
)
def test_the_reason(fault: str, cause: Cause, said: str, folder: Path) -> None:
    made = exported("body", "w8a8", folder)
    planted = Planted(copy.deepcopy(made.model), "branch")
    FAULTS[fault](planted)
    found = made.blame(planted.model)
    assert found.first is not None
    assert [reason.cause for reason in found.first.reasons] == [cause]
    assert re.search(said, str(found))
    assert ("Please report" if cause is Cause.OPERATION else "lq.export_bundle(") in found.advice


def test_the_figure_of_a_layer_by_itself_is_the_one_that_ONNX_Runtime_gives_alone(folder: Path) -> None:
    """The last layer of the file, run by itself on the simulation's tensor."""
    made = exported("body", "w8a8", folder)
    planted = Planted(copy.deepcopy(made.model), "head")
    FAULTS["encoding_5_percent_off"](planted)
    found = {one.layer: one for one in made.blame(planted.model).layers}["head"]
    errors, peak = [], 0.0
    with on_cpu_in_eval(made.network.network):
        for seed in (3, 4):
            seen, output = rounded_tensors(made.network, call(images(1, seed=seed)))
            scale = 1.05 * made.network.network.head.output_quantizers[0].get_scale()
            zero_point = -made.network.network.head.output_quantizers[0].get_offset()
            before = seen[-1].before
            by_hand = ((before / scale).round() + zero_point).clamp(0, 255).sub(zero_point) * scale
            errors.append(((by_hand - output) ** 2).mean())
            peak = max(peak, float(output.abs().max()))
    expected = 20 * torch.log10(peak / torch.stack(errors).mean().sqrt())
    assert found.own.psnr_db == pytest.approx(float(expected), abs=1e-3)
    assert {reason.cause for reason in found.reasons} == {Cause.SCALE}
    assert found.reasons[0].found == pytest.approx(1.05 * found.reasons[0].expected, rel=1e-5)


def test_a_module_and_a_batch(tmp_path: Path) -> None:
    network = calibrated(Chain())
    found = blame(network, images(3))
    assert found.samples == 2
    assert not found.guilty
    module = SmallModule(network.network)
    assert blame(module, call(images(1))).samples == 1
    bundle = export_bundle(network, tmp_path / "net", [call(images(2))])
    assert blame(network, images(2), bundle.path) == blame(network, images(2), bundle)
    assert blame(network, [images(2)], bundle) == blame(network, images(2), bundle)


def test_modules_that_cannot_be_looked_at() -> None:
    with pytest.raises(ConfigurationError, match="holds no calibrated network"):
        blame(Chain(), images())
    with pytest.raises(ConfigurationError, match="holds 2 quantized networks"):
        blame(nn.ModuleList([calibrated(Chain()).network, calibrated(Chain()).network]), images())
    with pytest.raises(ConfigurationError, match="samples holds a ndarray: expected tensors"):
        blame(calibrated(Chain()), [images().numpy()])  # type: ignore[list-item]
    with pytest.raises(ConfigurationError, match="No samples to compare the simulation on"):
        blame(calibrated(Chain()), [])


def test_a_bundle_of_another_network(tmp_path: Path) -> None:
    bundle = export_bundle(calibrated(Chain()), tmp_path / "net", [call(images(2))])
    with pytest.raises(ExportError, match="No tensor of the file is one of SmallNet's"):
        blame(calibrated(small_net()), images(), bundle)


def test_names_of_modules_in_containers_that_are_not_called_themselves() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), nn.Conv2d(3, 2, 1)])
            seeded(self)

        def forward(self, x: Tensor) -> Tensor:
            return self.parts[1](self.parts[0](x))

    found = blame(calibrated(Listed()), images())
    assert [one.layer for one in found.layers] == ["x", "parts.0.0", "parts.1"]
    assert found.layers[1].modules == ("parts.0.0", "parts.0.1")


def test_a_module_called_twice() -> None:
    found = blame(calibrated(SharedConv()), images())
    assert [one.layer for one in found.layers] == ["x", "conv.conv2d", "conv.conv2d_1"]
    assert not found.guilty
