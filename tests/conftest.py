"""Fixtures of the whole suite."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def camvid() -> Path:
    """Real street photographs in Cityscapes layout (research data, not part of the repository)."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data" / "camvid"
    path = Path(os.environ.get("LIGHTNING_QUANT_CAMVID", beside))
    if not path.is_dir():
        pytest.skip("needs the CamVid photographs: set LIGHTNING_QUANT_CAMVID to their folder")
    return path


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """Makes quiet Trainers on one CPU that write below ``tmp_path`` only."""

    def make(*callbacks: Any, **arguments: Any) -> Trainer:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        local = {"accelerator": "cpu", "devices": 1, "default_root_dir": tmp_path, "enable_checkpointing": False}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(does not have many workers|log_every_n_steps).*")
            return Trainer(**{**quiet, **local, "callbacks": list(callbacks), **arguments})

    return make
