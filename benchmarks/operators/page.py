"""The page in the documentation, made of the results."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import table
from benchmarks.operators.catalogue import catalogue
from benchmarks.operators.shipped import refused_here, subject, versions
from lightning_quant.precision import PRECISIONS
from lightning_quant.simulation.operators import REMEDIES, Placement

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks" / "operators.md"
Line = Mapping[str, Any]
Groups = list[tuple[str, ...]]
# In the order of the columns: 8-bit weights first, which most networks have.
COLUMNS = ("w8a8", "w8a16", "w4a8", "w4a16")
assert set(COLUMNS) == set(PRECISIONS)
_WORDS = {
    Placement.FLOAT: "float",
    Placement.CPU: "**CPU**",
    Placement.REFUSED: "**refused**",
    Placement.CRASHED: "**crashes**",
    Placement.WRONG: "**wrong**",
}
_LONGEST = 180

_HEAD = """\
# What the NPU takes

{total} operators, each a small network as people write it, quantized by this package, exported, and compiled by \
Qualcomm's compiler for the NPUs of {chips}. **Compiled and emulated, not measured on hardware.** The preflight reads \
the same results: what leaves the NPU is said before calibration, with the layer's name and a remedy where one is known.

Measured {date} with {versions}.

## What leaves the NPU

*float*: on the NPU, but computed in float between a conversion from integers and one back. *CPU*: the values go to \
the CPU and back. *refused*: the compiler, or this package before it, ends with an error for the whole network. \
*crashes*: the compiler's process ends; this package survives it, and says so. *wrong*: it is compiled, but an output \
is off by more than a tenth of its range.

{leaving}

## Every operator

A figure is the share of outputs that are the integers of the simulation, and the largest difference in steps of the \
output's grid; without a word before it the operator is on the NPU, in integers. Chips that agree in every figure \
share a column. Columns of older chips stand behind that of the newest, and hold only what differs. A dash: the \
operator has no weights, so that its figures are those of 8-bit weights. SM8350 has no 16-bit activations, which this \
package refuses with a `ConfigurationError`.
"""

_TAIL = """
Every line, with the compiler's messages, is in `benchmarks/results/operators.jsonl`.

```console
make operators                                          # what is missing, or was measured with other versions
python -m benchmarks.operators --only 'Conv*' --again   # some operators
```
"""


def write(lines: Sequence[Line]) -> None:
    """Write the page."""
    PAGE.write_text(page(lines))


def page(lines: Sequence[Line]) -> str:
    """Return the page, of lines of any operator and precision."""
    found = {(line["network"], line["precision"]): line for line in lines}
    order = [name for name in catalogue() if any(name == known for known, _ in found)]
    groups = joined(lines)
    dates = sorted({line["date"] for line in lines})
    head = _HEAD.format(
        total=len(order),
        chips=", ".join(chip for group in groups for chip in group),
        date=dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}",
        versions=", ".join(f"{name} {version}" for name, version in versions(lines).items()),
        leaving=_leaving(order, found),
    )
    parts = [head]
    for family in dict.fromkeys(catalogue()[name].family for name in order):
        members = [name for name in order if catalogue()[name].family == family]
        parts += [f"\n### {family}\n", _of_family(members, found, groups)]
    return "\n".join([*parts, _TAIL])


def joined(lines: Iterable[Line]) -> Groups:
    """Return the chips in groups that no line tells apart; one without 16-bit activations joins by its 8-bit ones."""
    chips = list(dict.fromkeys(chip for line in lines for chip in line["chips"]))
    apart = {
        frozenset((one, other))
        for line in lines
        for one, first in line["chips"].items()
        for other, second in line["chips"].items()
        if None not in (_result(first), _result(second)) and _result(first) != _result(second)
    }
    groups: list[list[str]] = []
    for chip in chips:
        home = next((group for group in groups if not any(frozenset((chip, one)) in apart for one in group)), None)
        if home is None:
            groups.append([chip])
        else:
            home.append(chip)
    return [tuple(group) for group in groups]


def _result(found: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Return what a chip did; ``None`` where this package did not let it."""
    if refused_here(found):
        return None
    return found["placement"], found.get("equal"), found.get("steps")


def _of_family(members: Sequence[str], found: Mapping[tuple[str, str], Line], groups: Groups) -> str:
    """Return a table: for each precision the newest chips, and the older ones where they differ."""
    columns: list[tuple[str, ...]] = []
    for precision in COLUMNS:
        lines = [found.get((name, precision)) for name in members]
        *older, newest = groups
        first = [_cell(line, newest) for line in lines]
        columns.append((f"{precision.upper()}, {_short(newest)}", *first))
        for group in reversed(older):
            cells = [
                "" if (cell := _cell(line, group)) in ("–", same) else cell
                for line, same in zip(lines, first, strict=True)
            ]
            if any(cells):
                columns.append((_short(group), *cells))
    heads, *rows = zip(("operator", *(name.replace("|", "/") for name in members)), *columns, strict=True)
    return table(heads, rows) + "\n"


def _short(group: Sequence[str]) -> str:
    return ", ".join(group) if len(group) < 3 else f"{group[0]} to {group[-1]}"


def _cell(line: Line | None, group: Sequence[str]) -> str:
    if line is None:
        return "–"
    if not line["chips"]:
        return f"`{next(iter(line['errors'].values()))['type']}`"
    result = next((one for one in (line["chips"].get(chip) for chip in group) if one and _result(one)), None)
    if result is None:
        return "–"
    placement = Placement(result["placement"])
    words = [_WORDS[placement]] if placement is not Placement.NPU else []
    if "equal" in result:
        steps = result["steps"]
        figure = f"{_percent(result['equal'])}" + ("" if steps is None or not steps else f", {steps:.0f}")
        words.append(figure)
    return " ".join(words)


def _percent(share: float) -> str:
    return "equal" if share == 1 else f"{min(100 * share, 99.9):.1f} %"


def _leaving(order: Iterable[str], found: Mapping[tuple[str, str], Line]) -> str:
    rows = []
    chips = {chip for line in found.values() for chip in line["chips"]}
    for name in order:
        reasons: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        operation = None
        for precision in COLUMNS:
            line = found.get((name, precision))
            if line is None:
                continue
            operation = operation or subject(line)
            for stage, error in line["errors"].items():
                reasons[f"not exported (`{error['type']}`)", _said(error)][precision.upper()].append(stage)
            for chip, result in line["chips"].items():
                placement = Placement(result["placement"])
                if placement is not Placement.NPU and _result(result) is not None:
                    reasons[_WORDS[placement], _why(placement, chip, result)][precision.upper()].append(chip)
        for (where, why), precisions in reasons.items():
            rows.append([name, where, _everywhere(precisions, chips), why, REMEDIES.get(operation or "", "–")])
    return table(["operator", "where", "at, on", "why", "instead"], rows)


def _everywhere(precisions: Mapping[str, Sequence[str]], chips: Collection[str]) -> str:
    """Return precisions with their chips, those of the same chips together; a stage that failed is of no chip."""
    alike: dict[str, list[str]] = defaultdict(list)
    for precision, where in precisions.items():
        tried = [chip for chip in where if chip in chips]
        # 16-bit activations are never tried on chips that lack them
        every = len(tried) >= len(chips) - precision.endswith("A16")
        alike["every chip" if every else _short(tried) if tried else ""].append(precision)
    return "; ".join(", ".join(names) + (f" on {where}" if where else "") for where, names in alike.items())


def _why(placement: Placement, chip: str, result: Mapping[str, Any]) -> str:
    if placement is Placement.CPU:
        return _plain(next(iter(result["cpu"].values()), "the compiler gives no reason"))
    if placement is Placement.WRONG:
        return "its outputs are not those of the simulation"
    if placement is Placement.FLOAT:
        kinds = sorted({island.rpartition("/")[2].partition("_token")[0] for island in result["islands"]})
        return f"in float: {_plain(', '.join(kinds))}"
    if placement is Placement.CRASHED:
        return "the compiler's process dies"
    return _said(result["error"]).replace(chip, "the chip")


def _said(error: Mapping[str, str]) -> str:
    return f"`{error['type']}`: {_plain(error['message'])}"


def _plain(message: str) -> str:
    short = message if len(message) <= _LONGEST else f"{message[:_LONGEST].rstrip()}…"
    return "".join(
        {"|": "/", "`": "'", "<": "‹", ">": "›", "*": "∗", "_": "\\_", "[": "(", "]": ")"}.get(c, c) for c in short
    )
