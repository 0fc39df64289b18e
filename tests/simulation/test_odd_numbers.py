"""Networks and samples at the edge of what numbers can be: a right answer, proven by an export, or a clear error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.deploy.export import export_bundle
from lightning_quant.errors import CalibrationError, PreflightError
from tests.helpers.networks import calibrated, call, images


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))


def with_weights(change: Callable[[nn.Sequential], object]) -> nn.Module:
    network = small()
    with torch.no_grad():
        change(network)
    return network


class Constant(nn.Module):
    """Answers 3, whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * 0 + 3


class Reshape(nn.Module):
    """Nothing in it can be quantized."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], -1)


class Shared(nn.Module):
    """Two layers, one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def one_element() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 1))


def frozen() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    return network.requires_grad_(False)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "a channel of zeros": lambda: with_weights(lambda n: [n[0].weight[1].zero_(), n[0].bias[1].zero_()]),
    "all zeros": lambda: with_weights(lambda n: [parameter.zero_() for parameter in n.parameters()]),
    "weight of 1e30": lambda: with_weights(lambda n: n[0].weight[0, 0, 0, 0].fill_(1e30)),
    "weights near 1e-39": lambda: with_weights(lambda n: n[0].weight.mul_(1e-38)),
    "denormal weights": lambda: with_weights(lambda n: [n[0].weight.mul_(1e-42), n[0].bias.zero_()]),
    "constant": Constant,
    "shared weights": Shared,
    "one element": one_element,
    "frozen": frozen,
}

SAMPLES: dict[str, Callable[[], Tensor]] = {
    "of 1e30": lambda: images(4) * 1e30,
    "of 1e-38": lambda: images(4) * 1e-38,
    "black": lambda: images(4) * 0,
    "one of them far off": lambda: torch.cat([images(3), images(1) * 1e20]),
    "a single one": lambda: images(1),
}

PRECISIONS = pytest.mark.parametrize("precision", ["w8a8", "w4a16"])


def check(network: nn.Module, x: Tensor, precision: str, folder: Path) -> None:
    network.eval()
    with torch.no_grad():
        expected = network(x)
        made = calibrated(network, call(x), precision=precision)
        answer = made(x)
    assert torch.isfinite(answer).all()
    assert (answer - expected).abs().max() <= 0.2 * expected.abs().max()
    bundle = export_bundle(made, folder / "net", [call(x[:1])])  # compares with ONNX Runtime
    assert (bundle.path / "net.onnx").is_file()


@PRECISIONS
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str, precision: str, tmp_path: Path) -> None:
    check(NETWORKS[name](), images(4), precision, tmp_path)


@PRECISIONS
@pytest.mark.parametrize("name", SAMPLES)
def test_samples(name: str, precision: str, tmp_path: Path) -> None:
    check(small(), SAMPLES[name](), precision, tmp_path)


@PRECISIONS
def test_nothing_to_quantize(precision: str) -> None:
    with pytest.raises(PreflightError, match="Reshape computes nothing that could be quantized"):
        calibrated(Reshape(), call(images(4)), precision=precision)


@PRECISIONS
def test_a_channel_of_zeros_stays_zero(precision: str) -> None:
    network = NETWORKS["a channel of zeros"]()
    with torch.no_grad():
        made = calibrated(nn.Sequential(network[0]), call(images(4)), precision=precision)  # type: ignore[index]
        assert not made(images(4, seed=1))[:, 1].any()


@PRECISIONS
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["0.weight", "2.bias"])
def test_weights_that_are_not_finite(name: str, value: float, precision: str) -> None:
    network = with_weights(lambda n: n.get_parameter(name).view(-1)[0].fill_(value))
    with pytest.raises(PreflightError, match=f"'{name}' of Sequential holds NaN or Inf"):
        calibrated(network, call(images(4)), precision=precision)


def test_batch_norm_statistics_that_are_not_finite() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    network[1].running_var[2] = torch.inf
    with pytest.raises(PreflightError, match=r"'1\.running_var' of Sequential holds NaN or Inf"):
        calibrated(network, call(images(4)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_samples_that_are_not_finite(value: float) -> None:
    x = images(4)
    x[2, 0, 0, 0] = value
    with pytest.raises(CalibrationError, match=r"Calibration batch 0 holds (NaN|Inf)"):
        calibrated(small(), call(x))


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (5, 3, 8, 8), (2, 3, 17, 9), (1, 3, 64, 64)])
def test_sizes_it_was_not_calibrated_with(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    network = small().eval()
    made = calibrated(network, call(images(8)), precision="w8a8")
    with torch.no_grad():
        assert (made(x) - network(x)).abs().mean() < 0.1 * network(x).abs().mean()


def test_a_layer_without_channels_is_the_networks_own_error() -> None:
    with pytest.warns(UserWarning, match="zero-element"):
        network = nn.Sequential(nn.Conv2d(3, 0, 1), nn.Conv2d(0, 2, 1))
    with pytest.raises(PreflightError, match=r"Sequential cannot be run on one sample: RuntimeError: .*at least 1"):
        calibrated(network, call(images(4)))
