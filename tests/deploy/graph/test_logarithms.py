"""16-bit logarithms on the NPU, which gets them wrong in integers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from lightning_quant.deploy.graph.files import write_onnx
from lightning_quant.simulation.preflight import FindingKind
from tests.helpers.networks import calibrated, call
from tests.helpers.qdq import NO_EMULATOR, computed, emulated, psnr

ROWS = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(0))
# Logarithms of a layer's outputs, and what else is made of them.
LOGARITHMS: dict[str, Callable[[Tensor], Tensor]] = {
    "log": lambda y: torch.log(y.square() + 0.1),
    "of small numbers": lambda y: torch.log(y.abs() * 0.01 + 1e-3),
    "log2": lambda y: torch.log2(y.abs() + 0.5),
    "log10": lambda y: torch.log10(y.abs() + 0.5),
    "read twice": lambda y: torch.log(y.abs() + 0.5) * torch.log(y.abs() + 0.5).sigmoid(),
}


class Logarithm(nn.Module):
    """A logarithm between two layers, as behind the energies of a spectrogram."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(16, 16), nn.Linear(16, 8), function

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.function(self.first(x)))
        return y


@pytest.mark.parametrize("precision", ["w8a16", "w8a8"])
@pytest.mark.parametrize("name", LOGARITHMS)
def test_logarithms_on_the_npu(name: str, precision: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    known = calibrated(Logarithm(LOGARITHMS[name]).eval(), call(ROWS), precision=precision)
    in_float = precision == "w8a16"
    assert [one.kind for one in known.findings] == [FindingKind.FLOAT_ON_NPU] * in_float * (1 + (name == "read twice"))
    write_onnx(known, call(ROWS[:1]), tmp_path / "float.onnx", tmp_path / "qdq.onnx")
    model = onnx.load(tmp_path / "qdq.onnx")
    feeds = {model.graph.input[0].name: ROWS[:1].numpy()}
    with torch.no_grad():
        expected = known(ROWS[:1]).numpy()
    assert psnr(expected, computed(model, tmp_path, **feeds)[0]) > 90
    if NO_EMULATOR is None:
        report, (output,) = emulated(model, tmp_path / "npu", **feeds)
        assert not report.layers["CPU"]
        assert bool(report.float_islands) is in_float
        assert psnr(expected, output) > (65 if in_float else 45)
