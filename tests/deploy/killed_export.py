"""Run by test_export.py in a process of its own: exports that are killed or run out of space, in forked children.

Prints one JSON line per attempt.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from functools import partial
from pathlib import Path

import torch

torch.set_num_threads(1)

from lightning_quant.deploy import export  # noqa: E402
from lightning_quant.deploy.bundle import load_bundle  # noqa: E402
from lightning_quant.errors import ExportError  # noqa: E402
from tests.helpers.kills import child, moments  # noqa: E402
from tests.helpers.networks import Body, calibrated, call, images  # noqa: E402


def state(path: Path) -> str:
    """What is there under the final name: nothing, the complete old or new bundle, or something broken."""
    if not path.exists():
        return "nothing"
    try:
        return str(load_bundle(path).manifest.precision)
    except ExportError as error:
        return f"broken: {error}"


def report(kind: str, path: Path, before: str, pid: int, **more: object) -> None:
    _, status = os.waitpid(pid, 0)
    leftovers = sorted(file.name for file in path.parent.iterdir() if file != path)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
    record = {"kind": kind, "before": before, "after": state(path), "killed": killed, "code": code}
    print(json.dumps({**record, "leftovers": leftovers, **more}), flush=True)


def main(root: Path) -> None:
    old = calibrated(Body(), precision="w8a8")
    new = calibrated(Body(), precision="w8a16")
    samples = [call(images(2))]
    export.export_bundle(old, root / "warm" / "net", samples)

    def prepare(kind: str, before: str) -> Path:
        path = root / kind / "net"
        path.parent.mkdir(parents=True)
        if before != "nothing":
            export.export_bundle(old, path, samples)
        return path

    # at moments spread over the whole export
    totals = {}
    for before in ("nothing", "w8a8"):
        totals[before] = moments(partial(export.export_bundle, new, prepare(f"counted-{before}", before), samples))
    for index in range(8):
        before = ("nothing", "w8a8")[index % 2]
        path = prepare(f"moment{index}", before)
        work = partial(export.export_bundle, new, path, samples)
        report("moment", path, before, child(work, dies_at=1 + index * totals[before] // 8))

    # right before and right after each rename
    for index, moment in enumerate(("before", "after") * 2):
        path = prepare(f"rename{index}", "w8a8")

        def work(path: Path = path, moment: str = moment, which: int = index // 2) -> None:
            real, calls = os.replace, []

            def replace(*args: object) -> None:
                calls.append(args)
                if len(calls) == which + 1 and moment == "before":
                    os.kill(os.getpid(), signal.SIGKILL)
                real(*args)  # type: ignore[arg-type]
                if len(calls) == which + 1:
                    os.kill(os.getpid(), signal.SIGKILL)

            os.replace = replace  # type: ignore[assignment]
            export.export_bundle(new, path, samples)

        report("rename", path, "w8a8", child(work), moment=f"{moment} {index // 2}")

    # no file may grow beyond a limit: the first, the second … file fails
    sizes = [file.stat().st_size for file in (root / "warm" / "net").rglob("*") if file.is_file()]
    for index, limit in enumerate([0, *(size - 1 for size in sorted(sizes))]):
        before = ("w8a8", "nothing")[index % 2]
        path = prepare(f"full{index}", before)

        def work(path: Path = path, limit: int = limit) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                export.export_bundle(new, path, samples)
            except ExportError as error:
                os._exit(17 if "File too large" in str(error) else 18)

        report("full", path, before, child(work), limit=limit)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
