"""The page of the zoo, docs/benchmarks/networks.md, from the results: written by `python -m benchmarks.zoo`."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.zoo.record import FILES, GARBAGE_DB, OURS, PLAIN, all_the_way, emulated, garbage, reached, read

TRAINED = Path(__file__).parents[1] / "results" / "elsewhere"
PAGE = Path(__file__).parents[2] / "docs" / "benchmarks" / "networks.md"
_TOOLS = {OURS: "lightning_quant", PLAIN: "plain AIMET"}
_PRECISIONS = ("w8a8", "w8a16", "w4a16")
_LONGEST = 160
# PSNR in dB above which an exported file is as good as equal to its simulation.
_CLOSE_DB = 80.0
Line = Mapping[str, Any]

_HEAD = """\
# Networks

{total} networks of other packages, unchanged, at small sizes with random weights whose batch norm statistics \
were set from data. Each is quantized by `PostTrainingQuantization`, trained for one step by \
`QuantizationAwareTraining` (at W8A8), saved, loaded again, exported by `DeviceExport`, compared with its simulation \
in ONNX Runtime, compiled for the chip of a Galaxy S24 and emulated. For comparison, the same networks through plain \
AIMET: `prepare_model`, `fold_all_batch_norms`, `QuantizationSimModel`, one step of training, \
`aimet_torch.onnx.export`; where one of the first two fails the rest continues without it, and an output that AIMET \
does not take, such as a dictionary, is converted to a tuple.

**All the way** means: every stage passed, and the compiler put every layer on the NPU with none of them in float. \
How close the exported file is to its simulation is a column of its own. A sum that lies half way between two \
integers goes either way, as it is added in another order, and random weights amplify that single step through all \
layers behind it. So `blame` looks at every tensor that the file rounds, computed from the simulation's own inputs: \
*computed otherwise* counts those that differ by more than such single steps. *Garbage* is an output of the emulated \
NPU below {garbage:.0f} dB. *Values in float* are those in the file that no QuantizeLinear rounds. The seconds are of \
one busy core. Compiled and emulated; not measured on hardware.
"""

_TRAINED = """
## Trained on photographs

Two networks of other packages, trained from random weights on street photographs (CamVid in Cityscapes layout), then \
quantized, fine-tuned for one epoch, exported and emulated. The metric on the device is that of the outputs of the \
emulated NPU, next to the simulation's and float's on the same images; closeness is to the simulation. Not measured on \
hardware. `make elsewhere`.
"""

_TAIL = """
{how}

```console
make zoo                                                   # all of it: hours; resumes where it was stopped
python -m benchmarks.zoo --only 'timm/*vit*' --again       # some networks
python -m benchmarks.zoo --plain --precisions w8a8         # through plain AIMET
```
"""


def write() -> None:
    """Write the page from the results that are there."""
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page([line for path in FILES.values() for line in read(path)]))


def page(lines: Sequence[Line]) -> str:
    """The page from all lines, of any tool and precision."""
    networks = list(dict.fromkeys(line["network"] for line in lines))
    found = {(line["network"], line["by"], line["precision"]): line for line in lines}
    sources: dict[str, list[str]] = defaultdict(list)
    for name in networks:
        sources[name.partition("/")[0]].append(name)
    parts = [_HEAD.format(total=len(networks), garbage=GARBAGE_DB), _counts(lines)]
    for source, members in sources.items():
        parts += [f"\n## {source}\n", _of_source(members, found)]
    parts += ["\n## Where they stop\n", _stops(lines), _TRAINED, _trained(), _TAIL.format(how=_how(lines))]
    return "\n".join(parts)


def _counts(lines: Sequence[Line]) -> str:
    heads = ["", "tried", "exported", "compiled", "all the way", "of these garbage"]
    heads += [f"file equal or above {_CLOSE_DB:.0f} dB", "no tensor computed otherwise"]
    rows = []
    for by, tool in _TOOLS.items():
        for precision in _PRECISIONS:
            mine = [line for line in lines if line["by"] == by and line["precision"] == precision]
            if mine:
                whole = [line for line in mine if all_the_way(line)]
                exported = sum("export" in line["passed"] for line in mine)
                figures = [len(mine), exported, sum(map(emulated, mine)), f"**{len(whole)}**"]
                figures += [sum(map(garbage, whole)), sum(map(_close, mine)), _layers_right(mine)]
                rows.append([f"{tool}, {precision.upper()}", *map(str, figures)])
    return _table(heads, rows)


def _of_source(members: Iterable[str], found: Mapping[tuple[str, str, str], Line]) -> str:
    heads = [
        "network",
        "W8A8",
        "NPU / CPU / in float",
        "values in float",
        "file dB",
        "computed otherwise",
        "emulated dB",
        "s",
    ]
    heads += ["W8A16", "W4A16", "plain AIMET, W8A8", "NPU / CPU / in float", "values in float"]
    rows = []
    for name in members:
        first = found.get((name, OURS, "w8a8"))
        others = [_way(found.get((name, OURS, precision))) for precision in _PRECISIONS[1:]]
        plain = found.get((name, PLAIN, "w8a8"))
        row = [name.partition("/")[2], _way(first), _placement(first), _left(first), _decibel(first, "parity")]
        row += [
            _otherwise(first),
            _decibel(first, "emulated"),
            f"{first['seconds']['all']:.0f}" if first else "–",
            *others,
        ]
        rows.append([*row, _way(plain), _placement(plain), _left(plain)])
    return _table(heads, rows)


def _trained() -> str:
    heads = ["network", "precision", "metric", "float", "PTQ", "QAT", "file dB", "emulated dB"]
    heads += ["on these images: float", "simulation", "device", "NPU / CPU / in float"]
    rows = []
    for path in sorted(TRAINED.glob("*.json")):
        one = json.loads(path.read_text())
        export = one["export"]
        row = [one["network"], one["precision"].upper(), one["monitor"]]
        row += [f"{one[stage]:.3f}" for stage in ("float", "ptq", "qat")]
        row += [f"{export[which]['psnr_db']:.0f}" for which in ("parity", "against_simulation")]
        row += [f"{export['metric_on_these'][which]:.3f}" for which in ("float", "simulation", "device")]
        rows.append([*row, f"{export['layers']['NPU']} / {export['layers']['CPU']} / {export['in_float']}"])
    return _table(heads, rows)


def _way(line: Line | None) -> str:
    if line is None:
        return "–"
    if all_the_way(line):
        return "all the way"
    failed = " and ".join(line["errors"])
    if emulated(line):
        return f"compiled, {failed} failed" if failed else "compiled"
    if "export" in line["passed"]:
        return f"exported, {failed} failed" if failed else "exported"
    return f"{failed} failed" + (f", {last} passed" if (last := reached(line)) else "")


def _placement(line: Line | None) -> str:
    return f"{line['npu']} / {line['cpu']} / {line['islands']}" if line and "npu" in line else "–"


def _left(line: Line | None) -> str:
    return str(line["left_in_float"]) if line and "left_in_float" in line else "–"


def _decibel(line: Line | None, which: str) -> str:
    agreement = (line or {}).get(which)
    if not agreement:
        return "–"
    return "equal" if agreement["psnr_db"] is None else f"{agreement['psnr_db']:.0f}"


def _close(line: Line) -> bool:
    if "parity" not in line:
        return False
    value = line["parity"]["psnr_db"]
    return value is None or value >= _CLOSE_DB


def _otherwise(line: Line | None) -> str:
    """How many of the tensors that the file rounds it computes otherwise than the simulation does."""
    found = (line or {}).get("blame")
    return f"{found['otherwise']} of {found['tensors']}" if found else "–"


def _layers_right(lines: Sequence[Line]) -> str:
    looked_at = [line["blame"] for line in lines if "blame" in line]
    return f"{sum(not found['otherwise'] for found in looked_at)} of {len(looked_at)}" if looked_at else "–"


def _stops(lines: Sequence[Line]) -> str:
    """The errors at W8A8, those of one stage and type together, the commonest first."""
    groups: dict[tuple[str, str, str], list[Line]] = defaultdict(list)
    for line in lines:
        for stage, error in line["errors"].items() if line["precision"] == "w8a8" else ():
            groups[line["by"], stage, error["type"]].append(line)
    rows = []
    for (by, stage, kind), members in sorted(groups.items(), key=lambda item: (item[0][0], -len(item[1]))):
        example = members[0]
        message = example["errors"][stage]["message"].replace("|", "/").replace("`", "'")[:_LONGEST]
        rows.append([_TOOLS[by], stage, f"`{kind}`", str(len(members)), example["network"], f"`{message}`"])
    if not rows:
        return "Nowhere, at W8A8.\n"
    return _table(["through", "stage", "error", "networks", "e.g.", "which said"], rows)


def _how(lines: Sequence[Line]) -> str:
    dates = sorted({line["date"] for line in lines})
    commits = {by: sorted({line["commit"] for line in lines if line["by"] == by}) for by in _TOOLS}
    parts = [f"{_TOOLS[by]} at commit {', '.join(found)}" for by, found in commits.items() if found]
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    where = "Every line is in `benchmarks/results/zoo*.jsonl`, with messages and names."
    return f"Measured {when}: {'; '.join(parts)}. {where}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows)) + "\n"
