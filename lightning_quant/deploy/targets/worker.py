"""Closed libraries and slow services run in a process of their own, which can be killed at a deadline."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lightning_quant import errors
from lightning_quant.errors import DeviceError, DeviceTimeoutError, LightningQuantError
from lightning_quant.utilities.files import atomic_write
from lightning_quant.utilities.parsing import parse_as, read_json

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")
J = TypeVar("J")

JOB, RESULT, ERROR, LOG = "job.json", "result.json", "error.json", "log.txt"


def run_worker(module: str, job: DataclassInstance, folder: Path, timeout: float, result: type[T]) -> T:
    """Run ``python -m module folder`` and return the result it leaves in ``folder``.

    Args:
        module: name of the worker's module; it calls :func:`serve`.
        job: what to do, a dataclass of JSON values.
        folder: for job, result and log; everything the worker prints goes to ``log.txt``.
        timeout: seconds after which it is killed.
        result: the dataclass of the result.

    Raises:
        LightningQuantError: of the type the worker raised, with its message.
        DeviceTimeoutError: when it was killed at the deadline.
        DeviceError: when it died, with the end of its log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in (RESULT, ERROR):
        (folder / name).unlink(missing_ok=True)
    (folder / JOB).write_text(json.dumps(asdict(job)))
    with (folder / LOG).open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(folder)],
            stdin=subprocess.PIPE,  # closes when this process ends, however it ends: see serve()
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # with all its children it can be killed
        )
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise DeviceTimeoutError(
                f"{_short(module)} did not finish within {timeout:g} s and was stopped. Give it more time "
                f"or fewer samples. The end of its log:\n{_tail(folder / LOG)}"
            ) from None
        finally:
            if process.poll() is None:  # at the deadline, or the user pressed Ctrl+C
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if (folder / ERROR).is_file():
        error = _read(folder / ERROR, dict[str, str])
        kind = getattr(errors, error.get("type", ""), None)
        known = isinstance(kind, type) and issubclass(kind, LightningQuantError)
        raise (kind if known and kind else DeviceError)(error.get("message", "no reason given"))
    if status != 0 or not (folder / RESULT).is_file():
        raise DeviceError(
            f"{_short(module)} died with exit status {status}{_signal_name(status)}. The end of its log:\n"
            f"{_tail(folder / LOG)}"
        )
    found: T = _read(folder / RESULT, result)
    return found


def _read(path: Path, kind: Any) -> Any:
    try:
        return parse_as(read_json(path), kind)
    except (OSError, ValueError) as error:
        raise DeviceError(f"{path.name} of a worker cannot be read: {error}. Run again.") from error


def serve(work: Callable[[J, Path], DataclassInstance], kind: type[J]) -> None:
    """Serve as a worker: call ``work(job, folder)`` and leave its result, or an error of this package, to the parent.

    The worker ends with its parent: an orphan would keep uploading while the next run does the same.

    Args:
        work: what to do with a job.
        kind: the dataclass of the job.
    """

    def end_with_the_parent() -> None:
        os.read(sys.stdin.fileno(), 1)
        os._exit(1)

    threading.Thread(target=end_with_the_parent, daemon=True).start()
    folder = Path(sys.argv[1])
    try:
        result = work(parse_as(read_json(folder / JOB), kind), folder)
    except LightningQuantError as error:
        _write(folder / ERROR, {"type": type(error).__name__, "message": str(error)})
    else:
        _write(folder / RESULT, asdict(result))


def _write(path: Path, values: dict[str, Any]) -> None:
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(values))


def _short(module: str) -> str:
    return ".".join(module.split(".")[-2:])


def _signal_name(status: int) -> str:
    return f" ({signal.Signals(-status).name})" if status < 0 else ""


def _tail(path: Path, lines: int = 12) -> str:
    text = re.sub(r"\x1b\[[0-9;]*m", "", path.read_text(errors="replace"))
    return "\n".join(text.splitlines()[-lines:])
