"""Networks of several domains, with genuine weights, from float to the emulated NPU: the table of `make showcase`.

A part of a cell (a domain at a precision) is one process and one JSON file below ``benchmarks/results/showcase``, so a
run resumes where it was stopped; ``--table`` only writes the table from what is there.
"""

from __future__ import annotations

import argparse
import json
import os
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from benchmarks.measure import facts
from benchmarks.showcase import table
from benchmarks.showcase.catalogue import DOMAINS
from benchmarks.showcase.parts import PARTS
from benchmarks.zoo.limits import measured


def main() -> None:
    """Measure what is missing, one process at a time, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--camvid", type=Path, default="../shared/data/camvid", help="photographs like Cityscapes'")
    parser.add_argument("--domains", nargs="+", choices=list(DOMAINS), default=list(DOMAINS))
    parser.add_argument("--precisions", nargs="+", choices=table.PRECISIONS, default=list(table.PRECISIONS))
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--limit-s", type=float, default=900.0, help="seconds for one part of a cell")
    parser.add_argument("--limit-gb", type=float, default=12.0, help="memory for it, in 10^9 bytes")
    parser.add_argument("--table", action="store_true", help="only write the table from the results")
    arguments = parser.parse_args()
    table.RESULTS.mkdir(parents=True, exist_ok=True)

    def run(domain: str, part: str, precision: str = "", seed: int = 0) -> dict[str, Any]:
        path = table.path_of(domain, part, precision, seed)
        if not path.is_file():
            key = {
                "domain": domain,
                "precision": precision,
                "seed": str(seed),
                "camvid": str(arguments.camvid.resolve()),
            }
            if part != "float":
                key["float"] = str(run(domain, "float")["figure"])
            line = measured(PARTS[part], key, arguments.limit_s, arguments.limit_gb)
            del line["camvid"]
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps({**facts(), **line}, indent=1) + "\n")
            os.replace(partial, path)
            print(path.stem, line["errors"] or f"{line['seconds']['all']} s", flush=True)
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    parts = () if arguments.table else arguments.parts
    for name, precision, part in product(arguments.domains, arguments.precisions, parts):
        if part == "float":
            run(name, part)
            continue
        first = run(name, part, precision)
        if part == "ours" and table.has_trained(first):
            for seed in range(1, DOMAINS[name].seeds):
                run(name, part, precision, seed)
    (table.RESULTS / "table.md").write_text(table.markdown() + "\n")
    Console(width=220).print(Markdown(table.markdown()))


if __name__ == "__main__":
    main()
