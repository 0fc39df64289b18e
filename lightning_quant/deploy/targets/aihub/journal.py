"""What was asked of a service and what it returned, on disk the moment it is known."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lightning_quant.errors import DeviceError
from lightning_quant.utilities.files import atomic_write
from lightning_quant.utilities.parsing import check, check_version, parse_as, read_json

_FORMAT_VERSION = 1


class Journal:
    """Entries by key, each a few plain values; every change is on disk before :meth:`note` returns.

    So after a crash, a kill or a lost connection the next run knows what exists already. It holds ids and
    links, never a token; the file is readable by its owner only.

    Args:
        path: the file; made with the first entry.

    Raises:
        DeviceError: when the file is there and cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[str, dict[str, Any]] = {}
        if path.is_file():
            try:
                content = read_json(path)
                check_version(content, _FORMAT_VERSION)
                self._entries = parse_as(content.get("entries"), dict[str, dict[str, Any]], "entries")
                for key, entry in self._entries.items():
                    for name, value in entry.items():
                        where = f"entries.{key}.{name}"
                        parse_as(value, int if name == "attempt" else str, where)
                        check(name != "attempt" or value > 0, where, value, "a number above 0")
            except (OSError, ValueError) as error:
                raise DeviceError(
                    f"The journal {path} cannot be read ({error}). It says what was uploaded and submitted already: "
                    "move it away to start over."
                ) from error

    def entry(self, key: str) -> dict[str, Any]:
        """Return a copy of an entry; an empty one if there is none."""
        return dict(self._entries.get(key, {}))

    def note(self, key: str, **values: Any) -> None:
        """Add values to an entry and write the file, if they are new."""
        entry = {**self._entries.get(key, {}), **values}
        if entry != self._entries.get(key):
            self._entries[key] = entry
            self._write()

    def begin_again(self, key: str) -> None:
        """Forget an entry whose job failed or vanished; the next attempt gets a name of its own."""
        self._entries[key] = {"attempt": self._entries.get(key, {}).get("attempt", 1) + 1}
        self._write()

    def _write(self) -> None:
        with atomic_write(self.path, private=True) as partial, partial.open("w") as file:
            json.dump({"format_version": _FORMAT_VERSION, "entries": self._entries}, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
