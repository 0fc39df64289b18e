"""Many steps and many calibrations in one process: what they leave in memory and in the system's tables."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import numpy as np
import psutil
import torch

import lightning_quant as lq
from tests.helpers.networks import Body, call, images, quantized
from tests.helpers.small import SmallModule, small_loader, small_net
from tests.helpers.trainers import quiet_trainer


@dataclass
class Endured:
    """What was watched.

    Args:
        count: steps, or calibrations.
        slope: growth of resident memory in the last three quarters, in bytes for each.
        handles: open files at the end less those after a quarter.
        differences: parts of AIMET's and PyTorch's global state that were not as before.
    """

    count: int
    slope: float
    handles: int
    differences: list[str]


class _Watch:
    def __init__(self) -> None:
        self._process = psutil.Process()
        self._before = global_state()
        self.at: list[int] = []
        self.memory: list[int] = []
        self.handles: list[int] = []

    def look(self, index: int) -> None:
        self.at.append(index)
        self.memory.append(self._process.memory_info().rss)
        self.handles.append(len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0)

    def ended(self, count: int) -> Endured:
        quarter = len(self.at) // 4
        slope = float(np.polyfit(self.at[quarter:], self.memory[quarter:], 1)[0])
        now = global_state()
        differences = [name for name, value in self._before.items() if now[name] != value]
        return Endured(count, slope, self.handles[-1] - self.handles[quarter], differences)


def global_state() -> dict[str, Any]:
    """What AIMET keeps, or changes, for the whole process."""
    from aimet_torch.nn import QuantizationMixin

    return {
        "unknown modules are ignored": QuantizationMixin._ignore_unknown_modules,
        "classes with a quantized form": len(QuantizationMixin.cls_to_qcls),
        "gradients": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "float32 matmul": torch.get_float32_matmul_precision(),
    }


def steps(count: int) -> Endured:
    """Quantization-aware training for ``count`` steps."""

    class Looks(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step % max(count // 100, 1) == 0:
                gc.collect()
                watch.look(trainer.global_step)

    train(1, pl.Callback())
    watch = _Watch()
    train(count, Looks())
    return watch.ended(count)


def train(count: int, callback: pl.Callback) -> None:
    with TemporaryDirectory() as folder:
        quantization = lq.QuantizationAwareTraining("w4a8", calibration_samples=16)
        trainer = quiet_trainer(
            folder, quantization, callback, max_steps=count, max_epochs=-1, num_sanity_val_steps=0, limit_val_batches=0
        )
        trainer.fit(SmallModule(small_net()), small_loader())


def calibrations(count: int) -> Endured:
    """``count`` calibrations, of three networks in turn, each with an estimator of its own."""
    from lightning_quant.simulation.calibrate import calibrate

    networks = [quantized(Body(), range_estimator=name) for name in ("min_max", "tf_enhanced", "percentile")]

    def one(index: int) -> None:
        calibrate(networks[index % 3], [call(images(8, seed=index))])

    for index in range(9):
        one(index)
    watch = _Watch()
    for index in range(count):
        one(index)
        gc.collect()
        watch.look(index)
    return watch.ended(count)


def builds(count: int) -> Endured:
    """``count`` networks quantized one after the other. PyTorch never frees the classes of AIMET's traces."""
    for _ in range(3):
        quantized(Body())
    watch = _Watch()
    for index in range(count):
        quantized(Body())
        gc.collect()
        watch.look(index)
    return watch.ended(count)
