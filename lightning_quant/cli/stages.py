"""What a run does, stage by stage: data, float network, ladder, export; or the sensitivity of layers."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_quant.callbacks.calibration import calibration_inputs
from lightning_quant.callbacks.calls import InputCatcher
from lightning_quant.callbacks.data import calibration_loader
from lightning_quant.callbacks.device_export import DeviceExport
from lightning_quant.callbacks.measured_precision import hook_measuring
from lightning_quant.callbacks.reporting import blame_layers
from lightning_quant.callbacks.resume_point import ResumePoint
from lightning_quant.callbacks.training import QuantizationAwareTraining
from lightning_quant.callbacks.training_notes import TrainingNotes
from lightning_quant.callbacks.visualizer import (
    DrawsComparisons,
    class_confusion,
    class_figures,
    draw_comparisons,
    log_pictures,
)
from lightning_quant.cli.float_network import float_task, read_or_refuse
from lightning_quant.cli.parts import Parts
from lightning_quant.deploy.blame.result import BLAME_NAME, write_blames
from lightning_quant.deploy.push import device_folder
from lightning_quant.deploy.single_samples import first_samples
from lightning_quant.errors import ConfigurationError
from lightning_quant.report.layers import LayerFigures
from lightning_quant.report.pictures import legend_of, write_comparisons
from lightning_quant.report.record import RECORD_NAME, RunRecord
from lightning_quant.report.sensitivity import print_sensitivity, write_sensitivity
from lightning_quant.report.summary import print_artifacts
from lightning_quant.simulation.inputs import NetworkInputs
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.sensitivity import layer_sensitivity
from lightning_quant.utilities.full_precision import full_precision

log = logging.getLogger(__name__)


class Stages:
    """Run the stages of one job and note in its record what they find.

    Args:
        parts: built from the configuration.
        record: written after each stage.
        resumes: whether what an earlier run left in the folder is used.
    """

    def __init__(self, parts: Parts, record: RunRecord, resumes: bool) -> None:
        self.parts = parts
        self.config = parts.config
        self.folder = parts.folder
        self.record = record
        self.resumes = resumes
        self.notes: TrainingNotes | None = None

    def quantize(self) -> None:
        """Climb the ladder from the float network, and export the best one."""
        callback = self.parts.training()  # wrong arguments are refused first, wrong data next
        export = self.parts.device_export(f"{self.record.model}_{self.record.precision}")
        export.check_target(callback.recipe)
        with self._stage("data"):
            self._set_up_data()
        with self._stage("float"):
            float_module = float_task(self.parts, self.record)
            if "float" not in self.record.metric:  # by the run that was stopped
                self._measure("float", float_module)
        with self._stage("ladder"):
            quantized = self._climb(float_module, callback)
        with self._stage("export"):
            trainer = self._export(quantized, export)
            self._draw(trainer, float_module, quantized)
        (self.folder / "ladder.part").unlink(missing_ok=True)

    def draw_sensitivity(self) -> None:
        """Measure which layers suffer most from their bit widths; nothing is kept quantized."""
        with self._stage("data"):
            self._set_up_data()
        with self._stage("float"):
            task = float_task(self.parts, self.record)
        with self._stage("sensitivity"):
            callback = self.parts.post_training()
            trainer = self.parts.trainer(callback, enable_progress_bar=False, limit_val_batches=1)
            trainer.validate(task, datamodule=self.parts.data, verbose=False)
            count = self.config.sensitivity.samples
            samples = self._samples(trainer, task, calibration_loader(trainer, task, None), count)
            found = layer_sensitivity(callback.quantized_network(task), samples, count)
        title = f"{self.record.model} at {self.record.precision}"
        picture, table = write_sensitivity(found, self.folder, title)
        self.record.artifacts |= {"sensitivity": picture.name, "sensitivity_table": table.name}
        print_sensitivity(found, title)
        print_artifacts(self.record, self.folder)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        """Announce a stage and take its time."""
        log.info("%s · %s · %s", self.record.model, self.record.precision, name)
        # in each stage: what QAT draws must not depend on whether float was trained before it or reused
        pl.seed_everything(self.config.seed, workers=True, verbose=False)
        start = time.perf_counter()
        yield
        self.record.seconds[name] = round(self.record.seconds.get(name, 0) + time.perf_counter() - start, 2)
        self.record.write(self.folder)

    def _set_up_data(self) -> None:
        self.parts.data.prepare_data()
        self.parts.data.setup("fit")

    def _measure(self, name: str, task: pl.LightningModule) -> None:
        """Run the user's validation; keep the monitored metric and the figures of the classes."""
        trainer = self.parts.trainer(enable_progress_bar=False)
        quantization = self.parts.training()
        if quantization.recipe.has_fine_grids or quantization.refines:  # what is compared is measured alike
            hook_measuring(trainer.precision_plugin, full_precision)
        trainer.validate(task, datamodule=self.parts.data, verbose=False)
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        if self.config.monitor not in metrics:
            raise ConfigurationError(
                f"monitor={self.config.monitor!r} was not logged in validation: expected one of "
                f"{', '.join(sorted(metrics)) or 'nothing, for nothing was logged'}."
            )
        self.record.metric[name] = metrics[self.config.monitor]
        if figures := class_figures(task):
            self.record.class_figures[name] = figures
        if (confusion := class_confusion(task)) is not None:
            self.record.confusion[name] = confusion
        log.info("%s %s: %.4f", name, self.config.monitor, self.record.metric[name])

    def _climb(self, float_module: pl.LightningModule, callback: QuantizationAwareTraining) -> pl.LightningModule:
        """Return the best quantized network: from the rungs before training or, if none is good enough, trained."""
        config = self.config.qat
        task = self.parts.task(learning_rate=config.learning_rate)
        task.load_state_dict(float_module.state_dict())
        point = ResumePoint(self.folder / "ladder.part")
        trainer = self.parts.trainer(
            callback, point, max_epochs=config.epochs, logger=self.parts.logger("ladder"), enable_checkpointing=True
        )
        best = Path(trainer.log_dir or self.folder) / "ladder" / "best.ckpt"
        if not self.resumes:
            best.unlink(missing_ok=True)
            point.path.unlink(missing_ok=True)
        ckpt_path = point.ckpt_path or (str(best) if best.is_file() else None)
        if ckpt_path:
            log.info("Resuming from %s", ckpt_path)
            read_or_refuse(Path(ckpt_path))
        try:
            trainer.fit(task, datamodule=self.parts.data, ckpt_path=ckpt_path, weights_only=True)
        finally:
            self.record.ladder = callback.result
        self.notes = callback.notes
        result = callback.result
        self.record.metric |= {rung.rung: rung.metric for rung in result.rungs if rung.metric is not None}
        if result.best is not None:
            self.record.exported = result.best.rung
        elif callback.climbs:
            raise ConfigurationError(
                f"No rung gave a network whose {self.config.monitor} is a number: nothing to export. See "
                f"{self.folder / RECORD_NAME} for what each did."
            )
        else:
            self.record.exported = "qat" if config.epochs > 0 else "ptq"
        self._measure(self.record.exported, task)
        return task

    def _export(self, quantized: pl.LightningModule, export: DeviceExport) -> pl.Trainer:
        """Export the network, have the target measure it, and look at each layer; return the Trainer that did so."""
        trainer = self.parts.trainer(
            self.parts.post_training(),  # finds the network quantized already
            export,
            enable_progress_bar=False,
            logger=self.parts.logger("device"),
            limit_val_batches=1,
        )
        try:
            trainer.validate(quantized, datamodule=self.parts.data, verbose=False)
        finally:  # of a network that falls below a bound, too, everything made is kept
            if export.bundle is not None:
                checkpoint = self.folder / f"{export.name}.ckpt"
                trainer.save_checkpoint(checkpoint, weights_only=True)
                manifest = export.bundle.manifest
                self.record.export = manifest.files_sha256
                self.record.bytes = manifest.bytes
                self.record.parity = manifest.parity
                self.record.artifacts["bundle"] = str(export.bundle.path.relative_to(self.folder))
                self.record.artifacts["checkpoint"] = checkpoint.name
                self.record.device = list(export.reports)
                if export.reports:
                    self.record.artifacts["device"] = str(device_folder(export.bundle).relative_to(self.folder))
                self._look_inside(trainer, quantized, export)
        return trainer

    def _look_inside(self, trainer: pl.Trainer, quantized: pl.LightningModule, export: DeviceExport) -> None:
        """Write histograms, sensitivity and errors of every layer, for the report."""
        config = self.config.report
        if config.samples:
            samples = self._samples(trainer, quantized, calibration_loader(trainer, quantized, None), config.samples)
            _, network = next(QuantizedNetwork.named_in(quantized))
            figures = LayerFigures.of(network, samples, config.sensitivity_samples)
            if self.notes is not None:
                self.notes.add_to(figures)
            self.record.artifacts["layers"] = figures.write(self.folder).name
            blames = export.blames or blame_layers(network, samples[:1])
            self.record.artifacts["blame"] = write_blames(self.folder / BLAME_NAME, blames).name

    def _draw(self, trainer: pl.Trainer, float_module: pl.LightningModule, quantized: pl.LightningModule) -> None:
        """Let the task draw what both networks predict for the first validation samples, as PNG."""
        count = self.config.overlays
        if not count or not isinstance(quantized, DrawsComparisons):
            return
        name, network = next(QuantizedNetwork.named_in(quantized))
        calls = self._samples(trainer, quantized, self.parts.data.val_dataloader(), count)
        comparisons = draw_comparisons(quantized, float_module.get_submodule(name), network.network, calls)
        if not comparisons:
            return
        drawn = write_comparisons(self.folder / "overlays", comparisons)
        if logger := self.parts.logger("device"):
            log_pictures([logger], {f"overlay/{index}": path for index, path in enumerate(drawn)}, 0)
        self.record.legend = legend_of(comparisons)
        self.record.artifacts["overlays"] = "overlays"

    def _samples(
        self, trainer: pl.Trainer, quantized: pl.LightningModule, loader: Any, count: int
    ) -> list[NetworkInputs]:
        """Return the first samples of a data loader, each a call of the quantized network."""
        name, network = next(QuantizedNetwork.named_in(quantized))
        catcher = InputCatcher(trainer, quantized, name, network)
        return first_samples(calibration_inputs(trainer, loader, catcher, count), count)
