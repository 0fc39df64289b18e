"""Learned ranges in optimizer groups of their own."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import compress
from operator import not_
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import nn
from torch.optim import Optimizer


def split_off_all(trainer: pl.Trainer, ranges: list[nn.Parameter]) -> None:
    """Split ``ranges`` off in every optimizer of the Trainer, see :func:`split_off_ranges`."""
    for optimizer in trainer.optimizers:
        schedulers = [config for config in trainer.lr_scheduler_configs if _drives(config, optimizer)]
        split_off_ranges(ranges, optimizer, schedulers)


def split_off_ranges(
    ranges: Iterable[nn.Parameter], optimizer: Optimizer, schedulers: Iterable[LRSchedulerConfig] = ()
) -> None:
    """Move range parameters into optimizer groups of their own: same options, but no weight decay.

    Args:
        ranges: the parameters to move.
        optimizer: changed in place.
        schedulers: those that drive it. What they keep for each group is repeated for the new groups.
    """
    wanted = {id(parameter) for parameter in ranges}
    for index, group in enumerate(list(optimizer.param_groups)):
        is_range = [id(parameter) in wanted for parameter in group["params"]]
        if not any(is_range):
            continue
        new = {**group, "weight_decay": 0.0} if "weight_decay" in group else {**group}
        for name in {"params", "param_names"} & group.keys():  # names, if the user gave named_parameters()
            new[name] = list(compress(group[name], is_range))
            group[name] = list(compress(group[name], map(not_, is_range)))
        optimizer.add_param_group(new)
        for config in schedulers:
            _repeat_group(config.scheduler, index)


def _drives(config: LRSchedulerConfig, optimizer: Optimizer) -> bool:
    return getattr(config.scheduler, "optimizer", None) is optimizer


# What PyTorch's schedulers keep as one entry per parameter group.
_PER_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums")


def _repeat_group(scheduler: Any, index: int) -> None:
    for name in _PER_GROUP:
        values = getattr(scheduler, name, None)
        if isinstance(values, list):
            values.append(values[index])
    for nested in getattr(scheduler, "_schedulers", ()):
        _repeat_group(nested, index)
