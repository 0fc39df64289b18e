"""The process that talks to Qualcomm AI Hub. Not to be imported: :mod:`.target` starts it."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from lightning_quant.deploy.targets.aihub.device_run import DeviceRun, Variant
from lightning_quant.deploy.targets.aihub.devices import find_device
from lightning_quant.deploy.targets.aihub.job import Job, Outcome, Outcomes
from lightning_quant.deploy.targets.aihub.journal import Journal
from lightning_quant.deploy.targets.aihub.link import Link
from lightning_quant.deploy.targets.aihub.service import Service
from lightning_quant.deploy.targets.aihub.submissions import Submissions
from lightning_quant.deploy.targets.worker import serve
from lightning_quant.errors import DeviceError


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
    devices = {name: find_device(service, name, job.runtimes, job.int16_activations) for name in job.devices}
    runs: dict[tuple[str, str, str, Variant], DeviceRun] = {}
    for name, runtime in pairs:
        for graph in job.graphs:
            sources = {Variant.QUANTIZED: graph.quantized}
            if graph.float_network:
                sources[Variant.FLOAT] = graph.float_network
            for variant, source in sources.items():
                runs[name, runtime, graph.size, variant] = DeviceRun(
                    job, submissions, folder, devices[name], name, runtime, variant, graph, source
                )
        linked = [run for run in runs.values() if run.links_graphs and (run.name, run.runtime) == (name, runtime)]
        link = Link(submissions, devices[name], name, [run.compile_key for run in linked])
        for run in linked:
            run.link = link
    # all queue before one is waited for
    for step in (DeviceRun.submit_compile, DeviceRun.submit_link, DeviceRun.submit_inference, DeviceRun.collect):
        for run in runs.values():
            run.attempt(step)
    stopped = [run.stopped for run in runs.values() if run.stopped]
    if stopped and not any(run.profile for run in runs.values() if run.variant is Variant.QUANTIZED):
        raise stopped[0]
    quantized = [run for run in runs.values() if run.variant is Variant.QUANTIZED]
    return Outcomes(
        [_outcome(run, runs.get((run.name, run.runtime, run.graph.size, Variant.FLOAT))) for run in quantized]
    )


def _outcome(run: DeviceRun, float_run: DeviceRun | None) -> Outcome:
    outcome = run.outcome()
    if float_run is not None:
        outcome.jobs |= {f"float {what}": url for what, url in float_run.links.items()}
        outcome.float_profile = float_run.profile
        if reason := float_run.error or float_run.stopped:
            outcome.warnings.append(f"The float network could not be measured: {reason}")
    return outcome


if __name__ == "__main__":
    serve(work, Job)
