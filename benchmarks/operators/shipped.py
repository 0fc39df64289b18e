"""The table that the package ships for its preflight, from the results."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.operators.catalogue import catalogue
from lightning_quant.deploy.socs import HEXAGON
from lightning_quant.errors import ConfigurationError
from lightning_quant.simulation.operators import PATH, OperatorTable
from lightning_quant.utilities.files import atomic_write

Line = Mapping[str, Any]


def write(lines: Sequence[Line]) -> None:
    """Write the table next to the code that reads it, an operation a line."""
    values = asdict(shipped(lines))
    operations = values.pop("operations")
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(found)}" for name, found in operations.items())
    head = json.dumps(values, indent=1).removesuffix("\n}")
    with atomic_write(PATH) as partial:
        partial.write_text(f'{head},\n "operations": {{\n{rows}\n }}\n}}\n')


def shipped(lines: Sequence[Line]) -> OperatorTable:
    """Return what holds of an operation wherever it was measured alone; where networks disagree, nothing does."""
    found: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for line in lines:
        if (operation := subject(line)) is not None:
            for chip, result in line["chips"].items():
                if not refused_here(result):
                    found[operation, line["precision"], chip].add(result["placement"])
    operations: dict[str, Any] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for (operation, precision, chip), placements in sorted(found.items()):
        if len(placements) == 1:
            operations[operation][precision][placements.pop()].append(HEXAGON[chip])
    chips = sorted({chip for line in lines for chip in line["chips"]})
    return OperatorTable(versions(lines), {str(HEXAGON[chip]): chip for chip in chips}, plain(operations))


def subject(line: Line) -> str | None:
    """Return the operation that a network is about, if it is about one."""
    beside = catalogue()[line["network"]].beside
    others = {one for one in line.get("operations", ()) if one not in beside}
    return others.pop() if len(others) == 1 else None


def refused_here(result: Mapping[str, Any]) -> bool:
    """Whether this package did not let a chip try: it lacks 16-bit activations."""
    return bool(result.get("error", {}).get("type") == ConfigurationError.__name__)


def versions(lines: Sequence[Line]) -> dict[str, str]:
    """Return the versions that the lines were measured with, several of one package joined."""
    known: dict[str, set[str]] = defaultdict(set)
    for line in lines:
        for name, version in line["versions"].items():
            known[name].add(version)
        for result in line["chips"].values():
            if "qairt" in result:
                known["QAIRT"].add(result["qairt"])
    return {name: ", ".join(sorted(found)) for name, found in sorted(known.items())}


def plain(value: Any) -> Any:
    """Return nested dicts as plain ones."""
    return {key: plain(item) for key, item in value.items()} if isinstance(value, dict) else value
