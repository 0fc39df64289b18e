"""What calibration adds to the preflight: concatenations whose one range leaves some values few integers."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.deploy.export import export_bundle
from lightning_quant.errors import PreflightError
from lightning_quant.precision import Precision
from lightning_quant.simulation.calibrate import calibrate
from lightning_quant.simulation.calibration_cache import StatisticsCache
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.preflight import FindingKind
from tests.helpers.networks import calibrated, call, images, quantized, seeded


class OneOutput(nn.Module):
    """A head as YOLO's: boxes of up to ``pixels`` and scores of 0 to 1, joined along the channels."""

    def __init__(self, pixels: float) -> None:
        super().__init__()
        self.boxes = nn.Conv2d(3, 4, 1)
        self.scores = nn.Conv2d(3, 5, 1)
        self.relu = nn.ReLU()
        seeded(self)
        with torch.no_grad():
            for parameter in self.boxes.parameters():
                parameter.mul_(pixels / 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.relu(self.boxes(x)), self.scores(x).sigmoid()), dim=1)


class Padded(OneOutput):
    """Joined with zeros: a constant needs no integers of its own."""

    def forward(self, x: Tensor) -> Tensor:
        boxes = self.relu(self.boxes(x))
        return torch.cat((boxes, torch.zeros_like(boxes)), dim=1)


class ColorsAndDistance(nn.Module):
    """Colors from 0 to 1 and a distance in one input."""

    def __init__(self, meters: float) -> None:
        super().__init__()
        self.meters = meters
        self.of_colors, self.of_distance = nn.Conv2d(2, 4, 1), nn.Conv2d(1, 4, 1)
        seeded(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.of_colors(x[:, :2]) + self.of_distance(x[:, 2:]).sigmoid()

    def batch(self) -> Tensor:
        return torch.rand(8, 3, 8, 8) * torch.tensor([1.0, 1.0, self.meters]).reshape(3, 1, 1)


class Margin(OneOutput):
    """Joined with a number that the range has to hold."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(self.scores(x).sigmoid(), (1, 1, 1, 1), value=-self.number)

    number = 500.0


class Skip(OneOutput):
    """Features that a layer reads, too, joined with what it makes of them."""

    def __init__(self, pixels: float) -> None:
        super().__init__(4.0)
        self.deep = nn.Conv2d(5, 4, 3, padding=1)
        self.factor = pixels

    def forward(self, x: Tensor) -> Tensor:
        features = self.scores(x).sigmoid()
        return torch.cat((features, self.deep(features) * self.factor), dim=1)


class Apart(OneOutput):
    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"boxes": self.relu(self.boxes(x)), "scores": self.scores(x).sigmoid()}


def found(network: QuantizedNetwork) -> list[tuple[str, FindingKind]]:
    return [(one.module, one.kind) for one in network.findings]


def scores(network: QuantizedNetwork) -> Tensor:
    with torch.no_grad():
        return network(images(2, seed=1))[:, 4:]


def test_pixels_and_scores_in_one_range_are_found_and_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        network = calibrated(OneOutput(640.0))
    assert found(network) == [("cat", FindingKind.UNLIKE_RANGES)]
    (finding,) = network.findings
    assert "steps the former are left 0." in finding.problem
    assert scores(network).unique().numel() <= 2  # which is why
    assert finding.problem in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        calibrate(network, [call(images(8))])  # as each rung does
    assert len(network.findings) == 1
    assert not caplog.text


@pytest.mark.parametrize(("factor", "names"), [(1.0, []), (5.0, ["cat"])])
def test_what_others_read_too_is_found_with_more_steps_left(factor: float, names: list[str]) -> None:
    network = calibrated(seeded(Skip(factor)))
    assert [one.module for one in network.findings] == names
    assert all("and other layers compute" in one.problem for one in network.findings)


def test_parts_of_an_input_that_are_unlike_are_found(tmp_path: Path) -> None:
    known = [
        calibrated(network, call(network.batch())) for network in (ColorsAndDistance(80.0), ColorsAndDistance(4.0))
    ]
    assert [found(network) for network in known] == [[("of_colors", FindingKind.UNLIKE_RANGES)], []]
    (finding,) = known[0].findings
    assert finding.problem.startswith("reads a part of values from ")
    assert "of whose 255 steps the former are left 3." in finding.problem
    wide = calibrated(ColorsAndDistance(80.0), call(ColorsAndDistance(80.0).batch()), precision="w8a16")
    assert not wide.findings
    cache, batches = StatisticsCache(tmp_path), [call(ColorsAndDistance(80.0).batch())]
    for _ in range(2):
        again = quantized(ColorsAndDistance(80.0), call(ColorsAndDistance(80.0).batch())).eval()
        calibrate(again, batches, cache=cache)
        assert found(again) == [("of_colors", FindingKind.UNLIKE_RANGES)]


def test_a_number_that_widens_the_range_is_found() -> None:
    network = calibrated(Margin(1.0))
    assert {kind for _, kind in found(network)} == {FindingKind.UNLIKE_RANGES}
    assert "with values from -500 to -500" in network.findings[0].problem
    assert not calibrated(Margin(1.0), precision="w8a16").findings


def test_a_pass_that_is_recalled_finds_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache, batches = StatisticsCache(tmp_path), [call(images(8))]
    whole = quantized(OneOutput(640.0)).eval()
    calibrate(whole, batches, cache=cache)
    with caplog.at_level(logging.INFO):
        calibrate(whole, batches, cache=cache)  # as each rung does
        recalled = quantized(OneOutput(640.0)).eval()
        calibrate(recalled, batches, cache=cache)
    assert caplog.text.count("was seen of the same 8 samples before") == 2
    assert [one.problem for one in recalled.findings] == [one.problem for one in whole.findings] != []
    with pytest.raises(PreflightError, match="joins values"):
        calibrate(quantized(OneOutput(640.0), strict=True).eval(), batches, cache=cache)


def test_the_line_to_paste_keeps_the_scores(tmp_path: Path) -> None:
    (finding,) = calibrated(OneOutput(640.0)).findings
    assert 'overrides={"cat": "w8a16"}' in finding.remedy
    network = calibrated(OneOutput(640.0), overrides={"cat": Precision.parse("w8a16")})
    assert found(network) == []
    assert scores(network).unique().numel() > 50
    bundle = export_bundle(network, tmp_path / "fine", images(4))  # equal to the simulation, or it raises
    assert bundle.manifest.parity


@pytest.mark.parametrize(
    ("network", "precision"),
    [
        (OneOutput(2.0), "w8a8"),
        (OneOutput(640.0), "w8a16"),
        (Padded(640.0), "w8a8"),
        (Apart(640.0), "w8a8"),
    ],
    ids=["alike", "16 bits", "a constant", "apart"],
)
def test_nothing_is_found_where_integers_suffice(network: nn.Module, precision: str) -> None:
    assert found(calibrated(network, precision=precision)) == []


def test_strict_refuses_after_calibration() -> None:
    network = quantized(OneOutput(640.0), strict=True).eval()
    with pytest.raises(PreflightError, match="joins values"):
        calibrate(network, [call(images(8))])
    assert not network.calibrated
