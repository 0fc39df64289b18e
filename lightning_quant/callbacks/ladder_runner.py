"""The ladder inside a fit: the user's module, data and validation, handed to :mod:`lightning_quant.ladder.climb`."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_quant.callbacks.best_checkpoint import best_path, network_state
from lightning_quant.callbacks.calibration import calibration_samples
from lightning_quant.callbacks.calls import InputCatcher
from lightning_quant.callbacks.data import isolated_seed
from lightning_quant.callbacks.logs import rank_zero_log
from lightning_quant.callbacks.quantization import QuantizationCallback
from lightning_quant.callbacks.resume_point import save_whole
from lightning_quant.callbacks.trainer_checks import averaging_callbacks
from lightning_quant.callbacks.validation import (
    check_float_metric,
    measure,
    monitored,
    shuffled_outputs,
    swapped_network,
)
from lightning_quant.errors import ConfigurationError
from lightning_quant.ladder.climb import climb
from lightning_quant.ladder.gate import Ladder, RungResult
from lightning_quant.ladder.rung import Rung, RungContext
from lightning_quant.ladder.session import LadderSession
from lightning_quant.simulation.inplace import state_kept
from lightning_quant.simulation.inputs import NetworkInputs, tensors_in
from lightning_quant.utilities.memory import PeakMemory
from lightning_quant.utilities.modules import preserve_modes

# How much better than chance a float network has to be, as a part of chance itself: an untrained one is off by luck.
_CHANCE_MARGIN = 0.01
# Seconds from which on it is said how long a rung will take.
_WORTH_TELLING_S = 30.0


class LadderRunner:
    """Runs the ladder on what a fit has: module, data, validation. Training is its last rung.

    Args:
        trainer: the Trainer of the fit.
        pl_module: the user's module, its network quantized.
        callback: the quantization callback.
        float_network: the user's network as it was.
        session: gets the results.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        callback: QuantizationCallback,
        float_network: nn.Module,
        session: LadderSession,
    ) -> None:
        self.trainer = trainer
        self.pl_module = pl_module
        self.callback = callback
        self.network = callback.quantized_network(pl_module)
        self.float_network = float_network
        self.session = session
        self._rung = ""
        self._rungs: dict[str, Rung] = {}
        self._best_state: dict[str, Any] | None = None
        self._started = 0.0
        self._validated_at = -1
        self._validation_seconds: float | None = None
        self._memory = PeakMemory()

    @property
    def ladder(self) -> Ladder:
        """What was measured; another object once a checkpoint was restored."""
        return self.session.ladder

    def climb(self, rungs: Sequence[Rung], seconds: float, peak_memory_bytes: int | None) -> None:
        """Measure the float network, then try the rungs that have no result; the best network is kept.

        Args:
            rungs: what to try, in order.
            seconds: how long the calibration before the fit took.
            peak_memory_bytes: how much memory it took.
        """
        self._rungs = {rung.name: rung for rung in rungs}
        self.float_network.to(self.pl_module.device).eval()
        if self.ladder.float_metric is None:
            self._measure_float()
        if not self.ladder.rungs and rungs[0].name == "ptq":
            self._keep(self._judge_calibrated(seconds, peak_memory_bytes))
        with preserve_modes(self.pl_module), torch.no_grad():
            self.pl_module.eval()
            for result in climb(self.session, rungs, self.network, self._context()):
                self._keep(result)
        self.session.finish_climb()
        self.float_network.cpu()
        self._save()

    def start_training(self) -> None:
        """Note when training starts, and from now on its memory."""
        self._started, self._validated_at = time.perf_counter(), -1
        self._memory.start()

    def judge_validation(self) -> None:
        """Judge the network by the validation that has just ended, and stop training when it suffices."""
        self._judge(monitored(self.trainer, self.ladder.monitor))

    def end_training(self) -> None:
        """Validate what was trained since the last validation."""
        if self._started and self._validated_at != self.trainer.global_step and not self.trainer.interrupted:
            self._judge(self._measure())

    def end_fit(self) -> None:
        """Record training, if there was any, and restore the best network."""
        session = self.session
        if not self._started and session.trained_metric is None:
            return
        seconds = time.perf_counter() - self._started if self._started else 0.0
        self._log(session.judge_training(self.trainer.global_step, seconds, self._memory.stop()))
        if self._best_state is None:
            self._best_state = network_state(session.best_model_path, self.callback.network_name)
        self.network.restore(self._best_state)
        rank_zero_log(f"Training ended: {session.describe()}.")

    def _judge(self, metric: float) -> None:
        self._validated_at = self.trainer.global_step
        if self.session.judge_validation(metric):
            self._best_state = self.network.snapshot()
            self._save()
        if self.session.should_stop:
            ladder = self.ladder
            rank_zero_log(
                f"Training stops: {ladder.monitor} is within {ladder.max_drop:g} of float and no longer improves."
            )
            self.trainer.should_stop = True

    def _keep(self, result: RungResult) -> None:
        if self.trainer.world_size > 1:  # GPUs may round differently; the networks must not differ
            for value in (*self.network.parameters(), *self.network.buffers()):
                torch.distributed.broadcast(value.data, src=0)
        metric = "" if result.metric is None else f"{self.ladder.monitor} {result.metric:.4f}, "
        changed = f" ({result.changed})" if result.changed else ""
        rank_zero_log(f"Rung {result.rung}: {metric}{result.reason}{changed}; {result.seconds:.0f} s.")
        self._log(result)
        if result.kept:
            self._best_state = self.network.snapshot()
        self._save()

    def _save(self) -> None:
        path = best_path(self.trainer)
        self.session.best_model_path = str(path)  # before it is saved: the path is in the checkpoint, too
        save_whole(self.trainer, path)

    def _log(self, result: RungResult) -> None:
        if result.metric is None or result.drop is None:
            return
        name = f"ladder/{result.rung}"
        values = {f"{name}/{self.ladder.monitor}": result.metric, f"{name}/drop": result.drop}
        for logger in self.trainer.loggers:
            logger.log_metrics(values, step=self.trainer.global_step)

    def _measure_float(self) -> None:
        """Measure the float network, and warn if it is no better than chance."""
        ladder = self.ladder
        value = check_float_metric(ladder.monitor, self._measure_other(self.float_network))
        ladder.float_metric = value
        rank_zero_log(f"Float network: {ladder.monitor} {value:.4f}.")
        with shuffled_outputs(self.float_network) as exchanged:
            chance = self._measure_other(self.float_network)
        barely_better = ladder.comparison.lowered(chance, -_CHANCE_MARGIN * abs(chance))
        if exchanged and not ladder.is_better(value, barely_better):
            rank_zero_warn(
                f"The float network's {ladder.monitor} ({value:.4f}) is no better than chance ({chance:.4f}, each "
                "sample given the answer to another): whatever quantization does will look good. Is it "
                "trained, and are its weights loaded? Is mode right?"
            )

    def _judge_calibrated(self, seconds: float, peak_memory_bytes: int | None) -> RungResult:
        """Judge the network as calibrated before the fit as the first rung: ``ptq`` would make the same again."""
        start = time.perf_counter()
        metric = self._measure()
        seconds += time.perf_counter() - start
        changed = f"{self.network.range_estimator} ranges"
        return self.ladder.judge("ptq", metric, changed, seconds, peak_memory_bytes)

    def _context(self) -> RungContext:
        return RungContext(
            float_network=self.float_network,
            inputs=self.network.inputs,
            samples=self._samples,
            measure=self._measure,
            suffices=None if self.ladder.max_drop is None else self.ladder.suffices,
            measure_float=self._measure_other,
            cache=self.callback.calibration_cache(self.trainer),
            attempt=self._attempt,
        )

    @contextmanager
    def _attempt(self, rung: Rung) -> Iterator[None]:
        self._rung = rung.name
        seconds = self._expected_seconds(rung)
        if seconds is not None and seconds > _WORTH_TELLING_S:
            minutes = round(seconds / 60) or 1
            rank_zero_log(f"Rung {rung.name} takes about {minutes} minute{'s' * (minutes > 1)}.")
        with isolated_seed():  # so that a rung does not depend on whether those before it ran or were restored
            yield

    def _expected_seconds(self, rung: Rung) -> float | None:
        """Return about how long a rung takes; ``None`` where that is not known, for whatever reason."""
        # a network may draw random numbers in eval mode, and count its calls: nothing of that is to stay
        with isolated_seed(), state_kept(self.network.network), suppress(Exception):
            cost = rung.cost(self.network, self._context())
            if cost is not None and self._validation_seconds is not None:
                correction = self._correction_samples()
                samples = cost.samples + (cost.validations + 1) * correction
                validations = cost.validations + bool(correction)  # with it and without
                seconds = samples * self._sample_seconds + validations * self._validation_seconds
                return seconds if math.isfinite(seconds) else None
        return None

    def _correction_samples(self) -> float:
        """Return what the correction in force takes, which is applied again after a rung and for each measurement."""
        correction = self._rungs.get(self.session.correction or "")
        cost = None if correction is None else correction.cost(self.network, self._context())
        return 0.0 if cost is None else cost.samples

    @cached_property
    def _sample_seconds(self) -> float:
        """How long the quantized network takes for a sample, by the fastest of three calls."""
        example = self.network.inputs.to(self.pl_module.device)
        seconds = []
        with self.network.cached_weights():  # as calibration and validation do
            for _ in range(3):
                start = time.perf_counter()
                for output in tensors_in(example.call(self.network.network)):
                    output.cpu()  # a GPU is waited for
                seconds.append(time.perf_counter() - start)
        return min(seconds) / max(example.batch_size, 1)

    def _measure(self) -> float:
        network = self.pl_module.get_submodule(self.callback.network_name)
        start = time.perf_counter()
        with self.network.cached_weights():  # the callback does so for other validations, but it is hidden here
            metric = measure(self.trainer, self.ladder.monitor, hidden=self.callback, network=network)
        self._validation_seconds = time.perf_counter() - start
        return metric

    def _measure_other(self, network: nn.Module) -> float:
        with swapped_network(self.pl_module, self.callback.network_name, network):
            return self._measure()

    def _samples(self) -> Iterator[NetworkInputs]:
        callback = self.callback
        catcher = InputCatcher(self.trainer, self.pl_module, callback.network_name, self.network)
        given, samples = callback.calibration_dataloader, callback.recipe.calibration_samples
        return calibration_samples(self.trainer, self.pl_module, catcher, given, samples, f"Rung {self._rung}")


def check_fit(trainer: pl.Trainer, ladder: Ladder) -> None:
    """Refuse a fit in which rungs cannot be judged.

    Raises:
        ConfigurationError: without validation, with averaged weights, or if Lightning would skip the whole fit.
    """
    if not trainer.enable_validation:
        raise ConfigurationError(
            f"max_drop={ladder.max_drop} and rungs are judged by {ladder.monitor!r}, but fit has no "
            "validation: expected a validation_step, validation data and limit_val_batches above 0."
        )
    for one in averaging_callbacks(trainer):
        raise ConfigurationError(
            f"max_drop or rungs with {type(one).__name__}: it validates averaged weights, while the best of the "
            "trained ones are kept. Remove one of the two."
        )
    if trainer.max_steps == 0 or trainer.limit_train_batches == 0:
        raise ConfigurationError(
            f"max_drop or rungs with Trainer(max_steps={trainer.max_steps}, limit_train_batches="
            f"{trainer.limit_train_batches}): Lightning then skips the fit. Use max_epochs=0 for rungs only."
        )
