"""The main job, start to end: a float network, up the accuracy ladder, the best one exported, one record.

Generic over Hydra's ``_target_``: any LightningModule that takes ``network=`` (and, for QAT,
``learning_rate=``) and logs the monitored metric in validation.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from filelock import FileLock
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf

from lightning_quant.callbacks.calibration import calibration_inputs
from lightning_quant.callbacks.calls import InputCatcher
from lightning_quant.callbacks.data import calibration_loader
from lightning_quant.callbacks.device_export import DeviceExport
from lightning_quant.callbacks.drift import RangeDrift
from lightning_quant.callbacks.measured_precision import hook_measuring
from lightning_quant.callbacks.post_training import PostTrainingQuantization
from lightning_quant.callbacks.reporting import log_pictures
from lightning_quant.callbacks.resume_point import ResumePoint
from lightning_quant.callbacks.training import QuantizationAwareTraining
from lightning_quant.deploy.push import device_folder
from lightning_quant.deploy.single_samples import first_samples
from lightning_quant.domains.segmentation.overlay import save_overlays
from lightning_quant.domains.segmentation.task import SegmentationTask
from lightning_quant.errors import CheckpointError, ConfigurationError, DataError, LightningQuantError
from lightning_quant.precision import Precision
from lightning_quant.report.layers import LayerFigures
from lightning_quant.report.page import REPORT_NAME, write_report
from lightning_quant.report.record import RECORD_NAME, RunRecord, config_hash
from lightning_quant.report.sensitivity import print_sensitivity, write_sensitivity
from lightning_quant.report.summary import print_artifacts, print_summary
from lightning_quant.simulation.inputs import NetworkInputs
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.sensitivity import layer_sensitivity
from lightning_quant.utilities.files import atomic_write, exclusive_lock
from lightning_quant.utilities.full_precision import full_precision
from lightning_quant.utilities.monitor import Monitor
from lightning_quant.utilities.parsing import read_checkpoint

log = logging.getLogger(__name__)

JOBS = ("quantize", "sensitivity")

_OBJECTIVES: dict[str, Callable[[RunRecord], float]] = {
    "metric": lambda record: record.metric.get(record.exported or "", math.nan),
    "drop": lambda record: math.nan if record.drop is None else record.drop,
    "megabytes": lambda record: record.bytes.get("quantized", math.nan) / 1e6,
    "latency_ms": lambda record: (record.device[0].median_latency_us or math.nan) / 1000 if record.device else math.nan,
    "seconds": lambda record: sum(record.seconds.values()),
}

# Values that say where or whether to run, not what comes out.
_NOT_THE_RESULT = ("skip_finished", "objectives")


def run(config: DictConfig) -> RunRecord:
    """Run one job of the app in Hydra's output folder and write its record there.

    Args:
        config: the composed configuration, see ``conf/config.yaml``.

    Returns:
        The record; the one found there if ``skip_finished`` is set and the configuration is the same.
    """
    _keep_to_the_point()
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise ConfigurationError(
            f"No value for {', '.join(missing)}: expected one on the command line, e.g. {missing[0]}=..."
        )
    if config.job not in JOBS:
        raise ConfigurationError(f"job={config.job!r}: expected one of {', '.join(JOBS)}.")
    if unknown := [name for name in config.objectives if name not in _OBJECTIVES]:
        raise ConfigurationError(f"objectives has {unknown[0]!r}: expected some of {', '.join(_OBJECTIVES)}.")
    for key in ("seed", "float.epochs", "qat.epochs", "overlays", "report.samples", "report.sensitivity_samples"):
        value = OmegaConf.select(config, key)
        if not isinstance(value, int) or value < 0:
            raise ConfigurationError(f"{key}={value!r}: expected a whole number of at least 0.")
    folder = Path(HydraConfig.get().runtime.output_dir)
    record = _new_record(config)
    if config.skip_finished and (finished := _earlier(folder, record.config_hash, "finished")):
        log.info("Skipped: %s holds the finished run of this configuration.", folder)
        return finished
    with _alone(folder):
        return _run(config, folder, record)


def _run(config: DictConfig, folder: Path, record: RunRecord) -> RunRecord:
    earlier = _earlier(folder, record.config_hash) if config.skip_finished else None
    if earlier is not None:  # what was measured stays measured
        _keep_logs(folder)
        record.metric, record.per_class_iou, record.seconds = earlier.metric, earlier.per_class_iou, earlier.seconds
    record.write(folder)
    job = _Run(config, folder, record, goes_on=earlier is not None)
    try:
        if config.job == "sensitivity":
            job.draw_sensitivity()
        else:
            job.execute()
    except SIGTERMException:
        log.warning("Stopped by SIGTERM. With hydra.run.dir=%s skip_finished=true the same command goes on.", folder)
        sys.exit(128 + signal.SIGTERM)
    except LightningQuantError as error:  # what was measured until then stays known
        record.status, record.error = "failed", f"{type(error).__name__}: {error}"
        record.write(folder)
        if config.job == "quantize":
            write_report(folder)
        raise
    record.status = "finished"
    if config.job == "quantize":
        record.artifacts["report"] = REPORT_NAME
    path = record.write(folder)
    if config.job == "quantize":
        write_report(folder)
    if HydraConfig.get().mode.name == "RUN" and config.job == "quantize":
        print_summary([record], f"Results: {path}")
        print_artifacts(record, folder)
    return record


def objectives(config: DictConfig, record: RunRecord | None) -> float | tuple[float, ...]:
    """What a sweeper such as Optuna searches by: the configured figures of a run.

    One that was not measured, or of a run that failed, is the worst there is: NaN would end the search.
    """

    def value(name: str) -> float:
        found = math.nan if record is None else _OBJECTIVES[name](record)
        worst = Monitor(config.monitor, config.mode).worst if name == "metric" else math.inf
        return found if math.isfinite(found) else worst

    values = tuple(value(name) for name in config.objectives)
    return values[0] if len(values) == 1 else values


def record_failure(config: DictConfig, error: Exception) -> None:
    """Leave a record of a run that failed before it had one, with its message; none where another run is at work."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    record = _new_record(config)
    record.status, record.error = "failed", f"{type(error).__name__}: {error}"
    with suppress(ConfigurationError), _alone(folder):
        if _earlier(folder, record.config_hash) is None:
            record.write(folder)


def _alone(folder: Path) -> AbstractContextManager[None]:
    """Refuse a second run in a folder."""
    busy = f"Another run is writing to {folder}: expected a folder for each. Give another hydra.run.dir, or wait."
    return exclusive_lock(folder / ".lock", ConfigurationError(busy))


def _keep_logs(folder: Path) -> None:
    """Number the tables of a run that was stopped: CSVLogger removes what it finds under its name."""
    for path in sorted(folder.glob("logs/*/metrics.csv")):
        number = len(list(path.parent.glob("metrics.*.csv"))) + 1
        path.rename(path.with_name(f"metrics.{number}.csv"))


def _keep_to_the_point() -> None:
    """Leave Lightning's messages to Hydra's log, once, without its greetings; silence known noise."""
    for name in ("lightning", "lightning.pytorch"):
        logging.getLogger(name).handlers.clear()
    for name in ("lightning.pytorch.utilities.rank_zero", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"lightning\.pytorch\.utilities\._pytree")
    for message in ("does not have many workers", "Experiment logs directory .* exists and is not empty"):
        warnings.filterwarnings("ignore", message=f".*{message}.*")


def _new_record(config: DictConfig) -> RunRecord:
    choices = HydraConfig.get().runtime.choices
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    plain = {str(key): value for key, value in values.items() if key not in _NOT_THE_RESULT}
    packages = ("lightning-quant", "lightning", "torch", "aimet-torch", "onnx", "onnxruntime", "torchmetrics")
    return RunRecord(
        status="running",
        model=choices["model"],
        data=choices["data"],
        precision=Precision.parse(config.precision),
        config_hash=config_hash(plain),
        monitor=config.monitor,
        mode=config.mode,
        versions={name: importlib.metadata.version(name) for name in packages},
        config=plain,
        reproduce=shlex.join(["lightning-quant", *HydraConfig.get().overrides.task]),
    )


def _earlier(folder: Path, wanted: str, status: str | None = None) -> RunRecord | None:
    """The record that an earlier run of the same configuration left, with this status if one is given."""
    if not (folder / RECORD_NAME).is_file():
        return None
    try:
        record = RunRecord.read(folder / RECORD_NAME)
    except DataError:  # damaged: run again
        return None
    return record if status in (None, record.status) and record.config_hash == wanted else None


class _Run:
    """One run: what its stages share."""

    def __init__(self, config: DictConfig, folder: Path, record: RunRecord, goes_on: bool) -> None:
        self.config = config
        self.folder = folder
        self.record = record
        self.goes_on = goes_on
        self.drift: RangeDrift | None = None
        self.data: pl.LightningDataModule = instantiate(config.data)

    def execute(self) -> None:
        callback = self.quantization()  # wrong arguments are told first, wrong data next
        self.device_export("checked")
        with self.stage("data"):
            self.data.prepare_data()
            self.data.setup("fit")
        with self.stage("float"):
            float_task = self.float_task()
            if "float" not in self.record.metric:  # by the run that was stopped
                self.measure("float", float_task)
        with self.stage("ladder"):
            quantized = self.climb(float_task, callback)
        with self.stage("export"):
            self.export(quantized)
            self.draw(float_task, quantized)
        (self.folder / "ladder.part").unlink(missing_ok=True)

    def draw_sensitivity(self) -> None:
        """Which layers suffer most from their bit widths; nothing is kept quantized."""
        with self.stage("data"):
            self.data.prepare_data()
            self.data.setup("fit")
        with self.stage("float"):
            task = self.float_task()
        with self.stage("sensitivity"):
            callback = PostTrainingQuantization(**self.quantizer())
            trainer = self.trainer(callback, enable_progress_bar=False, logger=False, limit_val_batches=1)
            trainer.validate(task, datamodule=self.data, verbose=False)
            samples = self.config.sensitivity.samples
            found = layer_sensitivity(callback.quantized_network(task), self.samples(trainer, task, samples), samples)
        title = f"{self.record.model} at {self.record.precision}"
        picture, table = write_sensitivity(found, self.folder, title)
        self.record.artifacts |= {"sensitivity": picture.name, "sensitivity_table": table.name}
        print_sensitivity(found, title)
        print_artifacts(self.record, self.folder)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage and take its time."""
        log.info("%s · %s · %s", self.record.model, self.record.precision, name)
        # for each stage anew: what QAT draws must not depend on whether float was trained before it or reused
        pl.seed_everything(self.config.seed, workers=True, verbose=False)
        start = time.perf_counter()
        yield
        self.record.seconds[name] = round(self.record.seconds.get(name, 0) + time.perf_counter() - start, 2)
        self.record.write(self.folder)

    def task(self, learning_rate: float | None = None) -> pl.LightningModule:
        given = {} if learning_rate is None else {"learning_rate": learning_rate}
        task: pl.LightningModule = instantiate(self.config.task, network=instantiate(self.config.model), **given)
        return task

    def logger(self, name: str) -> Any:
        """The configured logger for a stage that trains."""
        if "_target_" not in self.config.logger:
            return False
        # the progress bar would show the last letters of a version
        return instantiate(self.config.logger)(save_dir=str(self.folder / "logs"), name=name, version="")

    def trainer(self, *callbacks: Callback, **options: Any) -> pl.Trainer:
        trainer: pl.Trainer = instantiate(
            self.config.trainer,
            callbacks=list(callbacks),
            default_root_dir=str(self.folder),
            **options,
            _convert_="all",
        )
        return trainer

    def quantizer(self) -> dict[str, Any]:
        """Arguments of both quantization callbacks."""
        values = OmegaConf.to_container(self.config.quantizer, resolve=True)
        assert isinstance(values, dict)
        return {"precision": self.record.precision, **{str(key): value for key, value in values.items()}}

    def measure(self, name: str, task: pl.LightningModule, *callbacks: Callback) -> None:
        """Run the user's validation and keep the monitored metric."""
        trainer = self.trainer(*callbacks, enable_progress_bar=False, logger=False)
        quantization = self.quantization()
        if quantization.recipe.has_fine_grids or quantization.refines:  # what is compared is measured alike
            hook_measuring(trainer.precision_plugin, full_precision)
        trainer.validate(task, datamodule=self.data, verbose=False)
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        if self.config.monitor not in metrics:
            raise ConfigurationError(
                f"monitor={self.config.monitor!r} was not logged in validation: expected one of "
                f"{', '.join(sorted(metrics)) or 'nothing, for nothing was logged'}."
            )
        self.record.metric[name] = metrics[self.config.monitor]
        log.info("%s %s: %.4f", name, self.config.monitor, self.record.metric[name])
        if isinstance(task, SegmentationTask):
            self.record.per_class_iou[name] = {key: round(iou, 4) for key, iou in task.per_class_iou().items()}

    def float_task(self) -> pl.LightningModule:
        """The float network: from the given checkpoint, from an earlier run, or trained now."""
        config = self.config.float
        task = self.task()
        if config.checkpoint is not None:
            _load_float(task, Path(config.checkpoint))
            return task
        if config.epochs == 0:
            return task
        values = {part: self.record.config[part] for part in ("data", "model", "task", "float", "seed", "trainer")}
        # how the calibration samples are chosen does not change the float network
        values["data"] = {key: v for key, v in values["data"].items() if not key.startswith("calibration")}
        path = Path(config.dir).absolute() / f"{self.record.model}-{config_hash(values)}.ckpt"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # parallel jobs of a sweep wait for the one that trains
            if path.is_file():
                log.info("Float network from %s", path)
                _load_float(task, path)
            else:
                point = ResumePoint(path.with_suffix(".part"))
                if point.ckpt_path:
                    log.info("Going on with the float network from %s", point.path)
                    _read(point.path)  # before Lightning does, with a clear error
                options = {"max_epochs": config.epochs, "limit_val_batches": 0, "enable_checkpointing": True}
                trainer = self.trainer(point, logger=self.logger("float"), **options)
                trainer.fit(task, datamodule=self.data, ckpt_path=point.ckpt_path, weights_only=True)
                with atomic_write(path) as partial:
                    trainer.save_checkpoint(partial, weights_only=True)
                point.path.unlink()
                log.info("Float network trained and kept as %s", path)
        self.record.artifacts["float_checkpoint"] = str(path)
        return task

    def quantization(self) -> QuantizationAwareTraining:
        values = OmegaConf.to_container(self.config.ladder, resolve=True)
        qat = OmegaConf.to_container(self.config.qat, resolve=True)
        assert isinstance(values, dict)
        assert isinstance(qat, dict)
        return QuantizationAwareTraining(
            **self.quantizer(),
            **{str(key): value for key, value in values.items()},
            monitor=self.config.monitor,
            mode=self.config.mode,
            **{key: qat[key] for key in ("train_ranges", "distillation", "compile")},
        )

    def climb(self, float_task: pl.LightningModule, callback: QuantizationAwareTraining) -> pl.LightningModule:
        """The best quantized network: from the rungs before training or, if none is good enough, trained."""
        config = self.config.qat
        task = self.task(learning_rate=config.learning_rate)
        task.load_state_dict(float_task.state_dict())
        point = ResumePoint(self.folder / "ladder.part")
        logger = self.logger("ladder")
        trainer = self.trainer(callback, point, max_epochs=config.epochs, logger=logger, enable_checkpointing=True)
        best = Path(trainer.log_dir or self.folder) / "ladder" / "best.ckpt"
        if not self.goes_on:
            best.unlink(missing_ok=True)
            point.path.unlink(missing_ok=True)
        ckpt_path = point.ckpt_path or (str(best) if best.is_file() else None)
        if ckpt_path:
            log.info("Going on from %s", ckpt_path)
            _read(Path(ckpt_path))
        try:
            trainer.fit(task, datamodule=self.data, ckpt_path=ckpt_path, weights_only=True)
        finally:
            self.record.ladder = callback.result
        self.drift = callback.drift
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
        self.measure(self.record.exported, task)
        return task

    def export(self, quantized: pl.LightningModule) -> None:
        name = f"{self.record.model}_{self.record.precision}"
        export = self.device_export(name)
        callback = PostTrainingQuantization(**self.quantizer())  # finds the network quantized already
        logger = self.logger("device")
        trainer = self.trainer(callback, export, enable_progress_bar=False, logger=logger, limit_val_batches=1)
        try:
            trainer.validate(quantized, datamodule=self.data, verbose=False)
        finally:  # of a network that falls below a bound, too, everything made is kept
            if export.bundle is not None:
                checkpoint = self.folder / f"{name}.ckpt"
                trainer.save_checkpoint(checkpoint, weights_only=True)
                manifest = export.bundle.manifest
                self.record.bytes = manifest.bytes
                self.record.parity = manifest.parity
                self.record.artifacts["bundle"] = str(export.bundle.path.relative_to(self.folder))
                self.record.artifacts["checkpoint"] = checkpoint.name
                self.record.device = list(export.reports)
                if export.reports:
                    self.record.artifacts["device"] = str(device_folder(export.bundle).relative_to(self.folder))
                self.look_inside(trainer, quantized)

    def samples(self, trainer: pl.Trainer, task: pl.LightningModule, count: int) -> list[NetworkInputs]:
        """The first calibration samples, each a call of the quantized network."""
        quantizer = PostTrainingQuantization(**self.quantizer())
        catcher = InputCatcher(trainer, task, quantizer.network_name, quantizer.quantized_network(task))
        inputs = calibration_inputs(trainer, calibration_loader(trainer, task, None), catcher, count)
        return first_samples(inputs, count)

    def look_inside(self, trainer: pl.Trainer, quantized: pl.LightningModule) -> None:
        """Histograms and sensitivity of every layer, for the report."""
        config = self.config.report
        if config.samples:
            samples = self.samples(trainer, quantized, config.samples)
            _, network = next(QuantizedNetwork.named_in(quantized))
            figures = LayerFigures.of(network, samples, config.sensitivity_samples)
            if self.drift is not None:
                figures.drift, figures.drift_steps = self.drift.values, self.drift.steps
            self.record.artifacts["layers"] = figures.write(self.folder).name

    def device_export(self, name: str) -> DeviceExport:
        """The configured target, for a bundle of this name."""
        folder, config = str(self.folder / "export"), self.config
        export: DeviceExport = instantiate(
            config.target,
            dirpath=folder,
            name=name,
            monitor=config.monitor,
            mode=config.mode,
            report=False,  # the app's own knows more
            _convert_="all",
        )
        return export

    def draw(self, float_task: pl.LightningModule, quantized: pl.LightningModule) -> None:
        """Float and quantized predictions of the first validation images, side by side, as PNG."""
        count = self.config.overlays
        if not count or not isinstance(float_task, SegmentationTask):
            return
        images: list[torch.Tensor] = []
        for batch in self.data.val_dataloader():
            images.extend(batch[0])
            if len(images) >= count:
                break
        pictures = torch.stack(images[:count])
        with torch.no_grad():
            float_maps, maps = (task.eval().cpu().predict_step(pictures, 0).numpy() for task in (float_task, quantized))
        drawn = save_overlays(self.folder / "overlays", pictures, float_maps, maps)
        if logger := self.logger("device"):
            log_pictures([logger], {f"overlay/{index}": path for index, path in enumerate(drawn)}, 0)
        self.record.artifacts["overlays"] = "overlays"


def _read(path: Path) -> Any:
    try:
        return read_checkpoint(path)
    except Exception as error:  # pickle, zip, EOF and runtime errors, by where the damage is
        raise CheckpointError(
            f"{path} is not a readable checkpoint: {type(error).__name__}: {error}. Give another, or remove it if a "
            "run that was stopped left it there: then it is made anew."
        ) from error


def _load_float(task: pl.LightningModule, path: Path) -> None:
    """Load a float checkpoint of the task, or a state dict of its network.

    Raises:
        CheckpointError: if it is missing, damaged, quantized, or of another network.
    """
    if not path.is_file():
        raise CheckpointError(f"float.checkpoint={str(path)!r} does not exist: expected a checkpoint file.")
    content = _read(path)
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds {type(state).__name__}: expected a Lightning checkpoint or a state dict.")
    if any(str(key).endswith("_extra_state") for key in state):
        raise CheckpointError(f"{path} holds a quantized network: expected a float one to start from.")
    try:
        task.load_state_dict(state)
    except Exception as error:  # PyTorch's own for names and shapes, others for what is no tensor
        try:
            task.get_submodule("model").load_state_dict(state)
        except Exception:
            raise CheckpointError(f"{path} does not fit {type(task).__name__}: {error}") from error
