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
        gathered = _of_all_ranks(trainer, caught)
        if not gathered:
            return
        for new, call in counted(gathered):
            seen += new
            yield call


def _of_all_ranks(trainer: pl.Trainer, calls: list[NetworkInputs]) -> list[NetworkInputs]:
    """Return the calls of all ranks, by rank: what they consist of is pickled, their tensors go from device to device.

    What was on the CPU, such as the lengths in a PackedSequence, is there again.
    """
    device = trainer.strategy.root_device
    own = [[torch.empty_like(one, device=device).copy_(one) for one in call.tensors] for call in calls]
    described = [
        (
            call.map(lambda one: one.new_empty(0, device="cpu")),
            [
                ((sent.shape, sent.stride()), sent.dtype, one.is_cpu)
                for one, sent in zip(call.tensors, sent, strict=True)
            ],
        )
        for call, sent in zip(calls, own, strict=True)
    ]
    shares: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(shares, described)
    found = []
    for rank, share in enumerate(shares):
        for number, (call, tensors) in enumerate(share):
            given = []
            for place, (layout, dtype, on_cpu) in enumerate(tensors):
                is_own = rank == trainer.global_rank
                tensor = own[number][place] if is_own else torch.empty_strided(*layout, dtype=dtype, device=device)
                if tensor.numel():  # as bytes: not every type can be sent
                    flat = tensor.as_strided((tensor.numel(),), (1,))
                    torch.distributed.broadcast(flat.view(torch.uint8), src=rank)
                given.append(tensor.cpu() if on_cpu else tensor)
            found.append(call.with_tensors(given))
    return found
