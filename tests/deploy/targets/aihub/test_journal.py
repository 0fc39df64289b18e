"""What was asked of AI Hub and what it returned, on disk."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from lightning_quant.deploy.targets.aihub.journal import Journal
from lightning_quant.errors import DeviceError


def test_the_journal_is_private_and_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    path = tmp_path / "journal.json"
    journal = Journal(path)
    journal.note("a", state="asked")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Journal(path).entry("a") == {"state": "asked"}
    journal.begin_again("a")
    assert Journal(path).entry("a") == {"attempt": 2}
    assert Journal(path).entry("b") == {}
    path.write_text("{")
    with pytest.raises(DeviceError, match="move it away to start over"):
        Journal(path)
