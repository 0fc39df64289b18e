"""What is known of one network through one tool at one precision: filled stage by stage, one JSON line at the end."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_quant.utilities.files import atomic_write

RESULTS = Path(__file__).parents[1] / "results"
OURS, PLAIN = "lightning_quant", "aimet"
FILES = {OURS: RESULTS / "zoo.jsonl", PLAIN: RESULTS / "zoo-aimet.jsonl"}
# In this order. What is not asked for at a precision is neither passed nor failed.
STAGES = {
    OURS: ("build", "ptq", "qat", "save", "load", "export", "emulator"),
    PLAIN: ("build", "prepare", "fold", "simulate", "calibrate", "qat", "export", "emulator"),
}
# PSNR in dB of the emulated NPU against the simulation below which its output has nothing to do with it.
GARBAGE_DB = 10.0
# Seconds before the deadline at which a stage that can end by itself shall: what it found is still to be written.
_MARGIN_S = 10.0
# Plain AIMET continues with the unchanged network where these fail.
_NEEDLESS = ("prepare", "fold")
_LONGEST_MESSAGE = 400


class Record:
    """The values of one measurement, written to a file after every stage so that a killed process leaves them.

    Args:
        path: the file.
        key: ``network``, ``by`` and ``precision``.
        limit_s: seconds from now after which the process is killed.
    """

    def __init__(self, path: Path, key: Mapping[str, str], limit_s: float) -> None:
        self.path = path
        self._deadline = time.perf_counter() + limit_s
        self.values: dict[str, Any] = {**key, "passed": [], "errors": {}, "seconds": {}, "running": None}
        self.write()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Run a block as a stage. Its error is kept, not raised: ask :meth:`passed` whether to continue."""
        self.values["running"] = name
        self.write()
        started = time.perf_counter()
        try:
            yield
        except Exception as error:  # whatever a network or a library raises is a result here
            self.values["errors"][name] = described(error)
        else:
            self.values["passed"].append(name)
        self.values["running"] = None
        self.values["seconds"].setdefault(name, round(time.perf_counter() - started, 2))
        self.write()

    @property
    def left_s(self) -> float:
        """Seconds that a stage may take which ends by itself, at least one."""
        return max(self._deadline - time.perf_counter() - _MARGIN_S, 1.0)

    def passed(self, name: str) -> bool:
        return name in self.values["passed"]

    def write(self) -> None:
        """Keep what is known so far; every stage does so at its start and end."""
        with atomic_write(self.path) as partial:
            partial.write_text(json.dumps(self.values))


def described(error: BaseException) -> dict[str, str]:
    """Type and message of an error, short enough for a line."""
    message = re.sub(r"/\S*/(zoo-\w+|site-packages)/", "", " ".join(str(error).split()))  # where it ran
    return {"type": type(error).__name__, "message": message[:_LONGEST_MESSAGE]}


def reached(line: Mapping[str, Any]) -> str:
    """The last stage before the first that stopped it; ``""`` when the first one did."""
    last, end = "", stopped(line)
    for stage in STAGES[line["by"]]:
        if stage == end:
            break
        last = stage if stage in line["passed"] else last
    return last


def stopped(line: Mapping[str, Any]) -> str | None:
    """The first stage whose failure ended a network's way, if one did."""
    needless = _NEEDLESS if line["by"] == PLAIN else ()
    return next((stage for stage in STAGES[line["by"]] if stage in line["errors"] and stage not in needless), None)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a results file, of each measurement the newest; none when there is no file."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for text in path.read_text().splitlines() if path.is_file() else []:
        line = json.loads(text)
        found[line["network"], line["precision"]] = line
    return list(found.values())


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Add a line; a kill in between leaves at most a line that is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def emulated(line: Mapping[str, Any]) -> bool:
    """Whether the NPU's compiler took the exported file and its emulator computed the samples."""
    return "emulator" in line["passed"]


def all_the_way(line: Mapping[str, Any]) -> bool:
    """Whether every stage passed that is needed, and nothing on the device computes in float or on the CPU."""
    return emulated(line) and stopped(line) is None and not line["islands"] and not line["cpu"]


def garbage(line: Mapping[str, Any]) -> bool:
    """Whether the emulated NPU computed something else altogether."""
    value = line["emulated"]["psnr_db"] if emulated(line) else None
    return value is not None and value < GARBAGE_DB
