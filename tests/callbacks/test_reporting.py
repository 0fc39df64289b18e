"""Reports, pictures and curves of runs outside the app: what a user's own Trainer leaves."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

import lightning_quant as lq
from lightning_quant.deploy.blame.result import Against, read_blames
from lightning_quant.report.layers import LayerFigures
from lightning_quant.report.record import RunRecord
from lightning_quant.simulation.precisions import quantized_layers
from tests.helpers.small import SmallModule, small_loader

MakeTrainer = Callable[..., Trainer]


def climbing(**options: Any) -> lq.QuantizationAwareTraining:
    return lq.QuantizationAwareTraining(
        "w4a8", max_drop=-1.0, monitor="val_loss", mode="min", rungs=("ptq", "cle"), **options
    )


def test_a_fit_ends_with_a_report_and_curves_in_the_loggers(trainer: MakeTrainer, tmp_path: Path) -> None:
    loggers = [TensorBoardLogger(tmp_path, "tb", 0), CSVLogger(tmp_path, "csv", 0)]
    quantization = climbing()
    export = lq.DeviceExport(tmp_path / "out", target="onnxruntime", name="net", samples=4)
    one = trainer(quantization, export, logger=loggers, max_epochs=2, log_every_n_steps=2)
    one.fit(SmallModule(), small_loader(), small_loader())
    folder = tmp_path / "out/net.report"
    assert sorted(path.name for path in folder.iterdir()) == [
        "blame.json",
        "layers.json",
        "report.html",
        "results.json",
        "sensitivity.csv",
        "sensitivity.png",
    ]
    record, figures = RunRecord.read(folder / "results.json"), LayerFigures.read(folder)
    assert (record.model, str(record.precision), record.monitor) == ("SmallNet", "w4a8", "val_loss")
    assert set(record.metric) >= {"float", "ptq", "qat"}
    assert record.exported == quantization.result.best.rung  # type: ignore[union-attr]
    assert [one.tier for one in record.device] == ["onnxruntime"]
    assert figures.drift_steps == quantization.drift.steps == list(range(0, one.global_step + 1, 2))  # type: ignore[union-attr]
    (found,) = read_blames(folder / "blame.json")
    assert found.against is Against.FLOAT
    page = (folder / "report.html").read_text()
    assert "Where the error comes from" in page
    assert "W4A8 falls short of" in page
    assert "Drift of ranges in training" in page
    assert record.reproduce == (
        "import lightning_quant as lq\n\n"
        "lq.QuantizationAwareTraining('w4a8', max_drop=-1.0, monitor='val_loss', mode='min', rungs=('ptq', 'cle'))"
    )

    (event_file,) = (tmp_path / "tb/version_0").glob("events*")
    events = EventAccumulator(str(event_file)).Reload()
    assert "sensitivity" in events.Tags()["images"]
    wanted = {"ladder/ptq/val_loss", "ladder/cle/drop", "drift/weights_mean", "drift/activations_max"}
    assert wanted <= set(events.Tags()["scalars"])
    steps = [event.step for event in events.Scalars("drift/weights_max")]
    assert steps == figures.drift_steps[1:]
    with (tmp_path / "csv/version_0/metrics.csv").open() as file:
        assert wanted <= set(next(csv.reader(file)))


def test_drift_is_that_of_the_step_lengths(trainer: MakeTrainer) -> None:
    module = SmallModule()
    quantization = lq.QuantizationAwareTraining("w4a8")
    trainer(lq.PostTrainingQuantization("w4a8")).fit(module, small_loader())
    before = scales(module)
    one = trainer(quantization, max_epochs=3, log_every_n_steps=1)
    one.fit(module, small_loader(), small_loader())
    assert quantization.drift is not None
    assert quantization.drift.steps == list(range(one.global_step + 1))
    after = scales(module)
    moved = {name: values[-1] for name, values in quantization.drift.values.items()}
    assert moved.keys() == before.keys()
    for name, value in moved.items():
        assert value == pytest.approx(float(torch.log2(after[name] / before[name])), abs=1e-4)
    assert max(map(abs, moved.values())) > 0.001


def scales(module: SmallModule) -> dict[str, Tensor]:
    found = {}
    for name, layer in quantized_layers(module.quantized).items():
        places = {**dict(layer.param_quantizers.items()), "output": layer.output_quantizers[0]}
        inputs = list(layer.input_quantizers)
        places |= {"input" if len(inputs) == 1 else f"input {index}": one for index, one in enumerate(inputs)}
        for tensor, quantizer in places.items():
            if quantizer is not None:
                found[f"{name} · {tensor}"] = quantizer.get_scale().detach().max()
    return found


def test_frozen_ranges_have_no_drift(trainer: MakeTrainer) -> None:
    quantization = lq.QuantizationAwareTraining("w8a8", train_ranges=False)
    trainer(quantization, max_epochs=1, log_every_n_steps=1).fit(SmallModule(), small_loader(), small_loader())
    assert quantization.drift is None


def test_curves_go_on_after_a_restart(trainer: MakeTrainer, tmp_path: Path) -> None:
    def run(epochs: int, checkpoint: Path | None = None) -> lq.QuantizationAwareTraining:
        quantization = lq.QuantizationAwareTraining("w4a8")
        one = trainer(quantization, max_epochs=epochs, log_every_n_steps=1)
        one.fit(SmallModule(), small_loader(), small_loader(), ckpt_path=checkpoint, weights_only=True)
        one.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return quantization

    run(1)
    resumed, whole = run(3, tmp_path / "1.ckpt"), run(3)
    assert resumed.drift is not None
    assert whole.drift is not None
    assert resumed.drift.steps == whole.drift.steps
    assert resumed.drift.values == whole.drift.values


def test_no_run_is_lost_to_a_report(trainer: MakeTrainer, tmp_path: Path) -> None:
    (tmp_path / "net.report").write_text("in the way")
    export = lq.DeviceExport(tmp_path, target=None, name="net")
    with pytest.warns(UserWarning, match="The report was not written: .*net.report"):
        trainer(lq.PostTrainingQuantization(), export).fit(SmallModule(), small_loader())
    assert (tmp_path / "net/manifest.json").is_file()


def test_without_a_report_there_is_none(trainer: MakeTrainer, tmp_path: Path) -> None:
    export = lq.DeviceExport(tmp_path, target=None, name="net", report=False)
    trainer(lq.PostTrainingQuantization(), export).fit(SmallModule(), small_loader())
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("net")] == ["net"]
