"""The real NPU emulator: what it compiles, how closely it agrees, and that it never computes on the CPU unseen."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

import lightning_quant as lq
from lightning_quant.deploy.bundle import Bundle
from lightning_quant.deploy.device_report import DeviceReport
from lightning_quant.deploy.edges.app import plan_of
from lightning_quant.deploy.export import export_bundle
from lightning_quant.deploy.push import Push, device_folder
from lightning_quant.deploy.samples import Samples
from lightning_quant.deploy.sizes import InputSize, sized_calls
from lightning_quant.deploy.targets.htp import target as htp_emulator
from lightning_quant.deploy.targets.htp.target import HtpEmulatorTarget
from lightning_quant.domains.segmentation.cityscapes import NUM_CLASSES
from lightning_quant.domains.segmentation.datamodule import CityscapesDataModule
from lightning_quant.domains.segmentation.ffnet import ffnet_40s, ffnet_nano
from lightning_quant.domains.segmentation.task import SegmentationTask
from lightning_quant.errors import ConfigurationError, DeviceError, DeviceTimeoutError
from lightning_quant.precision import Precision
from lightning_quant.simulation.inputs import NetworkInputs
from lightning_quant.simulation.operators import off_the_npu
from lightning_quant.simulation.preflight import FindingKind
from tests.helpers.networks import Body, calibrated, call, images
from tests.helpers.trainers import quiet_trainer

MakeTrainer = Callable[..., Trainer]

_REASON = HtpEmulatorTarget("SM8650").unavailable()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(_REASON is not None, reason=str(_REASON))]

CHIPS = ("SM8550", "SM8650", "SM8750")
# PSNR in dB of emulator against simulation. The emulator scales sums back to integers less exactly than the simulation,
# an error of one step in one of a hundred 8-bit outputs, and each layer hands it on. Measured after the training below:
# FFNet-nano 47.5 / 87.4 / 60.2, LRASPP 50.3 / 92.4 / 79.8.
FLOORS = {
    "ffnet_nano": {"w8a8": 45.0, "w8a16": 75.0, "w4a16": 57.0},
    "lraspp": {"w8a8": 48.0, "w8a16": 75.0, "w4a16": 65.0},
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle that tests only read."""
    return export_bundle(calibrated(Body()), tmp_path_factory.mktemp("htp") / "net", [call(images(3, seed=9))])


@pytest.fixture
def inputs(bundle: Bundle) -> list[dict[str, np.ndarray]]:
    (name,) = bundle.manifest.input_names
    return [{name: images(1, seed=seed).numpy()} for seed in (1, 2)]


def run(target: HtpEmulatorTarget, bundle: Bundle, inputs: Any, folder: Path) -> tuple[DeviceReport, Any]:
    target.check(bundle)
    (measured,) = target.run(bundle, inputs, folder)
    return measured.report, measured.outputs


def test_report_and_artifacts(bundle: Bundle, inputs: Any, tmp_path: Path) -> None:
    report, outputs = run(HtpEmulatorTarget("Samsung Galaxy S23"), bundle, inputs, tmp_path)
    assert (report.tier, report.device, report.soc) == ("htp_emulator", "Samsung Galaxy S23", "SM8550")
    assert report.layers is not None
    assert len(report.layers["NPU"]) > 2
    assert (report.layers["CPU"], report.layers["GPU"], report.float_islands, report.fallen_back) == ([], [], [], {})
    binary = tmp_path / "samsung-galaxy-s23" / report.artifacts["context_binary"]
    assert binary.stat().st_size == report.bytes["compiled"] > 1000
    context = onnx.load(tmp_path / "samsung-galaxy-s23" / report.artifacts["context"], load_external_data=False)
    assert "EPContext" in {node.op_type for node in context.graph.node}
    assert len(outputs) == 2
    # what the emulator cannot know is not there
    values = report.to_dict()
    assert values["statement"].endswith("not measured on hardware")
    assert not {"latency_us", "median_latency_us", "memory_bytes", "load_us", "speedup", "jobs"} & values.keys()


def test_large_samples_are_taken_in_part(
    bundle: Bundle, inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(htp_emulator, "_MOST_NUMBERS", inputs[0][next(iter(inputs[0]))].size)
    _, outputs = run(HtpEmulatorTarget("SM8650"), bundle, inputs, tmp_path)
    assert len(outputs) == 1


def test_a_graph_without_fixed_shapes_does_not_run_on_the_npu(inputs: Any, tmp_path: Path) -> None:
    mine = export_bundle(calibrated(Body()), tmp_path / "net", [call(images(1))])
    model = onnx.load(mine.qdq)
    for value in model.graph.input:
        for axis in value.type.tensor_type.shape.dim:
            axis.dim_param = "unknown"
    del model.graph.value_info[:]
    for value in model.graph.output:
        for axis in value.type.tensor_type.shape.dim:
            axis.dim_param = "unknown"
    onnx.save(model, mine.qdq)
    with pytest.raises(DeviceError, match=r"No layer of net\.onnx was compiled for the NPU"):
        HtpEmulatorTarget("SM8650").run(mine, inputs, tmp_path)


@pytest.mark.parametrize("chip", ["SM0000", "57"])
def test_a_chip_the_compiler_does_not_know(bundle: Bundle, inputs: Any, tmp_path: Path, chip: str) -> None:
    target = HtpEmulatorTarget("SM8650")
    target.soc = chip
    with pytest.raises(DeviceError, match=r"compiled for chip number|No layer of"):
        target.run(bundle, inputs, tmp_path)


def test_an_error_while_running_is_not_retried_on_the_cpu(bundle: Bundle, inputs: Any, tmp_path: Path) -> None:
    (name,) = bundle.manifest.input_names
    wrong = [{name: inputs[0][name][..., :-1]}]
    with pytest.raises(DeviceError, match="emulator failed in sample 0"):
        HtpEmulatorTarget("SM8650").run(bundle, wrong, tmp_path)


def test_limits_on_time_and_memory(bundle: Bundle, inputs: Any, tmp_path: Path) -> None:
    with pytest.raises(DeviceTimeoutError, match=r"did not finish within 0\.01 s and was stopped"):
        HtpEmulatorTarget("SM8650", timeout=0.01).run(bundle, inputs, tmp_path)
    with pytest.raises(DeviceError, match=r"died with exit status|refused the network|No layer of net\.onnx"):
        HtpEmulatorTarget("SM8650", memory_gb=0.3).run(bundle, inputs, tmp_path)


def test_16_bit_activations_where_there_are_none(tmp_path: Path) -> None:
    mine = export_bundle(calibrated(Body(), precision="w8a16"), tmp_path / "net", [call(images(1))])
    with pytest.raises(ConfigurationError, match=r"Hexagon v68 of SM8350 has 8-bit ones only"):
        HtpEmulatorTarget("Samsung Galaxy S21").check(mine)
    HtpEmulatorTarget("Samsung Galaxy S22 5G").check(mine)
    network = calibrated(Body(), overrides={"head": Precision.parse("w8a16")})
    mine = export_bundle(network, tmp_path / "one layer", [call(images(1))])
    with pytest.raises(ConfigurationError, match=r"w8a8 with head in w8a16 on Samsung Galaxy S21"):
        HtpEmulatorTarget("Samsung Galaxy S21").check(mine)


class Erf(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.erf(x)


class Clipped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.masked_fill(x > 0.5, 0.0)


def test_what_the_preflight_says_is_refused_is(tmp_path: Path) -> None:
    network = calibrated(nn.Sequential(nn.Conv2d(3, 4, 3), Clipped()).eval(), call(images(1)))
    assert [one.kind for one in off_the_npu(network, 68)] == [FindingKind.REFUSED]
    assert off_the_npu(network, 75) == []
    mine = export_bundle(network, tmp_path / "net", [call(images(1))])
    sample = {mine.manifest.input_names[0]: images(1).numpy()}
    with pytest.raises(DeviceError, match="compiler refused the network"):
        HtpEmulatorTarget("SM8350").run(mine, [sample], tmp_path)
    (newer,) = HtpEmulatorTarget("SM8650").run(mine, [sample], tmp_path)
    assert newer.report.float_islands == []
    assert newer.report.fallen_back == {}


def test_what_the_preflight_says_is_left_to_the_cpu_is(tmp_path: Path) -> None:
    network = calibrated(nn.Sequential(nn.Conv2d(3, 4, 3), Erf(), nn.Conv2d(4, 4, 1)).eval(), call(images(1)))
    assert [(one.module, one.kind) for one in off_the_npu(network, 75)] == [("1.erf", FindingKind.ON_CPU)]
    mine = export_bundle(network, tmp_path / "net", [call(images(1))])
    sample = {mine.manifest.input_names[0]: images(1).numpy()}
    (run,) = HtpEmulatorTarget("SM8650").run(mine, [sample], tmp_path)
    assert any("erf" in name for name in run.report.fallen_back)


@pytest.fixture(scope="module")
def trained(
    request: pytest.FixtureRequest, camvid: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, SegmentationTask, CityscapesDataModule]:
    """A network trained on photographs for long enough to have ranges worth quantizing."""
    make: dict[str, Callable[[], nn.Module]] = {
        "ffnet_nano": ffnet_nano,
        "lraspp": lambda: lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=NUM_CLASSES),
    }
    data = CityscapesDataModule(camvid, batch_size=4, calibration_samples=16)
    torch.manual_seed(0)
    task = SegmentationTask(make[request.param](), learning_rate=3e-3)
    trainer = quiet_trainer(
        tmp_path_factory.mktemp(request.param), max_epochs=1, limit_train_batches=60, limit_val_batches=0
    )
    trainer.fit(task, datamodule=data)
    return request.param, task, data


@pytest.mark.parametrize(
    ("trained", "precision"),
    [
        *(("ffnet_nano", precision) for precision in FLOORS["ffnet_nano"]),
        *(pytest.param("lraspp", precision, marks=pytest.mark.torture) for precision in FLOORS["lraspp"]),
    ],
    indirect=["trained"],
)
def test_emulator_and_simulation_agree(trained: Any, trainer: MakeTrainer, tmp_path: Path, precision: str) -> None:
    name, float_task, data = trained
    task = SegmentationTask(copy.deepcopy(float_task.model))
    export = lq.DeviceExport(
        tmp_path, target="htp_emulator", device=CHIPS[0], samples=20, monitor="val_miou", name=name
    )
    quantization = lq.PostTrainingQuantization(precision, calibration_samples=16)
    trainer(quantization, export, limit_val_batches=5).validate(task, datamodule=data, verbose=False)
    assert export.bundle is not None
    (report,) = export.reports
    assert report.samples == 20
    assert abs(report.metric["device"] - report.metric["simulation"]) <= 0.002
    assert report.metric["float"] > 0.03
    samples = Samples.read(device_folder(export.bundle) / "samples.npz")
    few = Samples(samples.inputs[:1], samples.simulation[:1], samples.float_network and samples.float_network[:1])
    for chip in CHIPS:
        if chip != CHIPS[0]:
            (measured,) = Push("htp_emulator", [chip], 600, {}).run(export.bundle, few)
            report = measured.report
        assert report.soc == chip
        assert report.against_simulation is not None
        assert report.against_simulation.psnr_db >= FLOORS[name][precision]
        assert (report.float_islands, report.fallen_back) == ([], {})


def test_ffnet_40s_has_no_float_islands(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = NetworkInputs((torch.rand(1, 3, 64, 128),))
    network = calibrated(ffnet_40s(), inputs)
    mine = export_bundle(network, tmp_path / "net", [inputs])
    given = {mine.manifest.input_names[0]: inputs.args[0].numpy()}
    (measured,) = HtpEmulatorTarget("SM8650").run(mine, [given], tmp_path)
    assert measured.report.float_islands == []
    assert json.loads(json.dumps(measured.report.to_dict()))["float_islands"] == []


def test_the_sizes_of_a_network_share_their_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = NetworkInputs((torch.rand(1, 3, 64, 128),))
    network = calibrated(ffnet_nano(), inputs)
    sizes = [[32, 64], [2, 3, 64, 128]]
    mine = export_bundle(network, tmp_path / "net", [inputs], sizes=sizes)
    sized = sized_calls(network, InputSize.parse(sizes), [inputs])
    further = {size: Samples.of(network, mine.manifest, given.calls) for size, given in sized.items()}
    samples = Samples.of(network, mine.manifest, [inputs])
    shared = Push("htp_emulator", ["SM8650"], 300, {}).run(mine, samples, further)
    assert [one.report.size for one in shared] == ["1x3x64x128", "32x64", "2x3x64x128"]
    graphs = [mine, *mine.sizes.values()]
    for one, graph, given in zip(shared, graphs, [samples, *further.values()], strict=True):
        report = one.report
        assert report.against_simulation is not None
        assert report.against_simulation.psnr_db > 35
        assert report.fallen_back == {}
        assert (one.folder / report.artifacts["context_binary"]).stat().st_size == report.bytes["compiled"]
        assert (one.folder / report.artifacts["context"]).is_file()
        assert report.bytes["compiled_alone"] < report.bytes["compiled"] < 1.4 * report.bytes["compiled_alone"]
        assert report.saved is not None
        assert report.saved > 0.5
        # the same bits as a binary of its own computes
        (alone,) = HtpEmulatorTarget("SM8650").run(graph, given.inputs, tmp_path / "alone")
        assert alone.report.bytes["compiled"] == report.bytes["compiled_alone"]
        for own, other in zip(alone.outputs, one.outputs, strict=True):
            assert all(np.array_equal(own[name], other[name]) for name in own)


def test_a_graph_with_edges_has_a_binary_of_its_own(tmp_path: Path) -> None:
    calls = [call(images(1, seed=seed).sigmoid().mul(255).round() / 255) for seed in (1, 2)]
    network = calibrated(Body(), calls[0])
    mine = export_bundle(network, tmp_path / "net", calls, inputs="image", outputs="argmax")
    assert mine.app is not None
    samples = [Samples.of(network, mine.manifest, calls, plan) for plan in (None, plan_of(mine.app))]
    own, app = Push("htp_emulator", ["SM8650"], 300, {}).run(mine, samples[0], {"app": samples[1]})
    assert (own.folder / "app", own.report.edged, app.report.edged) == (app.folder, False, True)
    assert app.report.fallen_back == {}
    assert app.report.float_islands == []
    assert {value.dtype for value in app.outputs[0].values()} == {np.dtype(np.uint8)}
    for one in (own, app):
        assert one.report.saved is None
        assert (one.folder / one.report.artifacts["context_binary"]).stat().st_size == one.report.bytes["compiled"]


def test_sizes_that_cannot_share_are_compiled_alone(
    bundle: Bundle, inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate = HtpEmulatorTarget._emulate

    def without_room(target: HtpEmulatorTarget, models: Any, work: Path) -> Any:
        if len(models) > 1:
            raise DeviceError("no room")
        return emulate(target, models, work)

    monkeypatch.setattr(HtpEmulatorTarget, "_emulate", without_room)
    mine = export_bundle(calibrated(Body()), tmp_path / "net", [call(images(1))], sizes=[[16, 12]])
    (name,) = mine.manifest.input_names
    graphs = [(mine, inputs), (mine.sizes["16x12"], [{name: np.ones((1, 3, 16, 12), np.float32)}])]
    (own,), (further,) = HtpEmulatorTarget("SM8650").run_sizes(graphs, tmp_path / "htp")
    assert own.folder / "16x12" == further.folder
    for one in (own, further):
        assert one.report.warnings == ["The sizes share no weights, each was compiled alone: no room"]
        assert one.report.saved is None
        assert (one.folder / one.report.artifacts["context_binary"]).stat().st_size == one.report.bytes["compiled"]
