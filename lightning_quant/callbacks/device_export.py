"""Export at the end of a run, as a Lightning callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_quant.callbacks.data import (
    InputCatcher,
    calibration_inputs,
    calibration_loader,
    stage_loader,
    undisturbed,
)
from lightning_quant.callbacks.quantization import QuantizationCallback, say
from lightning_quant.deploy.bundle import Bundle, export_bundle, first_samples
from lightning_quant.errors import ConfigurationError
from lightning_quant.simulation.network import QuantizedNetwork

TARGETS = ("auto", "onnxruntime")


class DeviceExport(Callback):
    """Export the quantized network when a fit, validate or test ends, and check the files.

    Writes the bundle ``<dirpath>/<name>/``: ``<name>.aimet/`` (ONNX and encodings, for Qualcomm AI Hub),
    ``<name>.onnx`` (QuantizeLinear/DequantizeLinear with integer weights) and ``manifest.json``. The ONNX file
    is run on some samples and must compute what the simulation computed. List it after the
    quantization callback.

    Args:
        dirpath: folder for the bundle. Default: ``export`` in the Trainer's log or root folder.
        target: what to check the files with. ``"onnxruntime"`` runs them on the host's CPU; ``"auto"``
            takes the best target available, which is that one in this version.
        device: name of the phone the bundle is meant for. Running on the host's CPU needs none.
        samples: how many samples (not batches) to compare on: calibration data, or the stage's own without it.
        name: name of the bundle. Default: class of the network and precision, e.g. ``FFNet-w8a8``.

    Attributes:
        bundle: the :class:`~lightning_quant.deploy.bundle.Bundle` written last, or ``None``.

    Raises:
        ConfigurationError: for an unknown target, or without a quantization callback before it.
        ExportError, ParityError: see :func:`~lightning_quant.deploy.bundle.export_bundle`.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        target: str = "auto",
        device: str = "Samsung Galaxy S24",
        samples: int = 8,
        name: str | None = None,
    ) -> None:
        if target not in TARGETS:
            raise ConfigurationError(
                f"Unknown target {target!r}: expected one of {', '.join(TARGETS)} in this version."
            )
        if not isinstance(samples, int) or samples < 1:
            raise ConfigurationError(f"samples={samples!r}: expected a whole number of at least 1.")
        if name is not None and (not name or Path(name).name != name):
            raise ConfigurationError(f"name={name!r}: expected a plain file name without a folder.")
        self.dirpath = dirpath
        self.target = target
        self.device = device
        self.samples = samples
        self.name = name
        self.bundle: Bundle | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        before = callbacks[: callbacks.index(self)]
        quantized = any(isinstance(module, QuantizedNetwork) for module in pl_module.modules())
        if not quantized and not any(isinstance(one, QuantizationCallback) for one in before):
            raise ConfigurationError(
                "DeviceExport without a quantization callback before it: expected PostTrainingQuantization or "
                "QuantizationAwareTraining earlier in callbacks=[...] (move DeviceExport behind it), or a module from "
                "load_quantized."
            )

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._export(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._export(trainer, pl_module)

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._export(trainer, pl_module)

    def _export(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        name, network = next(
            (name, module) for name, module in pl_module.named_modules() if isinstance(module, QuantizedNetwork)
        )
        given = next(
            (c.calibration_dataloader for c in trainer.callbacks if isinstance(c, QuantizationCallback)),  # type: ignore[attr-defined]
            None,
        )
        catcher = InputCatcher(trainer, pl_module, network, name)
        with undisturbed(), torch.inference_mode(False), torch.no_grad():
            try:
                loader = calibration_loader(trainer, pl_module, given)
            except ConfigurationError:  # nothing is calibrated here: to compare, any data will do
                loader = stage_loader(trainer)
            calls = first_samples(calibration_inputs(trainer, loader, catcher, self.samples), self.samples)
        if trainer.is_global_zero:
            root = Path(self.dirpath or Path(trainer.log_dir or trainer.default_root_dir) / "export")
            stem = self.name or f"{network.float_class.__name__}-{network.recipe.precision}"
            self.bundle = export_bundle(network, root / stem, calls)
            parity: dict[str, Any] = self.bundle.manifest["parity"]
            agreement = "equal to" if parity["psnr_db"] is None else f"{parity['psnr_db']} dB against"
            samples = f"{parity['samples']} samples in ONNX Runtime"
            say(f"Exported {self.bundle.path} ({agreement} the simulation on {samples}).")
        trainer.strategy.barrier("lightning_quant_export")
