"""Runs of the app in forked children that are killed, stopped or short of space, and what they left behind."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from lightning_quant import app, pipeline  # noqa: F401  # so that children have it already
from lightning_quant.report.record import RunRecord
from tests.kills import child, moments
from tests.simulation.networks import Body, calibrated

# Every stage, and one of each kind of rung, on a network small enough to be killed often.
RUN = (
    "data.train=16", "data.val=8", "data.height=64", "data.width=128", "quantizer.calibration_samples=8",
    "float.epochs=3", "qat.epochs=3", "ladder.rungs=[ptq,percentile,bias_correction,seq_mse]", "ladder.max_drop=-10",
    "precision=w4a16", "overlays=1", "target=onnxruntime", "target.samples=2", "report.samples=1",
    "report.sensitivity_samples=1", "trainer.enable_progress_bar=false", "trainer.log_every_n_steps=1",
    "hydra.run.dir=run", "skip_finished=true",
)  # fmt: skip

# The same but for two precisions, one after the other.
SWEEP = (*RUN[:-2], "-m", "precision=w8a8,w4a16", "hydra.sweep.dir=run", "skip_finished=true")


def prepare() -> None:
    """Load all that is slow, so that children start with it."""
    torch.set_num_threads(1)
    calibrated(Body(), precision="w4a16")


def lightning_quant(folder: Path, *arguments: str) -> Callable[[], None]:
    """The app as a user runs it in ``folder``; what it prints goes to the file ``terminal``."""

    def work() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
        terminal = os.open("terminal", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(terminal, 1)
        os.dup2(terminal, 2)
        logging.getLogger().handlers.clear()
        sys.argv = ["lightning-quant", *arguments]
        try:
            app.main()
        except SystemExit as end:
            os._exit(int(end.code or 0))

    return work


def ended(pid: int) -> int:
    """Wait for a child; its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def result(folder: Path) -> dict[str, str]:
    """What must be the same bit for bit, in all runs below ``folder``: hashes by name.

    Weights and ranges, the exported files, the metrics, the pictures; not times, and not the peak of memory.
    """
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or "/." in f"/{name}" or name.endswith((".lock", "terminal")):
            continue  # what is not under a final name
        if path.suffix == ".ckpt":
            content = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
            tensors = sorted((key, value) for key, value in content.items() if isinstance(value, torch.Tensor))
            found[name] = _digest(*(key.encode() + value.numpy().tobytes() for key, value in tensors))
        elif path.name == "results.json":
            record = RunRecord.read(path)
            rungs = [(rung["rung"], rung["metric"], rung["kept"]) for rung in record.ladder["rungs"]]
            found[name] = _digest(repr((record.status, record.metric, record.exported, record.bytes, rungs)).encode())
        elif path.suffix == ".png":
            with Image.open(path) as image:
                found[name] = _digest(image.tobytes())
        elif path.suffix in (".onnx", ".encodings", ".npz") or path.name in ("manifest.json", "layers.json"):
            found[name] = _digest(path.read_bytes())
        elif path.suffix == ".json":
            json.loads(path.read_text())
            found[name] = "whole"
    return found


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


@dataclass
class Outcome:
    """Kills of one kind of run.

    Args:
        kills: how many there were.
        runs: how many runs were gone on with until their end.
        lost: what differed from an undisturbed run, or was half-written.
        moments: for each kill, the last line that the run had written to its log.
    """

    kills: int = 0
    runs: int = 0
    lost: list[str] = field(default_factory=list)
    moments: list[str] = field(default_factory=list)


def kill(root: Path, arguments: tuple[str, ...], kills: int, seed: int) -> Outcome:
    """Kill runs again and again, going on with each until it is finished, and compare with an undisturbed one.

    Half of the moments are before a change of a file, the other half anywhere in time.
    """
    start = time.perf_counter()
    whole = root / "whole"
    total = moments(lightning_quant(whole, *arguments))
    seconds = time.perf_counter() - start
    expected = result(whole)
    chosen, outcome = random.Random(seed), Outcome()
    while outcome.kills < kills:
        folder = root / f"run-{outcome.runs}"
        status = -signal.SIGKILL
        while status == -signal.SIGKILL:
            if chosen.random() < 0.5:
                pid = child(lightning_quant(folder, *arguments), dies_at=chosen.randint(1, total))
                status = ended(pid)
            else:
                pid = child(lightning_quant(folder, *arguments))
                timer = threading.Timer(chosen.uniform(0, seconds), os.kill, (pid, signal.SIGKILL))
                timer.start()
                status = ended(pid)
                timer.cancel()
            if status == -signal.SIGKILL:
                outcome.kills += 1
                outcome.moments.append(last_line(folder))
        outcome.runs += 1
        if status != 0:
            outcome.lost.append(f"{folder.name} ended with {status}: {last_line(folder)}")
        outcome.lost += [f"{folder.name}: {change}" for change in differences(expected, result(folder))]
    return outcome


def last_line(folder: Path) -> str:
    terminal = folder / "terminal"
    lines = terminal.read_text().splitlines() if terminal.is_file() else []
    return lines[-1] if lines else ""


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    names = sorted(expected.keys() | found.keys())
    return [
        f"{name}: {'missing' if name not in found else 'new' if name not in expected else 'differs'}"
        for name in names
        if expected.get(name) != found.get(name)
    ]
