"""The optimizer of the worked domains: AdamW, its learning rate along a cosine behind a warmup."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
from torch.optim import Optimizer

from lightning_quant.errors import ConfigurationError


def check_optimization(learning_rate: float, weight_decay: float, warmup_fraction: float) -> None:
    """Refuse arguments of :func:`adamw_with_cosine` that are out of range.

    Raises:
        ConfigurationError: naming the argument.
    """
    if not learning_rate > 0:
        raise ConfigurationError(f"learning_rate={learning_rate}: expected more than 0.")
    if not weight_decay >= 0:
        raise ConfigurationError(f"weight_decay={weight_decay}: expected 0 or more.")
    if not 0 <= warmup_fraction < 1:
        raise ConfigurationError(f"warmup_fraction={warmup_fraction}: expected 0 to below 1.")


def adamw_with_cosine(
    trainer: pl.Trainer, network: nn.Module, learning_rate: float, weight_decay: float, warmup_fraction: float
) -> Optimizer | OptimizerLRSchedulerConfig:
    """Return what ``configure_optimizers`` returns: AdamW, with a warmup and a cosine over all steps of the Trainer.

    Where the Trainer cannot tell its number of steps (``max_epochs=-1``), the learning rate is constant.

    Args:
        trainer: tells the number of optimizer steps.
        network: whose trainable parameters are optimized, see :func:`parameter_groups`.
        learning_rate: highest learning rate of the schedule.
        weight_decay: AdamW's decoupled weight decay.
        warmup_fraction: part of all optimizer steps in which the learning rate climbs, 0 to below 1.
    """
    optimizer = torch.optim.AdamW(parameter_groups(network, weight_decay), lr=learning_rate)
    steps = float(trainer.estimated_stepping_batches)
    if math.isinf(steps):
        return optimizer
    factor = partial(cosine_with_warmup, steps=steps, warmup=warmup_fraction * steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the trainable parameters in two groups: weights with more than one dimension decay, nothing else does.

    By name as well as by shape: the trainable ranges of a quantized network have the dimensions of the weight
    that they belong to, and a range that decays clips its weight.
    """
    decay: list[nn.Parameter] = []
    keep: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            (decay if name.endswith("weight") and parameter.ndim > 1 else keep).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": keep, "weight_decay": 0.0}]


def cosine_with_warmup(step: int, steps: float, warmup: float) -> float:
    """Return the factor on the learning rate: linear to 1 over ``warmup`` steps, then a half cosine to 0 at ``steps``.

    The cosine of Loshchilov and Hutter, "SGDR", 2017, without restarts.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1.0, steps - warmup))
    return 0.5 * (1 + math.cos(math.pi * done))
