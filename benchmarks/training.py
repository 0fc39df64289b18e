"""What ways to train at 4 bits bring networks of the showcase, over seeds: the table of `make training`.

All start from the same quantized network, that of the cheap rungs, and end with the last step: which epoch is the best
is not chosen by the validation that judges. A finished cell is a JSON file below ``benchmarks/results/training``, so a
run resumes where it was stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from rich.console import Console
from rich.markdown import Markdown

import lightning_quant as lq
from benchmarks.measure import facts, table
from benchmarks.showcase.catalogue import DOMAINS
from benchmarks.showcase.domain import CALIBRATION, TRAINED
from benchmarks.showcase.parts import QAT_RATE, trainer

RESULTS = Path(__file__).parent / "results" / "training"
TRAINABLE = [name for name, domain in DOMAINS.items() if domain.epochs]
PRECISION = "w4a8"
RUNGS = ("ptq", "bias_correction", "bn_reestimation")
SEEDS = 3
# By the name in the table: arguments of the callback, and callbacks beside it.
WAYS: dict[str, tuple[dict[str, Any], Callable[[], list[pl.Callback]]]] = {
    "as it is": ({"oscillations": "note"}, list),
    "oscillating weights frozen": ({"oscillations": "freeze"}, list),
    # The last hundred steps.
    "average of the weights (EMA)": ({"oscillations": "note"}, lambda: [EMAWeightAveraging(decay=0.99)]),
    "distillation": ({"oscillations": "note", "distillation": 1.0}, list),
}
NOTHING = "no training"


def start(name: str, camvid: Path, task: pl.LightningModule, data: pl.LightningDataModule) -> tuple[Path, float]:
    """The quantized network that training starts from, and its figure: made once, kept beside the float weights."""
    domain = DOMAINS[name]
    folder = TRAINED / f"{name}-{PRECISION}"
    figure = folder / "figure.json"
    if not figure.is_file():
        climb = lq.QuantizationAwareTraining(
            PRECISION, calibration_samples=CALIBRATION, rungs=RUNGS, monitor=domain.monitor, mode=domain.mode,
            max_drop=-1.0,
        )  # fmt: skip
        trainer(folder, climb, max_epochs=0).fit(copy.deepcopy(task), datamodule=data)
        best = [rung.metric for rung in climb.result.rungs if rung.kept][-1]
        figure.write_text(json.dumps(best))
    return folder / "ladder" / "best.ckpt", json.loads(figure.read_text())


def measure(name: str, way: str, seed: int, camvid: Path) -> dict[str, Any]:
    """Train from there with the numbers of ``seed``; the figure afterwards, and what oscillated."""
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    domain = DOMAINS[name]
    task, data = domain.build(camvid)
    path, before = start(name, camvid, task, data)
    if way == NOTHING:
        return {"figure": before}
    vars(task)["learning_rate"] *= QAT_RATE
    options, beside = WAYS[way]
    quantization = lq.QuantizationAwareTraining(
        PRECISION, calibration_samples=CALIBRATION, monitor=domain.monitor, mode=domain.mode, **options
    )
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        fit = trainer(Path(folder), quantization, *beside(), max_epochs=domain.epochs, limit_val_batches=0)
        pl.seed_everything(seed, verbose=False)
        fit.fit(task, datamodule=data, ckpt_path=path, weights_only=False)
        seconds = time.perf_counter() - began
        (metrics,) = trainer(Path(folder), quantization).validate(task, datamodule=data, verbose=False)
    oscillation = quantization.oscillation
    assert oscillation is not None
    return {
        "figure": metrics[domain.monitor],
        "seconds": round(seconds, 1),
        "steps": fit.global_step,
        "oscillating": oscillation.oscillating[-1],
        "frozen": oscillation.frozen[-1] if oscillation.freeze else None,
    }


def path_of(name: str, way: str, seed: int) -> Path:
    """Where a cell is kept."""
    return RESULTS / f"{name}-{way.replace(' ', '_')}-{seed}.json"


def rows() -> list[list[str]]:
    """The cells that are there: figures in percent, mean and standard deviation over the seeds."""
    found = []
    for name, way in product(TRAINABLE, (NOTHING, *WAYS)):
        paths = [path for path in (path_of(name, way, seed) for seed in range(SEEDS)) if path.is_file()]
        if not paths:
            continue
        cells = [json.loads(path.read_text())["results"] for path in paths]
        row = [DOMAINS[name].network, DOMAINS[name].figure, way, _spread([100 * one["figure"] for one in cells])]
        if way == NOTHING:
            found.append([*row, "–", "–"])
            continue
        oscillating = statistics.mean(100 * one["oscillating"] for one in cells)
        found.append([*row, f"{oscillating:.1f}", f"{statistics.mean(one['seconds'] for one in cells):.0f}"])
    return found


def markdown() -> str:
    """Return the table."""
    return table(["network", "figure", "training", "", "oscillating weights, %", "seconds"], rows())


def main() -> None:
    """Measure what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--camvid", type=Path, default="../shared/data/camvid", help="photographs like Cityscapes'")
    parser.add_argument("--domains", nargs="+", choices=TRAINABLE, default=TRAINABLE)
    parser.add_argument("--table", action="store_true", help="only write the table from the results")
    arguments = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    domains = () if arguments.table else arguments.domains
    for name, seed, way in product(domains, range(SEEDS), (NOTHING, *WAYS)):
        path = path_of(name, way, seed)
        if path.is_file() or (way == NOTHING and seed):
            continue
        partial = path.with_suffix(".partial")
        results = measure(name, way, seed, arguments.camvid)
        partial.write_text(json.dumps({**facts(), "results": results}, indent=1) + "\n")
        os.replace(partial, path)
        print(path.stem, results, flush=True)
    (RESULTS / "table.md").write_text(markdown() + "\n")
    Console(width=200).print(Markdown(markdown()))


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
