"""Writing files so that nobody ever sees half of one, and no two processes write the same."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lightning_quant.errors import ConfigurationError


def check_folder(path: str | Path | None, argument: str) -> None:
    """Refuse a folder that can be neither made nor written to, before there is something to write.

    Args:
        path: the folder; ``None`` is not refused.
        argument: the name of the argument that it is.

    Raises:
        ConfigurationError: naming the argument.
    """
    if path is None:
        return
    there = Path(path).absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise ConfigurationError(f"{argument}={str(path)!r}: {there} is a file, expected a folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigurationError(f"{argument}={str(path)!r}: {there} may not be written to, expected one that may.")


@contextmanager
def atomic_write(path: Path, private: bool = False) -> Iterator[Path]:
    """Yield a path next to ``path`` to write to; move it there when the block ends well, and remove it otherwise.

    So after a kill or on a full disk ``path`` is what it was before. The folder is made if it is missing. The ending
    of the name stays, since some libraries go by it.

    Args:
        path: the file to write or replace.
        private: make it readable by its owner only.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        if private:
            os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def exclusive_lock(lock: Path, otherwise: Exception) -> Iterator[None]:
    """Hold a lock file for the length of a block, then remove it.

    The system releases it when the process ends, however it ends; a file that a kill leaves there locks nothing.

    Raises:
        Exception: ``otherwise``, if it is held already.
        OSError: where it cannot be made.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(lock, timeout=0)
    try:
        held.acquire()
    except Timeout:
        raise otherwise from None
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        held.release()
