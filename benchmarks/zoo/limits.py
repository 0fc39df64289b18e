"""One measurement in a process of its own, with a deadline and a limit on memory."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.zoo.record import Record

# Imported once, in a process that the others are forked from: seconds for each measurement otherwise.
_PRELOADED = ["torch", "torchvision", "timm", "lightning.pytorch", "aimet_torch", "lightning_quant"]
# Seconds between two looks at the memory.
_LOOK = 0.25
# Seconds that a process may take to begin before its limit runs.
_LONGEST_START = 300.0

Measurement = Callable[[Record, Path], None]


def measured(function: Measurement, key: dict[str, str], limit_s: float, limit_gb: float) -> dict[str, Any]:
    """Run ``function`` in a process and return what it recorded, however it ended.

    Args:
        function: a module-level function; gets the record to fill and a folder that is removed afterwards.
        key: ``network``, ``by`` and ``precision``.
        limit_s: seconds after which it is killed, from when it begins.
        limit_gb: memory of it and its children, in 10^9 bytes, at which it is killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with tempfile.TemporaryDirectory(prefix="zoo-") as folder:
        path = Path(folder) / "record.json"
        process = context.Process(target=_run, args=(function, key, folder, limit_s, os.getpid()))
        process.start()
        assert process.pid is not None
        begin = time.perf_counter()  # the first one waits for what is preloaded
        while process.exitcode is None and not path.exists() and time.perf_counter() - begin < _LONGEST_START:
            process.join(_LOOK)
        started = time.perf_counter()
        peak, why = 0.0, None
        while process.exitcode is None:
            process.join(_LOOK)
            peak = max(peak, _gigabytes(process.pid))
            if time.perf_counter() - started > limit_s:
                why = {"type": "TimeLimit", "message": f"stopped after {limit_s:g} s"}
            elif peak > limit_gb:
                why = {"type": "MemoryLimit", "message": f"stopped at {peak:.1f} of {limit_gb:g} GB"}
            if why:
                _kill(process.pid)
                process.join()
                break
        if why is None and process.exitcode:
            code = process.exitcode
            name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            why = {"type": "Died", "message": f"the process ended with {name}"}
        line: dict[str, Any] = {**key, "passed": [], "errors": {}, "seconds": {}, "running": "build"}
        with contextlib.suppress(OSError):
            line = json.loads(path.read_text())
    if why:
        line["errors"][line["running"] or "build"] = why
    del line["running"]
    line["seconds"]["all"] = round(time.perf_counter() - started, 2)
    return {**line, "peak_gb": round(peak, 2)}


def _run(function: Measurement, key: dict[str, str], folder: str, limit_s: float, starter: int) -> None:
    threading.Thread(target=_end_with, args=(starter,), daemon=True).start()
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    os.chdir(folder)  # for what a library leaves in the current folder
    record = Record(Path(folder) / "record.json", key, limit_s)
    work = Path(folder) / "work"
    work.mkdir()
    try:
        function(record, work)
    except Exception as error:  # outside of any stage: of the zoo itself, and reported as such
        with record.stage("build"):
            raise error


def _end_with(starter: int) -> None:
    """End this process when the one that started it was killed; the emulator's ends when this one does."""
    while psutil.pid_exists(starter):
        time.sleep(1)
    os._exit(1)


def _gigabytes(pid: int) -> float:
    try:
        process = psutil.Process(pid)
        return sum(_resident(one) for one in (process, *process.children(recursive=True))) / 1e9
    except psutil.Error:
        return 0.0


def _resident(process: psutil.Process) -> float:
    with contextlib.suppress(psutil.Error):
        return float(process.memory_info().rss)
    return 0.0


def _kill(pid: int) -> None:
    """Kill a process and its children, those in sessions of their own as well."""
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
