"""The user's own validation within a fit, of the quantized network or of another one in its place."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn

from lightning_quant.callbacks.data import isolated_seed
from lightning_quant.callbacks.lightning_internals import callbacks_of, logged_metrics_kept
from lightning_quant.callbacks.lightning_packages import either
from lightning_quant.callbacks.restored_state import restored_state
from lightning_quant.errors import ConfigurationError
from lightning_quant.simulation.inputs import tensors_in, with_tensors

# Callbacks of these packages keep no metrics of the user's.
_PACKAGES = ("lightning", "pytorch_lightning", "lightning_quant")
_REACTING = either(EarlyStopping, Checkpoint)


def validate_in_fit(trainer: pl.Trainer) -> None:
    """Run the validation loop as the training loop does."""
    trainer.validating = True
    try:
        trainer.fit_loop.epoch_loop.val_loop.run()
    finally:
        trainer.training = True


def measure(trainer: pl.Trainer, monitor: str, hidden: Callback, network: nn.Module) -> float:
    """Validate without side effects and return the metric: nothing is logged, no callback stops or saves.

    The user's module and callbacks are restored afterwards, and so are the random generators: a metric that keeps the
    best value does not carry it from one network to the next.

    Args:
        trainer: the Trainer, within a fit.
        monitor: name of the metric.
        hidden: the callback that measures; its hooks are not called.
        network: the network that is measured, which is left alone.

    Raises:
        ConfigurationError: if the metric was not logged; the message lists those that were.
    """
    loggers = trainer.loggers
    callbacks = callbacks_of(trainer)
    seeing = [one for one in callbacks if not (isinstance(one, _REACTING) or one is hidden)]
    trainer.loggers = [DummyLogger()] if loggers else []
    trainer.callbacks = seeing  # type: ignore[attr-defined]
    try:
        with logged_metrics_kept(trainer), isolated_seed(), isolated_validation(trainer, network):
            validate_in_fit(trainer)
            return monitored(trainer, monitor)
    finally:
        trainer.loggers = loggers
        trainer.callbacks = callbacks  # type: ignore[attr-defined]


def isolated_validation(trainer: pl.Trainer, network: nn.Module) -> AbstractContextManager[None]:
    """Restore after a validation in a block what the module and the user's callbacks keep."""
    users = [one for one in callbacks_of(trainer) if type(one).__module__.partition(".")[0] not in _PACKAGES]
    return restored_state([trainer.lightning_module, *users], network)


def monitored(trainer: pl.Trainer, monitor: str) -> float:
    """Return the metric as validation logged it last: the mean over the ranks, and so the same on each.

    Raises:
        ConfigurationError: if it was not logged.
    """
    metrics = trainer.callback_metrics
    if monitor not in metrics:
        raise ConfigurationError(
            f"monitor={monitor!r} was not logged in validation: expected one of "
            f"{', '.join(sorted(map(repr, metrics))) or 'nothing, for nothing was logged'}. Give its name, or log it "
            f"with self.log({monitor!r}, …) in validation_step or on_validation_epoch_end."
        )
    value = metrics[monitor].detach().clone().to(trainer.strategy.root_device)
    return float(trainer.strategy.reduce(value, reduce_op="mean"))


@contextmanager
def swapped_network(pl_module: pl.LightningModule, name: str, network: nn.Module) -> Iterator[None]:
    """Put another network at the dotted attribute ``name`` for the length of a block."""
    parent, _, attribute = name.rpartition(".")
    owner = pl_module.get_submodule(parent)
    own = getattr(owner, attribute)
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    setattr(owner, attribute, network.to(pl_module.device))
    try:
        yield
    finally:
        setattr(owner, attribute, own)
        network.to(device)


@contextmanager
def shuffled_outputs(network: nn.Module) -> Iterator[list[bool]]:
    """Give every sample the output for another one: the metric is then that of chance.

    Yields:
        A list that holds ``True`` once an output was exchanged for a different one.
    """
    last: list[Tensor] = []
    exchanged: list[bool] = []

    def swap(module: nn.Module, args: Any, output: Any) -> Any:
        tensors = tensors_in(output)
        if len(last) == len(tensors) and all(a.shape == b.shape for a, b in zip(last, tensors, strict=True)):
            others = list(last)
        else:
            others = [tensor.roll(1, 0) if tensor.dim() else tensor for tensor in tensors]
        if any(not torch.equal(a, b) for a, b in zip(others, tensors, strict=True)):
            exchanged[:] = [True]
        last[:] = tensors
        return with_tensors(output, others)

    handle = network.register_forward_hook(swap)
    try:
        yield exchanged
    finally:
        handle.remove()


def check_float_metric(monitor: str, value: float) -> float:
    """Refuse a float metric that cannot be compared with.

    Raises:
        ConfigurationError: if it is NaN.
    """
    if math.isnan(value):
        raise ConfigurationError(
            f"{monitor} of the float network is NaN: expected a number to compare the quantized network with. Check "
            "that the float weights are loaded and that validation has labeled samples."
        )
    return value
