"""The ladder inside a fit: the user's module, data and validation, handed to :mod:`lightning_quant.ladder.climb`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_quant.callbacks.calls import InputCatcher
from lightning_quant.callbacks.data import calibration_inputs, calibration_loader, undisturbed
from lightning_quant.callbacks.progress import progress
from lightning_quant.callbacks.quantization import QuantizationCallback, say
from lightning_quant.callbacks.validation import check_float_metric, guessing, in_place_of, measure
from lightning_quant.ladder.climb import Footing, climb
from lightning_quant.ladder.gate import Ladder, RungResult
from lightning_quant.ladder.rung import Technique, Workbench
from lightning_quant.simulation.inputs import NetworkInputs, counted, take_samples

# How much better than chance a float network has to be, as a part of chance itself: an untrained one is off by luck.
_CHANCE_MARGIN = 0.01


class Climber:
    """What the ladder needs of a fit.

    Args:
        trainer: the Trainer, in ``on_train_start``.
        pl_module: the user's module, its network quantized and calibrated.
        callback: the quantization callback.
        float_network: the user's network as it was.
        ladder: gets the results.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        callback: QuantizationCallback,
        float_network: nn.Module,
        ladder: Ladder,
    ) -> None:
        self.trainer = trainer
        self.pl_module = pl_module
        self.callback = callback
        self.network = callback.quantized_network(pl_module)
        self.float_network = float_network.to(pl_module.device).eval()
        self.ladder = ladder
        self.rung = ""

    def measure_float(self) -> None:
        """Measure the float network, and warn if it is no better than chance."""
        ladder = self.ladder
        value = check_float_metric(ladder.monitor, self._measure_other(self.float_network))
        ladder.float_metric = value
        say(f"Float network: {ladder.monitor} {value:.4f}.")
        with guessing(self.float_network) as exchanged:
            chance = self._measure_other(self.float_network)
        margin = _CHANCE_MARGIN * abs(chance) * (1 if ladder.mode == "max" else -1)
        if exchanged and not ladder.is_better(value, chance + margin):
            rank_zero_warn(
                f"The float network's {ladder.monitor} ({value:.4f}) is no better than chance ({chance:.4f}, each "
                "sample given the answer to another): whatever quantization does will look good. Is it "
                "trained, and are its weights loaded? Is mode right?"
            )

    def judge_calibrated(self, seconds: float, peak_memory_bytes: int | None) -> RungResult:
        """Take the network as calibrated before the fit for the first rung: it is what ``ptq`` would make again."""
        start = time.perf_counter()
        metric = self._measure()
        seconds += time.perf_counter() - start
        changed = f"{self.network.range_estimator} ranges"
        return self.ladder.judge("ptq", metric, changed, seconds, peak_memory_bytes)

    def climb(self, rungs: Sequence[Technique], footing: Footing, done: Callable[[RungResult], None]) -> None:
        """Try the rungs that are left, see :func:`~lightning_quant.ladder.climb.climb`."""

        @contextmanager
        def trying(name: str) -> Iterator[None]:
            self.rung = name
            with undisturbed():  # so that a rung does not depend on whether those before it ran or were restored
                yield

        modes = {module: module.training for module in self.pl_module.modules()}
        bench = Workbench(
            float_network=self.float_network,
            inputs=self.network.inputs,
            samples=self._samples,
            measure=self._measure,
            suffices=None if self.ladder.max_drop is None else self.ladder.suffices,
            cache=self.callback.calibration_cache(self.trainer),
        )
        self.pl_module.eval()
        try:
            with torch.no_grad():
                measure_float = self._measure_other
                climb(
                    self.ladder,
                    rungs,
                    self.network,
                    bench,
                    measure_float=measure_float,
                    footing=footing,
                    trying=trying,
                    done=done,
                )
        finally:
            for module, training in modes.items():
                module.training = training

    def _measure(self) -> float:
        network = self.pl_module.get_submodule(self.callback.network_name)
        return measure(self.trainer, self.ladder.monitor, hidden=self.callback, network=network)

    def _measure_other(self, network: nn.Module) -> float:
        with in_place_of(self.pl_module, self.callback.network_name, network):
            return self._measure()

    def _samples(self) -> Iterator[NetworkInputs]:
        callback = self.callback
        catcher = InputCatcher(self.trainer, self.pl_module, callback.network_name, self.network)
        samples = callback.recipe.calibration_samples
        with undisturbed(), progress(self.trainer, f"Rung {self.rung}", samples) as advance:
            loader = calibration_loader(self.trainer, self.pl_module, callback.calibration_dataloader)
            calls = calibration_inputs(self.trainer, loader, catcher, samples)
            for new, call in counted(take_samples(calls, samples)):
                yield call
                advance(new)
