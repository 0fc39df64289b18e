"""The ladder inside a fit: the user's module, data and validation, handed to :mod:`lightning_quant.ladder.climb`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_quant.callbacks.calibration import calibration_samples
from lightning_quant.callbacks.calls import InputCatcher
from lightning_quant.callbacks.data import isolated_seed
from lightning_quant.callbacks.logs import rank_zero_log
from lightning_quant.callbacks.quantization import QuantizationCallback
from lightning_quant.callbacks.trainer_checks import averaging_callbacks
from lightning_quant.callbacks.validation import check_float_metric, measure, shuffled_outputs, swapped_network
from lightning_quant.errors import ConfigurationError
from lightning_quant.ladder.climb import climb
from lightning_quant.ladder.gate import Ladder, RungResult
from lightning_quant.ladder.rung import Rung, RungContext
from lightning_quant.ladder.session import LadderSession
from lightning_quant.simulation.inputs import NetworkInputs

# How much better than chance a float network has to be, as a part of chance itself: an untrained one is off by luck.
_CHANCE_MARGIN = 0.01


class LadderRunner:
    """Runs the ladder on what a fit has: module, data, validation.

    Args:
        trainer: the Trainer, in ``on_train_start``.
        pl_module: the user's module, its network quantized and calibrated.
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
        self.float_network = float_network.to(pl_module.device).eval()
        self.session = session
        self.ladder = session.ladder
        self.rung = ""

    def measure_float(self) -> None:
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

    def judge_calibrated(self, seconds: float, peak_memory_bytes: int | None) -> RungResult:
        """Judge the network as calibrated before the fit as the first rung: ``ptq`` would make the same again."""
        start = time.perf_counter()
        metric = self._measure()
        seconds += time.perf_counter() - start
        changed = f"{self.network.range_estimator} ranges"
        return self.ladder.judge("ptq", metric, changed, seconds, peak_memory_bytes)

    def climb(self, rungs: Sequence[Rung]) -> Iterator[RungResult]:
        """Try the rungs that are left, see :func:`~lightning_quant.ladder.climb.climb`; in eval mode, no gradients."""
        context = RungContext(
            float_network=self.float_network,
            inputs=self.network.inputs,
            samples=self._samples,
            measure=self._measure,
            suffices=None if self.ladder.max_drop is None else self.ladder.suffices,
            measure_float=self._measure_other,
            cache=self.callback.calibration_cache(self.trainer),
            attempt=self._attempt,
        )
        return climb(self.session, rungs, self.network, context)

    @contextmanager
    def _attempt(self, name: str) -> Iterator[None]:
        self.rung = name
        with isolated_seed():  # so that a rung does not depend on whether those before it ran or were restored
            yield

    def _measure(self) -> float:
        network = self.pl_module.get_submodule(self.callback.network_name)
        with self.network.cached_weights():  # the callback does so for other validations, but it is hidden here
            return measure(self.trainer, self.ladder.monitor, hidden=self.callback, network=network)

    def _measure_other(self, network: nn.Module) -> float:
        with swapped_network(self.pl_module, self.callback.network_name, network):
            return self._measure()

    def _samples(self) -> Iterator[NetworkInputs]:
        callback = self.callback
        catcher = InputCatcher(self.trainer, self.pl_module, callback.network_name, self.network)
        given, samples = callback.calibration_dataloader, callback.recipe.calibration_samples
        return calibration_samples(self.trainer, self.pl_module, catcher, given, samples, f"Rung {self.rung}")


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
