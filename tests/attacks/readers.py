"""Everything in the package that reads a file, with a genuine file for each, as the package writes it."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

import lightning_quant as lq
from lightning_quant.cli.float_network import load_float
from lightning_quant.cli.predict import Predictor
from lightning_quant.deploy.blame.blame import blame
from lightning_quant.deploy.blame.result import read_blames, write_blames
from lightning_quant.deploy.bundle import load_bundle
from lightning_quant.deploy.compare.snapshot import Snapshot
from lightning_quant.deploy.device_report import DeviceReport
from lightning_quant.deploy.edges.contract import Contract
from lightning_quant.deploy.export import export_bundle
from lightning_quant.deploy.hosts.write import feeding, write_hosts
from lightning_quant.deploy.push import Push, resume
from lightning_quant.deploy.samples import Samples
from lightning_quant.deploy.targets import worker
from lightning_quant.deploy.targets.aihub import target as aihub
from lightning_quant.deploy.targets.aihub.job import Outcomes
from lightning_quant.deploy.targets.aihub.journal import Journal
from lightning_quant.domains.segmentation.cityscapes import read_labels
from lightning_quant.domains.segmentation.scenes import generate_scenes
from lightning_quant.domains.segmentation.weights import load_weights
from lightning_quant.errors import (
    CheckpointError,
    ConfigurationError,
    DataError,
    DeviceError,
    ExportError,
    LightningQuantError,
)
from lightning_quant.recipe import QuantRecipe
from lightning_quant.report.app_table import app_table
from lightning_quant.report.baseline import write_baseline
from lightning_quant.report.layers import LayerFigures
from lightning_quant.report.page import write_report
from lightning_quant.report.record import RunRecord
from lightning_quant.simulation import calibration_cache as statistics_cache
from lightning_quant.simulation.calibrate import calibrate
from lightning_quant.simulation.calibration_cache import StatisticsCache
from lightning_quant.utilities.images import open_image
from tests.helpers.handmade_bundles import photos, write_app
from tests.helpers.networks import Body, calibrated, call, images, quantized
from tests.helpers.small import SmallModule, small_net
from tests.report.folders import DEVICE, full_record

SCENES = {"train": 1, "val": 0, "height": 32, "width": 64}


@dataclass(frozen=True)
class Reader:
    """A function of the package that reads a file.

    Args:
        file: where the file is in the folder of genuine ones.
        read: reads the folder.
        error: what it raises for a file that it refuses; ``None``: it warns instead.
        slow: takes more than a few milliseconds, so that only what is named is tried.
    """

    file: str
    read: Callable[[Path], Any]
    error: type[LightningQuantError] | None
    slow: bool = False

    @property
    def folder(self) -> str:
        """The part of the folder that the file belongs to: what has to be copied with it."""
        return Path(self.file).parts[0]


def read_contract(folder: Path) -> Any:
    """What is made of a contract: programs, and the lines of a report, which are Python whatever is in it."""
    contract = Contract.read(folder / "app")
    app_table(contract)
    ast.parse(feeding(contract))
    written = write_hosts(folder / "app", contract)
    return [(folder / "app" / path).read_text() for path in written]


def predict_app(folder: Path) -> Any:
    return Predictor(folder / "app").predict(open_image(folder / "app/photo0.png"))


def read_run(folder: Path) -> Any:
    record, path = RunRecord.read(folder / "run/results.json"), folder / "run" / "layers.json"
    return record.drop, path


def said_of_layers(folder: Path) -> list[str]:
    return [str(one) for one in read_blames(folder / "run/blame.json")]


def load_checkpoint(folder: Path) -> Any:
    path = folder / "checkpoint/last.ckpt"
    lq.read_manifest(path)
    return lq.load_quantized(SmallModule, path)


def calibrate_with_cache(folder: Path) -> Any:
    (path,) = (folder / "cache").glob("*.npz")
    statistics_cache.read(path)
    network = quantized(Body())
    calibrate(network, [call(images(4))], cache=StatisticsCache(folder / "cache"))
    return network


def resume_pushed(folder: Path) -> Any:
    """Resume a push, wherever the request says: nobody's token is at hand."""
    with mock.patch.dict(os.environ, {"HOME": str(folder), "QAIHUB_CLIENT_INI": str(folder / "none.ini")}):
        return resume(folder / "pushed/net")


def fetch(folder: Path) -> Any:
    """What AI Hub sent, as its worker hands it over."""
    bundle, result = load_bundle(folder / "fetched/net"), folder / "fetched/result.json"

    def found(*_: Any) -> Any:
        return worker._read(result, Outcomes)

    target = aihub.AiHubTarget(["Samsung Galaxy S24"], compare_float=False)
    with mock.patch.object(aihub, "run_worker", found):
        return target.run(bundle, [{"x": np.zeros((1, 3, 8, 8), np.float32)}], folder / "fetched")


READERS = {
    "record": Reader("run/results.json", lambda at: RunRecord.read(at / "run/results.json").drop, DataError),
    "layers": Reader("run/layers.json", lambda at: LayerFigures.read(at / "run"), DataError),
    "errors of layers": Reader("run/blame.json", said_of_layers, DataError),
    "report of a run": Reader("run/results.json", lambda at: write_report(at / "run"), DataError, slow=True),
    "report of layers": Reader("run/layers.json", lambda at: write_report(at / "run"), DataError, slow=True),
    "picture in a report": Reader(
        "run/overlays/overlay_0/input.png", lambda at: write_report(at / "run"), DataError, True
    ),
    "device report": Reader(
        "device/report.json", lambda at: DeviceReport.read(at / "device/report.json").sentence(), DataError
    ),
    "baseline": Reader("device/baseline.json", lambda at: Snapshot.read(at / "device/baseline.json"), DataError, True),
    "journal": Reader("device/journal.json", lambda at: Journal(at / "device/journal.json"), DeviceError),
    "manifest": Reader(
        "pushed/net/manifest.json", lambda at: load_bundle(at / "pushed/net").manifest.int16_activations, ExportError
    ),
    "model": Reader("pushed/net/net.onnx", lambda at: load_bundle(at / "pushed/net"), ExportError),
    "encodings": Reader("pushed/net/net.aimet/model.encodings", lambda at: load_bundle(at / "pushed/net"), ExportError),
    "request": Reader("pushed/net.device/request.json", resume_pushed, LightningQuantError, slow=True),
    "samples": Reader(
        "pushed/net.device/samples.npz", lambda at: Samples.read(at / "pushed/net.device/samples.npz"), DataError
    ),
    "AI Hub's result": Reader("fetched/result.json", fetch, DeviceError, slow=True),
    "AI Hub's outputs": Reader("fetched/samsung-galaxy-s24-qnn_dlc/outputs.npz", fetch, DeviceError, slow=True),
    "checkpoint": Reader("checkpoint/last.ckpt", load_checkpoint, CheckpointError, slow=True),
    "float checkpoint": Reader(
        "float/float.ckpt", lambda at: load_float(SmallModule(), at / "float/float.ckpt"), CheckpointError
    ),
    "weights": Reader(
        "float/float.ckpt", lambda at: load_weights(small_net(), at / "float/float.ckpt"), CheckpointError
    ),
    "statistics": Reader("cache/statistics.npz", lambda at: statistics_cache.read(at / "cache/statistics.npz"), None),
    "photograph": Reader("pictures/photo.png", lambda at: open_image(at / "pictures/photo.png"), DataError),
    "labels": Reader("pictures/labels.png", lambda at: read_labels(at / "pictures/labels.png"), DataError),
    "scenes": Reader("scenes/scenes.json", lambda at: generate_scenes(at / "scenes", **SCENES), DataError),
    "contract": Reader("app/io.json", read_contract, ExportError),
    "contract of a prediction": Reader("app/io.json", predict_app, LightningQuantError, slow=True),
    "contract in a report": Reader("app/io.json", lambda at: write_report(at / "app"), LightningQuantError, slow=True),
    "hardware": Reader(
        "hardware/own.json",
        lambda at: QuantRecipe(hardware=str(at / "hardware/own.json")).identity(),
        ConfigurationError,
    ),
}


def make_genuine(folder: Path) -> None:
    """Write a genuine file for each of :data:`READERS`."""
    full_record().write(folder / "run")
    figures = LayerFigures.of(calibrated(Body(), precision="w4a16"), [call(images())] * 2, 1)
    figures.drift, figures.drift_steps = {"conv.weight": [0.0, 0.1]}, [0, 50]
    figures.write(folder / "run")
    network = calibrated(Body(), precision="w4a8")
    network.network.relu.relu.output_quantizers[0].min.data *= 0.1
    network.network.relu.relu.output_quantizers[0].max.data *= 0.1
    write_blames(folder / "run/blame.json", [blame(network, images(2), against="float"), blame(network, images(2))])
    for panel in ("input", "float", "quantized", "difference"):
        place = folder / "run/overlays/overlay_0" / f"{panel}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(place)

    DEVICE.write(folder / "device/report.json")
    journal = Journal(folder / "device/journal.json")
    journal.note("model-abc", state="made", name="lq-model-abc", id="m1")
    journal.begin_again("compile-abc")

    network = calibrated(Body())
    calls = [call(images(1, seed)) for seed in range(2)]
    for part in ("pushed", "fetched"):
        bundle = export_bundle(network, folder / part / "net", calls)
        samples = Samples.of(network, bundle.manifest, calls)
        options = {"runtimes": ["qnn_dlc"], "options": "--x", "profile": None, "wait": False, "poll_seconds": 1.0}
        Push("onnxruntime", [], 60.0, options).run(bundle, samples)
    write_baseline(folder / "device/baseline.json", folder / "pushed/net")
    outputs = folder / "fetched/samsung-galaxy-s24-qnn_dlc"
    outputs.mkdir()
    np.savez(outputs / "outputs.npz", output=np.zeros((2, 1, 4, 8, 8), np.float32))
    profile = {
        "execution_summary": {
            "estimated_inference_time": 2000,
            "all_inference_times": [2000, 2100],
            "first_load_time": 10,
            "warm_load_time": 5,
            "inference_memory_peak_range": [0, 1024],
        },
        "execution_detail": [{"name": "conv", "type": "Conv", "compute_unit": "NPU"}],
    }
    result: dict[str, Any] = {
        "device": "Samsung Galaxy S24",
        "runtime": "qnn_dlc",
        "size": "",
        "status": "finished",
        "soc": "SM8650",
        "jobs": {"compile": "https://hub.example/jobs/j1/"},
        "profile": profile,
        "versions": {"qnn": "2"},
        "artifacts": {"outputs": "outputs.npz"},
        "warnings": [],
        "error": None,
    }
    (folder / "fetched/result.json").write_text(json.dumps({"results": [result]}))

    module = SmallModule()
    content = {"pytorch-lightning_version": "2.6.0", "epoch": 0, "global_step": 0, "hyper_parameters": {}}
    (folder / "float").mkdir()
    torch.save({**content, "state_dict": module.state_dict()}, folder / "float/float.ckpt")
    module.model = calibrated(small_net(), overrides={"head": "w8a16"}).network
    (folder / "checkpoint").mkdir()
    torch.save({**content, "state_dict": module.state_dict()}, folder / "checkpoint/last.ckpt")

    seen = quantized(Body())
    calibrate(seen, [call(images(4))], cache=StatisticsCache(folder / "cache"))
    (cached,) = (folder / "cache").glob("*.npz")
    shutil.copy(cached, folder / "cache/statistics.npz")

    write_app(folder / "app", "top_k")
    photos(folder / "app", 1)
    full_record(artifacts={"bundle": "."}).write(folder / "app")

    (folder / "pictures").mkdir()
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(np.stack([ramp * 3, ramp, 255 - ramp], axis=-1)).save(folder / "pictures/photo.png")
    Image.fromarray(ramp % 34).save(folder / "pictures/labels.png")
    generate_scenes(folder / "scenes", **SCENES)
    spec = importlib.util.find_spec("aimet_torch")
    assert spec is not None
    assert spec.origin is not None
    (folder / "hardware").mkdir()
    configs = Path(spec.origin).parent / "common/quantsim_config"
    shutil.copy(configs / "htp_quantsim_config_v75.json", folder / "hardware/own.json")


def attacked(genuine: Path, work: Path, reader: Reader, data: bytes) -> Path:
    """A folder in ``work`` like the genuine one, in which a reader's file holds ``data``."""
    folder = work / "inside"
    if reader.slow or not folder.exists():  # these write, too
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(genuine / reader.folder, folder / reader.folder)
    (folder / reader.file).write_bytes(data)
    return folder


def outcome(reader: Reader, folder: Path) -> LightningQuantError | None:
    """Read; the error if the file was refused. What is none of this package's errors escapes."""
    try:
        reader.read(folder)
    except LightningQuantError as error:
        return error
    return None
