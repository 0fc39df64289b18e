"""Genuine files, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.attacks.readers import make_genuine


@pytest.fixture(scope="session")
def genuine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a genuine file for each reader."""
    folder = tmp_path_factory.mktemp("genuine")
    make_genuine(folder)
    return folder
