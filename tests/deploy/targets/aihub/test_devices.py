"""A device that cannot run the network is refused before the network is trained, not after it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

import lightning_quant as lq
from lightning_quant.deploy.targets.htp.target import HtpEmulatorTarget
from lightning_quant.errors import ConfigurationError, UnknownDeviceError
from lightning_quant.recipe import QuantRecipe
from tests.aihub import faults
from tests.aihub.standin import StandIn
from tests.helpers.small import SmallModule, small_loader

pytestmark = pytest.mark.slow

MakeTrainer = Callable[..., Trainer]

S24 = "Samsung Galaxy S24"
PIXEL = "Google Pixel 3"  # no Hexagon NPU, and no QNN


def recipe(precision: str = "w8a8") -> QuantRecipe:
    return QuantRecipe(precision=precision)  # type: ignore[arg-type]  # parsed there


@pytest.mark.parametrize("target", ["aihub", "auto"])
@pytest.mark.parametrize(
    ("arguments", "precision", "error", "message"),
    [
        ({"device": "Samsung Galaxy S42"}, "w8a8", UnknownDeviceError, r"no device 'Samsung Galaxy S42'.*Galaxy S2"),
        ({"device": PIXEL}, "w8a8", ConfigurationError, r"runtime='qnn_dlc' on Google Pixel 3: .*offers tflite"),
        (
            {"device": PIXEL, "runtime": "tflite"},
            "w4a16",
            ConfigurationError,
            r"w4a16 on Google Pixel 3: expected",
        ),
        ({"device": S24, "runtime": "coreml"}, "w8a8", ConfigurationError, r"Unknown runtime 'coreml'"),
    ],
)
def test_refused_before_training(
    hub: StandIn,
    trainer: MakeTrainer,
    tmp_path: Path,
    target: str,
    arguments: dict[str, Any],
    precision: str,
    error: type[Exception],
    message: str,
) -> None:
    module = SmallModule()

    def fit() -> None:
        export = lq.DeviceExport(tmp_path / "out", target=target, **arguments)
        one = trainer(lq.QuantizationAwareTraining(precision), export, max_epochs=1)
        one.fit(module, small_loader(), small_loader())

    with pytest.raises(error, match=message):
        fit()
    assert "training" not in module.called
    assert hub.posts("models") == []
    assert not (tmp_path / "out").exists()


def test_a_chip_is_the_emulators(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """AI Hub has phones, not chips: "auto" leaves them to the emulator, before training and after it."""
    export = lq.DeviceExport(target="auto", device="SM8650")
    export.check_target(recipe())
    assert export.push is not None
    monkeypatch.setattr(HtpEmulatorTarget, "unavailable", lambda self: "the NPU emulator is not installed")
    taken: Any = object.__new__(HtpEmulatorTarget)
    with monkeypatch.context() as patched:
        patched.setattr(HtpEmulatorTarget, "unavailable", lambda self: None)
        patched.setattr(HtpEmulatorTarget, "check", lambda self, bundle: None)
        assert type(export.push._choose(taken)) is HtpEmulatorTarget
    assert "no device 'SM8650'" in export.push.passed_over["aihub"]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (faults.answer(503), "AI Hub gave no list of its devices"),
        (faults.hang(), "AI Hub gave no list of its devices"),
        (faults.answer(401), "AI Hub refused the list of devices: Failed to authenticate"),
    ],
)
def test_a_service_that_fails_costs_a_line(
    hub: StandIn, caplog: pytest.LogCaptureFixture, fault: faults.Fault, reason: str
) -> None:
    hub.inject(fault, faults.DEVICES, times=None)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        lq.DeviceExport(target="auto", device="Samsung Galaxy S42").check_target(recipe())
    (line,) = caplog.messages
    assert line.startswith(f"Not known before the export whether Samsung Galaxy S42 can run the network: {reason}")


def test_a_service_that_is_down(hub: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    hub.stop()
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        lq.DeviceExport(target="auto", device="Samsung Galaxy S42").check_target(recipe())
        assert caplog.messages == []  # "auto" means whatever there is
        lq.DeviceExport(target="aihub", device="Samsung Galaxy S42").check_target(recipe())
    (line,) = caplog.messages
    assert "cannot be reached" in line
    with pytest.raises(ConfigurationError, match="w8a16 on Samsung Galaxy S21: expected a chip with 16-bit"):
        lq.DeviceExport(target="aihub", device="Samsung Galaxy S21").check_target(recipe("w8a16"))


def test_asked_once(hub: StandIn, trainer: MakeTrainer, tmp_path: Path) -> None:
    export = lq.DeviceExport(tmp_path / "out", target="aihub", device=S24, name="net", compare_float=False)
    export.check_target(recipe())
    export.check_target(recipe())
    assert len(hub.requests()) == 1
    export.check_target(recipe("w8a16"))  # a question of its own
    assert len(hub.requests()) == 2
    one = trainer(lq.PostTrainingQuantization("w8a8", calibration_dataloader=small_loader()), export)
    one.predict(SmallModule(), small_loader())
    assert len(hub.requests()) == 2
