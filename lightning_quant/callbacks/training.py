"""Quantization-aware training as a Lightning callback, after repairs that need no training."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from typing_extensions import override

from lightning_quant.callbacks.best_checkpoint import locked_folder
from lightning_quant.callbacks.distillation import Distillation, compared_classes, features_in, loss_scale
from lightning_quant.callbacks.distillation_loss import DistillationLoss
from lightning_quant.callbacks.drift import RangeDrift
from lightning_quant.callbacks.early_setup import set_up_early
from lightning_quant.callbacks.gradient_guard import GradientGuard
from lightning_quant.callbacks.ladder_runner import LadderRunner, check_fit
from lightning_quant.callbacks.logs import rank_zero_log
from lightning_quant.callbacks.networks import find_network
from lightning_quant.callbacks.oscillation import WeightOscillation
from lightning_quant.callbacks.quantization import QuantizationCallback, end_fit, measuring
from lightning_quant.callbacks.trainer_checks import check_dense, check_has_float
from lightning_quant.callbacks.training_notes import Oscillations, TrainingNotes
from lightning_quant.callbacks.validation import isolated_validation
from lightning_quant.errors import ConfigurationError, TrainingError
from lightning_quant.ladder.gate import Ladder
from lightning_quant.ladder.registry import parse_rungs
from lightning_quant.ladder.rung import Rung
from lightning_quant.ladder.session import LadderSession
from lightning_quant.precision import Precision
from lightning_quant.simulation.compiled import Compiled, check_options
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.range_estimators import RangeEstimator
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
        monitor: the metric, as your validation logs it. ``None`` is allowed where nothing is compared.
        mode: ``"max"`` if more of it is better, ``"min"`` if less is.
        rungs: repairs to try before training, cheapest first: ``"ptq"``, ``"min_max"``, ``"tf_enhanced"``,
            ``"percentile"``, ``"cle"``, ``"joins"``, ``"bn_reestimation"``, ``"bias_correction"``, ``"seq_mse"``,
            ``"rounding"``, ``"clipping"``, ``"adaround"``, ``"attention"``, ``"mixed"``; with options as
            ``{"mixed": {"budget": 0.05}}``; or a ``Rung`` of your own, an instance or the dotted path of the class.
        train_ranges: learn the ranges too, all but those of the network's inputs. ``False`` keeps them as calibrated.
        distillation: weight of a second loss, the squared difference from the float network's output relative to its
            power; or weights of several losses by name, such as ``{"kl": 1.0, "temperature": 2.0}`` for the divergence
            between classes, or ``{"mse": 1.0, "features": {"backbone.*": 0.1}}`` for what modules return. 0: none.
        oscillations: ``"note"`` records how many weights turn back and forth between two integers while they train;
            ``"freeze"`` also freezes them at the integer that they are on average. Costs memory for each weight.
        statistics_cache: folder that keeps what calibration saw, so that other precisions with the same width of
            weights, network and data need no pass of their own; their ranges are exactly the same. Not used under DDP.
        compile: let ``torch.compile`` compile the quantized network for training and its validation; or ``backend``,
            ``mode`` and ``options`` for it, such as ``{"mode": "reduce-overhead"}``. It pays on a GPU, after minutes of
            compiling. Where a compiled network would lose something that your ``forward`` does, it is not compiled,
            and a warning says why.

    Attributes:
        result: what was measured, a :class:`~lightning_quant.ladder.gate.Ladder`.
        best_model_path: the checkpoint of the best network so far, written after every rung and validation that
            improved on it. ``fit(ckpt_path=…)`` resumes from there.
        drift: how far the ranges moved in training, a :class:`~lightning_quant.callbacks.drift.RangeDrift`, noted every
            ``Trainer(log_every_n_steps=…)``; ``None`` before training, and where they do not learn.
        oscillation: which share of the weights oscillates, noted likewise, with ``oscillations``: a
            :class:`~lightning_quant.callbacks.oscillation.WeightOscillation`.

    Raises:
        ConfigurationError, PreflightError, CalibrationError: as there.
        TrainingError: gradients are NaN or infinite; names step, batch and layer. The step is not taken. On a GPU it is
            known one step later, and the message says so; with ``16-mixed`` it is raised once scaling does not explain
            them. With ``max_drop`` or rungs it is a warning, and the fit ends with the best network so far.
    """

    def __init__(
        self,
        precision: str | Precision = "w8a8",
        *,
        network: str = "model",
        hardware: str = "htp_v75",
        calibration_samples: int = 256,
        calibration_dataloader: Iterable[Any] | None = None,
        range_estimator: RangeEstimator | Spec = "min_max",
        overrides: Mapping[str, str] | None = None,
        strict: bool = False,
        max_drop: float | None = None,
        monitor: str | None = "val_miou",
        mode: Literal["max", "min"] = "max",
        rungs: Sequence[Rung | Spec] = ("ptq",),
        train_ranges: bool = True,
        distillation: float | Mapping[str, Any] = 0.0,
        oscillations: Oscillations | None = None,
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
        self.rungs = parse_rungs(list(rungs) if isinstance(rungs, tuple) else rungs)
        self.climbs = max_drop is not None or [rung.name for rung in self.rungs] != ["ptq"]
        if self.climbs and (not isinstance(monitor, str) or not monitor):
            raise ConfigurationError(
                f"max_drop={max_drop!r} with monitor={monitor!r}: expected the name of the metric that is compared, as "
                "your validation logs it."
            )
        if self.climbs and isinstance(calibration_dataloader, Iterator):
            raise ConfigurationError(
                "calibration_dataloader is an iterator, and each rung reads the samples again: expected a data "
                "loader, or a function that makes one."
            )
        self.refines = self.climbs and any(rung.refines for rung in self.rungs)
        self.train_ranges = train_ranges
        self.distillation = DistillationLoss.parse(distillation)
        self.compile = None if compile is False else check_options(compile)
        if self.compile is not None and self.distillation.features:
            raise ConfigurationError("distillation: features with compile=...: expected one of both.")
        self._compiled, self._locked, self._sanity_check = ExitStack(), ExitStack(), ExitStack()
        self._guard = GradientGuard(network, uncompile=self._compiled.close)
        self.notes = TrainingNotes(network, train_ranges, oscillations)
        self._only_rungs = False
        self._runner: LadderRunner | None = None
        self._teacher: Distillation | None = None
        self._begin(Ladder(monitor or "", mode, max_drop), None)

    @property
    def result(self) -> Ladder:
        """What was measured."""
        return self.session.ladder

    @property
    def best_model_path(self) -> str:
        """The checkpoint of the best network so far; empty before there is one."""
        return self.session.best_model_path

    @property
    def drift(self) -> RangeDrift | None:
        """How far the ranges moved."""
        return self.notes.drift

    @property
    def oscillation(self) -> WeightOscillation | None:
        """Which share of the weights oscillates."""
        return self.notes.oscillation

    def _begin(self, ladder: Ladder, float_network: nn.Module | None) -> None:
        """Forget what an earlier fit measured."""
        self.session = LadderSession(ladder)
        self._float = float_network
        self.notes.forget()

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        set_up_early(trainer, pl_module, stage)
        fits = trainer.state.fn == "fit"
        network = find_network(pl_module, self.network_name)
        is_float = QuantizedNetwork.of(network) is None
        if fits and (self.climbs or self.distillation):
            self._check_fit(trainer, has_float=is_float or self._float is not None)
        if fits and is_float:  # refused before calibration
            check_dense(network, self.network_name)
            features_in(network, self.distillation)
        super().setup(trainer, pl_module, stage)
        quantized = self.quantized_network(pl_module)
        compared_classes(quantized.output_structure, self.distillation)
        if fits and is_float and (self.climbs or self.distillation):
            self._begin(Ladder(self.result.monitor, self.result.mode, self.result.max_drop), quantized.float_network)
        quantized.learn_ranges(self.train_ranges)
        self._note_ranges(trainer, quantized, fits)
        self._runner = None
        if fits and self.climbs:
            assert self._float is not None  # by _check_fit
            self._runner = LadderRunner(trainer, pl_module, self, self._float, self.session)
            for rung in self.rungs:
                rung.check(quantized)

    @override
    def _on_set_up(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._runner is not None:
            self._locked.close()  # of a fit that was not torn down
            self._locked.enter_context(locked_folder(trainer))
        start = time.perf_counter()
        with PeakMemory() as memory:
            super()._on_set_up(trainer, pl_module)
        self._calibration = time.perf_counter() - start, memory.peak_bytes

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.notes.restore(self.quantized_network(pl_module))

    @override
    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._runner is not None:  # a metric that remembers it would satisfy the ladder
            self._sanity_check.enter_context(isolated_validation(trainer, self.quantized_network(pl_module).network))

    @override
    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._sanity_check.close()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._runner is not None:
            session = self.session
            if not session.climbed:
                with measuring(trainer, pl_module)():
                    self._runner.climb(self.rungs, *self._calibration)
            untried = session.untried(self.rungs)
            if untried and not self.result.satisfied:
                rank_zero_warn(f"The climb was over in the checkpoint: {', '.join(untried)} are not tried.")
            if self._only_rungs or not session.needs_training:
                why = "training is not needed" if self.result.satisfied else "max_epochs=0"
                rank_zero_log(f"No training: {session.describe()}; {why}.")
                end_fit(trainer)
                return
            if session.should_stop:  # it was killed between this and its end
                end_fit(trainer)
                return
            self._runner.start_training()
        self.notes.start(trainer, self.quantized_network(pl_module))
        if self.distillation:
            assert self._float is not None
            scale = partial(loss_scale, trainer)
            self._teacher = Distillation(self._float.to(pl_module.device), self.distillation, scale)
            self._teacher.attach(self.quantized_network(pl_module).network)
        if self.compile is not None:
            compiled = Compiled(self.quantized_network(pl_module).network, self.compile)
            self._compiled.enter_context(compiled.active())
            rank_zero_log(f"{self.network_name} is compiled in the first step, which takes a while.")

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._guard.start_batch(batch, batch_idx)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        message = self._guard.check_step(trainer, pl_module, self.quantized_network(pl_module), optimizer)
        if message is not None:
            self._end_training(trainer, message)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check_last_step(trainer)
        super().on_validation_start(trainer, pl_module)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._check_last_step(trainer)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._teacher is not None:
            self._teacher.check_used(self.network_name)
        self._check_last_step(trainer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._teacher is not None and outputs:  # a step may skip its batch
            self._teacher.check_used(self.network_name)
        self.notes.end_batch(trainer, self.quantized_network(pl_module))

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if self._runner is not None and not trainer.sanity_checking:
            self._runner.judge_validation()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._detach_teacher()
        self._compiled.close()
        self._check_last_step(trainer)
        if self._runner is not None:
            self._runner.end_training()

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # here and not in on_train_end, which does not come when a finished training is resumed
        if self._runner is not None:
            self._runner.end_fit()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._guard.forget()
        self._sanity_check.close()
        self._detach_teacher()
        self.teardown(trainer, pl_module, "fit")

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._runner = None
        self._locked.close()
        self._compiled.close()
        if self._only_rungs:
            trainer.fit_loop.max_epochs = 0
            self._only_rungs = False

    @override
    def state_dict(self) -> dict[str, Any]:
        notes = self.notes.state_dict()
        if not (self.climbs or self.distillation):
            return notes
        state = {**notes, **self.session.state_dict()}
        if self._float is not None and (self.distillation or not self.session.climbed):
            state["float"] = self._float.state_dict()
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.notes.load_state_dict(state_dict)
        if "ladder" not in state_dict:
            return
        self.session.load_state_dict(state_dict)
        if "float" in state_dict and self._float is not None:
            self._float.load_state_dict(state_dict["float"])

    def _detach_teacher(self) -> None:
        if self._teacher is not None:
            self._teacher.detach()
            self._teacher = None

    def _check_fit(self, trainer: pl.Trainer, has_float: bool) -> None:
        check_has_float(has_float, type(self).__name__)
        if not self.climbs:
            return
        check_fit(trainer, self.result)
        if trainer.max_epochs == 0:  # Lightning would skip the whole of fit
            trainer.fit_loop.max_epochs = 1
            self._only_rungs = True

    def _check_last_step(self, trainer: pl.Trainer) -> None:
        if (message := self._guard.check_last(trainer)) is not None:
            self._end_training(trainer, message)

    def _end_training(self, trainer: pl.Trainer, message: str) -> None:
        if not self.climbs:
            raise TrainingError(message)
        rank_zero_warn(message + " Training ends here, with the best network so far.")
        end_fit(trainer)
