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
from typing_extensions import override

from lightning_quant.errors import ConfigurationError


class Task(LightningModule):
    """What the tasks of all domains share: one evaluation for validation and test, and AdamW for ``model``.

    A subclass has ``training_step``, and how a stage, ``"val"`` or ``"test"``, begins (:meth:`start_evaluation`),
    counts a batch (:meth:`evaluate`) and ends (:meth:`end_evaluation`).

    Args:
        network: the network, trained in place.
        learning_rate: highest learning rate of the schedule.
        weight_decay: AdamW's decoupled weight decay.
        warmup_fraction: part of all optimizer steps in which the learning rate climbs, 0 to below 1.

    Raises:
        ConfigurationError: an argument is out of range.
    """

    def __init__(self, network: nn.Module, learning_rate: float, weight_decay: float, warmup_fraction: float) -> None:
        super().__init__()
        if not learning_rate > 0:
            raise ConfigurationError(f"learning_rate={learning_rate}: expected more than 0.")
        if not weight_decay >= 0:
            raise ConfigurationError(f"weight_decay={weight_decay}: expected 0 or more.")
        if not 0 <= warmup_fraction < 1:
            raise ConfigurationError(f"warmup_fraction={warmup_fraction}: expected 0 to below 1.")
        self.model = network
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_fraction = warmup_fraction

    def start_evaluation(self, stage: str) -> None:
        """Forget what an earlier epoch counted."""
        raise NotImplementedError

    def evaluate(self, stage: str, batch: Any) -> None:
        """Count one batch, and log its loss."""
        raise NotImplementedError

    def end_evaluation(self, stage: str) -> None:
        """Log the figures of an epoch."""
        raise NotImplementedError

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluate("val", batch)

    @override
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluate("test", batch)

    @override
    def on_validation_epoch_start(self) -> None:
        self.start_evaluation("val")

    @override
    def on_test_epoch_start(self) -> None:
        self.start_evaluation("test")

    @override
    def on_validation_epoch_end(self) -> None:
        self.end_evaluation("val")

    @override
    def on_test_epoch_end(self) -> None:
        self.end_evaluation("test")

    @override
    def configure_optimizers(self) -> Optimizer | OptimizerLRSchedulerConfig:
        """Return AdamW, whose learning rate climbs linearly and falls along a cosine.

        Where the trainer does not know its number of steps (``max_epochs=-1``), the rate is constant.
        """
        optimizer = torch.optim.AdamW(parameter_groups(self.model, self.weight_decay), lr=self.learning_rate)
        steps = float(self.trainer.estimated_stepping_batches)
        if math.isinf(steps):
            return optimizer
        factor = partial(cosine_with_warmup, steps=steps, warmup=self.warmup_fraction * steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def figures_of_epoch(found: Mapping[str, dict[str, float]], stage: str, method: str) -> dict[str, float]:
    """Return the figures of the classes that an epoch of ``stage`` left.

    Args:
        found: by stage.
        stage: ``"val"`` or ``"test"``.
        method: what was called, for the error.

    Raises:
        ConfigurationError: there has been no such epoch.
    """
    if stage not in found:
        expected = {"val": "trainer.validate or trainer.fit", "test": "trainer.test"}
        raise ConfigurationError(
            f"{method}({stage!r}) has nothing to report yet: stage is 'val' or 'test', after "
            f"an epoch of {expected.get(stage, ' or '.join(expected.values()))}."
        )
    return dict(found[stage])


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
