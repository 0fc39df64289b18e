"""Quantization-aware training as a Lightning callback, after repairs that need no training."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_quant.callbacks.calls import InputCatcher
from lightning_quant.callbacks.distillation import Distillation, loss_scale, loss_scaler
from lightning_quant.callbacks.drift import RangeDrift
from lightning_quant.callbacks.early_setup import set_up_early
from lightning_quant.callbacks.finiteness import GradientWatch, Step, gradients_are_finite, origin
from lightning_quant.callbacks.ladder_runner import Climber
from lightning_quant.callbacks.logs import rank_zero_log
from lightning_quant.callbacks.networks import find_network
from lightning_quant.callbacks.quantization import (
    QuantizationCallback,
    end_fit,
    measuring,
    quantization_callbacks,
)
from lightning_quant.callbacks.resume_point import save_whole
from lightning_quant.callbacks.trainer_checks import averaging_callbacks
from lightning_quant.callbacks.validation import isolated_validation, measure, monitored
from lightning_quant.errors import CalibrationError, CheckpointError, ConfigurationError, TrainingError
from lightning_quant.ladder.climb import Footing
from lightning_quant.ladder.gate import Ladder, RungResult
from lightning_quant.ladder.registry import Rung, techniques
from lightning_quant.ladder.rungs.ptq import CalibratedRanges
from lightning_quant.precision import Precision
from lightning_quant.simulation.compiled import Compiled, check_options
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.range_estimators import RangeEstimator
from lightning_quant.utilities.files import exclusive_lock
from lightning_quant.utilities.memory import PeakMemory
from lightning_quant.utilities.registry import Spec


class QuantizationAwareTraining(QuantizationCallback):
    """Fine-tune a trained network with its weights and activations rounded as the device will round them.

    ``fit`` calibrates first, then trains as your module and optimizer say. The ranges learn along with the
    weights, in an optimizer group of their own without weight decay: decay would pull every range towards
    zero, and with it the values the layer can represent. A good learning rate is about a hundredth of the
    one the float network was trained with.

    With ``max_drop``, training is the last resort: ``fit`` measures the float network with your own validation,
    then tries ``rungs`` in order, measures after each, keeps the best and stops at the first that is within
    ``max_drop`` of float. If one is, no training happens and the run says so. Otherwise it trains, stops once within
    the bound and no longer improving, and ends with the best weights it saw. ``Trainer(max_epochs=0)`` climbs without
    training.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> quantization = QuantizationAwareTraining("w4a16", max_drop=0.01, rungs=("ptq", "bn_reestimation"))
        >>> trainer = Trainer(max_epochs=2, callbacks=[quantization])  # doctest: +SKIP
        >>> trainer.fit(module, datamodule=data)  # doctest: +SKIP
        >>> quantization.result.rungs  # doctest: +SKIP

    Args:
        precision: bit widths, ``"w8a8"``, ``"w8a16"``, ``"w4a16"`` or ``"w4a8"``.
        network: dotted attribute of the LightningModule that holds the float ``nn.Module``.
        hardware: AIMET hardware config: an alias such as ``"htp_v75"`` (Snapdragon 8 Gen 3) or the path of
            a JSON file.
        calibration_samples: how many samples (images, not batches) the ranges are taken from.
        calibration_dataloader: the data to take them from. Default: ``datamodule.calibration_dataloader()``
            if it has one, else the training data.
        range_estimator: ``"min_max"``, ``"tf_enhanced"`` or ``"percentile"``, with options as in
            ``{"percentile": {"percentile": 99.9}}``; or a ``RangeEstimator`` of your own, an instance or the
            dotted path of the class.
        overrides: precision of single layers, as glob on the network's module names → precision.
        strict: make the warnings of the preflight errors.
        max_drop: how far ``monitor`` may fall below the float network, in units of the metric (0.01 of an mIoU
            between 0 and 1 is a point). ``None``: every rung is tried and training always follows.
        monitor: the metric, as your validation logs it.
        mode: ``"max"`` if more of it is better, ``"min"`` if less is.
        rungs: repairs to try before training, cheapest first: ``"ptq"``, ``"min_max"``, ``"tf_enhanced"``,
            ``"percentile"``, ``"cle"``, ``"bn_reestimation"``, ``"bias_correction"``, ``"seq_mse"``, ``"adaround"``,
            ``"mixed"``; with options as ``{"mixed": {"budget": 0.05}}``; or the dotted path of a
            ``lightning_quant.ladder.rung.Technique`` of your own.
        train_ranges: learn the ranges too. ``False`` keeps them as calibrated.
        distillation: weight of a second loss, the squared difference from the float network's output relative to
            its power, beside your own. 0: none.
        statistics_cache: folder that keeps what calibration saw, so that other precisions with the same width of
            weights, network and data need no pass of their own; their ranges are exactly the same. Not used under DDP.
        compile: let ``torch.compile`` compile the quantized network for training and its validation; or ``backend``,
            ``mode`` and ``options`` for it, such as ``{"mode": "reduce-overhead"}``. It pays on a GPU, after minutes of
            compiling. Where a compiled network would lose something that your ``forward`` does, it is not compiled,
            and a warning says why.

    Attributes:
        result: what was measured, a :class:`~lightning_quant.ladder.gate.Ladder`.
        best_model_path: the checkpoint of the best network so far, written after every rung and validation that
            improved on it. ``fit(ckpt_path=…)`` goes on from there.
        drift: how far the ranges moved in training, a :class:`~lightning_quant.callbacks.drift.RangeDrift`, noted every
            ``Trainer(log_every_n_steps=…)``; ``None`` before training, and where they do not learn.

    Raises:
        ConfigurationError, PreflightError, CalibrationError: as there.
        TrainingError: gradients are NaN or infinite; names step, batch and layer. The step is not taken. On a GPU it is
            known one step later, and the message says so; with ``16-mixed`` it is raised once scaling does not explain
            them. With ``max_drop`` or rungs it is a warning, and the fit ends with the best network so far.
    """

    def __init__(
        self,
        precision: str | Precision = "w8a8",
        network: str = "model",
        hardware: str = "htp_v75",
        calibration_samples: int = 256,
        calibration_dataloader: Iterable[Any] | None = None,
        range_estimator: RangeEstimator | Spec = "min_max",
        overrides: Mapping[str, str] | None = None,
        strict: bool = False,
        max_drop: float | None = None,
        monitor: str = "val_miou",
        mode: str = "max",
        rungs: Sequence[Rung] = ("ptq",),
        train_ranges: bool = True,
        distillation: float = 0.0,
        statistics_cache: str | None = None,
        compile: bool | Mapping[str, Any] = False,
    ) -> None:
        super().__init__(
            precision=precision,
            network=network,
            hardware=hardware,
            calibration_samples=calibration_samples,
            calibration_dataloader=calibration_dataloader,
            range_estimator=range_estimator,
            overrides=overrides,
            strict=strict,
            statistics_cache=statistics_cache,
        )
        if max_drop is not None and (not isinstance(max_drop, int | float) or math.isnan(max_drop)):
            raise ConfigurationError(f"max_drop={max_drop!r}: expected a number in units of the metric, or None.")
        if mode not in ("max", "min"):
            raise ConfigurationError(f"mode={mode!r}: expected 'max' or 'min'.")
        if not isinstance(distillation, int | float) or not 0 <= distillation < math.inf:
            raise ConfigurationError(f"distillation={distillation!r}: expected a weight of at least 0.")
        self.techniques = techniques(list(rungs) if isinstance(rungs, tuple) else rungs)
        self.climbs = max_drop is not None or [type(technique) for technique in self.techniques] != [CalibratedRanges]
        if self.climbs and (not isinstance(monitor, str) or not monitor):
            raise ConfigurationError(
                f"max_drop={max_drop!r} with monitor={monitor!r}: expected the name of the metric that is compared, as "
                "your validation logs it."
            )
        if self.climbs and isinstance(calibration_dataloader, Iterator):
            raise ConfigurationError(
                "calibration_dataloader is an iterator, and each rung reads the samples anew: expected a data "
                "loader, or a function that makes one."
            )
        self.refines = self.climbs and any(technique.refines for technique in self.techniques)
        self.train_ranges = train_ranges
        self.distillation = distillation
        self.compile = None if compile is False else check_options(compile)
        self._compiled = ExitStack()
        self._only_rungs = False
        self._teaching: tuple[Distillation, RemovableHandle] | None = None
        self._memory = PeakMemory()
        self._batch: tuple[Any, int] = (None, 0)
        self._watch = GradientWatch()
        self._locked = ExitStack()
        self._sane = ExitStack()
        self._begin(Ladder(monitor, mode, max_drop), None)

    def _begin(self, ladder: Ladder, float_network: nn.Module | None) -> None:
        """Nothing was measured yet."""
        self.result = ladder
        self.best_model_path = ""
        self._float = float_network
        self._footing = Footing()
        self._climbed = False
        self._trained_metric: float | None = None
        self._improving = True
        self._best_state: dict[str, Any] | None = None
        self._started = 0.0
        self._validated_at = -1
        self.drift: RangeDrift | None = None
        self._drift_before: dict[str, Any] | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        set_up_early(trainer, pl_module, stage)
        fits = trainer.state.fn == "fit"
        is_float = QuantizedNetwork.of(find_network(pl_module, self.network_name)) is None
        if fits and (self.climbs or self.distillation):
            self._check_fit(trainer, has_float=is_float or self._float is not None)
        super().setup(trainer, pl_module, stage)
        quantized = self.quantized_network(pl_module)
        if fits and is_float and (self.climbs or self.distillation):
            self._begin(Ladder(self.result.monitor, self.result.mode, self.result.max_drop), quantized.float_network)
        quantized.learn_ranges(self.train_ranges)
        self._fixed_ranges = [one for one in quantized.range_parameters() if not one.requires_grad]
        if fits and self.climbs:
            for technique in self.techniques:
                technique.check(quantized)

    @override
    def _on_set_up(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.climbs and trainer.state.fn == "fit":
            self._lock(trainer, _folder(trainer) / "ladder")
        start = time.perf_counter()
        with PeakMemory() as memory:
            super()._on_set_up(trainer, pl_module)
        self._calibration = time.perf_counter() - start, memory.peak_bytes

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.drift = None
        if self._drift_before is not None:
            self.drift = RangeDrift(self.quantized_network(pl_module))
            self.drift.load_state_dict(self._drift_before)
            self._drift_before = None

    @override
    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.climbs:  # a metric that remembers it would satisfy the ladder
            self._sane.enter_context(isolated_validation(trainer, self.quantized_network(pl_module).network))

    @override
    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._sane.close()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.climbs:
            if not self._climbed:
                with measuring(trainer, pl_module)():
                    self._climb(trainer, pl_module)
            late = {one.name for one in self.techniques} - {rung.rung for rung in self.result.rungs}
            if late and not self.result.satisfied:
                rank_zero_warn(f"The climb was over in the checkpoint: {', '.join(sorted(late))} are not tried.")
            if (self.result.satisfied and self._trained_metric is None) or self._only_rungs:
                self._tell_no_training()
                end_fit(trainer)
                return
            if self._good_enough():  # it was killed between this and its end
                end_fit(trainer)
                return
        self._started, self._validated_at = time.perf_counter(), -1
        self._memory.start()
        if self.train_ranges and self.drift is None:
            self.drift = RangeDrift(self.quantized_network(pl_module))
        if self.distillation:
            assert self._float is not None
            teacher = Distillation(self._float.to(pl_module.device), self.distillation, partial(loss_scale, trainer))
            self._teaching = teacher, self.quantized_network(pl_module).register_forward_hook(teacher, with_kwargs=True)
        if self.compile is not None:
            compiled = Compiled(self.quantized_network(pl_module).network, self.compile)
            self._compiled.enter_context(compiled.in_place())
            rank_zero_log(f"{self.network_name} is compiled in the first step, which takes a while.")

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._batch = batch, batch_idx

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        now = Step(trainer.global_step + 1, trainer.current_epoch, self._batch[1])
        spoilt = self._watch.look(parameters, now)
        if spoilt is None:
            return
        scaler = loss_scaler(trainer)
        if scaler is not None:  # it has skipped what came before; this step counts, if scaling does not explain it
            if scaler.get_scale() < 1 and (spoilt == now or not gradients_are_finite(parameters)):
                self._end_spoilt(trainer, self._not_finite(trainer, pl_module, now, scaler.get_scale()))
            return
        message = self._not_finite(trainer, pl_module, now) if spoilt == now else _noticed_late(spoilt)
        self._end_spoilt(trainer, message)
        for parameter in parameters:
            parameter.grad = None  # the step that follows leaves it as it is

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look_back(trainer)
        super().on_validation_start(trainer, pl_module)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._look_back(trainer)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look_back(trainer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._teaching is not None and not self._teaching[0].used:
            raise ConfigurationError(
                f"distillation={self.distillation}: training_step did not call self.{self.network_name} itself, or "
                "uses nothing of what it returned. Name the attribute that is called in network=..., or set "
                "distillation=0."
            )
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self.drift is not None and trainer.is_global_zero and every and step % every == 0:
            scalars = self.drift.note(self.quantized_network(pl_module), step)
            if len(quantization_callbacks(trainer)) > 1:
                scalars = {f"{self.network_name}/{name}": value for name, value in scalars.items()}
            for logger in trainer.loggers if scalars else ():
                logger.log_metrics(scalars, step=step)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "fit" and self.climbs and not trainer.sanity_checking:
            self._judge_training(trainer, pl_module, monitored(trainer, self.result.monitor))

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._stop_teaching()
        self._compiled.close()
        self._look_back(trainer)
        if self.climbs and self._started and self._validated_at != trainer.global_step and not trainer.interrupted:
            network = self.quantized_network(pl_module).network
            metric = measure(trainer, self.result.monitor, hidden=self, network=network)
            self._judge_training(trainer, pl_module, metric)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # here and not in on_train_end, which does not come when a finished training is resumed
        if not self.climbs or not (self._started or self._trained_metric is not None):
            return
        seconds = time.perf_counter() - self._started if self._started else 0.0
        metric = math.nan if self._trained_metric is None else self._trained_metric
        self.result.rungs = [rung for rung in self.result.rungs if rung.rung != "qat"]
        changed = f"trained for {trainer.global_step} steps"
        rung = self.result.judge("qat", metric, changed, seconds, self._memory.stop())
        self._log(trainer, rung)
        if self._best_state is None:
            self._best_state = _network_state(self.best_model_path, self.network_name)
        self.quantized_network(pl_module).restore(self._best_state)
        self._best_state, self._started = None, 0.0
        rank_zero_log(f"Training ended: {self._standing()}.")

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._watch.forget()
        self._sane.close()
        self._stop_teaching()
        self._started = 0.0
        self.teardown(trainer, pl_module, "fit")

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._locked.close()
        self._compiled.close()
        if self._only_rungs:
            trainer.fit_loop.max_epochs = 0
            self._only_rungs = False

    @override
    def state_dict(self) -> dict[str, Any]:
        drift = {} if self.drift is None else {"drift": self.drift.state_dict()}
        if not (self.climbs or self.distillation):
            return drift
        state = {
            **drift,
            "ladder": self.result.to_dict(),
            "climbed": self._climbed,
            "finishing": self._footing.finishing,
            "trained_metric": self._trained_metric,
            "improving": self._improving,
            "best_model_path": self.best_model_path,
        }
        if self._float is not None and (self.distillation or not self._climbed):
            state["float"] = self._float.state_dict()
        if not self._climbed:
            state["base"] = self._footing.base
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._drift_before = state_dict.get("drift")
        if "ladder" not in state_dict:
            return
        known = Ladder.from_dict(state_dict["ladder"])
        if (known.monitor, known.mode) != (self.result.monitor, self.result.mode):
            raise CheckpointError(
                f"The checkpoint was measured by monitor={known.monitor!r}, mode={known.mode!r}, but the callback was "
                f"given monitor={self.result.monitor!r}, mode={self.result.mode!r}. Give the same, or start from the "
                "float weights."
            )
        known.max_drop = self.result.max_drop
        self.result = known
        self._climbed = state_dict["climbed"]
        self._footing = Footing(state_dict["finishing"], state_dict.get("base"))
        self._trained_metric = state_dict["trained_metric"]
        self._improving = state_dict.get("improving", True)
        self.best_model_path = state_dict["best_model_path"]
        if "float" in state_dict and self._float is not None:
            self._float.load_state_dict(state_dict["float"])

    def _stop_teaching(self) -> None:
        if self._teaching is not None:
            self._teaching[1].remove()
            self._teaching = None

    def _check_fit(self, trainer: pl.Trainer, has_float: bool) -> None:
        if not has_float:
            raise ConfigurationError(
                f"max_drop, rungs or distillation of {type(self).__name__} with a module that is quantized already: "
                "expected the float network, to compare with and to learn from. Start from the float module; to "
                "resume, make the module anew and give ckpt_path."
            )
        if not self.climbs:
            return
        if not trainer.enable_validation:
            raise ConfigurationError(
                f"max_drop={self.result.max_drop} and rungs are judged by {self.result.monitor!r}, but fit has no "
                "validation: expected a validation_step, validation data and limit_val_batches above 0."
            )
        for one in averaging_callbacks(trainer):
            raise ConfigurationError(
                f"max_drop or rungs with {type(one).__name__}: it validates averaged weights, while the best of the "
                "trained ones are kept. Leave one of the two away."
            )
        if trainer.max_steps == 0 or trainer.limit_train_batches == 0:
            raise ConfigurationError(
                f"max_drop or rungs with Trainer(max_steps={trainer.max_steps}, limit_train_batches="
                f"{trainer.limit_train_batches}): Lightning then leaves out the fit. Use max_epochs=0 for rungs only."
            )
        if trainer.max_epochs == 0:  # Lightning would skip the whole of fit
            trainer.fit_loop.max_epochs = 1
            self._only_rungs = True

    def _climb(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._float is not None
        climber = Climber(trainer, pl_module, self, self._float, self.result)
        done = partial(self._after_rung, trainer, self.quantized_network(pl_module))
        if self.result.float_metric is None:
            climber.measure_float()
        if not self.result.rungs and type(self.techniques[0]) is CalibratedRanges:
            done(climber.judge_calibrated(*self._calibration))
        climber.climb(self.techniques, self._footing, done)
        self._climbed = True
        self._footing = Footing()
        self._float.cpu()
        self._save(trainer)

    def _after_rung(self, trainer: pl.Trainer, network: QuantizedNetwork, rung: RungResult) -> None:
        if trainer.world_size > 1:  # GPUs may round differently; the networks must not differ
            for value in (*network.parameters(), *network.buffers()):
                torch.distributed.broadcast(value.data, src=0)
        metric = "" if rung.metric is None else f"{self.result.monitor} {rung.metric:.4f}, "
        changed = f" ({rung.changed})" if rung.changed else ""
        rank_zero_log(f"Rung {rung.rung}: {metric}{rung.reason}{changed}; {rung.seconds:.0f} s.")
        self._log(trainer, rung)
        if rung.kept:
            self._best_state = network.snapshot()
        self._save(trainer)

    def _judge_training(self, trainer: pl.Trainer, pl_module: pl.LightningModule, metric: float) -> None:
        ladder = self.result
        self._validated_at = trainer.global_step
        self._improving = ladder.is_better(metric, self._trained_metric)
        rungs = [rung.metric for rung in ladder.rungs if rung.kept and rung.rung != "qat"]
        known = [value for value in (self._trained_metric, *rungs) if value is not None]
        if self._improving:
            self._trained_metric = metric
        if all(ladder.is_better(metric, value) for value in known):
            self._best_state = self.quantized_network(pl_module).snapshot()
            self._save(trainer)
        if self._good_enough():
            rank_zero_log(
                f"Training stops: {ladder.monitor} is within {ladder.max_drop:g} of float and no longer improves."
            )
            trainer.should_stop = True

    def _lock(self, trainer: pl.Trainer, folder: Path) -> None:
        self._locked.close()  # of a fit that was not torn down
        if trainer.is_global_zero:
            busy = f"Another fit is writing to {folder}: expected a folder for each. Give another default_root_dir."
            self._locked.enter_context(exclusive_lock(folder / ".lock", ConfigurationError(busy)))

    def _look_back(self, trainer: pl.Trainer) -> None:
        """Read the last flag, before what the step has made of the weights is measured or kept."""
        if loss_scaler(trainer) is not None:  # the step was skipped, and the next one is to know
            return
        if (spoilt := self._watch.last()) is not None:
            self._end_spoilt(trainer, _noticed_late(spoilt))

    def _end_spoilt(self, trainer: pl.Trainer, message: str) -> None:
        if not self.climbs:
            raise TrainingError(message)
        rank_zero_warn(message + " Training ends here, with the best network so far.")
        end_fit(trainer)

    def _not_finite(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step, scale: float | None = None
    ) -> str:
        """In words: the step that is about to be taken, at this loss scale if it is scaled."""
        self._compiled.close()  # layers are looked into
        network = self.quantized_network(pl_module)
        catcher = InputCatcher(trainer, pl_module, self.network_name, network, first="training_step")
        try:
            with isolate_rng():
                calls = catcher.catch(*self._batch)
            with trainer.precision_plugin.train_step_context():  # float16 ends where float32 does not
                where = origin(network, calls)
        except CalibrationError:  # a training step that cannot be run twice
            where = "where they come from could not be found by running the step again"
        if scale is None:
            return (
                f"{_named(step)}: {where}. Expected finite ones. The step was not taken, so the weights are those of "
                f"the step before. {_REMEDIES}"
            )
        return (
            f"{_named(step)}: {where}. Expected finite ones. The loss scale has fallen to {scale:g}, so it is not the "
            "scaling that makes them overflow. Steps like this one are skipped, so the weights are those of the last "
            f"finite step. {_REMEDIES} precision='bf16-mixed' has the range of float32."
        )

    def _good_enough(self) -> bool:
        """Whether training was within the bound and its last validation no better."""
        return not self._improving and self._trained_metric is not None and self.result.suffices(self._trained_metric)

    def _save(self, trainer: pl.Trainer) -> None:
        # below this run's folder, even if it resumed from another's: what that kept stays as it is
        self.best_model_path = str(_folder(trainer) / "ladder" / "best.ckpt")
        save_whole(trainer, Path(self.best_model_path))

    def _log(self, trainer: pl.Trainer, rung: RungResult) -> None:
        if rung.metric is None or rung.drop is None:
            return
        values = {f"ladder/{rung.rung}/{self.result.monitor}": rung.metric, f"ladder/{rung.rung}/drop": rung.drop}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    def _tell_no_training(self) -> None:
        why = "max_epochs=0" if not self.result.satisfied else "training is not needed"
        rank_zero_log(f"No training: {self._standing()}; {why}.")

    def _standing(self) -> str:
        ladder, best = self.result, self.result.best
        if best is None or best.metric is None:
            return "no rung gave a usable network"
        bound = "" if ladder.max_drop is None else f" (max_drop={ladder.max_drop:g})"
        return (
            f"{ladder.monitor} {best.metric:.4f} by {best.rung}, {ladder.drop(best.metric):.4f} below "
            f"float {ladder.reference:.4f}{bound}"
        )


_REMEDIES = "Lower the learning rate, set Trainer(gradient_clip_val=...), or look at that batch."


def _named(step: Step) -> str:
    return f"Step {step.number} (epoch {step.epoch}, batch {step.batch}) has gradients that are not finite"


def _noticed_late(step: Step) -> str:
    return (
        f"{_named(step)}. Expected finite ones. The step was taken, for on this device that is known one step later: "
        f"its weights are not to be used, go on from a checkpoint before it. {_REMEDIES} On a CPU the layer they come "
        "from is named."
    )


def _folder(trainer: pl.Trainer) -> Path:
    """Where ModelCheckpoint would save: below the first logger's name and version, the same on every rank."""
    folder = Path(trainer.default_root_dir)
    if trainer.loggers:
        logger = trainer.loggers[0]
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        folder = Path(logger.save_dir or folder) / str(logger.name) / version
    return trainer.strategy.broadcast(folder)


def _network_state(path: str, name: str) -> dict[str, Any]:
    """The state of the network in a checkpoint."""
    if not Path(path).is_file():
        raise CheckpointError(f"The best network was kept in {path!r}, which is gone: expected it to be left in place.")
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
