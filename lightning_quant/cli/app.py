"""The command line: ``lightning-quant``, or ``python -m lightning_quant``. Configuration by Hydra.

Only what parsing the command line needs is imported here; the run itself is in :mod:`lightning_quant.cli.run`.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import logging
import sys
from importlib import metadata
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from lightning_quant.cli.configuration import config_dir
from lightning_quant.cli.quiet import quiet_third_party
from lightning_quant.errors import LightningQuantError

log = logging.getLogger(__name__)

# What does not run a configuration, each in a module of this package by that name.
_COMMANDS = ("blame", "compare", "predict", "resume")


@hydra.main(config_path=str(config_dir()), config_name="config", version_base="1.3")
def _job(config: DictConfig) -> float | tuple[float, ...]:
    """Run one job and return its objectives, for sweepers that search by them."""
    from lightning_quant.cli.objectives import objectives
    from lightning_quant.cli.run import record_failure, run

    try:
        return objectives(config, run(config))
    except LightningQuantError as error:
        # The next job of a sweep may well succeed, so it gets its chance.
        record_failure(config, error)
        log.error("%s: %s", type(error).__name__, error)
        return _failed(config)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        logging.raiseExceptions = False  # the log's own file may be on that disk
        place = error.filename2 or error.filename or Path.cwd()
        folder = HydraConfig.get().runtime.output_dir
        log.error(
            "No space left for %s. Free some; with skip_finished=true and this folder, %s, the same command resumes.",
            place,
            folder,
        )
        return _failed(config)


def _failed(config: DictConfig) -> float | tuple[float, ...]:
    """End a single run with status 1; of a run in a sweep return the worst objectives, for the others are to run."""
    from lightning_quant.cli.objectives import objectives

    if HydraConfig.get().mode is RunMode.RUN:
        sys.exit(1)
    return objectives(config, None)


def main() -> None:
    """Run the app, or a command of its own; the exit status is 1 if that failed."""
    sys.path.append(str(Path.cwd()))  # rungs, estimators and networks of the user's own lie here, as for ``python -m``
    if sys.argv[1:2] and sys.argv[1] in _COMMANDS:
        logging.basicConfig(format="%(message)s")
        sys.exit(_run_command(sys.argv[1], sys.argv[2:]))
    if sys.argv[1:] == ["--version"]:  # Hydra would name its own
        print(f"lightning-quant {metadata.version('lightning-quant')}")
        return
    if sys.argv[1:]:
        _refuse_unknown(sys.argv[1])
    if "sensitivity" in sys.argv[1:]:  # Hydra takes key=value only
        sys.argv[sys.argv.index("sensitivity", 1)] = "job=sensitivity"
    _job()


def _refuse_unknown(word: str) -> None:
    """End where the first word of the command line is neither a command nor what Hydra takes."""
    known = (*_COMMANDS, "sensitivity")
    if word in known or "=" in word or word.startswith(("-", "+", "~")):
        return
    near = difflib.get_close_matches(word, known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    sys.exit(f"ConfigurationError: Unknown command {word!r}: expected {', '.join(known)} or key=value.{hint}")


def _run_command(name: str, arguments: list[str]) -> int:
    """Return the exit status of a command, which parses its arguments itself."""
    command = importlib.import_module(f"lightning_quant.cli.{name}").command
    quiet_third_party()
    try:
        status: int = command(arguments)
    except LightningQuantError as error:
        log.error("%s: %s", type(error).__name__, error)
        return 1
    return status


if __name__ == "__main__":
    main()
