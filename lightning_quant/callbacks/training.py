"""Quantization-aware training as a Lightning callback."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import compress
from operator import not_
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_quant.callbacks.quantization import QuantizationCallback
from lightning_quant.precision import Precision


class QuantizationAwareTraining(QuantizationCallback):
    """Fine-tune a trained network with its weights and activations rounded as the device will round them.

    ``fit`` calibrates first, then trains as your module and optimizer say. The ranges learn along with the
    weights, in an optimizer group of their own without weight decay: decay would pull every range towards
    zero, and with it the values the layer can represent. A good learning rate is about a hundredth of the
    one the float network was trained with.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(max_epochs=2, callbacks=[QuantizationAwareTraining("w4a16")])  # doctest: +SKIP
        >>> trainer.fit(module, datamodule=data)  # doctest: +SKIP

    Args:
        precision: see :class:`PostTrainingQuantization`, likewise up to ``strict``.
        network: see there.
        hardware: see there.
        calibration_samples: see there.
        calibration_dataloader: see there.
        range_estimator: see there.
        overrides: see there.
        strict: see there.
        train_ranges: learn the ranges too. ``False`` keeps them as calibrated.

    Raises:
        ConfigurationError, PreflightError, CalibrationError: as there.
    """

    def __init__(
        self,
        precision: str | Precision = "w8a8",
        network: str = "model",
        hardware: str = "htp_v75",
        calibration_samples: int = 256,
        calibration_dataloader: Iterable[Any] | None = None,
        range_estimator: str = "min_max",
        overrides: Mapping[str, str] | None = None,
        strict: bool = False,
        train_ranges: bool = True,
    ) -> None:
        super().__init__(
            precision=precision,
            network=network,
            hardware=hardware,
            calibration_samples=calibration_samples,
            calibration_dataloader=calibration_dataloader,
            range_estimator=range_estimator,
            overrides=overrides,
            strict=strict,
        )
        self.train_ranges = train_ranges

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.quantized_network(pl_module).learn_ranges(self.train_ranges)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        # before Lightning restores the optimizer's state, which was saved with the group split off
        for optimizer in trainer.optimizers:
            schedulers = [config for config in trainer.lr_scheduler_configs if _drives(config, optimizer)]
            split_off_ranges(self.quantized_network(pl_module).range_parameters(), optimizer, schedulers)


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
