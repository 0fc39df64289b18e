"""The report of a run for which no app keeps a record: what the Trainer and its callbacks know."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from torch import Tensor

from lightning_quant.callbacks.lightning_packages import either
from lightning_quant.callbacks.quantization import QuantizationCallback, callback_of
from lightning_quant.callbacks.reproduce import reproduce
from lightning_quant.callbacks.training import QuantizationAwareTraining
from lightning_quant.deploy.bundle import Bundle
from lightning_quant.deploy.device_report import DeviceReport
from lightning_quant.domains.segmentation.cityscapes import NUM_CLASSES
from lightning_quant.domains.segmentation.images import IMAGE_MEAN, IMAGE_STD
from lightning_quant.domains.segmentation.overlay import save_overlays
from lightning_quant.report.layers import LayerFigures
from lightning_quant.report.page import write_report
from lightning_quant.report.record import RunRecord
from lightning_quant.report.sensitivity import write_sensitivity
from lightning_quant.simulation.inputs import NetworkInputs, tensors_in
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.utilities.modules import on_cpu_in_eval

# Histograms and pictures of so many samples; each layer is measured alone with half of them.
SAMPLES = 4


def report_folder(bundle: Bundle) -> Path:
    """Where the report of a bundle is kept: ``<name>.report`` beside it."""
    return bundle.path.with_name(f"{bundle.path.name}.report")


def write_callback_report(
    trainer: pl.Trainer,
    name: str,
    network: QuantizedNetwork,
    bundle: Bundle,
    devices: Sequence[DeviceReport],
    calls: Sequence[NetworkInputs],
) -> Path:
    """Write ``report.html`` and what it is made of into :func:`report_folder`; give its pictures to the loggers.

    Args:
        trainer: whose callbacks know what was measured.
        name: dotted attribute of the network.
        network: the quantized network that was exported.
        bundle: what it was exported to.
        devices: what devices made of it.
        calls: samples, one each.
    """
    folder = report_folder(bundle)
    calls = [call.to(torch.device("cpu")) for call in calls[:SAMPLES]]
    callback = callback_of(trainer, name)
    training = callback if isinstance(callback, QuantizationAwareTraining) else None
    with on_cpu_in_eval(network.network):
        figures = LayerFigures.of(network, calls, SAMPLES // 2)
        if training is not None and training.drift is not None:
            figures.drift, figures.drift_steps = training.drift.values, training.drift.steps
        overlays = _draw(network, calls, folder / "overlays")
    figures.write(folder)
    _record(trainer, callback, network, bundle, devices).write(folder)
    path = write_report(folder)
    pictures = {f"overlay/{index}": picture for index, picture in enumerate(overlays)}
    if figures.sensitivity:
        title = f"{network.float_class.__name__} in {str(network.recipe.precision).upper()}"
        pictures["sensitivity"] = write_sensitivity(figures.sensitivity, folder, title)[0]
    log_pictures(trainer.loggers, pictures, trainer.global_step)
    return path


def log_pictures(loggers: Iterable[Logger], pictures: Mapping[str, Path], step: int) -> None:
    """Give PNG files to the loggers that take pictures: TensorBoard, Weights & Biases, MLflow."""
    from matplotlib.image import imread

    for logger in loggers:
        for name, path in pictures.items():
            if isinstance(logger, either(TensorBoardLogger)):
                logger.experiment.add_image(name, imread(path)[..., :3], step, dataformats="HWC")
            elif isinstance(logger, either(WandbLogger)):
                logger.log_image(name, [str(path)], step=step)
            elif isinstance(logger, either(MLFlowLogger)):
                logger.experiment.log_artifact(logger.run_id, str(path), name.partition("/")[0])


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


def _draw(network: QuantizedNetwork, calls: Sequence[NetworkInputs], folder: Path) -> list[Path]:
    """Overlays of a network that puts images into the classes of Cityscapes; nothing of any other."""
    known = network.float_network
    image = calls[0].tensors[0]
    if known is None or len(calls[0].tensors) != 1 or image.dim() != 4 or image.shape[1] != 3:
        return []
    scores = [value for value in tensors_in(calls[0].call(network.network)) if value.is_floating_point()]
    if not scores or scores[0].dim() != 4 or scores[0].shape[1] != NUM_CLASSES:
        return []
    was_training = known.training
    known.eval()
    try:
        float_maps, maps = ([_classes(one, call) for call in calls] for one in (known, network.network))
    finally:
        known.train(was_training)
    return save_overlays(folder, [_normalised(call.tensors[0][0]) for call in calls], float_maps, maps)


def _classes(network: torch.nn.Module, call: NetworkInputs) -> Tensor:
    scores = next(value for value in tensors_in(call.call(network)) if value.is_floating_point())
    size = call.tensors[0].shape[-2:]
    return F.interpolate(scores, size=size, mode="bilinear", align_corners=False)[0].argmax(0)


def _normalised(image: Tensor) -> Tensor:
    """An image as the overlays take it, whatever the user's own normalization: brightness is stretched to fit."""
    mean, std = torch.tensor(IMAGE_MEAN).view(3, 1, 1), torch.tensor(IMAGE_STD).view(3, 1, 1)
    picture = image.float() * std + mean
    if picture.min() < -0.05 or picture.max() > 1.05:
        low, high = image.min(), image.max()
        picture = (image.float() - low) / (high - low).clamp_min(1e-9)
    return (picture - mean) / std
