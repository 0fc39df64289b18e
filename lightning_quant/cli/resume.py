"""``lightning-quant resume FOLDER``: the results of jobs that were interrupted."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from lightning_quant.errors import LightningQuantError

log = logging.getLogger(__name__)


def command(arguments: Sequence[str]) -> int:
    """Fetch what the jobs of the bundles below a folder found, and write it into their records and reports.

    Args:
        arguments: of the command line, behind ``resume``.

    Returns:
        The exit status: 0 if all results are there now.
    """
    from lightning_quant.deploy.push import REQUEST_NAME, finished

    parser = argparse.ArgumentParser(
        "lightning-quant resume", description="Fetch the results of device jobs that were interrupted."
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("."),
                        help="folder of a bundle, a run or a sweep; the current one by default")  # fmt: skip
    folder: Path = parser.parse_args(arguments).folder
    whole_path = folder.absolute()
    own = whole_path.parent / f"{whole_path.name}.device" / REQUEST_NAME  # if the folder is a bundle's
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
            _resume(bundle)
        except LightningQuantError as error:
            log.error("%s: %s: %s", bundle, type(error).__name__, error)
            whole = False
    return 0 if whole else 1


def _resume(bundle: Path) -> None:
    """Fetch the results of one bundle."""
    from lightning_quant.deploy.push import resume
    from lightning_quant.report.page import write_report
    from lightning_quant.report.record import RECORD_NAME, RunRecord

    found = resume(bundle)
    # of a run of the app, and of a DeviceExport in a Trainer of the user's own
    for place in (bundle.parent.parent, bundle.with_name(f"{bundle.name}.report")):
        if (place / RECORD_NAME).is_file():
            record = RunRecord.read(place / RECORD_NAME)
            record.device = [one.report for one in found]
            record.write(place)
            write_report(place)
    for one in found:
        print(f"{bundle.name}: {one.report.sentence()}")
