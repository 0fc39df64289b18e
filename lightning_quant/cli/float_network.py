"""The float network that a run starts from: from a given checkpoint, from an earlier run, or trained now."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from filelock import FileLock

from lightning_quant.callbacks.resume_point import ResumePoint
from lightning_quant.cli.parts import Parts
from lightning_quant.errors import CheckpointError
from lightning_quant.report.record import RunRecord, config_hash
from lightning_quant.utilities.files import atomic_write
from lightning_quant.utilities.parsing import read_checkpoint

log = logging.getLogger(__name__)


def float_task(parts: Parts, record: RunRecord) -> pl.LightningModule:
    """Return the task with its float network; where it is kept is noted among the record's artifacts.

    A trained one is shared by all runs whose data, model, task, trainer and seed are the same.

    Raises:
        CheckpointError: for a checkpoint that cannot be used, see :func:`load_float`.
    """
    config = parts.config.float
    task = parts.task()
    if config.checkpoint is not None:
        load_float(task, Path(config.checkpoint))
        return task
    if config.epochs == 0:
        return task
    values = {part: record.config[part] for part in ("data", "model", "task", "float", "seed", "trainer")}
    # how the calibration samples are chosen does not change the float network
    values["data"] = {key: value for key, value in values["data"].items() if not key.startswith("calibration")}
    path = Path(config.dir).absolute() / f"{record.model}-{config_hash(values)}.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):  # parallel jobs of a sweep wait for the one that trains
        if path.is_file():
            log.info("Float network from %s", path)
            load_float(task, path)
        else:
            _train(parts, task, path)
            log.info("Float network trained and kept as %s", path)
    record.artifacts["float_checkpoint"] = str(path)
    return task


def _train(parts: Parts, task: pl.LightningModule, path: Path) -> None:
    """Train the float network into ``path``, or resume where a run was stopped."""
    point = ResumePoint(path.with_suffix(".part"))
    if point.ckpt_path:
        log.info("Resuming the float network from %s", point.path)
        read_or_refuse(point.path)  # before Lightning does, with a clear error
    options = {"max_epochs": parts.config.float.epochs, "limit_val_batches": 0, "enable_checkpointing": True}
    trainer = parts.trainer(point, logger=parts.logger("float"), **options)
    trainer.fit(task, datamodule=parts.data, ckpt_path=point.ckpt_path, weights_only=True)
    with atomic_write(path) as partial:
        trainer.save_checkpoint(partial, weights_only=True)
    point.path.unlink()


def load_float(task: pl.LightningModule, path: Path) -> None:
    """Load a float checkpoint of the task, or a state dict of its network.

    Raises:
        CheckpointError: if it is missing, damaged, quantized, or of another network.
    """
    if not path.is_file():
        raise CheckpointError(f"float.checkpoint={str(path)!r} does not exist: expected a checkpoint file.")
    content = read_or_refuse(path)
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds {type(state).__name__}: expected a Lightning checkpoint or a state dict.")
    if any(str(key).endswith("_extra_state") for key in state):
        raise CheckpointError(f"{path} holds a quantized network: expected a float one to start from.")
    try:
        task.load_state_dict(state)
    except Exception as error:  # PyTorch's own for names and shapes, others for what is not a tensor
        try:
            task.get_submodule("model").load_state_dict(state)
        except Exception:
            raise CheckpointError(f"{path} does not fit {type(task).__name__}: {error}") from error


def read_or_refuse(path: Path) -> Any:
    """Return what a checkpoint holds.

    Raises:
        CheckpointError: if it is damaged.
    """
    try:
        return read_checkpoint(path)
    except Exception as error:  # pickle, zip, EOF and runtime errors, by where the damage is
        raise CheckpointError(
            f"{path} is not a readable checkpoint: {type(error).__name__}: {error}. Give another, or remove it if a "
            "run that was stopped left it there: then it is made again."
        ) from error
