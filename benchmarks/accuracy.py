"""What quantization costs each network, rung by rung: the table of `make accuracy`.

One cell is one network, data set, precision and seed. It climbs every rung, whatever they bring, trains from the best
of them with and without distillation, and trains from plain min-max ranges for as many epochs, as a hand-written AIMET
script would. A finished cell is one JSON file below ``benchmarks/results/accuracy``, so a run resumes where it was
stopped; ``--table`` only prints what is there.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.markdown import Markdown

import lightning_quant as lq
from benchmarks.networks import NETWORKS
from lightning_quant.domains.segmentation.datamodule import CityscapesDataModule, SyntheticScenesDataModule
from lightning_quant.domains.segmentation.task import SegmentationTask
from lightning_quant.ladder.gate import Ladder

FLOAT = Path("outputs/accuracy/float")
RESULTS = Path(__file__).parent / "results" / "accuracy"
# Cells of an earlier version, run on the same float networks.
BEFORE = RESULTS / "before"

PRECISIONS = ("w8a8", "w8a16", "w4a16", "w4a8")
RUNGS = ("ptq", "cle", "bias_correction", "bn_reestimation", "seq_mse", "mixed")
# What a cell should lose at most, in points of mIoU.
TARGETS = {"w8a8": 0.5, "w8a16": 0.2, "w4a16": 1.0, "w4a8": 1.5}
QAT_EPOCHS = 1
# Of the float learning rate.
QAT_RATE = 1 / 30
# Besides the ladder: training from its best network, and from plain min-max ranges as an AIMET script would.
PARTS: dict[str, dict[str, Any]] = {"qat": {}, "qat_distilled": {"distillation": 1.0}, "plain_qat": {}}
# The float network trained as long again: what training more is worth without any rounding.
TUNED = "float_tuned"


def data(name: str, camvid: str) -> CityscapesDataModule:
    """Validation never calibrates or trains: 64 training images do."""
    if name == "camvid":
        return CityscapesDataModule(camvid, batch_size=8, calibration_samples=64)
    return SyntheticScenesDataModule("data/scenes-128x256-600-120-0", batch_size=8, calibration_samples=64)


def trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    own = {"enable_checkpointing": False, "gradient_clip_val": 1.0, "devices": 1, "num_sanity_val_steps": 0}
    return pl.Trainer(**{**quiet, **own, **options, "callbacks": list(callbacks)})


def float_task(name: str, source: str, camvid: str, factor: int = 1) -> SegmentationTask:
    """The network with its float weights: trained once, kept in ``outputs/accuracy/float``."""
    network = NETWORKS[name]
    path = FLOAT / f"{name}-{source}-x{factor}.ckpt"
    pl.seed_everything(0, workers=True, verbose=False)
    task = SegmentationTask(network.build(), learning_rate=network.learning_rate)
    if path.is_file():
        task.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["state_dict"])
        return task
    path.parent.mkdir(parents=True, exist_ok=True)
    training = trainer(max_epochs=network.epochs * factor, limit_val_batches=0)
    training.fit(task, datamodule=data(source, camvid))
    partial = path.with_suffix(".partial")
    training.save_checkpoint(partial, weights_only=True)
    os.replace(partial, path)
    return task


def climb(task: SegmentationTask, precision: str, folder: Path, dm: pl.LightningDataModule) -> Ladder:
    """Every rung before training; the best network is left in ``folder``."""
    callback = lq.QuantizationAwareTraining(
        precision, calibration_samples=64, rungs=RUNGS, max_drop=-1.0, monitor="val_miou"
    )
    trainer(callback, max_epochs=0, default_root_dir=folder).fit(copy.deepcopy(task), datamodule=dm)
    return callback.result


def train(
    task: SegmentationTask, precision: str, folder: Path, dm: pl.LightningDataModule, start: Path | None, **options: Any
) -> dict[str, float]:
    """Quantization-aware training from the checkpoint ``start``, or from plain min-max ranges; mIoU and seconds."""
    rungs = RUNGS if start else ("ptq",)
    callback = lq.QuantizationAwareTraining(
        precision, calibration_samples=64, rungs=rungs, max_drop=-1.0 if start else None, **options
    )
    student = copy.deepcopy(task)
    began = time.perf_counter()
    fit = trainer(callback, max_epochs=QAT_EPOCHS, default_root_dir=folder, limit_val_batches=1.0 if start else 0)
    fit.fit(student, datamodule=dm, ckpt_path=start, weights_only=False if start else None)
    seconds = time.perf_counter() - began
    if start:
        rung = callback.result.rungs[-1]
        assert rung.metric is not None
        return {"miou": rung.metric, "seconds": rung.seconds}
    (metrics,) = trainer(callback).validate(student, datamodule=dm, verbose=False)
    return {"miou": metrics["val_miou"], "seconds": round(seconds, 2)}


def tune_float(task: SegmentationTask, dm: pl.LightningDataModule) -> dict[str, float]:
    """The float network after the same further training; mIoU and seconds."""
    student = copy.deepcopy(task)
    began = time.perf_counter()
    fit = trainer(max_epochs=QAT_EPOCHS, limit_val_batches=0)
    fit.fit(student, datamodule=dm)
    seconds = time.perf_counter() - began
    (metrics,) = trainer().validate(student, datamodule=dm, verbose=False)
    return {"miou": metrics["val_miou"], "seconds": round(seconds, 2)}


def cell(name: str, source: str, precision: str, seed: int, camvid: str, factor: int) -> None:
    """Everything about one network, data set, precision and seed; what is in its file already is not done again."""
    path = RESULTS / f"{name}-{source}-{precision}-{seed}.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if result.keys() >= {*PARTS, TUNED}:
        return
    print(f"{name} on {source}, {precision}, seed {seed}", flush=True)
    task = float_task(name, source, camvid, factor)
    task.learning_rate = NETWORKS[name].learning_rate * QAT_RATE
    folder = Path("outputs/accuracy") / path.stem
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    first = RESULTS / f"{name}-{source}-{precision}-0.json"
    best = Path("outputs/accuracy") / first.stem / "ladder" / "best.ckpt"
    if not result:
        result = {"network": name, "data": source, "precision": precision, "seed": seed}
    if not best.is_file():
        pl.seed_everything(0, workers=True, verbose=False)
        result["ladder"] = climb(task, precision, best.parent.parent, data(source, camvid)).to_dict()
    elif "ladder" not in result:  # the rungs draw nothing: seeds are for training
        result["ladder"] = json.loads(first.read_text())["ladder"]
    for part in (*PARTS, TUNED):
        if part in result:
            continue
        pl.seed_everything(seed, workers=True, verbose=False)
        if part == TUNED:
            others = (json.loads(one.read_text()) for one in RESULTS.glob(f"{name}-{source}-*-{seed}.json"))
            known = next((one[TUNED] for one in others if TUNED in one), None)  # the same for every precision
            result[part] = known or tune_float(task, data(source, camvid))
        else:
            start = None if part == "plain_qat" else best
            result[part] = train(task, precision, folder / part, data(source, camvid), start, **PARTS[part])
        result |= {
            "qat_epochs": QAT_EPOCHS,
            "float_epochs": NETWORKS[name].epochs * factor,
            "commit": commit.stdout.strip(),
            "threads": torch.get_num_threads(),
            "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
            "versions": {one: importlib.metadata.version(one) for one in ("aimet-torch", "lightning", "torch")},
        }
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(partial, path)


def finished(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The cells that were run to the end."""
    cells = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [one for one in cells if one.keys() >= {*PARTS, TUNED}]


def chosen(one: dict[str, Any]) -> tuple[str, float, float]:
    """Return what the gate would take at the cell's target: rung, mIoU and seconds until then."""
    ladder = Ladder.from_dict(one["ladder"])
    bound, seconds, best = TARGETS[one["precision"]] / 100, 0.0, ("", 0.0)
    assert ladder.float_metric is not None
    for rung in ladder.rungs:
        seconds += rung.seconds
        if rung.kept and rung.metric is not None and rung.drop is not None:
            best = rung.rung, rung.metric
            if rung.drop <= bound:
                return rung.rung, rung.metric, seconds
    trained = max(one["qat"]["miou"], best[1])
    return ("qat" if trained > best[1] else best[0]), trained, seconds + one["qat"]["seconds"]


def lines(cells: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the table as Markdown: mIoU in points, mean ± standard deviation over seeds, seconds in brackets."""
    heads = ["network", "data", "", "float", "re-estimated", "tuned", *RUNGS, "QAT", "distilled", "plain QAT"]
    heads += ["gate takes", "mIoU", "drop", "after s"]
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for one in cells:
        groups.setdefault((one["network"], one["data"], one["precision"]), []).append(one)
    for key, seeds in sorted(groups.items(), key=lambda item: (*item[0][:2], PRECISIONS.index(item[0][2]))):
        ladder = Ladder.from_dict(seeds[0]["ladder"])
        rungs = {rung.rung: rung for rung in ladder.rungs}
        figures = [_points(ladder.float_metric), _points(ladder.float_reestimated), _over_seeds(seeds, TUNED)]
        figures += [_points(rungs[name].metric, rungs[name].seconds) if name in rungs else "–" for name in RUNGS]
        figures += [_over_seeds(seeds, part) for part in PARTS]
        rung_name, miou, seconds = chosen(seeds[0])
        assert ladder.float_metric is not None
        figures += [rung_name, _points(miou), f"{100 * (ladder.float_metric - miou):.1f}", f"{seconds:.0f}"]
        yield "| " + " | ".join([*key, *figures]) + " |"


def changes(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a table of what an earlier version came to with the same float networks, and what this one does."""
    heads = ["network", "data", "", "seed", "float", "ptq", "best rung", "QAT", "plain QAT"]
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    known = {_cell(one): one for one in before}
    for one in sorted(after, key=lambda one: (one["network"], PRECISIONS.index(one["precision"]))):
        old = known.get(_cell(one))
        if old is None or old["ladder"]["float_metric"] != one["ladder"]["float_metric"]:
            continue
        figures = [[_points(value) for value in _figures(cell)] for cell in (old, one)]
        pairs = [a if a == b else f"{a} → {b}" for a, b in zip(*figures, strict=True)]
        yield "| " + " | ".join([*map(str, _cell(one)), *pairs]) + " |"


def _cell(one: dict[str, Any]) -> tuple[Any, ...]:
    return one["network"], one["data"], one["precision"], one["seed"]


def _figures(one: dict[str, Any]) -> list[float | None]:
    ladder = Ladder.from_dict(one["ladder"])
    metrics = {rung.rung: rung.metric for rung in ladder.rungs}
    best = max(value for value in metrics.values() if value is not None)
    return [ladder.float_metric, metrics["ptq"], best, *(one[part]["miou"] for part in ("qat", "plain_qat"))]


def _points(value: float | None, seconds: float | None = None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f}" + ("" if seconds is None else f" ({seconds:.0f})")


def _over_seeds(seeds: list[dict[str, Any]], part: str) -> str:
    points = [100 * one[part]["miou"] for one in seeds]
    spread = f" ± {statistics.stdev(points):.1f}" if len(points) > 1 else ""
    return f"{statistics.mean(points):.1f}{spread} ({statistics.mean(one[part]['seconds'] for one in seeds):.0f})"


def main() -> None:
    """Run the cells that are missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--data", nargs="+", choices=["camvid", "scenes"], default=["camvid"])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--camvid", default="../shared/data/camvid", help="photographs in the layout of Cityscapes")
    parser.add_argument("--longer", type=int, default=1, help="times as many float epochs: for a machine with a GPU")
    parser.add_argument("--table", action="store_true", help="run nothing, print the table")
    arguments = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    wanted = product(arguments.networks, arguments.data, arguments.seeds, arguments.precisions)
    for name, source, seed, precision in () if arguments.table else wanted:
        cell(name, source, precision, seed, arguments.camvid, arguments.longer)
    table = "\n".join(lines(finished()))
    (RESULTS / "table.md").write_text(table + "\n")
    (RESULTS / "changes.md").write_text("\n".join(changes(finished(BEFORE), finished())) + "\n")
    Console(width=240).print(Markdown(table))


if __name__ == "__main__":
    main()
