"""Hostile and damaged files, reader by reader: refused by name, or read; no code, no bombs, no stray files."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from lightning_quant.utilities.memory import PeakMemory
from tests.attacks.attack import MARKER, Attack
from tests.attacks.corpus import corpus
from tests.attacks.readers import READERS, attacked, outcome

pytestmark = pytest.mark.slow

# Far more than any of the files has, far less than any of the bombs unfolds to.
MOST_BYTES = 400 * 2**20


@pytest.mark.parametrize("name", READERS)
def test_genuine_files_are_read(genuine: Path, tmp_path: Path, name: str) -> None:
    reader = READERS[name]
    folder = attacked(genuine, tmp_path, reader, (genuine / reader.file).read_bytes())
    assert outcome(reader, folder) is None


@pytest.mark.parametrize("name", READERS)
def test_hostile_files(
    genuine: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    reader = READERS[name]
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.WARNING)
    tried = refused = 0
    wrong = []
    with PeakMemory() as memory:
        resident = memory.stop() or 0
        for attack in corpus(name, (genuine / reader.file).read_bytes(), reader.slow):
            caplog.clear()
            folder = attacked(genuine, tmp_path, reader, attack.data)
            try:
                error = outcome(reader, folder)
            except Exception as escaped:
                wrong.append(f"{attack.name}: {type(escaped).__name__}: {escaped!s:.300}")
                continue
            said = caplog.text if reader.error is None else str(error or "")
            tried, refused = tried + 1, refused + bool(said)
            if reader.error and error and not isinstance(error, reader.error):
                wrong.append(f"{attack.name}: {type(error).__name__} instead of {reader.error.__name__}: {error}")
            if (missing := unnamed(attack, said, folder / reader.file)) is not None:
                wrong.append(f"{attack.name}: {missing!r} is not named in {said[:400]!r}")
            if MARKER.exists() or os.listdir(tmp_path) != ["inside"]:
                wrong.append(f"{attack.name}: left {os.listdir(tmp_path)}")
                MARKER.unlink(missing_ok=True)
    assert not wrong, "\n".join(wrong)
    if memory.peak_bytes is not None:
        assert memory.peak_bytes - resident < MOST_BYTES
    print(f"{name}: {refused} of {tried} refused")
    assert refused > 0


def unnamed(attack: Attack, said: str, file: Path) -> str | None:
    """What a refusal does not name: the file (or the folder it is a part of), or the field."""
    if attack.field is None and not said:
        return None
    if file.name not in said and str(file.parent) not in said:
        return file.name
    return None if (attack.field or "") in said else attack.field
