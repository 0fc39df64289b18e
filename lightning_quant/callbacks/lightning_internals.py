"""Lightning's private and undeclared names: all that the package uses of them, where Lightning has no public way.

An upgrade of Lightning touches this file; a test sees that no other one uses such a name. Every function takes objects
of either of Lightning's packages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.device_dtype_mixin import _DeviceDtypeModuleMixin
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.data import _is_dataloader_shuffled
from torch import nn
from torch.utils._pytree import tree_unflatten

from lightning_quant.callbacks.lightning_packages import either, of_package

# LightningCLI leaves the name of a function in a checkpoint that would import and build classes that the file names.
WITHOUT_INSTANTIATOR = {"_instantiator": None}
# Where a Trainer keeps what was logged, for callbacks, loggers and the progress bar.
_LOGGED = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")


def callbacks_of(trainer: pl.Trainer) -> list[Callback]:
    """Return the callbacks of a Trainer; Lightning sets the attribute without declaring it."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def stage_dataloaders(trainer: pl.Trainer) -> Any:
    """Return the running stage's own data loaders; public attributes hold them only once its loop runs."""
    loops: dict[str, Any] = {
        "fit": trainer.fit_loop,
        "validate": trainer.validate_loop,
        "test": trainer.test_loop,
        "predict": trainer.predict_loop,
    }
    assert trainer.state.fn is not None
    return loops[trainer.state.fn.value]._data_source.dataloader()


def validation_dataloaders_of_fit(trainer: pl.Trainer) -> Any:
    """Return the validation data loaders of a fit, ``None`` where it has none or does not validate."""
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    return source.dataloader() if source.is_defined() and trainer.enable_validation else None


def sharded(trainer: pl.Trainer, dataloader: Any) -> Any:
    """Return a data loader that reads this rank's share, as Lightning makes it for its own loops."""
    shuffle = _is_dataloader_shuffled(dataloader)
    return trainer._data_connector._prepare_dataloader(dataloader, shuffle=shuffle, mode=RunningStage.TRAINING)


def recombined(combined: CombinedLoader, dataloaders: Sequence[Any]) -> CombinedLoader:
    """Combine other data loaders as a CombinedLoader combines its own."""
    return CombinedLoader(tree_unflatten(list(dataloaders), combined._spec), combined._mode)


def transferred(
    trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, device: torch.device, dataloader_idx: int
) -> Any:
    """Return a batch as a step gets it: with the transfer hooks, as Lightning's loops call them, and the precision."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=dataloader_idx)
    return trainer.strategy.batch_to_device(batch, device, dataloader_idx)


@contextmanager
def logged_metrics_kept(trainer: pl.Trainer) -> Iterator[None]:
    """Restore afterwards what was logged before a block."""
    connector = trainer._logger_connector
    known = {name: dict(getattr(connector, name)) for name in _LOGGED}
    try:
        yield
    finally:
        for name, metrics in known.items():
            setattr(connector, name, metrics)


@contextmanager
def own_trainer_kept(pl_module: pl.LightningModule) -> Iterator[None]:
    """Restore afterwards the Trainer of a module, for a block in which another one runs it."""
    trainer = pl_module._trainer
    try:
        yield
    finally:
        pl_module._trainer = trainer


def make_optimizers(trainer: pl.Trainer) -> None:
    """Make the optimizers and schedulers of a Trainer's module, as Lightning does once its strategy is set up."""
    module = trainer.lightning_module
    made = of_package(trainer, _init_optimizers_and_lr_schedulers)(module)
    trainer.strategy.optimizers, trainer.strategy.lr_scheduler_configs = made


def set_device(module: nn.Module, device: torch.device) -> None:
    """Let modules and metrics of Lightning answer ``.device`` with where their parameters are.

    During ``setup()`` they answer with where they will be.
    """
    for part in module.modules():
        if isinstance(part, either(_DeviceDtypeModuleMixin)):
            part._device = device


def attributes_of_lightning(value: object) -> frozenset[str]:
    """Return which attributes of a LightningModule Lightning itself keeps there; none of any other object."""
    kinds: tuple[Any, ...] = either(pl.LightningModule)
    return next((_attributes_of_class(kind) for kind in kinds if isinstance(value, kind)), frozenset())


@cache
def _attributes_of_class(kind: Any) -> frozenset[str]:
    return frozenset(vars(kind())) - frozenset(vars(nn.Module()))


def is_compiled(pl_module: pl.LightningModule) -> bool:
    """Whether ``torch.compile`` was called on the LightningModule itself."""
    return pl_module._compiler_ctx is not None


def expects_all_gradients(trainer: pl.Trainer) -> bool:
    """Whether the strategy raises where a parameter that learns gets no gradient, as DDP does by default."""
    strategy = trainer.strategy
    return isinstance(strategy, either(DDPStrategy)) and not strategy._ddp_kwargs.get("find_unused_parameters", False)


def synchronizes_batch_norms(trainer: pl.Trainer) -> bool:
    """Whether the strategy will replace batch norms by synchronized ones, ``Trainer(sync_batchnorm=True)``."""
    return getattr(trainer.strategy, "_layer_sync", None) is not None


def averaged_model(callback: Any) -> nn.Module | None:
    """Return the averaged copy that a callback which averages weights has made of the module, if it has made one."""
    average: nn.Module | None = callback._average_model
    return None if average is None else getattr(average, "module", average)
