"""Which data the network is built, calibrated and compared with, in the order that every rank sees it in."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy
import torch
import torch.distributed
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.data import _is_dataloader_shuffled
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils._pytree import tree_unflatten
from torch.utils.data import DataLoader, IterableDataset

from lightning_quant.errors import ConfigurationError
from lightning_quant.simulation.inputs import NetworkInputs, counted

if TYPE_CHECKING:
    from lightning_quant.callbacks.calls import InputCatcher


def stage_loader(trainer: pl.Trainer) -> CombinedLoader:
    """The running stage's own data: where the example for tracing comes from."""
    loops: dict[str, Any] = {
        "fit": trainer.fit_loop,
        "validate": trainer.validate_loop,
        "test": trainer.test_loop,
        "predict": trainer.predict_loop,
    }
    stage = stage_name(trainer)
    loader = loops[stage]._data_source.dataloader()
    # as the Trainer does it: training combines several loaders in one batch, the others run them one by one
    return _combined(loader) if stage == "fit" else CombinedLoader(loader, "sequential")


def stage_name(trainer: pl.Trainer) -> str:
    """The method of the Trainer that is running: fit, validate, test or predict."""
    assert trainer.state.fn is not None
    return trainer.state.fn.value


def calibration_loader(trainer: pl.Trainer, pl_module: pl.LightningModule, given: Any) -> Any:
    """The data to calibrate on: given, the data module's calibration loader, or its training data.

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
        return trainer.fit_loop._data_source.dataloader()
    for source in (datamodule, pl_module):
        if source is not None and is_overridden("train_dataloader", source):
            if is_overridden("setup", source):
                with _what_was_there(source):
                    source.setup("fit")  # data modules make their training set there only
                    return source.train_dataloader()
            return source.train_dataloader()
    raise ConfigurationError(
        f"trainer.{stage_name(trainer)}() has no data to calibrate on: expected "
        "calibration_dataloader=... on the callback, a calibration_dataloader() method on the data module, or a "
        "train_dataloader(). Validation data is not used for it."
    )


@contextmanager
def _what_was_there(source: Any) -> Iterator[None]:
    """Keep the attributes that a module has, network included, from being made anew for another stage."""
    owned = [vars(source)]
    if isinstance(source, pl.LightningModule):
        owned += [source._modules, source._parameters, source._buffers]
    before = [dict(mapping) for mapping in owned]
    yield
    for mapping, entries in zip(owned, before, strict=True):
        mapping.update(entries)


def calibration_inputs(
    trainer: pl.Trainer, loader: Any, catcher: InputCatcher, samples: int
) -> Iterator[NetworkInputs]:
    """Calls of the network with calibration samples, the same sequence on every rank.

    Those of one step follow one another; the last is marked, see :class:`NetworkInputs`.

    Each rank reads its share of the data as Lightning would deal it out; the shares are exchanged batch by
    batch. So every rank observes every sample in the same order and comes to the same ranges, whatever the
    range estimator, without any arithmetic on half-finished statistics.

    Args:
        trainer: the Trainer.
        loader: a data loader or a collection of them.
        catcher: turns batches into calls.
        samples: how many samples are wanted over all ranks; reading stops there.
    """
    if trainer.world_size == 1:
        for index, batch in enumerate(batches(loader)):
            if trainer.received_sigterm:  # here Lightning has no loop that would stop
                raise SIGTERMException
            yield from catcher.catch(batch, index)
        return
    own = enumerate(batches(_sharded(trainer, loader)))
    seen = 0
    while seen < samples:
        caught = [call for index, batch in islice(own, 1) for call in catcher.catch(batch, index)]
        shares: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(shares, [call.to(torch.device("cpu")) for call in caught])
        gathered = [call for share in shares for call in share]
        if not gathered:
            return
        for new, call in counted(gathered):
            seen += new
            yield call.to(trainer.strategy.root_device)


@contextmanager
def isolated_seed() -> Iterator[None]:
    """Draw the same samples every time, and leave the program's random numbers as they were.

    Without this, adding the callback would change the order of the training data.
    """
    with isolate_rng():
        torch.manual_seed(0)
        numpy.random.seed(0)
        random.seed(0)
        yield


def _combined(loader: Any) -> CombinedLoader:
    return loader if isinstance(loader, CombinedLoader) else CombinedLoader(loader, "max_size_cycle")


def batches(loader: Any) -> Iterator[Any]:
    """Every batch of a loader or a collection of loaders, the way the Trainer would combine them."""
    combined = _combined(loader)
    with _generators_kept(combined):
        for batch, _, _ in combined:
            yield batch


def twin_batches(loader: Any) -> list[Any]:
    """Two batches, of two and of three times the same sample, as the loaders put theirs together.

    They differ in nothing but the number of samples. None where the loaders are no data loaders of PyTorch, or their
    data comes in batches.
    """
    combined = _combined(loader)
    made: dict[int, list[Any]] = {2: [], 3: []}
    with _generators_kept(combined):
        for one in combined.flattened:
            if not isinstance(one, DataLoader) or one.batch_sampler is None:
                return []
            try:
                if isinstance(one.dataset, IterableDataset):
                    sample = next(iter(one.dataset))
                else:
                    sample = one.dataset[next(iter(one.batch_sampler))[0]]
            except Exception:  # whatever a data set of the user's cannot do out of turn
                return []
            for count, found in made.items():
                copies: Any = [copy.deepcopy(sample) for _ in range(count)]
                found.append(DataLoader(copies, batch_size=count, collate_fn=one.collate_fn))
    structured = (tree_unflatten(found, combined._spec) for found in made.values())
    return [next(batches(CombinedLoader(found, combined._mode))) for found in structured]


@contextmanager
def _generators_kept(combined: CombinedLoader) -> Iterator[None]:
    owners = [owner for one in combined.flattened for owner in (one, getattr(one, "sampler", None))]
    generators = [g for owner in owners if (g := getattr(owner, "generator", None)) is not None]
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _sharded(trainer: pl.Trainer, loader: Any) -> CombinedLoader:
    """Deal a loader's samples out over the ranks, as Lightning does for its own loops."""
    combined = _combined(loader)
    combined.flattened = [
        trainer._data_connector._prepare_dataloader(
            one, shuffle=_is_dataloader_shuffled(one), mode=RunningStage.TRAINING
        )
        for one in combined.flattened
    ]
    return combined
