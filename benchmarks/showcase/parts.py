"""What is measured of a domain at one precision: ours from PTQ to the emulated NPU, and plain AIMET beside it.

Each part runs in a process of its own (:func:`benchmarks.zoo.limits.measured`) and fills a record; what the record's
key names is the domain, the precision, the seed and the folder of photographs.
"""

from __future__ import annotations

import copy
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn

import lightning_quant as lq
from benchmarks.showcase.catalogue import DOMAINS
from benchmarks.showcase.domain import CALIBRATION, Domain
from benchmarks.zoo.plain_aimet import prepared_and_folded
from benchmarks.zoo.record import Record

DEVICE = "Samsung Galaxy S24"
# Of what the emulator computes: it takes up to seconds for an image.
EMULATED = 16
# From the cheapest; the gate ends the climb at the first that is good enough. No mixed precision: a row of the table is
# of one.
RUNGS = ("ptq", "percentile", "cle", "bias_correction", "bn_reestimation")
# Where rounding weights loses something.
RUNGS_OF_4_BITS = ("seq_mse", "rounding")
# How much of the float figure a network may lose, relative to it.
BOUNDS = {"w8a8": 0.01, "w8a16": 0.005, "w4a16": 0.015, "w4a8": 0.015}
# Of the float learning rate, where a network is trained.
QAT_RATE = 1 / 30


def measure_float(record: Record, folder: Path) -> None:
    """The figure of the float network, and its size."""
    domain, module, data = _built(record)
    with record.stage("float"):
        record.values["figure"] = _figure(domain, module, data)
        record.values["parameters"] = sum(parameter.numel() for parameter in module.parameters())


def measure_ours(record: Record, folder: Path) -> None:
    """The ladder until it is good enough, training where the domain trains, the exported file, and the emulator."""
    domain, module, data = _built(record)
    precision = record.values["precision"]
    pl.seed_everything(int(record.values["seed"]), verbose=False)
    rungs = (*RUNGS, *domain.more_rungs, *(RUNGS_OF_4_BITS if precision.startswith("w4") else ()))
    quantization = lq.QuantizationAwareTraining(
        precision, calibration_samples=CALIBRATION, rungs=rungs, monitor=domain.monitor, mode=domain.mode,
        max_drop=BOUNDS[precision] * abs(float(record.values["float"])),
    )  # fmt: skip
    export = lq.DeviceExport(
        folder / "export", target="htp_emulator", device=DEVICE, samples=EMULATED, monitor=domain.monitor,
        timeout=record.left_s, on_parity="warn", on_failure="raise",
    )  # fmt: skip
    if domain.epochs:
        vars(module)["learning_rate"] *= QAT_RATE
    with record.stage("ladder"):
        keep = _AfterEachRung(record, quantization)
        trainer(folder, quantization, max_epochs=domain.epochs, logger=keep).fit(module, datamodule=data)
        record.values["ladder"] = quantization.result.to_dict()
    if not record.passed("ladder"):
        return
    with record.stage("export"):
        trainer(folder, quantization, export, limit_val_batches=2).validate(module, datamodule=data, verbose=False)
        assert export.bundle is not None
        record.values["file"] = export.bundle.manifest.parity.to_dict()
    if record.passed("export"):
        with record.stage("emulator"):
            (report,) = export.reports
            record.values["device"] = report.to_dict()


def measure_aimet(record: Record, folder: Path) -> None:
    """Plain AIMET with min-max ranges, prepared and folded as its documentation shows."""
    _aimet(record, folder, adaround=False)


def measure_adaround(record: Record, folder: Path) -> None:
    """Plain AIMET with AdaRound at its defaults, on the same samples."""
    _aimet(record, folder, adaround=True)


PARTS = {
    "float": measure_float,
    "ours": measure_ours,
    "aimet": measure_aimet,
    "aimet_adaround": measure_adaround,
}


class _AfterEachRung(DummyLogger):
    """Keeps what the ladder has measured, for a climb that is ended by its limit."""

    def __init__(self, record: Record, quantization: lq.QuantizationAwareTraining) -> None:
        super().__init__()
        self.record, self.quantization = record, quantization

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        self.record.values["ladder"] = self.quantization.result.to_dict()
        self.record.write()


def trainer(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """Return a Trainer on the CPU that says and keeps nothing."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(
        accelerator="cpu", devices=1, enable_model_summary=False, num_sanity_val_steps=0, callbacks=list(callbacks),
        default_root_dir=folder, **{**quiet, **options},
    )  # fmt: skip


def _built(record: Record) -> tuple[Domain, pl.LightningModule, pl.LightningDataModule]:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    domain = DOMAINS[record.values["domain"]]
    return domain, *domain.build(Path(record.values["camvid"]))


def _figure(domain: Domain, module: pl.LightningModule, data: pl.LightningDataModule) -> float:
    (metrics,) = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    ).validate(module, datamodule=data, verbose=False)
    return metrics[domain.monitor]


def _aimet(record: Record, folder: Path, adaround: bool) -> None:
    domain, module, data = _built(record)
    sys.setrecursionlimit(20_000)  # copying a long traced graph goes node by node
    original = copy.deepcopy(module.model)
    assert isinstance(original, nn.Module)
    calls = _calls(module, data)
    started = time.perf_counter()
    network = prepared_and_folded(original, tuple(one[:1] for one in calls[0]), record)
    weights, _, activations = record.values["precision"][1:].partition("a")
    bits = {"default_param_bw": int(weights), "default_output_bw": int(activations), "config_file": "htp_v75"}
    example = tuple(one[:1] for one in calls[0])
    if adaround:
        with record.stage("adaround"):
            from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters

            parameters = AdaroundParameters(
                calls, num_batches=len(calls), forward_fn=lambda model, inputs: model(*inputs)
            )
            network = Adaround.apply_adaround(
                network, example, parameters, path=str(folder), filename_prefix="adaround",
                default_param_bw=int(weights), default_config_file="htp_v75",
            )  # fmt: skip
        if not record.passed("adaround"):
            return
    with record.stage("simulate"):
        from aimet_torch import QuantizationSimModel

        sim = QuantizationSimModel(network, dummy_input=example, **bits)
        if adaround:
            sim.set_and_freeze_param_encodings(str(folder / "adaround.encodings"))
        with torch.no_grad():
            sim.compute_encodings(lambda model: [model(*call) for call in calls])
        record.values["seconds_until"] = round(time.perf_counter() - started, 2)
        module.model = sim.model.eval()
        record.values["figure"] = _figure(domain, module, data)


def _calls(module: pl.LightningModule, data: pl.LightningDataModule) -> list[tuple[torch.Tensor, ...]]:
    """What the training step gives the network, for the first samples."""
    seen: list[tuple[torch.Tensor, ...]] = []
    network = module.model
    assert isinstance(network, nn.Module)
    handle = network.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple(one for one in (*args, *kwargs.values()))), with_kwargs=True
    )
    count = 0
    with torch.no_grad():
        for batch in data.train_dataloader():
            module.training_step(batch, 0)
            count += len(batch[0])
            if count >= CALIBRATION:
                break
    handle.remove()
    return seen
