"""Which data the network is built, calibrated and compared with, batch by batch as the Trainer would read it."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import numpy
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_quant.callbacks.lightning_internals import recombined, stage_dataloaders
from lightning_quant.callbacks.lightning_packages import either, is_overridden
from lightning_quant.errors import ConfigurationError
from lightning_quant.utilities.random_state import random_state_kept


def stage_loader(trainer: pl.Trainer) -> CombinedLoader:
    """Return the running stage's own data, from which the example inputs are taken."""
    loader = stage_dataloaders(trainer)
    # as the Trainer does it: training combines several loaders in one batch, the others run them one by one
    return combined(loader) if trainer.state.fn == "fit" else CombinedLoader(loader, "sequential")


def stage_name(trainer: pl.Trainer) -> str:
    """Return which method of the Trainer is running: fit, validate, test or predict."""
    assert trainer.state.fn is not None
    return trainer.state.fn.value


def calibration_loader(trainer: pl.Trainer, pl_module: pl.LightningModule, given: Any) -> Any:
    """Return the data to calibrate on: what is given, the data module's calibration loader, or its training data.

    Raises:
        ConfigurationError: when there is neither. Validation data is never taken silently: ranges tuned on it
            would flatter the metric that judges them.
    """
    if given is not None:
        return given() if callable(given) and not isinstance(given, Iterable) else given
    datamodule = getattr(trainer, "datamodule", None)
    if datamodule is not None and hasattr(datamodule, "calibration_dataloader"):
        return datamodule.calibration_dataloader()
    if trainer.state.fn == "fit":
        return stage_dataloaders(trainer)
    for source in (datamodule, pl_module):
        if source is not None and is_overridden("train_dataloader", source):
            if is_overridden("setup", source):
                with _attributes_kept(source):
                    source.setup("fit")  # data modules make their training set there only
                    return source.train_dataloader()
            return source.train_dataloader()
    raise ConfigurationError(
        f"trainer.{stage_name(trainer)}() has no data to calibrate on: expected "
        "calibration_dataloader=... on the callback, a calibration_dataloader() method on the data module, or a "
        "train_dataloader(). Validation data is not used for it."
    )


@contextmanager
def _attributes_kept(source: Any) -> Iterator[None]:
    """Keep a ``setup`` for another stage from replacing attributes that a module has, its network included."""
    owned = [vars(source)]
    if isinstance(source, nn.Module):
        owned += [source._modules, source._parameters, source._buffers]
    before = [dict(mapping) for mapping in owned]
    try:
        yield
    finally:
        for mapping, entries in zip(owned, before, strict=True):
            mapping.update(entries)


@contextmanager
def isolated_seed() -> Iterator[None]:
    """Draw the same samples every time, and leave the program's random numbers as they were.

    Without this, adding the callback would change the order of the training data.
    """
    with random_state_kept():
        torch.manual_seed(0)
        numpy.random.seed(0)
        random.seed(0)
        yield


def combined(loader: Any) -> CombinedLoader:
    """Combine a loader or a collection of loaders as the Trainer does for training."""
    return loader if isinstance(loader, either(CombinedLoader)) else CombinedLoader(loader, "max_size_cycle")


def batches(loader: Any) -> Iterator[Any]:
    """Yield every batch of a loader or a collection of loaders, combined as the Trainer would."""
    loaders = combined(loader)
    with _generators_kept(loaders):
        for batch, _, _ in loaders:
            yield batch


def twin_batches(loader: Any) -> list[Any]:
    """Return two batches, of two and of three copies of the same sample, collated as the loaders do.

    They differ only in the number of samples. Nothing is returned where the loaders are not PyTorch data loaders, or
    their data comes in batches.
    """
    loaders = combined(loader)
    made: dict[int, list[Any]] = {2: [], 3: []}
    with _generators_kept(loaders):
        for one in loaders.flattened:
            if not isinstance(one, DataLoader) or one.batch_sampler is None:
                return []
            try:
                if isinstance(one.dataset, IterableDataset):
                    sample = next(iter(one.dataset))
                else:
                    sample = one.dataset[next(iter(one.batch_sampler))[0]]
            except Exception:  # of a data set that cannot be indexed at this time
                return []
            for count, found in made.items():
                copies: Any = [copy.deepcopy(sample) for _ in range(count)]
                found.append(DataLoader(copies, batch_size=count, collate_fn=one.collate_fn))
    return [next(batches(recombined(loaders, found))) for found in made.values()]


@contextmanager
def _generators_kept(loaders: CombinedLoader) -> Iterator[None]:
    owners = [owner for one in loaders.flattened for owner in (one, getattr(one, "sampler", None))]
    generators = [g for owner in owners if (g := getattr(owner, "generator", None)) is not None]
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
