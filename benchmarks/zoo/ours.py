"""One network through this package, with what its documentation shows: a LightningModule and callbacks."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_quant as lq
from benchmarks.zoo import emulator, floats
from benchmarks.zoo.catalogue import catalogue
from benchmarks.zoo.record import Record
from lightning_quant.deploy.blame.result import Blame
from lightning_quant.simulation.inputs import NetworkInputs

SAMPLES, BATCH = 8, 2


def tensors(output: Any) -> list[Tensor]:
    """The tensors in what a network answers, in order."""
    if isinstance(output, Tensor):
        return [output]
    inner = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    return [tensor for value in inner for tensor in tensors(value)]


def loss(output: Any) -> Tensor:
    """A number to minimize that every part of an output has a share in: there are no labels.

    Each part counts alike, whatever its unit: boxes in pixels would give gradients that no training has.
    """
    parts = [t.float().square().mean() for t in tensors(output) if t.is_floating_point() and t.requires_grad]
    parts = parts or [t.float().square().mean() for t in tensors(output) if t.is_floating_point()]
    return torch.stack([part / part.detach().clamp(min=1.0) for part in parts]).sum()


class ZooModule(pl.LightningModule):
    """The network as a user would have it: in ``self.model``, called in the steps.

    Args:
        name: its name in the catalogue; all that a checkpoint needs to build it again.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = catalogue()[name].build()
        self.without_gradient: list[str] = []
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        value = loss(self.model(*batch))
        self.losses.append(float(value.detach()))
        return value

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", loss(self.model(*batch)), batch_size=len(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.without_gradient = [n for n, p in self.named_parameters() if p.requires_grad and p.grad is None]

    def loader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(*catalogue()[self.hparams["name"]].batch(SAMPLES)), batch_size=BATCH)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader()

    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader()


def trainer(folder: Path, *callbacks: pl.Callback) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=1, max_steps=1, num_sanity_val_steps=0,
        callbacks=list(callbacks), default_root_dir=folder,
    )  # fmt: skip


def warm_up(record: Record, folder: Path) -> None:
    """Quantize a small network, so that what is built on first use is there."""
    with record.stage("ptq"):
        quantization = lq.PostTrainingQuantization("w8a8", calibration_samples=SAMPLES)
        trainer(folder, quantization).validate(ZooModule("torch/gru"), verbose=False)


def measure(record: Record, folder: Path) -> None:
    """All stages for the network and precision of a record."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    name, precision = record.values["network"], record.values["precision"]
    example = catalogue()[name].batch(1)
    with record.stage("build"):
        module = ZooModule(name)
        record.values["parameters"] = sum(parameter.numel() for parameter in module.parameters())
    if not record.passed("build"):
        return
    with record.stage("ptq"):
        quantization = lq.PostTrainingQuantization(precision, calibration_samples=SAMPLES)
        trainer(folder, quantization).validate(module, verbose=False)
        found = _findings(module)
        record.values |= {"findings": len(found), "finding_texts": found[:8]}
    if not record.passed("ptq"):
        return
    if precision == "w8a8":
        with record.stage("qat"):
            _train_a_step(module, precision, folder, record)
    with record.stage("save"):
        after = trainer(folder)
        after.strategy.connect(module)
        after.save_checkpoint(folder / "last.ckpt", weights_only=True)
    if record.passed("save"):
        with record.stage("load"):
            _load_again(module, folder / "last.ckpt", example)
    _export(module, precision, folder, record, example)


def _train_a_step(module: ZooModule, precision: str, folder: Path, record: Record) -> None:
    training = lq.QuantizationAwareTraining(precision, calibration_samples=SAMPLES, monitor="val_loss", mode="min")
    trainer(folder, training).fit(module)
    record.values["without_gradient"] = len(module.without_gradient)
    record.values["without_gradient_names"] = module.without_gradient[:8]
    if not module.losses or not all(math.isfinite(value) for value in module.losses):
        raise RuntimeError(f"the losses of the step are {module.losses}: expected finite ones")


def _load_again(module: ZooModule, path: Path, example: tuple[Tensor, ...]) -> None:
    loaded = lq.load_quantized(ZooModule, path)
    module.eval()
    with torch.no_grad():
        pairs = zip(tensors(module.model(*example)), tensors(loaded.model(*example)), strict=True)
        differing = [float((a - b).abs().max()) for a, b in pairs if not torch.equal(a, b)]
    if differing:
        raise RuntimeError(f"loaded, it computes something else: outputs differ by up to {max(differing):.2e}")


def _export(module: ZooModule, precision: str, folder: Path, record: Record, example: tuple[Tensor, ...]) -> None:
    target = "htp_emulator" if emulator.available() else None
    export = lq.DeviceExport(
        folder / "export", target=target, device=emulator.DEVICE, samples=2, name=precision,
        on_failure="raise", report=False, timeout=record.left_s,
    )  # fmt: skip
    failed: Exception | None = None
    with record.stage("export"):
        started = time.perf_counter()
        try:
            # random weights amplify a rounding: how close the file is, is a column, not a reason to stop
            with mock.patch("lightning_quant.deploy.parity.check_parity"):
                trainer(folder, export).validate(module, verbose=False)
        except Exception as error:
            if export.bundle is None:
                raise
            failed = error
        assert export.bundle is not None
        whole = time.perf_counter() - started
        emulating = sum(report.seconds.get("all", 0.0) for report in export.reports)
        record.values["seconds"] |= {"export": round(whole - emulating, 2)}
        parity = export.bundle.manifest.to_dict()["parity"]
        left = floats.left_in_float(export.bundle.qdq)
        record.values |= {"parity": parity, "left_in_float": len(left), "left_in_float_names": left[:8]}
    if not record.passed("export"):
        return
    with record.stage("blame"):
        record.values["blame"] = _layer_by_layer(lq.blame(module, NetworkInputs(example), export.bundle, count=1))
    if target is None:
        return
    with record.stage("emulator"):
        if failed is not None:
            raise failed
        report = export.reports[0]
        assert report.layers is not None
        record.values |= emulator.placed(report.layers["NPU"], report.layers["CPU"], report.float_islands or [])
        values = report.to_dict()
        record.values |= {"emulated": values["against_simulation"], "against_float": values.get("against_float")}
        record.values["seconds"]["emulator"] = emulating


def _layer_by_layer(found: Blame) -> dict[str, Any]:
    """Return which tensors of the file are computed otherwise than in the simulation, from the simulation's inputs."""
    largest = max((layer.own.differing for layer in found.layers), default=0.0)
    return {
        "tensors": len(found.layers),
        "otherwise": len(found.guilty),
        "otherwise_names": [layer.layer for layer in found.guilty][:8],
        "reasons": [str(reason) for layer in found.guilty for reason in layer.reasons][:8],
        "largest_share": largest,
        "observed_runs": found.observed_runs,
        "unmatched": len(found.unmatched),
    }


def _findings(module: ZooModule) -> list[str]:
    """Return what the preflight found, one line each."""
    found = getattr(module.model, "findings", ())
    return [f"{one.module or '(network)'}: {one.problem}" for one in found]
