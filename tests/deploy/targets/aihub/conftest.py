"""A stand-in for AI Hub at the end of the default configuration."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.aihub.standin import StandIn

TOKEN = "t0ken-that-must-not-be-found-anywhere"
IMPATIENT = Path(__file__).resolve().parents[3] / "aihub" / "impatient"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A stand-in that the default configuration leads to; the worker's delays are short."""
    root = IMPATIENT.parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{IMPATIENT}{os.pathsep}{root}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("NETRC", os.devnull)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with StandIn(tmp_path / "hub", TOKEN, part_size=4096) as hub:
        monkeypatch.setenv("QAIHUB_CLIENT_INI", str(hub.write_ini(tmp_path / "secret" / "client.ini")))
        yield hub
