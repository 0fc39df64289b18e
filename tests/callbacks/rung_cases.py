"""Networks of which each needs one rung and is content with it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_quant as lq
from tests.helpers.trainers import quiet_trainer

SAMPLES = 128


class Chain(nn.Module):
    """3×8×8 images to 4 numbers: two convolutions, the first with a batch norm, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.relu2 = nn.ReLU()
        self.head = nn.Linear(16 * 64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu2(self.second(self.relu(self.norm(self.first(x)))))
        return self.head(x.flatten(1))


class Regression(pl.LightningModule):
    """Fits its targets; validation logs how well, in dB: 10·log10(Σ t² / Σ (y − t)²)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.model = network

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, targets = batch
        return (self.model(images) - targets).square().mean()

    def on_validation_epoch_start(self) -> None:
        self._power = self._error = 0.0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, targets = batch
        self._power += float(targets.square().sum())
        self._error += float((self.model(images) - targets).square().sum())

    def on_validation_epoch_end(self) -> None:
        self.log("val_db", 10 * torch.log10(torch.tensor(self._power / self._error)))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=3e-4)


@functools.cache
def images() -> Tensor:
    return torch.randn(SAMPLES, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def targets_of(network: nn.Module) -> Tensor:
    """What the float network says, and noise 40 dB below it: the float network is good, not perfect."""
    with torch.no_grad():
        answers = network.eval()(images())
    noise = torch.randn(answers.shape, generator=torch.Generator().manual_seed(2))
    return answers + 0.01 * answers.std() * noise


def loader(targets: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(images(), targets), batch_size=32)


@functools.cache
def trained() -> Chain:
    """A network that has learned something, so that its weights and statistics are no noise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Chain()
        x = images()
        features = x.mean((1, 2, 3)), x[:, 0].amax((1, 2)), x.std((1, 2, 3)), (x[:, 1] * x[:, 2]).mean((1, 2))
        wanted = torch.stack(features, 1)
        optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
        for _ in range(80):
            loss = (network(x) - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()


@dataclass(frozen=True)
class Case:
    """A network and the rungs it is given.

    Args:
        change: turns the trained network into one with a particular weakness.
        precision: of the whole network.
        max_drop: in dB.
        rungs: tried in this order.
        options: of the callback.
    """

    change: Callable[[Chain], None]
    precision: str
    max_drop: float
    rungs: Sequence[Any]
    options: dict[str, Any] = field(default_factory=dict)


def nothing(network: Chain) -> None:
    """Leave it as it is."""


def unequal(network: Chain) -> None:
    """Channels between the convolutions whose ranges differ by 10⁴, in one range for all of them."""
    factors = torch.logspace(-2, 2, 16)
    network.norm.weight.mul_(factors)
    network.norm.bias.mul_(factors)
    network.second.weight.div_(factors.view(1, -1, 1, 1))


def dead_outliers(network: Chain) -> None:
    """One huge weight in each row of the head, at a feature that is always zero."""
    network.second.weight[0] = 0
    network.second.bias[0] = -1
    network.head.weight[:, 0] = 4 * network.head.weight.abs().amax()


def halfway(network: Chain) -> None:
    """Weights of the head four tenths above the 4-bit grid: the nearest rounding is off to the same side everywhere."""
    step = network.head.weight.abs().amax(1, keepdim=True) / 7.5
    network.head.weight.copy_((network.head.weight / step).floor() * step + 0.45 * step)
    network.head.weight[:, :1] = 7.5 * step


def shrinking(network: Chain) -> None:
    """Weights of the first layer that the nearest rounding makes smaller, all of them."""
    weight = network.first.weight
    step = weight.abs().amax((1, 2, 3), keepdim=True) / 7.5
    weight.copy_(weight.sign() * ((weight.abs() / step).floor() + 0.45) * step)
    weight[:, 0, 0, 0] = 7.5 * step.flatten()
    outputs = network.first(images())
    network.norm.running_var, network.norm.running_mean = torch.var_mean(outputs, (0, 2, 3))


def fragile_first(network: Chain) -> None:
    """A first layer whose kernels have one large weight, at a pixel that hardly varies."""
    network.first.weight[:, 0, 0, 0] = 12 * network.first.weight.abs().amax((1, 2, 3))


CASES = {
    "ptq": Case(nothing, "w8a16", 1.0, ("ptq", "cle")),
    "cle": Case(unequal, "w8a8", 6.0, ("ptq", "tf_enhanced", "cle")),
    "tf_enhanced": Case(dead_outliers, "w4a16", 20.0, ("ptq", "cle", "tf_enhanced")),
    "bias_correction": Case(halfway, "w4a16", 15.0, ("ptq", "cle", "bias_correction", "seq_mse")),
    "bn_reestimation": Case(shrinking, "w4a16", 10.0, ("ptq", "cle", "bn_reestimation", "mixed")),
    "seq_mse": Case(dead_outliers, "w4a16", 20.0, ("ptq", "cle", "seq_mse")),
    "adaround": Case(halfway, "w4a16", 22.0, ("ptq", "cle", {"adaround": {"iterations": 200}})),
    "rounding": Case(halfway, "w4a16", 22.0, ("ptq", "cle", {"rounding": {"iterations": 200}})),
    "mixed": Case(fragile_first, "w4a16", 10.0, ("ptq", "cle", "seq_mse", "mixed")),
    "qat": Case(dead_outliers, "w4a16", 16.0, ("ptq", "cle", "bias_correction")),
}


def fit_case(case: Case, folder: str | Path, **changes: Any) -> tuple[lq.QuantizationAwareTraining, pl.Trainer]:
    """Fit with the case's network; the callback, with what it measured, and the Trainer."""
    network = copy.deepcopy(trained())
    with torch.no_grad():
        case.change(network)
    data = loader(targets_of(network))
    arguments = {"max_drop": case.max_drop, "rungs": case.rungs, **case.options}
    epochs = changes.pop("max_epochs", 3)
    callback = lq.QuantizationAwareTraining(case.precision, monitor="val_db", **{**arguments, **changes})
    trainer = quiet_trainer(folder, callback, max_epochs=epochs)
    trainer.fit(Regression(network), data, data)
    return callback, trainer
