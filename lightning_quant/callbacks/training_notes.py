"""What is noted of a quantized network while it trains: how its ranges move, and which weights oscillate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import lightning.pytorch as pl

from lightning_quant.callbacks.drift import RangeDrift
from lightning_quant.callbacks.oscillation import WeightOscillation
from lightning_quant.callbacks.quantization import quantization_callbacks
from lightning_quant.errors import ConfigurationError
from lightning_quant.report.layers import LayerFigures
from lightning_quant.simulation.network import QuantizedNetwork

Oscillations = Literal["note", "freeze"]


class TrainingNotes:
    """The notes of one network's training, which a resumed fit continues.

    Args:
        network_name: dotted attribute of the LightningModule.
        ranges: whether the ranges learn.
        oscillations: whether weights that oscillate are noted, and frozen too.

    Attributes:
        drift: how the ranges moved; ``None`` before training, and where they do not learn.
        oscillation: which weights oscillate; ``None`` likewise.

    Raises:
        ConfigurationError: for another value of ``oscillations``.
    """

    def __init__(self, network_name: str, ranges: bool, oscillations: Oscillations | None) -> None:
        if oscillations not in (None, *get_args(Oscillations)):
            raise ConfigurationError(f"oscillations={oscillations!r}: expected 'note', 'freeze' or None.")
        self.network_name = network_name
        self.ranges = ranges
        self.oscillations = oscillations
        self.forget()

    def forget(self) -> None:
        """Forget an earlier fit."""
        self.drift: RangeDrift | None = None
        self.oscillation: WeightOscillation | None = None
        self._before: dict[str, Any] = {}
        self._step = 0
        self._steps = math.inf

    def restore(self, network: QuantizedNetwork) -> None:
        """Begin a fit: with the notes of the one that is resumed, or with none."""
        before = self._before
        self.forget()
        if "drift" in before:
            self.drift = RangeDrift(network)
            self.drift.load_state_dict(before["drift"])
        if "oscillation" in before and self.oscillations:
            self.oscillation = WeightOscillation(network, self.oscillations == "freeze")
            self.oscillation.load_state_dict(before["oscillation"])

    def start(self, trainer: pl.Trainer, network: QuantizedNetwork) -> None:
        """Begin to note, before the first step of training."""
        self._step = trainer.global_step
        if self.ranges and self.drift is None:
            self.drift = RangeDrift(network)
        if self.oscillations is not None:
            self._steps = trainer.estimated_stepping_batches
            self.oscillation = self.oscillation or WeightOscillation(network, self.oscillations == "freeze")

    def end_batch(self, trainer: pl.Trainer, network: QuantizedNetwork) -> None:
        """Note a batch of training, and log it every ``Trainer(log_every_n_steps=…)``."""
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self.oscillation is not None and step != self._step:  # gradients of several batches may make one step
            self.oscillation.step(min(step / max(self._steps, 1), 1.0) if math.isfinite(self._steps) else 1.0)
        self._step = step
        if not (trainer.is_global_zero and every and step % every == 0):
            return
        scalars = {} if self.drift is None else self.drift.note(network, step)
        scalars |= {} if self.oscillation is None else self.oscillation.note(step)
        if len(quantization_callbacks(trainer)) > 1:
            scalars = {f"{self.network_name}/{name}": value for name, value in scalars.items()}
        for logger in trainer.loggers if scalars else ():
            logger.log_metrics(scalars, step=step)

    def add_to(self, figures: LayerFigures) -> None:
        """Put the curves into the figures of a report."""
        if self.drift is not None:
            figures.drift, figures.drift_steps = self.drift.values, self.drift.steps
        if self.oscillation is not None:
            figures.oscillating, figures.frozen = self.oscillation.oscillating, self.oscillation.frozen
            figures.oscillation_steps = self.oscillation.steps

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed fit needs."""
        state = {} if self.drift is None else {"drift": self.drift.state_dict()}
        return state | ({} if self.oscillation is None else {"oscillation": self.oscillation.state_dict()})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what :meth:`state_dict` returned, for the fit that :meth:`restore` begins."""
        self._before = {name: state[name] for name in ("drift", "oscillation") if name in state}
