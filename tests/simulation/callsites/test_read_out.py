"""Values that leave PyTorch in a network: told before calibration, and refused where nothing else is left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_quant.deploy.graph.files import write_onnx
from lightning_quant.errors import ExportError, PreflightError
from lightning_quant.simulation.preflight import FindingKind
from tests.helpers.networks import calibrated, call, quantized

ROWS = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))


class Leaving(nn.Module):
    """A function of a layer's output, in front of another layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(16, 16), nn.Linear(16, 4), function

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.function(self.first(x)))
        return y


# By what takes the values.
LEAVING: dict[str, Callable[[Tensor], Tensor]] = {
    "numpy": lambda y: torch.from_numpy(np.tanh(y.detach().numpy())),
    "array": lambda y: torch.tensor(np.asarray(y.detach())),
    "tolist": lambda y: torch.tensor(y.tolist()),
    "item": lambda y: y * y.abs().max().item(),
    "item, computed with": lambda y: y / (1 + 2 * y.abs().sum().item() ** 2),
}
STAYING: dict[str, Callable[[Tensor], Tensor]] = {
    "a size": lambda y: y * float(y.shape[1]),
    "a constant": lambda y: y * torch.tensor([2.0]).item(),
    "a cast": lambda y: y.float() * (y > 0).float(),
    "a branch": lambda y: y if y.sum() > -1e6 else -y,
    "a branch by a number": lambda y: y if y.sum().item() > -1e6 and float(y.max()) < 1e6 else -y,
    "text": lambda y: y * len(f"{y.sum().item():.2f} {y.max()}"[:2]),
    "a whole number": lambda y: y[:, : int(torch.tensor(7))].repeat(1, 3)[:, :16],
}


@pytest.mark.parametrize("name", LEAVING)
def test_the_place_is_told_before_calibration(name: str) -> None:
    torch.manual_seed(0)
    known = quantized(Leaving(LEAVING[name]).eval(), call(ROWS))
    (found,) = (one for one in known.findings if "takes values out of PyTorch" in one.problem)
    assert found.kind is FindingKind.NOT_IN_ONNX
    line = LEAVING[name].__code__.co_firstlineno
    assert found.problem.startswith(f"{name.partition(',')[0]} in {Path(__file__).name}, line {line}, ")
    with pytest.raises(PreflightError, match="takes values out of PyTorch"):
        quantized(Leaving(LEAVING[name]).eval(), call(ROWS), strict=True)


@pytest.mark.parametrize("name", STAYING)
def test_what_stays_is_not_told(name: str) -> None:
    torch.manual_seed(0)
    assert not quantized(Leaving(STAYING[name]).eval(), call(ROWS)).findings


@pytest.mark.parametrize("name", ["numpy", "array", "tolist"])
def test_a_graph_without_an_input_is_refused(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    known = calibrated(Leaving(LEAVING[name]).eval(), call(ROWS))
    with pytest.raises(ExportError, match=r"of Leaving takes no input: .*numpy\(\)"):
        write_onnx(known, call(ROWS[:1]), tmp_path / "float.onnx", tmp_path / "qdq.onnx")
