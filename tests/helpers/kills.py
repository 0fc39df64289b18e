"""Work in forked children that are killed at a chosen moment: before one of the changes they make to files.

Moments are counted by Python's audit events, not by the clock, so the same number is the same moment on any machine.
Forking keeps the seconds of importing AIMET out of every attempt.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate")


def _changes_files(event: str, arguments: tuple[Any, ...]) -> bool:
    if event == "open" and isinstance(arguments[2], int):
        return bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) and "/dev/" not in str(arguments[0])
    return event in _CHANGES


def child(work: Callable[[], object], dies_at: int | None = None) -> int:
    """Fork and run ``work`` in the child, which kills itself before its ``dies_at``-th change of a file; its id."""
    pid = os.fork()
    if pid:
        return pid
    status, seen, parent = 1, 0, os.getpid()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if _changes_files(event, arguments) and os.getpid() == parent:
            seen += 1
            if seen == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.addaudithook(hook)
        work()
        status = 0
    finally:
        os._exit(status)
    raise AssertionError


def moments(work: Callable[[], object]) -> int:
    """How many changes of files ``work`` makes, counted in a child."""
    reading, writing = os.pipe()

    def counted() -> None:
        seen = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            seen += _changes_files(event, arguments)

        sys.addaudithook(hook)
        work()
        os.write(writing, str(seen).encode())

    pid = child(counted)
    os.close(writing)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    assert status == 0, status
    return int(answer)
