"""Resume a killed fit with exactly what an uninterrupted fit would have computed."""

from __future__ import annotations

import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from typing_extensions import override

from lightning_quant.callbacks.lightning_packages import AnyCheckpoint
from lightning_quant.utilities.files import atomic_write


class ResumePoint(AnyCheckpoint):
    """Save the state of a fit to one file after every epoch, random numbers included, and resume from it exactly.

    Lightning's own checkpoints hold no random numbers, so a resumed fit shuffles and augments differently. With this
    callback it draws what the killed fit would have drawn: on a CPU the weights are equal bit for bit. Under DDP,
    where each process draws its own, the random numbers are not restored.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> point = ResumePoint("runs/street/last.ckpt")
        >>> trainer = Trainer(max_epochs=20, callbacks=[point])
        >>> trainer.fit(module, ckpt_path=point.ckpt_path, weights_only=True)  # doctest: +SKIP

    Args:
        path: the file. It is replaced atomically: a kill leaves that of the previous epoch.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._restored: dict[str, Any] | None = None
        self._between_epochs = False
        self._single_process = True

    @property
    def ckpt_path(self) -> str | None:
        """Return the file, for ``Trainer.fit(ckpt_path=…)``, or ``None`` before the first epoch has ended."""
        return str(self.path) if self.path.is_file() else None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._single_process = trainer.world_size == 1

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._between_epochs = True
        try:
            save_whole(trainer, self.path)
        finally:
            self._between_epochs = False

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._restored is not None:  # stopped again before it was restored
            return self._restored
        return {**_random_state(), "between_epochs": self._between_epochs}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict
        if state_dict["between_epochs"]:  # before Lightning draws the sample order of the epoch it resumes with
            self._restore()

    def _restore(self) -> None:
        if self._restored is not None and self._single_process:
            _set_random_state(self._restored)
        self._restored = None


def save_whole(trainer: pl.Trainer, path: Path) -> None:
    """Save a checkpoint atomically: a kill leaves what was at ``path`` before.

    ``trainer.save_checkpoint`` writes to the system's folder for temporary files and moves the file from there. On
    another file system that is a copy, which leaves half a checkpoint when interrupted.
    """
    with atomic_write(path) if trainer.is_global_zero else nullcontext(path) as partial:
        trainer.save_checkpoint(partial, weights_only=False)
    trainer.strategy.barrier()


def _random_state() -> dict[str, Any]:
    """Return the state of PyTorch's, NumPy's and Python's generators, in types that load without pickle."""
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (torch.from_numpy(np.asarray(keys, dtype=np.int64)), int(position), int(has_gauss), float(gauss)),
        "python": random.getstate(),
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    random.setstate(state["python"])
