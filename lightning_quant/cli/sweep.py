"""The end of a sweep: its runs gathered into one table and one report, whichever launcher ran them."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from typing_extensions import override

from lightning_quant.report.record import RECORD_NAME, RunRecord
from lightning_quant.report.summary import gather, print_artifacts, print_summary, write_summary

log = logging.getLogger(__name__)


class SweepSummary(Callback):
    """Hydra callback: write and print the summary of a multirun, and end the process with status 1 if a run failed."""

    @override
    def on_multirun_end(self, config: Any, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        runs = gather(folder)
        try:
            if runs:
                _summarize(folder, runs)
        except Exception:  # Hydra would warn and end with status 0
            log.exception("The summary of %s could not be written.", folder)
            sys.exit(1)
        started = {path.parent for name in (RECORD_NAME, ".hydra") for path in folder.glob(f"*/{name}")}
        if started - runs.keys() or any(record.status != "finished" for record in runs.values()):
            sys.exit(1)  # Hydra has no exit status of its own for that; it catches exceptions of callbacks, not this


def _summarize(folder: Path, runs: dict[Path, RunRecord]) -> None:
    from lightning_quant.report.page import write_sweep_report  # after the runs: --help stays instant

    records = list(runs.values())
    markdown, table_file = write_summary(records, folder)
    print_summary(records, f"{len(records)} runs in {folder}")
    for run, record in runs.items():
        print_artifacts(record, run)
    report = write_sweep_report(folder, runs)
    print(f"Table: {markdown} and {table_file}")
    print(f"Report: {report}")
