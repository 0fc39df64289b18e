"""16-bit grids of softmax and ELU are as coarse as the NPU needs, which costs nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.simulation.network import QuantizedNetwork
from tests.helpers.networks import calibrated, call
from tests.helpers.qdq import NO_EMULATOR, equal_everywhere

ROWS = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(0))


class Routed(nn.Module):
    """Weights of branches from scores that are nearly alike: of small weights, or made small behind them."""

    def __init__(self, size: float, softmax: str, scaling: str) -> None:
        super().__init__()
        self.scores = nn.Linear(16, 16)
        self.size, self.softmax_of, self.scaling = size, SOFTMAXES[softmax], scaling
        if scaling == "weights":
            with torch.no_grad():
                for parameter in self.scores.parameters():
                    parameter.mul_(size)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.scores(x)
        if self.scaling == "product":
            scores = scores * self.size
        if self.scaling == "quotient":
            scores = scores.transpose(0, 1) / (1 / self.size)
            scores = scores.transpose(0, 1)
        return self.softmax_of(scores) * x


SOFTMAXES: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda y: y.softmax(-1),
    "channels": lambda y: y.softmax(1),
    "moved": lambda y: y.transpose(1, 2).reshape(-1, 4, 4, 6).softmax(1).reshape(-1, 16, 6).transpose(1, 2),
    "read elsewhere": lambda y: y.softmax(-1) + y,
    "of maps": lambda y: nn.Softmax2d()(y.unsqueeze(-1)).squeeze(-1),
}
SCALINGS = ("weights", "product", "quotient")


def routed(size: float, softmax: str = "rows", scaling: str = "weights", **recipe: Any) -> QuantizedNetwork:
    torch.manual_seed(0)
    return calibrated(Routed(size, softmax, scaling).eval(), call(ROWS), **recipe)


def range_of_scores(network: QuantizedNetwork, factor: float = 1.0) -> tuple[float, float]:
    """Both ends of what the softmax takes; a product with a number hands its tensor's integers on."""
    scores: Any = network.network.get_submodule("scores")
    (quantizer,) = scores.output_quantizers
    return quantizer.get_min().item() * factor, quantizer.get_max().item() * factor


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("softmax", SOFTMAXES)
def test_narrow_ranges_are_widened(softmax: str, scaling: str) -> None:
    factor = 1.0 if scaling == "weights" else 0.01
    low, high = range_of_scores(routed(0.01, softmax, scaling, precision="w8a16"), factor)
    assert high - low == pytest.approx(1, abs=1e-4)
    before = range_of_scores(routed(0.01, softmax, scaling, precision="w8a8"), factor)
    assert low / high == pytest.approx(before[0] / before[1], rel=0.02)  # zero is where it was
    assert before[1] - before[0] < 0.05


@pytest.mark.parametrize("scaling", SCALINGS)
def test_other_ranges_stay(scaling: str) -> None:
    factor = 1.0 if scaling == "weights" else 5.0
    one, other = (range_of_scores(routed(5.0, "rows", scaling, precision=one), factor) for one in ("w8a16", "w8a8"))
    assert one == pytest.approx(other, rel=0.02)
    assert one[1] - one[0] > 2


def test_override_to_16_bits_is_enough() -> None:
    low, high = range_of_scores(routed(0.01, precision="w8a8", overrides={"softmax": "w8a16"}))
    assert high - low == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("size", [0.1, 0.01, 1e-4])
def test_nothing_is_lost(size: float) -> None:
    """Against float, with unrounded scores: what is left is the rounding of the softmax's output."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Softmax(-1)).eval()
    scores = ROWS * size
    with torch.no_grad():
        expected = network(scores)
        actual = calibrated(network, call(scores), precision="w8a16")(scores)
    assert float((actual - expected).abs().max()) < 0.6 * 2.0**-16


class Positive(nn.Module):
    """Scores that are not below 0."""

    def __init__(self, size: float, activation: nn.Module) -> None:
        super().__init__()
        self.scores, self.activation, self.size = nn.Linear(16, 16), activation, size
        with torch.no_grad():
            for parameter in self.scores.parameters():
                parameter.mul_(size)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.scores(x)).softmax(-1) * x


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.2), nn.ELU(), nn.Softplus()])
def test_end_that_is_fixed_stays(activation: nn.Module, tmp_path: Path) -> None:
    torch.manual_seed(0)
    known = calibrated(Positive(0.01, activation).eval(), call(ROWS), precision="w8a16")
    layer: Any = known.network.get_submodule("activation")
    (quantizer,) = layer.output_quantizers
    low, high = quantizer.get_min().item(), quantizer.get_max().item()
    assert high - low == pytest.approx(1, abs=1e-4) or high - low > 1
    if isinstance(activation, nn.ReLU):
        assert low == 0
    equal_everywhere(known, ROWS[:1], tmp_path, npu_db=70)


@pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("softmax", ["rows", "channels", "moved", "of maps"])
def test_on_the_npu(softmax: str, scaling: str, tmp_path: Path) -> None:
    equal_everywhere(routed(0.01, softmax, scaling, precision="w8a16"), ROWS[:1], tmp_path, npu_db=75)


class Unit(nn.Module):
    """An exponential unit of a layer's outputs, which its small weights make narrow."""

    def __init__(self, size: float, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.scores, self.activation = nn.Linear(16, 16), activation
        with torch.no_grad():
            for parameter in self.scores.parameters():
                parameter.mul_(size)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.scores(x))


UNITS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu,
    "elu in place": lambda y: F.elu_(y, 0.5),
    "celu": lambda y: F.celu(y, 2.0),
    "selu": nn.SELU(),
    "pooled": lambda y: F.max_pool1d(F.elu(y), 2),
    "read elsewhere": lambda y: torch.cat([F.elu(y), y], -1),
}


@pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))
@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize(("size", "npu_db"), [(0.05, 60), (0.01, 45), (0.003, 35)])
def test_units_on_the_npu(name: str, size: float, npu_db: float, tmp_path: Path) -> None:
    """It is off by 3e-5 to 5e-5, whatever the range: 0 dB and less of what is not widened."""
    torch.manual_seed(0)
    known = calibrated(Unit(size, UNITS[name]).eval(), call(ROWS), precision="w8a16")
    low, high = range_of_scores(known)
    assert high - low > 0.2499
    # a step of the file is more than usual beside the little that the range is used
    equal_everywhere(known, ROWS[:1], tmp_path, npu_db=npu_db, file_db=80)
