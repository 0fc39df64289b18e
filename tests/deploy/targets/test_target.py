"""Targets by name, by path and as instances: the package's, and one of a user's own from a file of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI

import lightning_quant as lq
from lightning_quant.cli.configuration import config_dir
from lightning_quant.deploy.bundle import Bundle
from lightning_quant.deploy.device_report import DeviceReport
from lightning_quant.deploy.export import export_bundle
from lightning_quant.deploy.parity import LOWEST_PSNR
from lightning_quant.deploy.push import Push, device_folder, resume
from lightning_quant.deploy.samples import Samples
from lightning_quant.deploy.targets.onnxruntime import OnnxRuntimeTarget
from lightning_quant.deploy.targets.target import TARGETS, Measured, folder_name
from lightning_quant.errors import ConfigurationError, DeviceError, DeviceUnavailableError
from lightning_quant.recipe import QuantRecipe
from lightning_quant.report.record import RunRecord
from lightning_quant.simulation.calibrate import calibrate
from tests.helpers.networks import Body, call, images, quantized
from tests.helpers.small import SmallModule, small_loader
from tests.helpers.targets import Board

MakeTrainer = Callable[..., Trainer]

PATH = "tests.helpers.targets.Board"
S24 = "Samsung Galaxy S24"


class Plain(SmallModule):
    """Without arguments."""

    def __init__(self) -> None:
        super().__init__()


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Bundle, Samples]:
    network = quantized(Body()).eval()
    calibrate(network, [call(images(8))])
    calls = [call(images(1, seed=seed)) for seed in (1, 2)]
    bundle = export_bundle(network, tmp_path / "out" / "net", calls)
    return bundle, Samples.of(network, bundle.manifest, calls)


def made(target: Any, device: str | list[str] = S24) -> Any:
    """The target that a callback was given."""
    push = lq.DeviceExport(target=target, device=device).push
    assert push is not None
    return push._target


@pytest.mark.parametrize(
    ("target", "device", "port"),
    [
        (Board(), "a board", 80),
        (Board("mine", port=5555), "mine", 5555),
        ("board", S24, 80),
        (PATH, S24, 80),
        ({"board": {"port": 5555}}, S24, 5555),
        ({PATH: {"device": "mine", "port": 5555}}, "mine", 5555),
    ],
)
def test_a_target_of_ones_own(target: Any, device: str, port: int) -> None:
    board = made(target)
    assert isinstance(board, Board)
    assert (board.device, board.port) == (device, port)


def test_the_packages_own_targets() -> None:
    assert list(TARGETS.homes) == ["aihub", "htp_emulator", "onnxruntime"]
    assert made("aihub", [S24, "Xiaomi 12"]).devices == [S24, "Xiaomi 12"]
    assert made("htp_emulator").soc == "SM8650"
    assert made({"htp_emulator": {"memory_gb": 4.0}}).memory_gb == 4.0
    assert isinstance(made(OnnxRuntimeTarget()), OnnxRuntimeTarget)
    assert made("auto") is None


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("phone", "Unknown target 'phone': expected one of auto, aihub, htp_emulator, onnxruntime, "),
        ("nowhere.Board", "Target 'nowhere.Board' cannot be imported"),
        ("torch.nn.ReLU", r"is not a subclass of lightning_quant\.Target"),
        ({PATH: {"color": "red"}}, "with options .*color"),
        ({"htp_emulator": {"device": "toaster"}}, "No chip known for device 'toaster'"),
        (3, "Target 3: expected a name"),
    ],
)
def test_refuses(target: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        lq.DeviceExport(target=target)


@pytest.mark.parametrize("target", ["auto", "onnxruntime", "board", PATH])
def test_several_devices_only_where_they_are_taken(target: str) -> None:
    with pytest.raises(ConfigurationError, match=r"2 devices with target='(auto|onnxruntime|board)': only aihub"):
        lq.DeviceExport(target=target, device=[S24, S24])


def test_a_class_without_run_cannot_be_made() -> None:
    class Nothing(lq.Target):
        name = "nothing"

    with pytest.raises(ConfigurationError, match=r"Target 'nothing' with options {}: .*abstract.*run"):
        lq.DeviceExport(target="nothing")


@pytest.mark.parametrize(
    ("error", "refused"), [(ConfigurationError("no such board"), True), (DeviceError("the board is asleep"), False)]
)
def test_refuses_or_cannot_know_before_training(
    trainer: MakeTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture, error: Exception, refused: bool
) -> None:
    asked = []

    class Choosy(Board):
        def check_recipe(self, recipe: QuantRecipe) -> None:
            asked.append(str(recipe.precision))
            raise error

    export = lq.DeviceExport(tmp_path, target=Choosy(), name="net", samples=1, report=False)
    one = trainer(lq.PostTrainingQuantization("w8a8", calibration_dataloader=small_loader()), export)
    with pytest.raises(ConfigurationError, match="no such board") if refused else nullcontext():
        one.validate(SmallModule(), small_loader(), verbose=False)
    assert asked == ["w8a8"]
    assert export.bundles.keys() == (set() if refused else {"model"})
    assert ("Not known before the export whether board can run the network: the board is asleep" in caplog.text) is (
        not refused
    )


def test_from_fit_to_report(trainer: MakeTrainer, tmp_path: Path) -> None:
    export = lq.DeviceExport(tmp_path, target=Board("mine", noise=0.01), name="net", samples=3, monitor="val_loss")
    module = SmallModule()
    trainer(lq.PostTrainingQuantization("w8a8"), export).fit(module, small_loader(), small_loader())
    (report,) = export.reports
    assert (report.tier, report.device, report.samples) == ("board", "mine at 80", 3)
    assert report.against_simulation is not None
    assert LOWEST_PSNR < report.against_simulation.psnr_db < 60
    assert report.metric.keys() == {"float", "simulation", "device"}
    assert DeviceReport.read(tmp_path / "net.device/board/report.json") == report
    assert "Measured on a board on a desk." in report.sentence()
    record = RunRecord.read(tmp_path / "net.report/results.json")
    assert record.device == [report]
    page = (tmp_path / "net.report/report.html").read_text()
    assert "mine at 80" in page
    assert "board: measured on a board on a desk." in page


def test_a_statement_does_not_replace_that_of_a_tier_of_the_package() -> None:
    report = DeviceReport("htp_emulator", "mine", quantized(Body()).recipe.precision, statement="a real phone")
    assert report.statement == "compiled for this SoC and emulated; not measured on hardware"


def test_an_impossible_report_is_refused(exported: tuple[Bundle, Samples]) -> None:
    class Hasty(Board):
        name = "hasty"

        def run(self, *arguments: Any) -> list[Measured]:
            (measured,) = super().run(*arguments)
            return [replace(measured, report=replace(measured.report, latency_us=[0]))]

    with pytest.raises(DeviceError, match=r"The report of target 'hasty' cannot be: latency_us is \[0\], expected"):
        Push(Hasty(), [], 60.0, {}).run(*exported)


def test_one_that_cannot_be_used(exported: tuple[Bundle, Samples]) -> None:
    class Unplugged(Board):
        name = "unplugged"

        def unavailable(self) -> str | None:
            return "it is not plugged in"

    with pytest.raises(DeviceUnavailableError, match="target='unplugged' cannot be used: it is not plugged in"):
        Push("unplugged", [S24], 60.0, {}).run(*exported)


@pytest.mark.parametrize("target", [Board("mine"), PATH, {"board": {"port": 5555}}])
def test_resumed_with_the_target_again(exported: tuple[Bundle, Samples], target: Any) -> None:
    bundle, samples = exported
    (first,) = Push(target, [S24], 60.0, {"wait": False}).run(bundle, samples)
    assert json.loads((device_folder(bundle) / "request.json").read_text())["target"] == "board"
    with pytest.raises(ConfigurationError, match=r"'board', which was made in Python: expected it again"):
        resume(bundle.path)
    (again,) = resume(bundle.path, target)
    assert again.report == first.report


def test_from_lightnings_command_line() -> None:
    for given, device in [
        (PATH, S24),
        ({PATH: {"port": 5555}}, S24),
        ({"class_path": PATH, "init_args": {"device": "mine", "port": 5555}}, "mine"),
    ]:
        callback = {"class_path": "lightning_quant.DeviceExport", "init_args": {"target": given}}
        arguments = {"trainer": {"accelerator": "cpu", "logger": False, "callbacks": [callback]}}
        cli = LightningCLI(Plain, args=arguments, run=False, save_config_callback=None)
        (export,) = [one for one in cli.trainer.callbacks if isinstance(one, lq.DeviceExport)]
        assert export.push is not None
        assert isinstance(export.push._target, Board)
        assert export.push._target.device == device


@pytest.mark.parametrize(
    ("override", "port"),
    [
        (f"target.target={PATH}", 80),
        ("target.target={" + PATH + ":{port:5555}}", 5555),
        ("target.target={_target_:" + PATH + ",port:5555}", 5555),
    ],
)
def test_from_the_command_line(override: str, port: int) -> None:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = compose("config", [override])
    export = instantiate(config.target, _convert_="all")
    assert isinstance(export.push._target, Board)
    assert export.push._target.port == port


def test_two_phones_have_two_folders() -> None:
    names = ("Samsung Galaxy S24", "Samsung Galaxy S24+", "Samsung Galaxy S24 Ultra")
    assert [folder_name(name) for name in names] == [
        "samsung-galaxy-s24", "samsung-galaxy-s24-plus", "samsung-galaxy-s24-ultra"
    ]  # fmt: skip
