"""Bundles on a target: what is kept to resume them, what is compared, which bounds are kept."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lightning_quant.deploy.bundle import Bundle
from lightning_quant.deploy.device_report import DeviceReport
from lightning_quant.deploy.export import export_bundle
from lightning_quant.deploy.parity import compare
from lightning_quant.deploy.push import Push, check_bounds, device_folder, finished, resume
from lightning_quant.deploy.samples import Samples
from lightning_quant.errors import ConfigurationError, DataError, DeviceBoundError
from lightning_quant.precision import Precision
from tests.helpers.networks import Body, calibrated, call, images


@pytest.fixture
def pushed(tmp_path: Path) -> Bundle:
    """A bundle that was run by ONNX Runtime."""
    network = calibrated(Body())
    calls = [call(images(1, seed=seed)) for seed in (1, 2)]
    bundle = export_bundle(network, tmp_path / "net", calls)
    Push("onnxruntime", ["Samsung Galaxy S24"], 60.0, {"wait": False}).run(
        bundle, Samples.of(network, bundle.manifest, calls)
    )
    return bundle


def test_what_is_kept_to_resume(pushed: Bundle) -> None:
    request = json.loads((device_folder(pushed) / "request.json").read_text())
    files = json.loads((pushed.path / "manifest.json").read_text())["files"]
    assert request == {
        "target": "onnxruntime",
        "devices": ["Samsung Galaxy S24"],
        "timeout": 60.0,
        "options": {"wait": False},
        "bundle": files,
    }
    report = DeviceReport.read(device_folder(pushed) / "onnxruntime/report.json")
    assert finished(device_folder(pushed))
    (again,) = resume(pushed.path)
    assert again.report == report


def test_a_bundle_that_was_never_sent(tmp_path: Path) -> None:
    bundle = export_bundle(calibrated(Body()), tmp_path / "net", [call(images(1))])
    assert not finished(device_folder(bundle))
    with pytest.raises(ConfigurationError, match=r"was not sent to a target yet \(.*request.json: there is no file"):
        resume(bundle.path)


def test_a_bundle_that_was_exported_again(pushed: Bundle) -> None:
    path = device_folder(pushed) / "request.json"
    request = json.loads(path.read_text())
    request["bundle"]["net.onnx"]["sha256"] = "0" * 64
    path.write_text(json.dumps(request))
    with pytest.raises(DataError, match="was exported again after it was sent to onnxruntime"):
        resume(pushed.path)


@pytest.mark.parametrize(("mode", "device"), [("max", 0.68), ("min", 0.72)])
def test_a_bound_on_the_metric(mode: str, device: float) -> None:
    report = DeviceReport("aihub", "phone", Precision(8, 8), metric={"float": 0.7, "device": device})
    check_bounds([report], min_psnr=None, max_metric_drop=0.03, mode=mode)
    with pytest.raises(DeviceBoundError, match=r"the metric drops by 0\.0200 to .*, expected at most max_metric_drop"):
        check_bounds([report], min_psnr=None, max_metric_drop=0.01, mode=mode)


def test_a_bound_in_db_for_outputs_that_are_classes() -> None:
    values = compare([([np.array([[1, 2]])], [np.array([[1, 3]])])]).rounded()
    report = DeviceReport("aihub", "phone", Precision(8, 8), against_float=values)
    with pytest.raises(DeviceBoundError, match=r"outputs are classes, 50\.00% of them the same.*max_metric_drop"):
        check_bounds([report], min_psnr=40, max_metric_drop=None)
    same = compare([([np.array([[1, 2]])], [np.array([[1, 2]])])]).rounded()
    check_bounds(
        [DeviceReport("aihub", "phone", Precision(8, 8), against_float=same)], min_psnr=40, max_metric_drop=None
    )
