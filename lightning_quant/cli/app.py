"""The command line: ``lightning-quant``, or ``python -m lightning_quant``. Configuration by Hydra.

Only what parsing the command line needs is imported here; the run itself is in :mod:`lightning_quant.cli.run`.
"""

from __future__ import annotations

import errno
import logging
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from lightning_quant.cli.configuration import config_dir
from lightning_quant.errors import LightningQuantError

log = logging.getLogger(__name__)


@hydra.main(config_path=str(config_dir()), config_name="config", version_base="1.3")
def _job(config: DictConfig) -> float | tuple[float, ...]:
    """Run one job and return its objectives, for sweepers that search by them."""
    from lightning_quant.cli.objectives import objectives
    from lightning_quant.cli.run import record_failure, run

    try:
        return objectives(config, run(config))
    except LightningQuantError as error:
        # The next job of a sweep may well succeed, so it gets its chance.
        record_failure(config, error)
        log.error("%s: %s", type(error).__name__, error)
        return _failed(config)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        logging.raiseExceptions = False  # the log's own file may be on that disk
        place = error.filename2 or error.filename or Path.cwd()
        folder = HydraConfig.get().runtime.output_dir
        log.error(
            "No space left for %s. Free some; with skip_finished=true and this folder, %s, the same command resumes.",
            place,
            folder,
        )
        return _failed(config)


def _failed(config: DictConfig) -> float | tuple[float, ...]:
    """End a single run with status 1; of a run in a sweep return the worst objectives, for the others are to run."""
    from lightning_quant.cli.objectives import objectives

    if HydraConfig.get().mode is RunMode.RUN:
        sys.exit(1)
    return objectives(config, None)


def _resume(folder: Path) -> bool:
    """Fetch the results of the bundles below a folder whose jobs were interrupted; return whether all are there."""
    from lightning_quant.deploy.push import REQUEST_NAME, finished, resume
    from lightning_quant.report.page import write_report
    from lightning_quant.report.record import RECORD_NAME, RunRecord

    own = folder.with_name(f"{folder.name}.device") / REQUEST_NAME  # if the folder is a bundle's
    requests = sorted(folder.rglob(REQUEST_NAME)) + ([own] if own.is_file() else [])
    if not requests:
        log.error("Nothing below %s was sent to a device: expected the folder of a run or of a bundle.", folder)
    whole = bool(requests)
    for request in requests:
        bundle = request.parent.with_suffix("")  # <name>.device is next to <name>
        if finished(request.parent):
            print(f"{bundle.name}: finished already, see {request.parent}")
            continue
        try:
            found = resume(bundle)
            # of a run of the app, and of a DeviceExport in a Trainer of the user's own
            for place in (bundle.parent.parent, bundle.with_name(f"{bundle.name}.report")):
                if (place / RECORD_NAME).is_file():
                    record = RunRecord.read(place / RECORD_NAME)
                    record.device = [one.report for one in found]
                    record.write(place)
                    write_report(place)
        except LightningQuantError as error:
            log.error("%s: %s: %s", bundle, type(error).__name__, error)
            whole = False
            continue
        for one in found:
            print(f"{bundle.name}: {one.report.sentence()}")
    return whole


def _blame(folder: Path) -> bool:
    """Print what each layer loses, and which of an exported file compute something else; return whether none does."""
    from lightning_quant.cli.blame import blame_run
    from lightning_quant.deploy.blame.result import Against

    try:
        found, path = blame_run(folder)
    except LightningQuantError as error:
        log.error("%s: %s", type(error).__name__, error)
        return False
    for one in found:
        print(f"Against {one.against.value}:\n{one}\n")
    print(path)
    return not any(one.guilty for one in found if one.against is not Against.FLOAT)


def _predict(arguments: list[str]) -> bool:
    """Print what an exported network sees in photographs; return whether all were read."""
    from lightning_quant.cli.predict import predict

    try:
        return predict(arguments)
    except LightningQuantError as error:
        log.error("%s: %s", type(error).__name__, error)
        return False


def main() -> None:
    """Run the app; the exit status is 1 if a run failed."""
    sys.path.append(str(Path.cwd()))  # rungs, estimators and networks of the user's own lie here, as for ``python -m``
    if sys.argv[1:2] == ["resume"]:
        logging.basicConfig(format="%(message)s")
        sys.exit(0 if _resume(Path(sys.argv[2] if len(sys.argv) > 2 else ".")) else 1)
    if sys.argv[1:2] == ["blame"]:
        logging.basicConfig(format="%(message)s")
        sys.exit(0 if _blame(Path(sys.argv[2] if len(sys.argv) > 2 else ".")) else 1)
    if sys.argv[1:2] == ["compare"]:
        from lightning_quant.cli.compare import compare_command

        logging.basicConfig(format="%(message)s")
        sys.exit(compare_command(sys.argv[2:]))
    if sys.argv[1:2] == ["predict"]:
        logging.basicConfig(format="%(message)s")
        sys.exit(0 if _predict(sys.argv[2:]) else 1)
    if "sensitivity" in sys.argv[1:]:  # Hydra takes key=value only
        sys.argv[sys.argv.index("sensitivity", 1)] = "job=sensitivity"
    _job()


if __name__ == "__main__":
    main()
