"""The worker that speaks to AI Hub, killed between any two of its steps."""

from __future__ import annotations

import os
import random
from pathlib import Path

from lightning_quant.deploy.push import Push
from lightning_quant.errors import DeviceError
from tests.aihub.standin import StandIn
from tests.deploy.targets.aihub.conftest import IMPATIENT
from tests.deploy.targets.aihub.test_target import S24, samples_and_bundle
from tests.torture.runs import Outcome


def journal(root: Path, kills: int, seed: int) -> Outcome:
    """Kill pushes and resume each until it is finished: nothing is made twice, all come to the same figures.

    The moments are those after the worker has written its journal, and those when the service has made something that
    the journal does not know of yet.
    """
    os.environ |= {
        "PYTHONPATH": f"{IMPATIENT}{os.pathsep}{IMPATIENT.parents[2]}",
        "NO_PROXY": "127.0.0.1", "NETRC": os.devnull, "HOME": str(root / "home"),
    }  # fmt: skip
    chosen, outcome, figures = random.Random(seed), Outcome(), []
    while outcome.tried < kills:
        folder = root / f"push-{outcome.runs}"
        exported = samples_and_bundle(folder / "net")
        with StandIn(folder / "hub", "token", part_size=4096) as hub:
            os.environ["QAIHUB_CLIENT_INI"] = str(hub.write_ini(folder / "client.ini"))
            undisturbed = outcome.runs == 0  # the first one is what the others are compared with
            while True:
                made = f"made:{chosen.choice(('model', 'compile', 'inputs', 'inference'))}"
                when = chosen.choice((made, f"after:{chosen.randint(1, 6)}"))
                os.environ["KILL_WORKER"] = "" if undisturbed else when
                try:
                    push = Push("aihub", [S24], 120, {"compare_float": False, "patience": 2.0, "poll_seconds": 0.1})
                    (one,) = push.run(*exported)
                    break
                except DeviceError as error:
                    if "SIGKILL" not in str(error):
                        raise
                    outcome.tried += 1
            if found := hub.duplicates():
                outcome.lost.append(f"{folder.name}: made twice: {found}")
            posts = [len(hub.posts(kind)) for kind in ("models", "datasets", "jobs")]
            if posts != [1, 1, 2]:
                outcome.lost.append(f"{folder.name}: {posts} models, datasets and jobs were sent, expected [1, 1, 2]")
        figures.append((one.report.against_simulation, one.report.against_float, one.report.latency_us))
        if figures[-1] != figures[0]:
            outcome.lost.append(f"{folder.name}: {figures[-1]} and not {figures[0]}")
        outcome.runs += 1
    return outcome
