"""``lightning-quant compare OLD NEW``: what became worse, as a table, JSON and an exit status."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_quant.errors import LightningQuantError

log = logging.getLogger(__name__)

KEPT, EXCEEDED, BAD_INPUT = 0, 1, 2


def command(arguments: Sequence[str]) -> int:
    """Print what changed between two exports.

    Args:
        arguments: of the command line, behind ``compare``.

    Returns:
        The exit status: 0 if every bound is kept, 1 if one is exceeded, and 2 for what cannot be compared.
    """
    parser = argparse.ArgumentParser(
        "lightning-quant compare", description="Compare an export with an earlier one.", allow_abbrev=False
    )
    parser.add_argument("old", type=Path, help="folder of a bundle or of a run, or a baseline; with --write-baseline "
                        "it may be the only one")  # fmt: skip
    parser.add_argument("new", type=Path, nargs="?", help="likewise")
    parser.add_argument("--bounds", type=Path, metavar="FILE", help="how much worse each thing may become, as YAML")
    parser.add_argument("--json", action="store_true", help="print everything that was found as JSON")
    parser.add_argument("--write-baseline", type=Path, metavar="FILE", help="keep what is compared of NEW in this file")
    given = parser.parse_args(arguments)
    if given.new is None and given.write_baseline is None:
        parser.error("NEW is missing: expected two folders or baselines, or one with --write-baseline FILE")
    if given.new is None and (given.bounds is not None or given.json):
        parser.error("--bounds and --json need two to compare")
    try:
        return _compare(given.old, given.new, given.bounds, given.json, given.write_baseline)
    except LightningQuantError as error:
        log.error("%s: %s", type(error).__name__, error)
    except OSError as error:  # such as a folder that must not be read or written
        log.error("%s", error)
    return BAD_INPUT


def _compare(old: Path, new: Path | None, bounds: Path | None, as_json: bool, baseline: Path | None) -> int:
    from lightning_quant.report.baseline import compare, write_baseline

    status = KEPT
    if new is not None:
        found = compare(old, new, bounds=bounds)
        status = KEPT if found.within_bounds else EXCEEDED
        if as_json:
            print(json.dumps(found.to_dict(), indent=2, allow_nan=False))
        else:
            from rich.console import Console

            from lightning_quant.deploy.compare.result import WIDTH, print_changes

            console = Console()
            print_changes(found, console if console.is_terminal else Console(width=WIDTH))
    if baseline is not None:
        path = write_baseline(baseline, old if new is None else new)
        print(f"Baseline: {path}", file=sys.stderr if as_json else sys.stdout)
    return status
