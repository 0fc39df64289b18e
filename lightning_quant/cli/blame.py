"""``lightning-quant blame FOLDER``: the simulation of a run compared layer by layer, with float and with its file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from lightning_quant.callbacks.calibration import calibration_inputs
from lightning_quant.callbacks.calls import InputCatcher
from lightning_quant.callbacks.data import calibration_loader
from lightning_quant.cli.parts import Parts
from lightning_quant.deploy.blame.blame import blame_all
from lightning_quant.deploy.blame.result import BLAME_NAME, Against, Blame, write_blames
from lightning_quant.deploy.bundle import MANIFEST_NAME, load_bundle
from lightning_quant.errors import ConfigurationError
from lightning_quant.report.record import RECORD_NAME, RunRecord
from lightning_quant.simulation.network import QuantizedNetwork

_SAMPLES = 2


def command(arguments: Sequence[str]) -> int:
    """Print what each layer loses, and which of an exported file compute something else.

    Args:
        arguments: of the command line, behind ``blame``.

    Returns:
        The exit status: 0 if no layer computes something else.

    Raises:
        ConfigurationError: when the folder is not of a run that exported something.
    """
    parser = argparse.ArgumentParser(
        "lightning-quant blame", description="Find the layers that lose most, and those that compute something else."
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("."),
                        help="folder of a run, or of the bundle in it; the current one by default")  # fmt: skip
    found, path = blame_run(parser.parse_args(arguments).folder)
    for one in found:
        print(f"Against {one.against.value}:\n{one}\n")
    print(path)
    return int(any(one.guilty for one in found if one.against is not Against.FLOAT))


def blame_run(folder: Path) -> tuple[list[Blame], Path]:
    """Compare the simulation of a finished run with float, the bundle, and the emulator if it was sent to one.

    The samples are those of calibration. The network is built from the run's own record, and its weights and ranges
    come from its checkpoint.

    Args:
        folder: of a run, or of the bundle in it.

    Returns:
        What was found, and where it was written: ``blame.json`` in the run's folder.

    Raises:
        ConfigurationError: when the folder is not of a run that exported something.
    """
    folder = folder.absolute()
    run = folder.parent.parent if (folder / MANIFEST_NAME).is_file() else folder
    if not (run / RECORD_NAME).is_file():
        raise ConfigurationError(
            f"{folder} is neither a run of lightning-quant nor a bundle in one: {run / RECORD_NAME} is missing, which "
            "says how the network is built. For a network of your own, call lq.blame(module, samples, bundle=...)."
        )
    record = RunRecord.read(run / RECORD_NAME)
    missing = [name for name in ("bundle", "checkpoint") if not (run / record.artifacts.get(name, "none")).exists()]
    if missing:
        raise ConfigurationError(f"The run {run} has no {missing[0]}: expected a run that exported a network.")
    parts = Parts(OmegaConf.create(record.config), run)
    task = parts.task()
    trainer = parts.trainer(
        parts.post_training(), enable_progress_bar=False, enable_model_summary=False, limit_val_batches=1
    )
    trainer.validate(
        task,
        datamodule=parts.data,
        ckpt_path=str(run / record.artifacts["checkpoint"]),
        verbose=False,
        weights_only=True,
    )
    name, network = next(QuantizedNetwork.named_in(task))
    catcher = InputCatcher(trainer, task, name, network)
    samples = calibration_inputs(trainer, calibration_loader(trainer, task, None), catcher, _SAMPLES)
    emulated = next((one.device for one in record.device if one.tier == Against.EMULATOR.value), None)
    found = blame_all(network, samples, load_bundle(run / record.artifacts["bundle"]), emulated)
    return found, write_blames(run / BLAME_NAME, found)
