"""Bounds on a device's figures: one that could not be checked is refused before work is spent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import lightning.pytorch as pl

from lightning_quant.callbacks.lightning_internals import callbacks_of
from lightning_quant.callbacks.training import QuantizationAwareTraining
from lightning_quant.callbacks.validation import monitored
from lightning_quant.deploy.device_report import DeviceReport
from lightning_quant.deploy.push import check_bounds
from lightning_quant.errors import ConfigurationError
from lightning_quant.utilities.monitor import Monitor


@dataclass(frozen=True)
class DeviceBounds:
    """What a network must keep to on a device, and the metric that is computed there.

    Args:
        min_psnr: lowest PSNR in dB against the float network.
        max_metric_drop: how much worse ``monitor`` may be than that of the float network.
        monitor: name of the validation metric.
        mode: ``"max"`` or ``"min"``, whichever is better of it.

    Raises:
        ConfigurationError: for a bound that is not a number, and another mode.
    """

    min_psnr: float | None
    max_metric_drop: float | None
    monitor: str | None
    mode: Literal["max", "min"]

    def __post_init__(self) -> None:
        for name, bound in self._asked():
            if not isinstance(bound, (int, float)) or isinstance(bound, bool) or math.isnan(bound):
                raise ConfigurationError(f"{name}={bound!r}: expected a number, or None for no bound.")
        if self.mode not in ("max", "min"):
            raise ConfigurationError(f"mode={self.mode!r}: expected max or min.")

    def refuse_without_figures(self, target: object, wait: bool) -> None:
        """Raise :class:`ConfigurationError` for a bound on what is not there when the run ends."""
        for name, bound in self._asked():
            if target is None:
                raise ConfigurationError(f"{name}={bound!r} with target=None: expected a target, which has figures.")
            if not wait:
                raise ConfigurationError(
                    f"{name}={bound!r} with wait=False, which ends before there are figures: expected wait=True, or no "
                    "bound."
                )

    def metric(self, trainer: pl.Trainer) -> Monitor | None:
        """Return the metric to compute: the given one, or that which QuantizationAwareTraining has a bound on.

        Its direction is that of QuantizationAwareTraining wherever the metric is.
        """
        if trainer.world_size > 1:  # it would wait for the other processes, which validate nothing then
            return None
        ladders = [
            one.result for one in callbacks_of(trainer) if isinstance(one, QuantizationAwareTraining) and one.climbs
        ]
        for ladder in ladders:
            if self.monitor in (None, ladder.monitor):
                return Monitor(ladder.monitor, ladder.mode)
        return Monitor(self.monitor, self.mode) if self.monitor else None

    def check_metric(self, trainer: pl.Trainer) -> None:
        """Raise :class:`ConfigurationError` where a bound is on a metric that will not be computed."""
        if self.max_metric_drop is None or self.metric(trainer) is not None:
            return
        given = f"max_metric_drop={self.max_metric_drop!r}"
        if trainer.world_size > 1:
            raise ConfigurationError(
                f"{given} in {trainer.world_size} processes, where no metric of the device's outputs is computed: "
                "expected one process. Validate the checkpoint in a Trainer of its own, with devices=1."
            )
        raise ConfigurationError(f"{given} without monitor=: expected the name of the validation metric it bounds.")

    def check_logged(self, trainer: pl.Trainer) -> None:
        """Raise :class:`ConfigurationError` after a validation that did not log the metric of a bound."""
        if self.max_metric_drop is not None and self.monitor and not trainer.sanity_checking:
            monitored(trainer, self.monitor)

    def check(self, reports: Sequence[DeviceReport], trainer: pl.Trainer) -> None:
        """Raise :class:`~lightning_quant.DeviceBoundError` for the first device that falls short, if any does."""
        metric = self.metric(trainer)
        check_bounds(reports, self.min_psnr, self.max_metric_drop, metric.mode if metric else self.mode)

    def _asked(self) -> list[tuple[str, float]]:
        bounds = {"min_psnr": self.min_psnr, "max_metric_drop": self.max_metric_drop}
        return [(name, bound) for name, bound in bounds.items() if bound is not None]
