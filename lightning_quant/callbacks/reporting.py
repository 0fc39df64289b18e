"""The report of a run for which no app keeps a record: what the Trainer and its callbacks know."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_quant.callbacks.quantization import QuantizationCallback, callback_of
from lightning_quant.callbacks.reproduce import reproduce
from lightning_quant.callbacks.training import QuantizationAwareTraining
from lightning_quant.callbacks.visualizer import class_confusion, class_figures, draw_comparisons, log_pictures
from lightning_quant.deploy.blame.blame import blame_all
from lightning_quant.deploy.blame.result import BLAME_NAME, Against, Blame, write_blames
from lightning_quant.deploy.bundle import Bundle
from lightning_quant.deploy.device_report import DeviceReport
from lightning_quant.report.layers import LayerFigures
from lightning_quant.report.page import write_report
from lightning_quant.report.pictures import legend_of, write_comparisons
from lightning_quant.report.record import RunRecord
from lightning_quant.report.sensitivity import write_sensitivity
from lightning_quant.simulation.inputs import NetworkInputs
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.utilities.modules import on_cpu_in_eval

# Histograms and pictures of so many samples; each layer is measured alone with half of them.
SAMPLES = 4


def report_folder(bundle: Bundle) -> Path:
    """Where the report of a bundle is kept: ``<name>.report`` beside it."""
    return bundle.path.with_name(f"{bundle.path.name}.report")


def blame_layers(
    network: QuantizedNetwork,
    calls: Sequence[NetworkInputs],
    bundle: Bundle | None = None,
    devices: Sequence[DeviceReport] = (),
) -> list[Blame]:
    """Compare the layers of a network with float; and with what it was exported to, where a device falls short.

    No run is lost to it: what fails is a warning.

    Args:
        network: the quantized network.
        calls: samples, one each.
        bundle: what it was exported to; ``None`` for float only.
        devices: what devices made of that.
    """
    emulated = next((one.device for one in devices if one.tier == Against.EMULATOR.value), None)
    try:
        return blame_all(network, calls, bundle, emulated)
    except Exception as error:
        rank_zero_warn(f"The layers were not compared: {type(error).__name__}: {error}")
        return []


def write_callback_report(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    name: str,
    network: QuantizedNetwork,
    bundle: Bundle,
    devices: Sequence[DeviceReport],
    calls: Sequence[NetworkInputs],
    blames: Sequence[Blame] = (),
) -> Path:
    """Write ``report.html`` and what it is made of into :func:`report_folder`; give its pictures to the loggers.

    Args:
        trainer: whose callbacks know what was measured.
        pl_module: draws its predictions, see :mod:`~lightning_quant.callbacks.visualizer`.
        name: dotted attribute of the network.
        network: the quantized network that was exported.
        bundle: what it was exported to.
        devices: what devices made of it.
        calls: samples, one each.
        blames: comparisons of layers, where a bound was missed. Default: with float, on one sample.
    """
    folder = report_folder(bundle)
    calls = [call.to(torch.device("cpu")) for call in calls[:SAMPLES]]
    callback = callback_of(trainer, name)
    training = callback if isinstance(callback, QuantizationAwareTraining) else None
    with on_cpu_in_eval(network.network):
        figures = LayerFigures.of(network, calls, SAMPLES // 2)
        if training is not None:
            training.notes.add_to(figures)
    comparisons = draw_comparisons(pl_module, network.float_network, network.network, calls)
    overlays = write_comparisons(folder / "overlays", comparisons)
    figures.write(folder)
    write_blames(folder / BLAME_NAME, blames or blame_layers(network, calls[:1]))
    record = _record(trainer, callback, network, bundle, devices)
    record.legend = legend_of(comparisons)
    # after a fit, the last validation need not be of what was exported
    if trainer.state.fn == "validate":
        if figures_of_classes := class_figures(pl_module):
            record.class_figures = {str(record.exported): figures_of_classes}
        if (confusion := class_confusion(pl_module)) is not None:
            record.confusion = {str(record.exported): confusion}
    record.write(folder)
    path = write_report(folder)
    pictures = {f"overlay/{index}": picture for index, picture in enumerate(overlays)}
    if figures.sensitivity:
        title = f"{network.float_class.__name__} in {str(network.recipe.precision).upper()}"
        pictures["sensitivity"] = write_sensitivity(figures.sensitivity, folder, title)[0]
    log_pictures(trainer.loggers, pictures, trainer.global_step)
    return path


def _record(
    trainer: pl.Trainer,
    callback: QuantizationCallback | None,
    network: QuantizedNetwork,
    bundle: Bundle,
    devices: Sequence[DeviceReport],
) -> RunRecord:
    training = callback if isinstance(callback, QuantizationAwareTraining) else None
    manifest = bundle.manifest
    packages = ("lightning-quant", "lightning", "torch", "aimet-torch", "onnx", "onnxruntime")
    identity = network.recipe.identity()
    record = RunRecord(
        status="finished",
        model=network.float_class.__name__,
        data=type(trainer.datamodule).__name__ if getattr(trainer, "datamodule", None) else "",  # type: ignore[attr-defined]
        precision=network.recipe.precision,
        config_hash="",
        exported="qat" if training is not None and trainer.global_step > 0 else "ptq",
        export=manifest.files_sha256,
        bytes=manifest.bytes,
        parity=manifest.parity,
        device=list(devices),
        artifacts={"bundle": f"../{bundle.path.name}"},
        versions={name: importlib.metadata.version(name) for name in packages},
        reproduce="" if callback is None else reproduce(callback),
        config={
            "recipe": identity,
            "raised": {name: str(precision) for name, precision in manifest.promoted.items()},
            "range_estimator": manifest.range_estimator,
        },
    )
    if training is not None and training.climbs and training.result.best is not None:
        ladder = training.result
        record.monitor, record.mode, record.ladder = ladder.monitor, ladder.mode, ladder
        known = {"float": ladder.float_metric, **{rung.rung: rung.metric for rung in ladder.rungs}}
        record.metric = {name: value for name, value in known.items() if value is not None}
        record.exported = training.result.best.rung
    return record
