"""What the tasks of all domains train with: logits wherever a network has them, AdamW, warmup and a cosine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_quant.errors import ConfigurationError


def check_training(learning_rate: float, weight_decay: float, warmup_fraction: float) -> None:
    """Refuse what :func:`adamw_with_cosine` cannot train with.

    Raises:
        ConfigurationError: when an argument is out of range.
    """
    if not learning_rate > 0:
        raise ConfigurationError(f"learning_rate={learning_rate}: expected more than 0.")
    if not weight_decay >= 0:
        raise ConfigurationError(f"weight_decay={weight_decay}: expected 0 or more.")
    if not 0 <= warmup_fraction < 1:
        raise ConfigurationError(f"warmup_fraction={warmup_fraction}: expected 0 to below 1.")


def adamw_with_cosine(
    task: LightningModule, network: nn.Module, learning_rate: float, weight_decay: float, warmup_fraction: float
) -> Optimizer | OptimizerLRSchedulerConfig:
    """Return what ``configure_optimizers`` does: AdamW, whose learning rate climbs linearly and falls along a cosine.

    Args:
        task: its trainer knows the number of steps; where it does not (``max_epochs=-1``), the rate is constant.
        network: whose parameters are trained, in the groups of :func:`parameter_groups`.
        learning_rate: highest of the schedule.
        weight_decay: AdamW's decoupled weight decay.
        warmup_fraction: part of all optimizer steps in which the rate climbs.
    """
    optimizer = torch.optim.AdamW(parameter_groups(network, weight_decay), lr=learning_rate)
    steps = float(task.trainer.estimated_stepping_batches)
    if math.isinf(steps):
        return optimizer
    factor = partial(cosine_with_warmup, steps=steps, warmup=warmup_fraction * steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def first_tensor(output: object, names: Sequence[str] = ("out",)) -> Tensor:
    """Return the logits in what a network returned: a tensor, an entry of a dict, or the first of a tuple.

    Args:
        output: what the network returned.
        names: of the entry in a dict; the first that is there counts.

    Raises:
        ConfigurationError: there is no tensor at these places.
    """
    found = output
    if isinstance(found, Mapping):
        found = next((found[name] for name in names if name in found), None)
    elif isinstance(found, tuple | list) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        given = f"a dict with the keys {list(output)}" if isinstance(output, Mapping) else type(output).__name__
        raise ConfigurationError(
            f"The network returned {given}; expected logits as a tensor, as the entry "
            f"{' or '.join(map(repr, names))} of a dict or as the first element of a tuple. Wrap the network in a "
            "module that returns them so."
        )
    # A quantized network returns a subclass of Tensor, which should not leave the task.
    return found.as_subclass(Tensor)


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
