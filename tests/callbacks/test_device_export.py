"""DeviceExport: when it runs, what it writes, and that the files run without PyTorch."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.utils.data import TensorDataset

import lightning_quant as lq
from lightning_quant.callbacks.device_metric import LabeledBatch, metrics_of
from lightning_quant.deploy.blame.result import Against, read_blames
from lightning_quant.deploy.bundle import load_bundle
from lightning_quant.deploy.device_report import DeviceReport
from lightning_quant.deploy.graph.qdq import exact_session
from lightning_quant.deploy.targets.htp.target import HtpEmulatorTarget
from lightning_quant.errors import ConfigurationError, DeviceBoundError, ParityError
from lightning_quant.simulation import aimet
from lightning_quant.simulation.inputs import NetworkInputs
from lightning_quant.simulation.network import QuantizedNetwork
from tests.helpers.qdq import tamper
from tests.helpers.small import SmallModule, assert_same_tensors, small_data, small_loader, small_net

MakeTrainer = Callable[..., Trainer]


def files_below(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_bundle_of_each_stage(trainer: MakeTrainer, tmp_path: Path, stage: str) -> None:
    module = SmallModule()
    quantizer = lq.PostTrainingQuantization("w8a8", calibration_dataloader=small_loader())
    export = lq.DeviceExport(tmp_path / "out", target=None, name="net", report=False)
    one = trainer(quantizer, export)
    if stage == "fit":
        one.fit(module, small_loader(), small_loader())
    else:
        getattr(one, stage)(module, small_loader(), verbose=False)
    assert files_below(tmp_path / "out") == {
        "net/net.aimet/model.onnx",
        "net/net.aimet/model.encodings",
        "net/net.onnx",
        "net/io.json",
        "net/manifest.json",
        *("net/host/Host.kt", "net/host/host.cpp", "net/host/host.py"),
    }
    assert export.bundle is not None
    manifest = json.loads((tmp_path / "out/net/manifest.json").read_text())
    assert export.bundle.manifest == load_bundle(tmp_path / "out/net").manifest
    assert manifest == export.bundle.manifest.to_dict()
    assert (manifest["precision"], manifest["hardware"], manifest["calibrated"]) == ("w8a8", "htp_v75", True)
    assert (manifest["parity"]["tier"], manifest["parity"]["samples"]) == ("onnxruntime", 8)
    session = exact_session(export.bundle.qdq)
    images = small_data().tensors[0][:1]
    (scores,) = session.run(None, {manifest["input_names"][0]: images.numpy()})
    with torch.no_grad():
        expected = module.quantized.eval()(images).numpy()
    np.testing.assert_allclose(scores, expected, atol=0.05 * np.abs(expected).max())


def test_a_calibrated_network_is_exported_where_there_is_no_training_data(trainer: MakeTrainer, tmp_path: Path) -> None:
    export = lq.DeviceExport(tmp_path / "out", name="net", samples=3)
    one = trainer(lq.QuantizationAwareTraining("w8a16"), export, max_epochs=1)
    module = SmallModule()
    one.fit(module, small_loader(), small_loader())
    (tmp_path / "out/net/manifest.json").rename(tmp_path / "of-fit.json")
    (tmp_path / "out").rename(tmp_path / "of-fit")
    one.validate(module, small_loader(), verbose=False)
    assert export.bundle is not None
    assert load_bundle(tmp_path / "out/net").manifest.parity.samples == 3


@pytest.mark.parametrize("precision", ["w4a8", "w4a16", "w8a16"])
def test_other_precisions(trainer: MakeTrainer, tmp_path: Path, precision: str) -> None:
    export = lq.DeviceExport(tmp_path, samples=3)
    trainer(lq.PostTrainingQuantization(precision), export).fit(SmallModule(), small_loader())
    assert export.bundle is not None
    assert export.bundle.path == tmp_path / f"SmallNet-{precision}"
    assert export.bundle.manifest.parity.samples == 3


def test_once_at_the_end_and_not_in_validations_inside_fit(trainer: MakeTrainer, tmp_path: Path) -> None:
    seen: list[tuple[bool, str, bool]] = []

    class Look(Callback):
        def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
            seen.append((trainer.sanity_checking, "validation", (tmp_path / "export").exists()))

        def on_fit_end(self, trainer: Trainer, *_: Any) -> None:
            seen.append((trainer.sanity_checking, "fit", (tmp_path / "export").exists()))

    module = SmallModule()
    export = lq.DeviceExport()
    trainer(lq.QuantizationAwareTraining(), export, Look(), max_epochs=2).fit(module, small_loader(), small_loader())
    # the folder is made below the Trainer's root, after training; on_fit_end of Look comes after the export's
    assert seen == [
        (True, "validation", False),
        (False, "validation", False),
        (False, "validation", False),
        (False, "fit", True),
    ]
    assert export.bundle is not None
    assert export.bundle.path == tmp_path / "export" / "SmallNet-w8a8"


def test_export_changes_nothing_in_the_module(trainer: MakeTrainer, tmp_path: Path) -> None:
    exported, plain, drawn = SmallModule(), SmallModule(), []
    for module, callbacks in ((exported, [lq.DeviceExport(tmp_path)]), (plain, [])):
        torch.manual_seed(0)
        one = trainer(lq.QuantizationAwareTraining(), *callbacks, max_epochs=1)
        one.fit(module, small_loader(shuffle=True))
        drawn.append(torch.rand(1))
    assert drawn[0] == drawn[1]
    assert_same_tensors(exported.state_dict(), plain.state_dict())
    assert exported.model.training == plain.model.training
    trainer(lq.QuantizationAwareTraining(), max_epochs=1).fit(exported, small_loader())
    assert exported.called.count("training") == 8


def test_export_leaves_every_parameter_the_object_it_is(trainer: MakeTrainer, tmp_path: Path) -> None:
    """Frozen ones stay frozen; what holds them, such as an optimizer, holds them still."""

    class Seeing(SmallModule):
        def on_validation_epoch_end(self) -> None:
            self.seen = [(name, id(one), one.requires_grad) for name, one in self.named_parameters()]

    module = Seeing()
    module.model.branch.bias = nn.Parameter(torch.zeros(6), requires_grad=False)
    trainer(lq.PostTrainingQuantization("w8a8"), lq.DeviceExport(tmp_path, target=None, report=False)).fit(
        module, small_loader(), small_loader()
    )
    assert [(name, id(one), one.requires_grad) for name, one in module.named_parameters()] == module.seen


def test_earlier_bundle_is_replaced(trainer: MakeTrainer, tmp_path: Path) -> None:
    export = lq.DeviceExport(tmp_path, target=None, name="net")
    callback = lq.QuantizationAwareTraining()
    module = SmallModule()
    for epochs in (1, 2):
        trainer(callback, export, max_epochs=epochs).fit(module, small_loader())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net", "net.report"]
    assert export.bundle is not None
    assert load_bundle(tmp_path / "net").manifest == export.bundle.manifest


def test_module_from_load_quantized_needs_no_callback(trainer: MakeTrainer, tmp_path: Path) -> None:
    one = trainer(lq.PostTrainingQuantization())
    one.fit(SmallModule(), small_loader())
    one.save_checkpoint(tmp_path / "last.ckpt")
    module = lq.load_quantized(SmallModule, tmp_path / "last.ckpt")

    class WithData(lq.DeviceExport):
        pass

    module.train_dataloader = small_loader  # type: ignore[method-assign]
    export = WithData(tmp_path / "out")
    trainer(export).test(module, small_loader(), verbose=False)
    assert export.bundle is not None


# What cannot work


def test_without_a_quantization_callback(trainer: MakeTrainer, tmp_path: Path) -> None:
    module = SmallModule()
    with pytest.raises(ConfigurationError, match="DeviceExport without a quantization callback before it"):
        trainer(lq.DeviceExport(tmp_path), max_epochs=1).fit(module, small_loader())
    assert module.called == []


def test_listed_before_the_quantization_callback(trainer: MakeTrainer, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="without a quantization callback before it"):
        trainer(lq.DeviceExport(tmp_path), lq.PostTrainingQuantization()).fit(SmallModule(), small_loader())


@pytest.mark.parametrize("precision", [{"precision": "w8a16"}, {"precision": "w8a8", "overrides": {"head": "w8a16"}}])
@pytest.mark.parametrize("target", ["htp_emulator", "auto"])
def test_activations_that_the_chip_lacks_are_refused_before_training(
    trainer: MakeTrainer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: dict[str, Any],
    target: str,
) -> None:
    monkeypatch.setenv("QAIHUB_CLIENT_INI", str(tmp_path / "none.ini"))
    module = SmallModule()
    export = lq.DeviceExport(tmp_path / "out", target=target, device="Samsung Galaxy S21")
    with pytest.raises(ConfigurationError, match="w8a16 on Samsung Galaxy S21: expected a chip with 16-bit"):
        trainer(lq.QuantizationAwareTraining(**precision), export, max_epochs=1).fit(module, small_loader())
    assert "training" not in module.called
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"on_failure": "cry"}, r"on_failure='cry': expected one of warn, raise"),
        ({"on_parity": "ignore"}, r"on_parity='ignore': expected one of warn, raise"),
        ({"mode": "best"}, r"mode='best': expected max or min"),
        ({"target": "htp_emulator", "device": "Nokia 3310"}, r"No chip known for device 'Nokia 3310'"),
        ({"target": "aihub", "runtime": "coreml"}, r"Unknown runtime 'coreml'"),
        ({"target": "iphone"}, r"Unknown target 'iphone': expected one of auto, aihub, htp_emulator, onnxruntime"),
        ({"samples": 0}, r"samples=0: expected a whole number of at least 1"),
        ({"name": "../net"}, r"name='\.\./net': expected a plain file name"),
        ({"name": ""}, r"name='': expected a plain file name"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        lq.DeviceExport(**arguments)


def test_files_that_compute_something_else_are_kept_under_a_name_that_says_so(
    trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = aimet.export

    def export(model: Any, args: Any, file: str, **options: Any) -> None:
        real(model, args, file, **options)
        tamper(Path(file), 1.5)

    monkeypatch.setattr(aimet, "export", export)
    with pytest.raises(ParityError, match="The first layer that differs is 'stem'"):
        trainer(lq.PostTrainingQuantization("w4a8"), lq.DeviceExport(tmp_path / "out")).fit(
            SmallModule(), small_loader()
        )
    assert files_below(tmp_path / "out") == {
        "SmallNet-w4a8.failed/SmallNet-w4a8.aimet/model.onnx",
        "SmallNet-w4a8.failed/SmallNet-w4a8.aimet/model.encodings",
        "SmallNet-w4a8.failed/SmallNet-w4a8.onnx",
        "SmallNet-w4a8.failed/blame.json",
        "SmallNet-w4a8.failed/io.json",
        "SmallNet-w4a8.failed/manifest.json",
        *(f"SmallNet-w4a8.failed/host/{name}" for name in ("Host.kt", "host.cpp", "host.py")),
    }


def test_files_that_compute_something_else_are_exported_if_that_is_asked_for(
    trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = aimet.export

    def wrong(model: Any, args: Any, file: str, **options: Any) -> None:
        real(model, args, file, **options)
        tamper(Path(file), 1.5)

    monkeypatch.setattr(aimet, "export", wrong)
    export = lq.DeviceExport(tmp_path / "out", target="onnxruntime", name="net", on_parity="warn", report=False)
    with pytest.warns(UserWarning, match=r"first layer that differs is 'stem'.* Exported anyway"):
        trainer(lq.PostTrainingQuantization("w4a8"), export).fit(SmallModule(), small_loader())
    assert load_bundle(tmp_path / "out/net").manifest.parity.psnr_db < 40
    assert len(export.reports) == 1
    assert not (tmp_path / "out/net.failed").exists()


def test_by_default_the_best_target_that_is_there(
    trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QAIHUB_CLIENT_INI", str(tmp_path / "none.ini"))
    monkeypatch.setattr(HtpEmulatorTarget, "unavailable", lambda self: "the NPU emulator is not installed")
    export = lq.DeviceExport(tmp_path / "out", name="net", monitor="val_loss", mode="min", samples=5)
    module = SmallModule()
    quantizer = lq.PostTrainingQuantization("w8a8", calibration_dataloader=small_loader())
    trainer(quantizer, export).validate(module, small_loader(batch_size=4), verbose=False)
    (report,) = export.reports
    assert list(export.passed_over) == ["aihub", "htp_emulator"]
    assert "no AI Hub token" in export.passed_over["aihub"]
    assert (report.tier, report.device, report.samples) == ("onnxruntime", "host CPU", 5)
    assert report.metric.keys() == {"float", "simulation", "device"}
    # the metric is that of the user's validation on the first five samples, of each network
    images, labels = small_data()[:5]
    expected = F.cross_entropy(module.quantized.eval()(images), labels)
    assert report.metric["simulation"] == pytest.approx(float(expected), rel=1e-5)
    assert report.metric["float"] == pytest.approx(float(F.cross_entropy(small_net().eval()(images), labels)), rel=1e-5)
    assert report.metric["device"] == pytest.approx(report.metric["simulation"], rel=0.02)
    assert DeviceReport.read(tmp_path / "out/net.device/onnxruntime/report.json") == report
    assert report.against_float is not None
    # the module is as it was: with its Trainer, on its device, in its mode
    assert QuantizedNetwork.of(module.model) is not None


def test_without_the_float_network_nothing_is_compared_with_it(trainer: MakeTrainer, tmp_path: Path) -> None:
    one = trainer(lq.PostTrainingQuantization("w8a8"))
    one.fit(SmallModule(small_net(3)), small_loader())  # other weights than those the class begins with
    one.save_checkpoint(tmp_path / "last.ckpt")
    module = lq.load_quantized(SmallModule, tmp_path / "last.ckpt")
    export = lq.DeviceExport(tmp_path / "out", target="onnxruntime", monitor="val_loss", mode="min")
    trainer(export).validate(module, small_loader(), verbose=False)
    (report,) = export.reports
    assert report.against_float is None
    assert report.against_simulation is not None
    assert report.metric.keys() == {"simulation", "device"}


def test_a_metric_that_is_not_there_costs_only_itself(trainer: MakeTrainer, tmp_path: Path) -> None:
    export = lq.DeviceExport(tmp_path / "out", target="onnxruntime", monitor="val_wrong")
    trainer(lq.PostTrainingQuantization("w8a8"), export).fit(SmallModule(), small_loader(), small_loader())
    (report,) = export.reports
    assert report.metric == {}
    assert report.against_float is not None


def test_a_bound_that_is_not_kept_fails_the_run_and_keeps_the_files(trainer: MakeTrainer, tmp_path: Path) -> None:
    export = lq.DeviceExport(tmp_path / "out", target="onnxruntime", name="net", min_psnr=200.0)
    with pytest.raises(DeviceBoundError, match=r"expected min_psnr=200 dB.* Compared with float: .* layers") as caught:
        trainer(lq.PostTrainingQuantization("w4a8"), export).fit(SmallModule(), small_loader(), small_loader())
    assert load_bundle(tmp_path / "out/net").manifest.name == "net"
    assert (tmp_path / "out/net.device/onnxruntime/report.json").is_file()
    report = tmp_path / "out/net.report"
    of_float, of_file = read_blames(report / "blame.json")
    assert (of_float.against, of_file.against) == (Against.FLOAT, Against.FILE)
    assert [one.to_dict() for one in export.blames] == [of_float.to_dict(), of_file.to_dict()]
    assert of_float.remedies
    for remedy in of_float.remedies:
        assert remedy.line in str(caught.value)
        assert html.escape(remedy.line) in (report / "report.html").read_text().replace("&#34;", "&quot;")


def test_validation_images_of_another_size(trainer: MakeTrainer, tmp_path: Path) -> None:
    """Crops for training and whole images for validation: the exported graph has the shape of what calibrated."""
    images, labels = small_data().tensors
    larger = small_loader(TensorDataset(F.interpolate(images, scale_factor=2), labels))
    export = lq.DeviceExport(tmp_path / "out", target="onnxruntime", monitor="val_loss", on_failure="raise")
    with pytest.warns(UserWarning, match="validation samples have another size"):
        trainer(lq.PostTrainingQuantization("w8a8"), export).fit(SmallModule(), small_loader(), larger)
    (report,) = export.reports
    assert (report.status, report.metric) == ("finished", {})
    assert report.against_simulation is not None


def test_whatever_fails_on_the_device_a_run_is_not_lost_to_it(
    trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reports of the export before do not stand for the new network."""
    module, out = SmallModule(), tmp_path / "out"
    export = lq.DeviceExport(out, target="onnxruntime", name="net")
    one = trainer(lq.PostTrainingQuantization("w8a8"), export)
    one.fit(module, small_loader(), small_loader())
    report = out / "net.device/onnxruntime/report.json"
    assert report.is_file()
    assert len(export.reports) == 1

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    assert export.push is not None
    monkeypatch.setattr(export.push, "run", full)
    with pytest.warns(UserWarning, match=r"not measured: OSError: .*No space left.*net is complete"):
        one.validate(module, small_loader(), verbose=False)
    assert export.reports == []
    assert not report.is_file()
    export.on_failure = "raise"
    with pytest.raises(OSError, match="No space"):
        one.validate(module, small_loader(), verbose=False)


def test_the_metric_ends_where_the_outputs_end(trainer: MakeTrainer, tmp_path: Path) -> None:
    """A large batch that the device computed in part is left out, and so is a small one after it."""
    export = lq.DeviceExport(tmp_path / "out", target=None, name="net")
    module = SmallModule()
    trainer(lq.PostTrainingQuantization("w8a8"), export).fit(module, small_loader(), small_loader())
    images, labels = small_data(8).tensors
    network = module.quantized.eval()
    labeled, outputs = [], []
    for start, stop in ((0, 4), (4, 7), (7, 8)):
        calls = [NetworkInputs((images[i : i + 1],)) for i in range(start, stop)]
        labeled.append(LabeledBatch((images[start:stop], labels[start:stop]), calls))
        with torch.no_grad():
            outputs += [{"output": network(*call.args).numpy()} for call in calls]
    for computed in (4, 5, 6, 7, 8):
        found = metrics_of(module, "model", network, "val_loss", labeled, outputs[:computed])
        assert found["device"] == pytest.approx(found["simulation"], rel=1e-4), computed


def test_auto_passes_over_a_target_that_does_not_know_the_device(
    trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QAIHUB_CLIENT_INI", str(tmp_path / "none.ini"))
    export = lq.DeviceExport(tmp_path / "out", target="auto", device="Google Pixel 8", on_failure="raise")
    trainer(lq.PostTrainingQuantization("w8a8"), export).fit(SmallModule(), small_loader(), small_loader())
    (report,) = export.reports
    assert report.tier == "onnxruntime"
    assert "no AI Hub token" in export.passed_over["aihub"]
    assert (
        "Google Pixel 8" in export.passed_over["htp_emulator"]
        or "onnxruntime-qnn" in export.passed_over["htp_emulator"]
    )


def test_a_metric_of_the_graph_with_edges_is_the_same_for_all_three(trainer: MakeTrainer, tmp_path: Path) -> None:
    export = lq.DeviceExport(
        tmp_path,
        target="onnxruntime",
        outputs="argmax",
        monitor="val_loss",
        mode="min",
        on_failure="raise",
        report=False,
    )
    one = trainer(lq.PostTrainingQuantization("w8a8", calibration_dataloader=small_loader()), export)
    one.validate(SmallModule(), small_loader(), verbose=False)
    own, app = export.reports
    assert (own.edged, app.edged) == (False, True)
    # the loss of classes is another one than that of scores, of the float network as well
    assert app.metric["simulation"] == app.metric["device"]
    assert app.against_float is not None
    assert app.against_float.argmax_agreement is not None
    assert (app.metric["float"] == app.metric["device"]) == (app.against_float.argmax_agreement == 1)
    assert abs(app.metric["float"] - own.metric["float"]) > 0.01
    assert own.metric["simulation"] == pytest.approx(own.metric["device"], rel=1e-3)
