"""What leaves the NPU is found before calibration, by the table; what is on it, or unknown, has no finding."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.deploy.socs import HEXAGON
from lightning_quant.errors import PreflightError
from lightning_quant.precision import PRECISIONS, Precision
from lightning_quant.simulation import operators
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.operators import (
    REMEDIES,
    OperatorTable,
    Placement,
    off_the_npu,
    operation_of,
    operator_table,
)
from lightning_quant.simulation.precisions import quantized_layers
from lightning_quant.simulation.preflight import Finding, FindingKind
from lightning_quant.simulation.second_operands import hexagon_simulated
from tests.helpers.networks import call, images, quantized
from tests.helpers.small import small_net


def found(network: nn.Module, **recipe: Any) -> list[Finding]:
    return quantized(network.eval(), **recipe).findings


class Activation(nn.Module):
    """A convolution with an activation that the NPU leaves to the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.erf(self.conv(x))


def test_what_falls_back_is_named_with_its_remedy() -> None:
    (erf,) = found(Activation())
    assert (erf.module, erf.kind) == ("erf", FindingKind.ON_CPU)
    assert erf.problem == "Erf is left to the CPU (Hexagon v75, w8a8)"
    assert erf.remedy == REMEDIES["Erf"]
    with pytest.raises(PreflightError, match="Erf is left to the CPU"):
        quantized(Activation().eval(), strict=True)


class Logarithm(nn.Module):
    """A logarithm, which the NPU computes in integers at 8 bits only, between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.log(self.first(x).abs() + 1.0))


@pytest.mark.parametrize("precision", ["w8a8", "w4a8"])
def test_a_layer_that_a_neighbor_raises_is_judged_at_the_bits_that_it_gets(precision: str) -> None:
    assert not found(Logarithm(), precision=precision)
    (finding,) = found(Logarithm(), precision=precision, overrides={"last": "w8a16"})
    assert (finding.module, finding.kind) == ("log", FindingKind.FLOAT_ON_NPU)
    assert "w8a16" in finding.problem
    assert finding.remedy.endswith('overrides={"log": "w8a8"}')
    assert not found(Logarithm(), precision=precision, overrides={"last": "w8a16", "log": "w8a8"})


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_network_of_npu_operators_has_no_finding(precision: str) -> None:
    assert found(small_net(), precision=precision) == []


@pytest.mark.parametrize("hardware", ["default", "htp_v66", "htp_v85"])
def test_nothing_is_claimed_of_an_npu_that_was_not_measured(hardware: str) -> None:
    assert found(Activation(), hardware=hardware) == []


class Unmeasured(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ceil(x)


def test_nothing_is_claimed_of_an_operation_that_was_not_measured() -> None:
    made = quantized(Unmeasured().eval())
    names = {operation_of(layer) for layer in quantized_layers(made).values()}
    assert "Ceil" in names - operator_table().operations.keys()
    assert made.findings == []


def test_a_precision_that_the_npu_takes_is_the_remedy() -> None:
    (finding,) = found(Logarithm(), precision="w8a16")
    assert (finding.module, finding.kind) == ("log", FindingKind.FLOAT_ON_NPU)
    assert finding.problem == "Log is computed in float on the NPU (Hexagon v75, w8a16)"
    assert finding.remedy == 'give it another precision: overrides={"log": "w8a8"}'
    assert found(Logarithm(), precision="w8a16", overrides={"log": Precision(8, 8)}) == []


@pytest.mark.parametrize(
    ("placement", "kind", "problem"),
    [
        (Placement.FLOAT, FindingKind.FLOAT_ON_NPU, "is computed in float on the NPU"),
        (Placement.WRONG, FindingKind.WRONG_ON_NPU, "computes something else on the NPU's emulator"),
        (Placement.REFUSED, FindingKind.REFUSED, "is refused by the NPU's compiler"),
        (Placement.CRASHED, FindingKind.REFUSED, "makes the NPU's compiler crash"),
    ],
)
def test_what_no_operation_of_todays_table_does_is_named_too(
    monkeypatch: pytest.MonkeyPatch, placement: Placement, kind: FindingKind, problem: str
) -> None:
    made = quantized(Unmeasured().eval())
    placements = {"w8a8": {placement.value: [75]}}
    monkeypatch.setattr(operators, "operator_table", lambda: OperatorTable({}, {}, {"Ceil": placements}))
    (finding,) = off_the_npu(made, 75)
    assert (finding.module, finding.kind) == ("ceil", kind)
    assert finding.problem == f"Ceil {problem} (Hexagon v75, w8a8)"
    assert off_the_npu(made, 73) == []


def test_each_chip_has_findings_of_its_own() -> None:
    made = quantized(Logarithm().eval(), precision="w8a16")
    assert [finding.module for finding in off_the_npu(made, 69)] == ["log"]
    assert off_the_npu(made, 68) == []  # it has no 16-bit activations: nothing was measured
    assert off_the_npu(made, None) == []


class Masked(nn.Module):
    """Values or a number, by a mask that belongs to the network or is computed."""

    def __init__(self, computed: bool, chooses: bool) -> None:
        super().__init__()
        self.conv, self.computed, self.chooses = nn.Conv2d(3, 4, 3), computed, chooses
        self.register_buffer("mask", torch.rand(6, 6) > 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        mask = (x > 0.5).logical_not() if self.computed else self.mask.logical_not()
        return torch.where(mask, x, torch.relu(x)) if self.chooses else x.masked_fill(mask, 0.0)


@pytest.mark.parametrize("where", [True, False])
def test_masks_that_are_computed_are_told_from_those_that_are_not(where: bool) -> None:
    (finding,) = off_the_npu(quantized(Masked(True, where).eval()), 68)
    assert (finding.module, finding.kind) == ("where" if where else "masked_fill", FindingKind.REFUSED)
    assert "by a computed mask is refused" in finding.problem
    assert off_the_npu(quantized(Masked(True, where).eval()), 75) == []
    assert off_the_npu(quantized(Masked(False, where).eval()), 68) == []


def test_what_decides_is_part_of_the_operation() -> None:
    def operation(layer: nn.Module, inputs: Tensor | None = None) -> str:
        made: QuantizedNetwork = quantized(nn.Sequential(layer), call(images() if inputs is None else inputs))
        (one,) = quantized_layers(made).values()
        return operation_of(one)

    assert operation(nn.Conv2d(3, 3, 3)) == operation(nn.Conv2d(3, 5, 1, bias=False)) == "Conv2d"
    assert operation(nn.Conv2d(3, 3, 3, groups=3)) == "Conv2d depthwise"
    assert operation(nn.Conv2d(3, 3, 1, groups=3)) == "Conv2d depthwise 1x1"
    assert operation(nn.Conv2d(3, 1, 1, bias=False)) == "Conv2d to one channel without bias"
    assert operation(nn.ConvTranspose2d(4, 4, 2, groups=2), torch.randn(1, 4, 8, 8)) == "ConvTranspose2d grouped"
    assert operation(nn.LayerNorm(8)) == "LayerNorm"
    assert operation(nn.AvgPool2d(4)) == operation(nn.AvgPool2d((4, 4))) == "AvgPool2d 4x4"
    assert operation(nn.AvgPool2d(4, 2)) == "AvgPool2d"
    assert operation(nn.InstanceNorm2d(3)) == "InstanceNorm2d without weights"


@pytest.mark.parametrize(
    ("hardware", "hexagon"),
    [("htp_v75", 75), ("htp_v69", 69), ("htp_v81", 81), ("default", None), ("enpu_v6", None)],
)
def test_the_npu_that_is_simulated(hardware: str, hexagon: int | None) -> None:
    assert hexagon_simulated(quantized(nn.Conv2d(3, 3, 3), hardware=hardware).sim) == hexagon


@pytest.mark.parametrize(("version", "hexagon"), [("v75", 75), ("V73", 73), ("SM8650", None), ("", None)])
def test_the_npu_of_a_hardware_config_of_the_users_own(version: str, hexagon: int | None, tmp_path: Path) -> None:
    known = importlib.util.find_spec("aimet_torch")
    assert known is not None
    assert known.origin is not None
    path = Path(known.origin).parent / "common/quantsim_config/htp_quantsim_config_v75.json"
    config = json.loads(path.read_text())
    config["defaults"]["hw_version"] = version
    (tmp_path / "own.json").write_text(json.dumps(config))
    network = quantized(nn.Conv2d(3, 3, 3), hardware=str(tmp_path / "own.json"))
    assert hexagon_simulated(network.sim) == hexagon


def test_the_table_is_of_chips_precisions_and_remedies_that_exist() -> None:
    table = operator_table()
    assert {"QAIRT", "onnxruntime-qnn"} <= table.versions.keys()
    assert {int(hexagon): HEXAGON[chip] for hexagon, chip in table.chips.items()} == {
        int(hexagon): int(hexagon) for hexagon in table.chips
    }
    for precisions in table.operations.values():
        for precision, placements in precisions.items():
            Precision.parse(precision)
            assert [Placement(name) for name in placements]
            listed = [version for versions in placements.values() for version in versions]
            assert len(listed) == len(set(listed))
    leaving = {
        operation
        for operation, precisions in table.operations.items()
        for placements in precisions.values()
        if placements.keys() - {Placement.NPU.value}
    }
    assert leaving >= REMEDIES.keys()
