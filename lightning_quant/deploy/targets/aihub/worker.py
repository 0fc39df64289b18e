"""The process that talks to Qualcomm AI Hub. Not to be imported: :mod:`.target` starts it."""

from __future__ import annotations

import contextlib
import difflib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lightning_quant.deploy.targets.aihub.device_run import DeviceRun, Variant
from lightning_quant.deploy.targets.aihub.job import RUNTIMES, Job, Outcome, Outcomes
from lightning_quant.deploy.targets.aihub.journal import Journal
from lightning_quant.deploy.targets.aihub.service import Service
from lightning_quant.deploy.targets.aihub.submissions import Submissions
from lightning_quant.deploy.targets.worker import serve
from lightning_quant.errors import ConfigurationError, DeviceError

# From this version of the Hexagon NPU on activations may have 16 bits.
_HEXAGON_WITH_INT16 = 69


def work(job: Job, folder: Path) -> Outcomes:
    """Push a bundle to its devices and return what came of it."""
    journal = Path(job.journal)
    journal.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{journal}.lock", timeout=5), _temporary_files_in(folder):
            return _push(job, folder, Journal(journal))
    except Timeout:
        raise DeviceError(
            f"Another process is sending this bundle to AI Hub (it holds {journal}.lock): wait for it, then run again."
        ) from None


@contextlib.contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """Keep the temporary files that the client leaves behind in the folder that the parent removes."""
    tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = None


def _push(job: Job, folder: Path, journal: Journal) -> Outcomes:
    service = Service(job.profile, job.patience, time.monotonic() + job.timeout)
    submissions = Submissions(job, service, journal)
    pairs = [(device, runtime) for device in job.devices for runtime in job.runtimes]
    devices = {name: _device(job, service, name) for name in job.devices}
    sources = {Variant.QUANTIZED: job.quantized} | ({Variant.FLOAT: job.float_network} if job.float_network else {})
    runs = {
        (name, runtime, variant): DeviceRun(job, submissions, folder, devices[name], name, runtime, variant, source)
        for name, runtime in pairs
        for variant, source in sources.items()
    }
    # all queue before one is waited for
    for step in (DeviceRun.submit_compile, DeviceRun.submit_inference, DeviceRun.collect):
        for run in runs.values():
            run.attempt(step)
    stopped = [run.stopped for run in runs.values() if run.stopped]
    if stopped and not any(run.profile for run in runs.values() if run.variant is Variant.QUANTIZED):
        raise stopped[0]
    return Outcomes([_outcome(runs[*pair, Variant.QUANTIZED], runs.get((*pair, Variant.FLOAT))) for pair in pairs])


def _outcome(run: DeviceRun, float_run: DeviceRun | None) -> Outcome:
    outcome = run.outcome()
    if float_run is not None:
        outcome.jobs |= {f"float {what}": url for what, url in float_run.links.items()}
        outcome.float_profile = float_run.profile
        if reason := float_run.error or float_run.stopped:
            outcome.warnings.append(f"The float network could not be measured: {reason}")
    return outcome


def _device(job: Job, service: Service, name: str) -> Any:
    """Return the device as AI Hub lists it; refuse it before anything is uploaded if it cannot run the network."""
    client = service.client
    found = service.read("the list of devices", lambda: client.get_devices(name=name))
    if not found:
        known = sorted({one.name for one in service.read("the list of devices", client.get_devices)})
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        raise ConfigurationError(
            f"AI Hub has no device {name!r}: expected one of its {len(known)} devices"
            f"{', e.g. ' + ', '.join(near) if near else ''}. `qai-hub list-devices` lists them all."
        )
    device = found[-1]  # the newest system
    for runtime in job.runtimes:
        framework = RUNTIMES[runtime]
        if f"framework:{framework}" not in device.attributes:
            offered = [one.partition(":")[2] for one in device.attributes if one.startswith("framework:")]
            raise ConfigurationError(
                f"runtime={runtime!r} on {name}: it needs {framework}, the device offers "
                f"{', '.join(offered) or 'nothing'}. Choose another runtime."
            )
    hexagon = next((int(one[9:]) for one in device.attributes if one.startswith("hexagon:v")), 0)
    if job.int16_activations and hexagon < _HEXAGON_WITH_INT16:
        chip = f"its Hexagon v{hexagon}" if hexagon else "its chip (no Hexagon NPU is named for it)"
        raise ConfigurationError(
            f"{job.int16_activations} on {name}: expected an NPU with 16-bit activations, {chip} has 8-bit ones "
            "at most. Use w8a8 or w4a8, or a newer device."
        )
    return device


if __name__ == "__main__":
    serve(work, Job)
