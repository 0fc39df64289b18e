"""The checkpoint of the best network that a fit has seen, in a folder that belongs to one fit at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_quant.errors import CheckpointError, ConfigurationError
from lightning_quant.utilities.files import exclusive_lock


@contextmanager
def locked_folder(trainer: pl.Trainer) -> Iterator[None]:
    """Keep other fits from writing to the folder of this one's best network, for the length of a block.

    Raises:
        ConfigurationError: if another fit is writing there.
    """
    folder = _folder(trainer)
    if not trainer.is_global_zero:
        yield
        return
    busy = f"Another fit is writing to {folder}: expected a folder for each. Give another default_root_dir."
    with exclusive_lock(folder / ".lock", ConfigurationError(busy)):
        yield


def best_path(trainer: pl.Trainer) -> Path:
    """Return where the best network of a fit is saved.

    It lies below the folder of this run, even if it resumed from another's: what that one kept stays as it is.
    """
    return _folder(trainer) / "best.ckpt"


def network_state(path: str, name: str) -> dict[str, Any]:
    """Read the state of a network from a checkpoint.

    Args:
        path: the checkpoint.
        name: dotted attribute of the LightningModule that holds the network.

    Raises:
        CheckpointError: if the file is gone.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"The best network was kept in {path!r}, which is gone: expected it to be left in place.")
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


def _folder(trainer: pl.Trainer) -> Path:
    """Where ModelCheckpoint would save: below the first logger's name and version, the same on every rank."""
    folder = Path(trainer.default_root_dir)
    if trainer.loggers:
        logger = trainer.loggers[0]
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        folder = Path(logger.save_dir or folder) / str(logger.name) / version
    return trainer.strategy.broadcast(folder) / "ladder"
