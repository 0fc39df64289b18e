"""Calibration samples as calls of the network, in the same order on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_quant.callbacks.calls import InputCatcher
from lightning_quant.callbacks.data import batches, calibration_loader, combined, isolated_seed
from lightning_quant.callbacks.lightning_internals import sharded
from lightning_quant.callbacks.lightning_packages import of_package
from lightning_quant.callbacks.progress import progress
from lightning_quant.simulation.inputs import NetworkInputs, counted, take_samples


def calibration_samples(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    catcher: InputCatcher,
    given: Any,
    samples: int,
    description: str,
) -> Iterator[NetworkInputs]:
    """Read the calibration data once, the same samples every time, with a progress bar.

    Args:
        trainer: the Trainer.
        pl_module: the user's module.
        catcher: turns batches into calls.
        given: the ``calibration_dataloader`` of the callback, if it was given one.
        samples: how many samples are wanted over all ranks.
        description: for the bar.
    """
    with isolated_seed(), progress(trainer, description, samples) as advance:
        loader = calibration_loader(trainer, pl_module, given)
        calls = calibration_inputs(trainer, loader, catcher, samples)
        for new, call in counted(take_samples(calls, samples)):
            yield call
            advance(new)


def calibration_inputs(
    trainer: pl.Trainer, loader: Any, catcher: InputCatcher, samples: int
) -> Iterator[NetworkInputs]:
    """Yield calls of the network with calibration samples, the same sequence on every rank.

    Those of one step follow one another; the last is marked, see :class:`NetworkInputs`.

    Each rank reads its shard of the data as Lightning would split it; the shards are exchanged batch by batch. So
    every rank observes every sample in the same order and computes the same ranges, whatever the range estimator,
    without merging partial statistics.

    Args:
        trainer: the Trainer.
        loader: a data loader or a collection of them.
        catcher: turns batches into calls.
        samples: how many samples are wanted over all ranks; reading stops there.
    """
    if trainer.world_size == 1:
        for index, batch in enumerate(batches(loader)):
            if trainer.received_sigterm:  # here Lightning has no loop that would stop
                raise of_package(trainer, SIGTERMException)
            yield from catcher.catch(batch, index)
        return
    loaders = combined(loader)
    loaders.flattened = [sharded(trainer, one) for one in loaders.flattened]
    own = enumerate(batches(loaders))
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
