"""How far each network of the zoo goes: `python -m benchmarks.zoo`, or `make zoo`."""

from __future__ import annotations

import argparse
import datetime
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.zoo import ours, plain_aimet, table
from benchmarks.zoo.catalogue import chosen
from benchmarks.zoo.limits import measured
from benchmarks.zoo.record import FILES, OURS, PLAIN, all_the_way, append, emulated, read, stopped
from lightning_quant.deploy.parity import Parity

PRECISIONS = ("w8a8", "w8a16", "w4a16")


def main() -> None:
    """Measure what is missing, one process at a time, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="*", metavar="GLOB", help="networks by name, e.g. 'timm/*vit*'")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--plain", action="store_true", help="through plain AIMET instead of this package")
    parser.add_argument("--again", action="store_true", help="measure what is there already, too")
    parser.add_argument("--limit-s", type=float, default=300.0, help="seconds for a network at one precision")
    parser.add_argument("--limit-gb", type=float, default=12.0, help="memory for it, in 10^9 bytes")
    parser.add_argument("--results", type=Path, help="another file of results than that in benchmarks/results")
    parser.add_argument("--list", action="store_true", help="only name the networks")
    parser.add_argument("--table", action="store_true", help="only write the page from the results")
    arguments = parser.parse_args()
    entries = chosen(arguments.only)
    if arguments.list:
        print(*(entry.name for entry in entries), f"{len(entries)} networks", sep="\n")
        return
    if not arguments.table:
        by = PLAIN if arguments.plain else OURS
        path = arguments.results or FILES[by]
        done = set() if arguments.again else {(line["network"], line["precision"]) for line in read(path)}
        todo = [(e.name, p) for e in entries for p in arguments.precisions if (e.name, p) not in done]
        if todo and not arguments.plain:  # the C++ kernels are built on first use: nobody's seconds
            measured(ours.warm_up, {"network": "", "by": by, "precision": ""}, 900.0, arguments.limit_gb)
        for index, (name, precision) in enumerate(todo):
            function = plain_aimet.measure if arguments.plain else ours.measure
            key = {"network": name, "by": by, "precision": precision}
            line = measured(function, key, arguments.limit_s, arguments.limit_gb)
            append(path, {**line, "commit": _commit(), "date": datetime.date.today().isoformat()})
            print(f"{index + 1}/{len(todo)} {_sentence(line)}", flush=True)
    if arguments.results is None:
        table.write()


def _sentence(line: dict[str, Any]) -> str:
    where = stopped(line)
    start = f"{line['network']} {line['precision']}"
    if where is not None:
        error = line["errors"][where]
        return f"{start}: stopped at {where}: {error['type']}: {error['message'][:120]} ({line['seconds']['all']} s)"
    placed = f"{line.get('npu')}/{line.get('cpu')}/{line.get('islands')} on NPU/CPU/in float" if "npu" in line else ""
    close = " and ".join(
        f"{which} {Parity.from_json(line[which])}" for which in ("parity", "emulated") if which in line
    )
    way = "all the way" if all_the_way(line) else "compiled" if emulated(line) else "exported"
    return f"{start}: {way}, {placed}, {close} ({line['seconds']['all']} s)"


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
