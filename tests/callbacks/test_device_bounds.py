"""Bounds on a device's figures: kept, missed, refused before work is spent, and never passed over in silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

import lightning_quant as lq
from lightning_quant.errors import ConfigurationError, DeviceBoundError
from tests.helpers.small import SmallModule, small_loader

MakeTrainer = Callable[..., Trainer]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": None, "min_psnr": 30}, r"min_psnr=30 with target=None: expected a target"),
        ({"target": None, "max_metric_drop": 0.1}, r"max_metric_drop=0.1 with target=None: expected a target"),
        ({"target": "aihub", "wait": False, "min_psnr": 30}, r"min_psnr=30 with wait=False, which ends before"),
        ({"max_metric_drop": "1%"}, r"max_metric_drop='1%': expected a number, or None"),
        ({"min_psnr": True}, r"min_psnr=True: expected a number, or None"),
        ({"min_psnr": float("nan")}, r"min_psnr=nan: expected a number, or None"),
    ],
)
def test_bounds_that_could_not_be_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        lq.DeviceExport(**arguments)


def fit(make: MakeTrainer, export: lq.DeviceExport, quantizer: Any = None, **options: Any) -> SmallModule:
    module = SmallModule()
    make(quantizer or lq.PostTrainingQuantization("w8a8"), export, **options).fit(
        module, small_loader(), small_loader()
    )
    return module


def test_a_bound_on_no_metric_is_refused_before_calibration(trainer: MakeTrainer, tmp_path: Path) -> None:
    export = lq.DeviceExport(tmp_path / "out", target="onnxruntime", max_metric_drop=0.1)
    module = SmallModule()
    with pytest.raises(ConfigurationError, match=r"max_metric_drop=0\.1 without monitor="):
        trainer(lq.PostTrainingQuantization("w8a8"), export).fit(module, small_loader(), small_loader())
    assert module.called == []


def test_a_bound_on_a_metric_that_is_not_logged(trainer: MakeTrainer, tmp_path: Path) -> None:
    export = lq.DeviceExport(tmp_path / "out", target="onnxruntime", monitor="val_los", max_metric_drop=0.1)
    with pytest.raises(ConfigurationError, match=r"monitor='val_los' was not logged in validation.*'val_loss'"):
        fit(trainer, export)
    assert not (tmp_path / "out").exists()


def test_without_a_bound_the_report_says_why_there_is_no_metric(trainer: MakeTrainer, tmp_path: Path) -> None:
    export = lq.DeviceExport(tmp_path / "out", target="onnxruntime", monitor="val_los", report=False)
    fit(trainer, export)
    (report,) = export.reports
    assert [
        one for one in report.warnings if "No metric of the outputs: val_los is not among what validation logs, " in one
    ]


def test_without_validation_samples_a_bound_is_not_kept(trainer: MakeTrainer, tmp_path: Path) -> None:
    export = lq.DeviceExport(
        tmp_path / "out", target="onnxruntime", monitor="val_loss", max_metric_drop=1, report=False
    )
    with pytest.raises(
        DeviceBoundError, match=r"known of nothing.*No metric of the outputs: there are no validation samples"
    ):
        trainer(lq.PostTrainingQuantization("w8a8"), export).fit(SmallModule(), small_loader())
    assert export.bundle is not None


def test_without_the_float_network_there_is_nothing_to_bound_a_metric_by(trainer: MakeTrainer, tmp_path: Path) -> None:
    one = trainer(lq.PostTrainingQuantization("w8a8"))
    one.fit(SmallModule(), small_loader(), small_loader())
    one.save_checkpoint(tmp_path / "net.ckpt")
    module = lq.load_quantized(SmallModule, tmp_path / "net.ckpt")
    export = lq.DeviceExport(
        tmp_path / "out", target="onnxruntime", monitor="val_loss", max_metric_drop=1, report=False
    )
    with pytest.raises(DeviceBoundError, match=r"known of simulation, device: expected that of float"):
        trainer(export).validate(module, small_loader(), verbose=False)


@pytest.mark.parametrize("given", [None, "val_loss"])
def test_the_direction_is_that_of_the_ladder(trainer: MakeTrainer, tmp_path: Path, given: str | None) -> None:
    """A loss that rises is a drop, though nothing but the ladder says that less of it is better."""
    export = lq.DeviceExport(tmp_path / "out", target="onnxruntime", monitor=given, max_metric_drop=-9, report=False)
    ladder = lq.QuantizationAwareTraining("w8a8", max_drop=9.0, monitor="val_loss", mode="min")
    with pytest.raises(DeviceBoundError, match=r"the metric drops by ") as caught:
        fit(trainer, export, ladder, max_epochs=0)
    (report,) = export.reports
    assert f"drops by {report.metric['device'] - report.metric['float']:.4f} to" in str(caught.value)


def test_a_folder_that_cannot_be_made_is_refused_before_calibration(trainer: MakeTrainer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    module = SmallModule()
    for folder in ("file", "file/out"):
        export = lq.DeviceExport(tmp_path / folder, target=None)
        with pytest.raises(ConfigurationError, match=r"dirpath=.*: .*file is a file, expected a folder"):
            trainer(lq.PostTrainingQuantization("w8a8"), export).fit(module, small_loader(), small_loader())
    assert module.called == []


def test_an_instance_is_not_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"of an object, a SmallModule: expected the LightningModule's c"):
        lq.load_quantized(SmallModule(), tmp_path / "net.ckpt")  # type: ignore[arg-type]
