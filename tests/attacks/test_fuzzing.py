"""Documents with anything anywhere, and files with anything flipped: read or refused, nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.attacks.attack import MARKER
from tests.attacks.json_attacks import as_json, paths_in, replaced, without
from tests.attacks.readers import READERS, attacked, outcome

pytestmark = pytest.mark.slow

JSON = [name for name, reader in READERS.items() if reader.file.endswith(".json")]
BINARY = [name for name in READERS if name not in JSON]

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def read(genuine: Path, work: Path, name: str, data: bytes) -> None:
    """Read a damaged file: fails if anything but the reader's own error comes of it."""
    reader = READERS[name]
    error = outcome(reader, attacked(genuine, work, reader, data))
    assert reader.error is None or error is None or isinstance(error, reader.error)
    assert not MARKER.exists()


def examples(name: str) -> int:
    return 8 if READERS[name].slow else 60


@pytest.mark.parametrize("name", JSON)
def test_documents(genuine: Path, tmp_path: Path, name: str) -> None:
    content: Any = json.loads((genuine / READERS[name].file).read_text())
    places = list(paths_in(content))

    @settings(max_examples=examples(name), deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(data=st.data())
    def mutate(data: st.DataObject) -> None:
        changed = content
        for _ in range(data.draw(st.integers(1, 3))):
            place = data.draw(st.sampled_from(places))
            value = data.draw(ANYTHING)
            how = data.draw(st.sampled_from(("replace", "remove", "add")))
            try:
                if how == "replace" or not place:
                    changed = replaced(changed, place, value)
                elif how == "remove":
                    changed = without(changed, place)
                else:
                    changed = replaced(changed, (*place[:-1], data.draw(st.text(max_size=8))), value)
            except (KeyError, IndexError, TypeError):  # an earlier change took the place away
                continue
        read(genuine, tmp_path, name, as_json(changed))

    mutate()


@pytest.mark.parametrize("name", BINARY)
def test_bytes(genuine: Path, tmp_path: Path, name: str) -> None:
    whole = (genuine / READERS[name].file).read_bytes()

    @settings(max_examples=examples(name), deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(
        flips=st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=4),
        end=st.integers(0, len(whole)) | st.just(len(whole)),
    )
    def mutate(flips: list[tuple[int, int]], end: int) -> None:
        changed = bytearray(whole)
        for at, value in flips:
            changed[at] = value
        read(genuine, tmp_path, name, bytes(changed[:end]))

    mutate()
