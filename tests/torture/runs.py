"""Runs of the app in forked children that are killed, stopped or short of space, and what they left behind."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from lightning_quant.cli import app  # so that children have it already
from lightning_quant.report.record import RunRecord
from tests.helpers.kills import child, moments
from tests.helpers.networks import Body, calibrated

# Every stage, and one of each kind of rung, on a network small enough to be killed often.
RUN = (
    "data.train=16", "data.val=8", "data.height=64", "data.width=128", "quantizer.calibration_samples=8",
    "float.epochs=3", "qat.epochs=3", "ladder.rungs=[ptq,percentile,bias_correction,seq_mse]", "ladder.max_drop=-10",
    "precision=w4a16", "overlays=1", "target=onnxruntime", "target.samples=2", "report.samples=1",
    "report.sensitivity_samples=1", "trainer.enable_progress_bar=false", "trainer.log_every_n_steps=1",
    "hydra.run.dir=run", "skip_finished=true",
)  # fmt: skip

# The same but for two precisions, one after the other.
SWEEP = (
    "-m", "precision=w8a8,w4a16", "hydra.sweep.dir=run",
    *(one for one in RUN if not one.startswith(("precision=", "hydra.run.dir="))),
)  # fmt: skip


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
            rungs = [(rung.rung, rung.metric, rung.kept) for rung in (record.ladder.rungs if record.ladder else [])]
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
    """What became of runs that were disturbed.

    Args:
        tried: how many kills, stops or full disks there were.
        runs: how many runs were resumed until their end.
        lost: what differed from an undisturbed run, or was half-written.
    """

    tried: int = 0
    runs: int = 0
    lost: list[str] = field(default_factory=list)


class Undisturbed:
    """A run that nothing happened to.

    Args:
        root: an empty folder for it and those that are compared with it.
        arguments: of the app.
    """

    def __init__(self, root: Path, arguments: tuple[str, ...]) -> None:
        self.root, self.arguments = root, arguments
        start = time.perf_counter()
        self.changes = moments(lightning_quant(root / "whole", *arguments))
        self.seconds = time.perf_counter() - start
        self.result = result(root / "whole")

    def compare(self, folder: Path, status: int) -> list[str]:
        """What a run in ``folder`` that ended with ``status`` lost."""
        lost = [f"{folder.name}: {change}" for change in differences(self.result, result(folder))]
        return lost if status == 0 else [f"{folder.name} ended with {status}: {last_line(folder)}", *lost]


def kill(root: Path, arguments: tuple[str, ...], kills: int, seed: int) -> Outcome:
    """Kill runs again and again, resuming each until it is finished, and compare with an undisturbed one.

    Half of the moments are before a change of a file, the other half anywhere in time.
    """
    whole, chosen, outcome = Undisturbed(root, arguments), random.Random(seed), Outcome()
    while outcome.tried < kills:
        folder = root / f"run-{outcome.runs}"
        status = -signal.SIGKILL
        while status == -signal.SIGKILL:
            if chosen.random() < 0.5:
                status = ended(child(lightning_quant(folder, *arguments), dies_at=chosen.randint(1, whole.changes)))
            else:
                pid = child(lightning_quant(folder, *arguments))
                status = signaled(pid, signal.SIGKILL, chosen.uniform(0, whole.seconds))
            outcome.tried += status == -signal.SIGKILL
        outcome.runs += 1
        outcome.lost += whole.compare(folder, status)
    return outcome


def stop(root: Path, arguments: tuple[str, ...], stops: int, seed: int) -> Outcome:
    """The same with SIGTERM: what Lightning does with it, and elsewhere the end of the process."""
    whole, chosen, outcome = Undisturbed(root, arguments), random.Random(seed), Outcome()
    stopped = (128 + signal.SIGTERM, -signal.SIGTERM)
    while outcome.tried < stops:
        folder = root / f"run-{outcome.runs}"
        status = stopped[0]
        while status in stopped:
            pid = child(lightning_quant(folder, *arguments))
            status = signaled(pid, signal.SIGTERM, chosen.uniform(0, whole.seconds))
            outcome.tried += status in stopped
        outcome.runs += 1
        outcome.lost += whole.compare(folder, status)
    return outcome


def fill(root: Path, arguments: tuple[str, ...], disks: int) -> Outcome:
    """Runs on disks that are too small by more and more, then resumed on larger ones. Needs to mount a tmpfs."""
    whole, outcome = Undisturbed(root, arguments), Outcome()
    needed = sum(path.stat().st_size for path in (root / "whole").rglob("*") if path.is_file())
    for index in range(disks):
        folder = root / f"disk-{index}"
        folder.mkdir()
        size = int(needed * (index + 0.5) / disks)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
            raise PermissionError("no tmpfs can be mounted here")
        try:
            status = ended(child(lightning_quant(folder, *arguments)))
            outcome.tried += 1
            if status != 1 or "Traceback" in (folder / "terminal").read_text():
                outcome.lost.append(f"{folder.name}, {size} of {needed} bytes: {status}, {last_line(folder)}")
            subprocess.run(["mount", "-o", f"remount,size={4 * needed}", folder], check=True)
            outcome.lost += whole.compare(folder, ended(child(lightning_quant(folder, *arguments))))
            outcome.runs += 1
        finally:
            subprocess.run(["umount", folder], check=True)
    return outcome


def share(root: Path, kills: int, seed: int) -> Outcome:
    """Kill two runs that work at the same time with the same data, float network and cache of statistics."""
    common = [one for one in RUN if not one.startswith(("precision=", "hydra.run.dir="))]
    pair = [(*common, f"precision={name}", f"hydra.run.dir={name}") for name in ("w8a8", "w4a16")]
    whole = Undisturbed(root, pair[0])
    assert ended(child(lightning_quant(root / "whole", *pair[1]))) == 0
    whole.result = result(root / "whole")
    chosen, outcome = random.Random(seed), Outcome()
    while outcome.tried < kills:
        folder = root / f"run-{outcome.runs}"
        open_ones = set(pair)
        while open_ones:
            pids = {child(lightning_quant(folder, *one)): one for one in sorted(open_ones)}
            timers = [threading.Timer(chosen.uniform(0, whole.seconds), os.kill, (pid, signal.SIGKILL)) for pid in pids]
            for timer in timers:
                timer.start()
            for (pid, one), timer in zip(pids.items(), timers, strict=True):
                status = ended(pid)
                timer.cancel()
                if status == -signal.SIGKILL:
                    outcome.tried += 1
                else:
                    open_ones.remove(one)
                    outcome.lost += [] if status == 0 else [f"{folder.name} ended with {status}: {last_line(folder)}"]
        outcome.runs += 1
        outcome.lost += whole.compare(folder, 0)
    return outcome


def signaled(pid: int, number: int, delay: float) -> int:
    """Send a child a signal after ``delay`` seconds, if it still runs; its exit status."""
    timer = threading.Timer(delay, os.kill, (pid, number))
    timer.start()
    try:
        return ended(pid)
    finally:
        timer.cancel()


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
