"""Resume a killed fit with exactly what an uninterrupted fit would have computed."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from lightning_quant.callbacks.lightning_packages import AnyCheckpoint
from lightning_quant.utilities.files import atomic_write
from lightning_quant.utilities.random_state import random_state, set_random_state


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
        return {**random_state(), "between_epochs": self._between_epochs}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict
        if state_dict["between_epochs"]:  # before Lightning draws the sample order of the epoch it resumes with
            self._restore()

    def _restore(self) -> None:
        if self._restored is not None and self._single_process:
            set_random_state(self._restored)
        self._restored = None


def save_whole(trainer: pl.Trainer, path: Path) -> None:
    """Save a checkpoint atomically: a kill leaves what was at ``path`` before.

    ``trainer.save_checkpoint`` writes to the system's folder for temporary files and moves the file from there. On
    another file system that is a copy, which leaves half a checkpoint when interrupted.
    """
    with atomic_write(path) if trainer.is_global_zero else nullcontext(path) as partial:
        trainer.save_checkpoint(partial, weights_only=False)
    trainer.strategy.barrier()
