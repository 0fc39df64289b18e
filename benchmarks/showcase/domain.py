"""What a domain of the showcase is: a network with genuine weights, data, and the figure that it is judged by."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

CALIBRATION = 64
# Float weights that are trained here: once, for all cells.
TRAINED = Path(__file__).parents[2] / "outputs" / "showcase"


@dataclass(frozen=True)
class Domain:
    """A network and how it is judged.

    Args:
        name: such as ``"keypoints"``.
        network: such as ``"XFeat"``.
        build: returns the LightningModule, its float weights in ``self.model``, and its data; given the folder of
            photographs. The batches of ``train_dataloader`` calibrate (64 samples), those of ``val_dataloader`` judge.
        monitor: what the validation logs.
        figure: what that is, for the table.
        mode: ``"max"`` if more is better.
        epochs: of training where no rung is good enough; 0: the network is not trained.
        seeds: how many runs, if the first one trained.
        more_rungs: that only its kind of network needs, tried before weights are rounded in other ways.
    """

    name: str
    network: str
    build: Callable[[Path], tuple[pl.LightningModule, pl.LightningDataModule]]
    monitor: str
    figure: str
    mode: Literal["max", "min"] = "max"
    epochs: int = 0
    seeds: int = 1
    more_rungs: tuple[str, ...] = ()


class Judged(pl.LightningModule):
    """A network that is calibrated and judged, and not trained; a subclass has ``validation_step``.

    Args:
        network: with its float weights.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.model = network.eval()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Run the network: what calibrates it."""
        return self.model(batch[0])

    def configure_optimizers(self) -> None:
        """Train nothing."""


class Tensors(pl.LightningDataModule):
    """Samples that calibrate and samples that judge, in memory.

    Args:
        calibration: first axis over the samples; one tensor or several of equal length.
        validation: likewise.
        batch_size: of both.
        shuffle: those that calibrate, for a network that is trained with them as well.
    """

    def __init__(
        self,
        calibration: tuple[Tensor, ...],
        validation: tuple[Tensor, ...],
        batch_size: int = 8,
        shuffle: bool = False,
    ) -> None:
        super().__init__()
        self.calibration = TensorDataset(*calibration)
        self.validation = TensorDataset(*validation)
        self.batch_size = batch_size
        self.shuffle = shuffle

    def train_dataloader(self) -> DataLoader[Any]:
        """Return what calibrates."""
        return DataLoader(self.calibration, self.batch_size, shuffle=self.shuffle)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return what judges."""
        return DataLoader(self.validation, self.batch_size)


def file_of(distribution: str, path: str) -> Path:
    """Return a file of an installed wheel, without importing its code.

    Raises:
        importlib.metadata.PackageNotFoundError: if it is not installed.
    """
    return Path(str(importlib.metadata.distribution(distribution).locate_file(path)))


def trained(name: str, network: nn.Module, train: Callable[[], None]) -> None:
    """Load the float weights of ``network``, or train it and keep them."""
    path = TRAINED / f"{name}.pt"
    if not path.is_file():
        train()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(network.state_dict(), partial)
        os.replace(partial, path)
    network.load_state_dict(torch.load(path, weights_only=True))
    network.eval()
