"""The parts of a run, built from its configuration: data, task, Trainer, loggers, callbacks.

Generic over Hydra's ``_target_``: any LightningModule that takes ``network=`` (and, for QAT, ``learning_rate=``) and
logs the monitored metric in validation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from lightning_quant.callbacks.device_export import DeviceExport
from lightning_quant.callbacks.post_training import PostTrainingQuantization
from lightning_quant.callbacks.training import QuantizationAwareTraining
from lightning_quant.errors import LightningQuantError
from lightning_quant.precision import Precision

_QAT_ARGUMENTS = ("train_ranges", "distillation", "oscillations", "compile")


class Parts:
    """Build what the configuration of a run names.

    Args:
        config: the composed configuration, see ``conf/config.yaml``.
        folder: of the run.

    Attributes:
        data: the data module, one for the whole run.
        precision: of weights and activations.
    """

    def __init__(self, config: DictConfig, folder: Path) -> None:
        self.config = config
        self.folder = folder
        self.precision = Precision.parse(config.precision)
        self.data: pl.LightningDataModule = _made(config.data)

    def task(self, **options: Any) -> pl.LightningModule:
        """Return a new task with a new network."""
        task: pl.LightningModule = _made(self.config.task, network=_made(self.config.model), **options)
        return task

    def logger(self, stage: str) -> Logger | None:
        """Return the configured logger for a stage; ``None`` if there is none."""
        if "_target_" not in self.config.logger:
            return None
        # the progress bar would show the last letters of a version
        logger: Logger = _made(self.config.logger)(save_dir=str(self.folder / "logs"), name=stage, version="")
        return logger

    def trainer(self, *callbacks: Callback, logger: Logger | None = None, **options: Any) -> pl.Trainer:
        """Return a Trainer with these callbacks; options take the place of configured ones."""
        trainer: pl.Trainer = _made(
            self.config.trainer,
            callbacks=list(callbacks),
            default_root_dir=str(self.folder),
            logger=logger or False,
            **options,
            _convert_="all",
        )
        return trainer

    def post_training(self) -> PostTrainingQuantization:
        """Return the callback that calibrates, or finds the network quantized already."""
        return PostTrainingQuantization(self.precision, **self._plain("quantizer"))

    def training(self) -> QuantizationAwareTraining:
        """Return the callback that climbs the ladder and, if no rung is good enough, trains.

        Raises:
            ConfigurationError: for an argument that it refuses.
        """
        qat = self._plain("qat")
        return QuantizationAwareTraining(
            self.precision,
            **self._plain("quantizer"),
            **self._plain("ladder"),
            monitor=self.config.monitor,
            mode=self.config.mode,
            **{key: qat[key] for key in _QAT_ARGUMENTS},
        )

    def device_export(self, name: str) -> DeviceExport:
        """Return the callback that exports a bundle of this name and has the configured target measure it."""
        export: DeviceExport = _made(
            self.config.target,
            dirpath=str(self.folder / "export"),
            name=name,
            monitor=self.config.monitor,
            mode=self.config.mode,
            report=False,  # the app's own knows more
            _convert_="all",
        )
        return export

    def _plain(self, group: str) -> dict[str, Any]:
        values = OmegaConf.to_container(self.config[group], resolve=True)
        assert isinstance(values, dict)
        return {str(key): value for key, value in values.items()}


def _made(config: DictConfig, **options: Any) -> Any:
    """Make what a configuration names; an error of ours comes as it is, not wrapped in Hydra's."""
    try:
        return instantiate(config, **options)
    except InstantiationException as error:
        if isinstance(error.__cause__, LightningQuantError):
            raise error.__cause__ from error
        raise
