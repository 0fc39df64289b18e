"""The cost of the callback itself: an epoch of fit with it, and the same epoch of a loop written by hand.

Both train the same calibrated simulation with the same kernels, AdamW and batches; Lightning is on both sides: by hand
means a LightningModule that holds the simulation, without the callback.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

import lightning_quant as lq
from benchmarks.measure import interleaved, photographs, publish, table
from lightning_quant.domains.segmentation.ffnet import ffnet_nano
from lightning_quant.domains.segmentation.task import SegmentationTask


def trainer(*callbacks: pl.Callback) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=1, callbacks=list(callbacks), logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip


def main() -> None:
    """Measure one epoch of 20 steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--camvid", default="../shared/data/camvid", help="photographs in the layout of Cityscapes")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    images = photographs(arguments.camvid, 8 * arguments.steps)
    labels = torch.randint(0, 19, (len(images), 192, 256))
    loader: DataLoader[Any] = DataLoader(TensorDataset(images, labels), batch_size=8)
    task = SegmentationTask(ffnet_nano(), learning_rate=1e-5)
    quantization = lq.QuantizationAwareTraining("w8a8", calibration_samples=8, calibration_dataloader=loader)
    trainer(quantization).fit(task, loader)  # puts the simulation in and calibrates it
    by_hand = copy.deepcopy(task)

    def epoch(module: pl.LightningModule, *callbacks: pl.Callback) -> Callable[[], None]:
        return lambda: trainer(*callbacks).fit(module, loader)

    seconds = interleaved({"by hand": epoch(by_hand), "callback": epoch(task, quantization)}, rounds=5)
    rows = [[f"{arguments.steps} steps of FFNet-nano", *(f"{seconds[key]:.2f}" for key in seconds)]]
    rows[0].append(f"{seconds['callback'] / seconds['by hand']:.3f}")
    publish("callback", table(["", "s by hand", "s with the callback", "**ratio**"], rows), seconds)


if __name__ == "__main__":
    main()
