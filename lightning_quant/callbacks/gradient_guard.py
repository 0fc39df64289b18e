"""Watch the gradients of a fit: which step had some that are not finite, and where they come from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_quant.callbacks.calls import InputCatcher
from lightning_quant.callbacks.distillation import loss_scaler
from lightning_quant.callbacks.finiteness import (
    GradientWatch,
    Step,
    describe_after,
    describe_before,
    gradients_are_finite,
    origin,
)
from lightning_quant.errors import CalibrationError
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.utilities.random_state import random_state_kept


class GradientGuard:
    """Checks every step of a fit.

    Args:
        network_name: dotted attribute of the LightningModule that holds the quantized network.
        uncompile: puts the network as it is in the place of a compiled one, so that its layers can be looked into.
    """

    def __init__(self, network_name: str, uncompile: Callable[[], None]) -> None:
        self.network_name = network_name
        self.uncompile = uncompile
        self.watch = GradientWatch()
        self._batch: tuple[Any, int] = (None, 0)

    def start_batch(self, batch: Any, batch_idx: int) -> None:
        """Keep the batch, to run its step again if its gradients are not finite."""
        self._batch = batch, batch_idx

    def check_step(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        network: QuantizedNetwork,
        optimizer: torch.optim.Optimizer,
    ) -> str | None:
        """Check the step that is about to be taken.

        Returns:
            Why training cannot continue, or ``None`` if it can. In the former case the step changes no weight any more.
        """
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        now = Step(trainer.global_step + 1, trainer.current_epoch, self._batch[1])
        bad = self.watch.check(parameters, now)
        if bad is None:
            return None
        scaler = loss_scaler(trainer)
        if scaler is None:
            taken = bad != now
            message = describe_after(bad) if taken else describe_before(now, self._origin(trainer, pl_module, network))
            for parameter in parameters:
                parameter.grad = None
            return message
        scale = scaler.get_scale()
        # it has skipped what came before; this step counts, if scaling does not explain it
        if scale < 1 and (bad == now or not gradients_are_finite(parameters)):
            return describe_before(now, self._origin(trainer, pl_module, network), scale)
        return None

    def check_last(self, trainer: pl.Trainer) -> str | None:
        """Check the last step taken, before the weights that it made are measured or saved."""
        if loss_scaler(trainer) is not None:  # the step was skipped, and the next one decides
            return None
        bad = self.watch.last()
        return None if bad is None else describe_after(bad)

    def forget(self) -> None:
        """Discard what was not read yet: training has ended for another reason."""
        self.watch.forget()
        self._batch = (None, 0)

    def _origin(self, trainer: pl.Trainer, pl_module: pl.LightningModule, network: QuantizedNetwork) -> str:
        """Find where the gradients of the step that is about to be taken leave the finite numbers."""
        self.uncompile()
        catcher = InputCatcher(trainer, pl_module, self.network_name, network, first="training_step")
        try:
            with random_state_kept():
                calls = catcher.catch(*self._batch)
            with trainer.precision_plugin.train_step_context():  # float16 ends where float32 does not
                return origin(network, calls)
        except CalibrationError:  # a training step that cannot be run twice
            return "where they come from could not be found by running the step again"
