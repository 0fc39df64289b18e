"""What quantization costs each network, rung by rung: the table `make accuracy` prints and README quotes."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import lightning.pytorch as pl
import torch

from benchmarks.networks import NETWORKS
from lightning_quant.segmentation.datamodule import CityscapesDataModule, SyntheticScenesDataModule
from lightning_quant.segmentation.task import SegmentationTask

FLOAT = Path("outputs/accuracy/float")


def data(name: str, camvid: str) -> CityscapesDataModule:
    if name == "camvid":
        return CityscapesDataModule(camvid, batch_size=8, calibration_samples=64)
    return SyntheticScenesDataModule("data/scenes-128x256-600-120-0", batch_size=8, calibration_samples=64)


def trainer(*callbacks: pl.Callback, **options: object) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    own = {"enable_checkpointing": False, "gradient_clip_val": 1.0, "devices": 1, "num_sanity_val_steps": 0}
    return pl.Trainer(**{**quiet, **own, **options, "callbacks": list(callbacks)})  # type: ignore[arg-type]


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--data", nargs="+", choices=["camvid", "scenes"], default=["camvid"])
    parser.add_argument("--camvid", default="../shared/data/camvid")
    arguments = parser.parse_args()
    for name in arguments.networks:
        for source in arguments.data:
            task = float_task(name, source, arguments.camvid)
            metrics = trainer().validate(task, datamodule=data(source, arguments.camvid), verbose=False)
            print(name, source, metrics, flush=True)


if __name__ == "__main__":
    main()
