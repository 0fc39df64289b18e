"""The command line as a user runs it: in a folder of their own, in a process of its own.

Importing PyTorch, AIMET and the rest takes as long as a small run. So a server does it once and forks for each run;
``fresh=True`` starts Python instead, for what importing could change.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import multiprocessing.context
import multiprocessing.forkserver
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SMALL = [
    "data.train=16",
    "data.val=8",
    "data.height=64",
    "data.width=128",
    "float.epochs=1",
    "qat.epochs=1",
    "ladder.rungs=[ptq]",
    "ladder.max_drop=-10",  # never good enough: what rounding costs a hardly trained network is luck
    "quantizer.calibration_samples=8",
    "overlays=1",
    "target.samples=2",
    "trainer.enable_progress_bar=false",
]
# The same without pictures and a device, which take longer than the rest of a run.
QUICK = [
    *(one for one in SMALL if not one.startswith(("overlays", "target."))),
    "overlays=0",
    "report.samples=0",
    "target=none",
]
_VARIABLES = {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
_TIMEOUT_S = 600


@functools.cache
def _server() -> multiprocessing.context.ForkServerContext:
    """Return the server that forks runs, started again: Python has one for a process, and the zoo may have started it.

    What that has imported sets up logging in another way than a run does.
    """
    multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]  # there is no public way
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.app_imports"])
    return context


def lightning_quant(folder: Path, *arguments: str, status: int = 0, fresh: bool = False) -> str:
    """Run the app in ``folder``; return its terminal output."""
    if fresh:
        done = subprocess.run(
            [sys.executable, "-m", "lightning_quant", *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            env={**os.environ, **_VARIABLES},
            check=False,
        )
        output, code = done.stdout + done.stderr, done.returncode
    else:
        with tempfile.TemporaryDirectory() as terminal:
            streams = [Path(terminal, name) for name in ("stdout", "stderr")]
            process = _server().Process(target=_run, args=(folder, arguments, dict(os.environ), streams))
            process.start()
            process.join(_TIMEOUT_S)
            if process.exitcode is None:
                process.kill()
            output = "".join(stream.read_text() for stream in streams)
            code = process.exitcode
    assert code == status, output
    return output


def _run(folder: Path, arguments: tuple[str, ...], variables: dict[str, str], streams: list[Path]) -> None:
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(variables, **_VARIABLES)
    os.chdir(folder)
    logging.getLogger().handlers.clear()  # what the imports needed: a new process has none
    sys.argv = ["lightning-quant", *arguments]
    from lightning_quant.cli import app

    app.main()
