"""`make torture`: everything that is broken for real, two things at a time, and one table.

    python -m tests.torture            all of it, half an hour on two cores
    python -m tests.torture --short    a little of each, for continuous integration
    python -m tests.torture kills      one row

Exits with 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "torture.json"

# Growth of memory that counts as flat: below what a run of a week would notice.
_STEP_BYTES, _CALIBRATION_BYTES = 1_000, 50_000


@dataclass
class Row:
    """A line of the table.

    Args:
        what: what was done.
        tried: how often.
        how: figures, in words.
        lost: what did not survive, was not refused or was not as before.
        skipped: why it was not tried, if so.
    """

    what: str
    tried: int = 0
    how: str = ""
    lost: list[str] = field(default_factory=list)
    skipped: str = ""
    seconds: float = 0.0


def _disturbed(what: str, work: Callable[..., Any], *arguments: Any) -> Row:
    from tests.torture import runs

    runs.prepare()
    with tempfile.TemporaryDirectory() as folder:
        try:
            outcome = work(Path(folder), *arguments)
        except PermissionError as error:
            return Row(what, skipped=str(error))
    return Row(what, outcome.tried, f"{outcome.runs} runs finished, bit for bit as undisturbed", outcome.lost)


def kills(short: bool) -> Row:
    from tests.torture import runs

    what = "kill -9: calibration, rungs, training, checkpoints, export, report"
    return _disturbed(what, runs.kill, runs.RUN, 2 if short else 60, 0)


def sweeps(short: bool) -> Row:
    from tests.torture import runs

    return _disturbed("kill -9: a sweep", runs.kill, runs.SWEEP, 1 if short else 20, 1)


def shared(short: bool) -> Row:
    from tests.torture import runs

    return _disturbed("kill -9: two runs that share float network and statistics", runs.share, 1 if short else 20, 2)


def journals(short: bool) -> Row:
    from tests.torture.journals import journal

    row = _disturbed("kill -9: the worker that speaks to AI Hub", journal, 1 if short else 12, 3)
    row.how = row.how.replace("bit for bit as undisturbed", "nothing uploaded or submitted twice")
    return row


def stops(short: bool) -> Row:
    from tests.torture import runs

    return _disturbed("SIGTERM", runs.stop, runs.RUN, 1 if short else 15, 4)


def disks(short: bool) -> Row:
    from tests.torture import runs

    return _disturbed("full disks (tmpfs)", runs.fill, runs.RUN, 1 if short else 15)


def _endured(what: str, count: int, bound: int, unit: str, work: Callable[[int], Any]) -> Row:
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = work(count)
    lost = [f"{name} was not restored" for name in found.differences]
    if found.handles > 0:
        lost.append(f"{found.handles} files were left open")
    if found.slope > bound:
        lost.append(f"memory grew by {found.slope:.0f} bytes a {unit}, expected at most {bound}")
    return Row(what, count, f"{found.slope:+.0f} bytes a {unit}, {found.handles:+d} open files", lost)


def steps(short: bool) -> Row:
    from tests.torture import endurance

    count, bound = (100, 50 * _STEP_BYTES) if short else (2000, _STEP_BYTES)
    return _endured("training steps in one process", count, bound, "step", endurance.steps)


def calibrations(short: bool) -> Row:
    from tests.torture import endurance

    count = 20 if short else 100
    return _endured("calibrations in one process", count, _CALIBRATION_BYTES, "calibration", endurance.calibrations)


def _tests(what: str, how: str, *arguments: str) -> Row:
    """Tests of the suite, as rows: each is one try."""
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "--torture", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    counts = {name: int(number) for number, name in re.findall(r"(\d+) (passed|failed|error)", done.stdout)}
    lost = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode and not lost:
        lost = [done.stdout[-2000:] + done.stderr[-2000:]]
    return Row(what, sum(counts.values()), how, lost)


def files(short: bool) -> Row:
    return _tests("hostile and damaged files", "refused by file, field and reason", "tests/attacks")


def fuzzing(short: bool) -> Row:
    what = "files made up by a coverage-guided fuzzer"
    if importlib.util.find_spec("atheris") is None:
        return Row(what, skipped="atheris is not installed")
    with tempfile.TemporaryDirectory() as crashes:
        command = [sys.executable, "-m", "tests.attacks.fuzz", "--seconds", "120", "--crashes", crashes]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        lost = [path.read_text() for path in sorted(Path(crashes).glob("*.txt"))]
    if not done.stdout.strip():
        return Row(what, lost=[done.stderr[-2000:]])
    counts = json.loads(done.stdout.splitlines()[-1])
    how = (
        f"{counts['refused']} refused, {counts['accepted']} whole enough, {counts['branches_reached']} branches reached"
    )
    return Row(what, counts["executions"], how, lost)


def faults(short: bool) -> Row:
    return _tests("faults of AI Hub", "finished, or refused and resumed", "tests/deploy/targets/aihub")


def numbers(short: bool) -> Row:
    tests = ("simulation/test_odd_numbers.py", "simulation/test_grid_properties.py", "callbacks/test_finiteness.py")
    return _tests("odd numbers", "a right answer, or an error that names the place", *(f"tests/{one}" for one in tests))


def members(short: bool) -> Row:
    what = "members of families of which the suite has samples: compiled patterns, networks, emulated precisions"
    # those of AI Hub are among its faults
    return _tests(what, "as the samples", "-m", "torture", "tests", "--ignore=tests/deploy/targets/aihub")


ROWS: tuple[Callable[[bool], Row], ...] = (
    kills, sweeps, shared, journals, stops, disks, files, fuzzing, faults, numbers, members, steps,
    calibrations,
)  # fmt: skip
NOT_SHORT = (sweeps, shared, disks, files, fuzzing, faults, numbers, members)  # too long, or in the suite anyway


def _in_a_process(row: Callable[[bool], Row], short: bool) -> Row:
    """Each row in a process of its own: forks start from little, memory is measured from the beginning."""
    command = [sys.executable, "-m", "tests.torture", row.__name__, "--json", *(["--short"] if short else [])]
    start = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    found = Row(row.__name__, lost=[f"ended with {done.returncode}: {done.stderr[-2000:]}"])
    with contextlib.suppress(ValueError, IndexError, TypeError):
        found = Row(**json.loads(done.stdout.splitlines()[-1]))
    found.seconds = round(time.perf_counter() - start)
    print(f"{found.seconds:5.0f} s  {found.what}", file=sys.stderr)
    return found


def markdown(rows: list[Row]) -> str:
    """Return the table of docs/benchmarks/reliability.md."""
    cells = [[row.what, f"{row.tried:,}", row.how, str(len(row.lost))] for row in rows]
    heads = ["| what was done | times | outcome | lost |", "|" + " --- |" * 4]
    return "\n".join([*heads, *("| " + " | ".join(row) + " |" for row in cells)]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="row", help=", ".join(row.__name__ for row in ROWS))
    parser.add_argument("--short", action="store_true", help="a little of each")
    parser.add_argument("--json", action="store_true", help="one row, here, as JSON")
    given = parser.parse_args()
    short = [row for row in ROWS if not (given.short and row in NOT_SHORT)]
    chosen = [row for row in ROWS if row.__name__ in given.rows] or short
    if given.json:
        print(json.dumps(asdict(chosen[0](given.short))))
        return 0
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda row: _in_a_process(row, given.short), chosen))
    from rich.console import Console
    from rich.table import Table

    table = Table("what was done", "times", "outcome", "lost", title="Torture")
    for row in found:
        table.add_row(
            row.what, str(row.tried), f"not tried: {row.skipped}" if row.skipped else row.how, str(len(row.lost))
        )
    console = Console()
    console.print(table)
    for row in found:
        for line in row.lost:
            console.print(f"{row.what}: {line}", markup=False)
    if not given.rows and not given.short:
        RESULTS.write_text(json.dumps([asdict(row) for row in found], indent=2) + "\n")
        RESULTS.with_suffix(".md").write_text(markdown(found))
    return int(any(row.lost for row in found))


if __name__ == "__main__":
    sys.exit(main())
