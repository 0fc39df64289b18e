"""The NPU's emulator: a layer that leaves the NPU, computes in float or something else is named, and no other."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import helper
from torch import Tensor, nn

from lightning_quant.deploy.blame.blame import blame
from lightning_quant.deploy.blame.emulator import compare_with_emulator
from lightning_quant.deploy.blame.reasons import Cause
from lightning_quant.deploy.blame.result import Against, Blame, read_blames, write_blames
from lightning_quant.deploy.export import export_bundle
from lightning_quant.deploy.targets.htp.target import HtpEmulatorTarget
from lightning_quant.errors import UnknownDeviceError
from lightning_quant.utilities.modules import on_cpu_in_eval
from tests.deploy.blame.faults import FAULTS, Planted
from tests.deploy.blame.test_blame import NETWORKS, PRECISIONS, Exported, exported
from tests.helpers.networks import Chain, calibrated, call, images, seeded

_REASON = HtpEmulatorTarget("SM8650").unavailable()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(_REASON is not None, reason=str(_REASON))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


def look(made: Exported, model: onnx.ModelProto | None = None) -> Blame:
    sample, target = call(images(1, seed=3)), HtpEmulatorTarget("SM8650")
    with on_cpu_in_eval(made.network.network):
        return compare_with_emulator(made.network, model or made.model, made.written.input_names, sample, target)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", NETWORKS)
def test_no_layer_is_named_where_nothing_is_wrong(name: str, precision: str, folder: Path) -> None:
    made = exported(name, precision, folder)
    found = look(made)
    assert not found.guilty, str(found)
    assert found.observed_runs
    assert {one.tensor for one in found.layers} <= {one.tensor for one in made.blame().layers}
    assert len(found.layers) > 4
    assert found.layers[0].own.psnr_db == found.layers[0].arrived.psnr_db > 60
    assert "runs in integers on the NPU" in str(found)


class Joined(nn.Module):
    """Scores of 0 to 1 in one tensor, and so in one range, with values of 0 to 32."""

    def __init__(self, scores: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.boxes, self.classes = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 5, 1)
        self.scores = scores
        seeded(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x).relu()
        return torch.cat((self.boxes(x) * 32, self.scores(self.classes(x))), 1)


@pytest.mark.parametrize("scores", [torch.sigmoid, torch.tanh, F.hardsigmoid, nn.SiLU()])
def test_what_the_device_has_on_another_grid_is_not_named(scores: Callable[[Tensor], Tensor], folder: Path) -> None:
    network = calibrated(Joined(scores), precision="w8a16")
    found = blame(network, images(1, seed=3), against="htp_emulator")
    assert not found.guilty, str(found)
    assert found.output.psnr_db > 75
    assert len(found.layers) == (7 if isinstance(scores, nn.SiLU) else 5)  # its sigmoid has a grid of its own


def operation_that_the_npu_lacks(planted: Planted) -> None:
    node = planted.graph.producers[planted.quantizer.input[0]]
    node.op_type = "Celu"
    del node.input[1:]


def operation_behind_it_that_the_npu_lacks(planted: Planted) -> None:
    name = planted.quantizer.input[0]
    planted.insert(name, [helper.make_node("Erf", [name], [f"{name}_erf"], "planted")], f"{name}_erf")


def another_operation(planted: Planted) -> None:
    node = planted.graph.producers[planted.quantizer.input[0]]
    node.op_type = "Sin"
    del node.input[1:]


@pytest.mark.parametrize(
    ("name", "layer", "fault", "named", "cause", "said"),
    [
        ("branches", "act", operation_that_the_npu_lacks, "depthwise", Cause.FALLEN_BACK, "runs on the CPU: .*`Celu`"),
        ("body", "head", operation_behind_it_that_the_npu_lacks, "head", Cause.FALLEN_BACK, "runs on the CPU: .*`Erf`"),
        ("body", "branch", FAULTS["float_left_in"], "add", Cause.FLOAT_ISLAND, "computed in float on the NPU"),
        ("branches", "act", another_operation, "depthwise", Cause.ARITHMETIC, "by up to .* steps of the grid"),
    ],
)
def test_the_layer_with_a_fault_is_named(
    name: str, layer: str, fault: Callable[[Planted], None], named: str, cause: Cause, said: str, folder: Path
) -> None:
    made = exported(name, "w8a8", folder)
    planted = Planted(copy.deepcopy(made.model), layer)
    fault(planted)
    found = look(made, planted.model)
    assert [one.layer for one in found.guilty] == [named], str(found)
    assert found.first is not None
    assert cause in {reason.cause for reason in found.first.reasons}
    assert re.search(said, str(found))


def test_a_module_and_its_bundle(tmp_path: Path) -> None:
    network = calibrated(Chain())
    bundle = export_bundle(network, tmp_path / "net", [call(images(2))])
    found = blame(network, images(2), against="htp_emulator")
    assert (found.against, found.samples) == (Against.EMULATOR, 1)
    assert blame(network, images(2), bundle, against="htp_emulator", device="SM8650") == found
    assert read_blames(write_blames(tmp_path / "blame.json", [found]))[0].layers == found.layers
    with pytest.raises(UnknownDeviceError):
        blame(network, images(2), against="htp_emulator", device="Nokia 3310")
