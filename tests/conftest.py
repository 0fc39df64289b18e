"""Fixtures of the whole suite."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from tests.helpers.trainers import quiet_trainer

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that runs what is marked ``torture``."""
    parser.addoption("--torture", action="store_true", help="run what only `make torture` runs, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the files with the most slow tests first: begun late, one would keep one process busy and others idle."""
    if not config.getoption("--torture"):
        left_out = [item for item in items if item.get_closest_marker("torture")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


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
    return functools.partial(quiet_trainer, tmp_path)
