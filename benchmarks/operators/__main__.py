"""What the NPU takes: `python -m benchmarks.operators`, or `make operators`."""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import subprocess
from collections.abc import Sequence
from pathlib import Path

from benchmarks.operators import page, shipped
from benchmarks.operators.catalogue import Operator, catalogue
from benchmarks.operators.measure import measure, versions
from benchmarks.operators.page import COLUMNS
from benchmarks.zoo.limits import measured
from benchmarks.zoo.record import append, read
from lightning_quant.precision import Precision

RESULTS = Path(__file__).parents[1] / "results" / "operators.jsonl"
# Seconds and 10^9 bytes for one operator at one precision, all chips.
_LIMIT_S, _LIMIT_GB = 300.0, 8.0


def main() -> None:
    """Measure what is missing or was measured with other versions, then write the page and the shipped table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="*", metavar="GLOB", help="operators by name, e.g. 'Conv*'")
    parser.add_argument("--precisions", nargs="+", choices=COLUMNS, default=list(COLUMNS))
    parser.add_argument("--again", action="store_true", help="measure what is there already, too")
    parser.add_argument("--results", type=Path, default=RESULTS, help="another file of results")
    parser.add_argument("--list", action="store_true", help="only name the operators")
    parser.add_argument("--table", action="store_true", help="only write page and shipped table from the results")
    arguments = parser.parse_args()
    chosen = [one for one in catalogue().values() if fnmatch.fnmatchcase(one.name, arguments.only)]
    if arguments.list:
        print(*(one.name for one in chosen), f"{len(chosen)} operators", sep="\n")
        return
    path = arguments.results
    if not arguments.table:
        _measure_missing(chosen, arguments.precisions, path, arguments.again)
    if path == RESULTS:
        lines = [line for line in read(path) if line["network"] in catalogue()]
        page.write(lines)
        shipped.write(lines)


def _measure_missing(chosen: Sequence[Operator], precisions: Sequence[str], path: Path, again: bool) -> None:
    known = [] if again else [line for line in read(path) if line["versions"] == versions()]
    done = {(line["network"], line["precision"]) for line in known}
    weighted = {one.name for one in chosen if one.has_weights}
    todo = [
        (one.name, precision)
        for precision in precisions
        for one in chosen
        if (one.name, precision) not in done and (one.name in weighted or Precision.parse(precision).weight_bits == 8)
    ]
    for index, (name, precision) in enumerate(todo):
        line = measured(measure, {"network": name, "precision": precision}, _LIMIT_S, _LIMIT_GB)
        append(path, {**line, "commit": _commit(), "date": datetime.date.today().isoformat()})
        placements = " ".join(found["placement"] for found in line["chips"].values())
        errors = " ".join(f"{stage}: {error['type']}" for stage, error in line["errors"].items())
        print(
            f"{index + 1}/{len(todo)} {name} {precision}: {placements or errors} ({line['seconds']['all']} s)",
            flush=True,
        )


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
