"""Going on after a kill with exactly what an undisturbed fit would have computed."""

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
    """Keeps the state of a fit after every epoch in one file, and goes on from it as if nothing had happened.

    Lightning's own checkpoints hold no random numbers, so a resumed fit shuffles and augments differently. With this
    callback it draws what the fit that was killed would have drawn: on a CPU weights come out the same bit for bit.
    Under DDP, where each process draws its own, the random numbers are not restored.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> point = ResumePoint("runs/street/last.ckpt")
        >>> trainer = Trainer(max_epochs=20, callbacks=[point])
        >>> trainer.fit(module, ckpt_path=point.ckpt_path, weights_only=True)  # doctest: +SKIP

    Args:
        path: the file. It is replaced whole, so a kill leaves the one of the epoch before.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._restored: dict[str, Any] | None = None
        self._between_epochs = False
        self._draws_alone = True

    @property
    def ckpt_path(self) -> str | None:
        """The file, for ``Trainer.fit(ckpt_path=…)``; ``None`` before the first epoch is over."""
        return str(self.path) if self.path.is_file() else None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._draws_alone = trainer.world_size == 1

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
        if self._restored is not None:  # stopped again before it was put to use
            return self._restored
        return {**_random_state(), "between_epochs": self._between_epochs}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict
        if state_dict["between_epochs"]:  # before Lightning draws the order of the epoch that it begins with
            self._restore()

    def _restore(self) -> None:
        if self._restored is not None and self._draws_alone:
            _set_random_state(self._restored)
        self._restored = None


def save_whole(trainer: pl.Trainer, path: Path) -> None:
    """``trainer.save_checkpoint`` such that a kill leaves what was at ``path`` before.

    Lightning writes to the system's folder for temporary files and moves from there, which is a copy where that is
    another file system, and half a checkpoint where it is interrupted.
    """
    with atomic_write(path) if trainer.is_global_zero else nullcontext(path) as partial:
        trainer.save_checkpoint(partial, weights_only=False)
    trainer.strategy.barrier()


def _random_state() -> dict[str, Any]:
    """The state of PyTorch's, NumPy's and Python's generators, of types that load without pickle."""
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
