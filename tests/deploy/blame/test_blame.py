"""A layer that computes something else is named; where nothing is wrong, none is."""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.deploy.blame.blame import blame, compare_layers
from lightning_quant.deploy.blame.result import Blame, Cause
from lightning_quant.deploy.export import export_bundle
from lightning_quant.deploy.graph.files import OnnxFiles, write_onnx
from lightning_quant.errors import ConfigurationError, ExportError
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.utilities.modules import on_cpu_in_eval
from tests.deploy.blame.faults import FAULTS, NotThere, Planted
from tests.helpers.networks import Body, Chain, calibrated, call, images, seeded
from tests.helpers.small import small_net


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
            return compare_layers(self.network, model or self.model, self.written.input_names, calls)


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
@pytest.mark.parametrize("precision", ["w8a8", "w4a16"])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_layer_with_a_fault_is_named(fault: str, name: str, precision: str, folder: Path) -> None:
    found = planted_everywhere(exported(name, precision, folder), fault)
    if not found:
        pytest.skip("no layer of this network can have it")
    for layer, result in found:
        assert {one.layer for one in result.guilty} == {layer}, f"{fault} in {layer}:\n{result}"
