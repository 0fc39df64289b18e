"""The Trainer of the tests: quiet, on one CPU, and writing below one folder only."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer


def quiet_trainer(folder: str | Path, *callbacks: Any, **arguments: Any) -> Trainer:
    """Make a Trainer without a logger, bars, summaries and checkpoints of its own.

    Args:
        folder: what it writes goes below this.
        callbacks: run in the order given.
        arguments: of the Trainer, instead of these defaults.
    """
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    local = {"accelerator": "cpu", "devices": 1, "default_root_dir": folder, "enable_checkpointing": False}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(does not have many workers|log_every_n_steps).*")
        return Trainer(**{**quiet, **local, "callbacks": list(callbacks), **arguments})
