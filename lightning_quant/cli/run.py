"""One job of the command line: its folder, its record, and both when it fails or is stopped."""

from __future__ import annotations

import importlib.metadata
import logging
import shlex
import signal
import sys
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf

from lightning_quant.cli.objectives import check_objectives
from lightning_quant.cli.parts import Parts
from lightning_quant.cli.quiet import quiet_third_party
from lightning_quant.cli.stages import Stages
from lightning_quant.errors import ConfigurationError, DataError, LightningQuantError
from lightning_quant.precision import Precision
from lightning_quant.report.page import REPORT_NAME, write_report
from lightning_quant.report.record import RECORD_NAME, RunRecord, config_hash
from lightning_quant.report.summary import print_artifacts, print_summary
from lightning_quant.utilities.files import exclusive_lock

log = logging.getLogger(__name__)

JOBS = ("quantize", "sensitivity")

# Values that say where or whether to run, not what comes out.
_NON_RESULT_KEYS = ("skip_finished", "objectives")


def run(config: DictConfig) -> RunRecord:
    """Run one job of the app in Hydra's output folder and write its record there.

    Args:
        config: the composed configuration, see ``conf/config.yaml``.

    Returns:
        The record; the one found there if ``skip_finished`` is set and the configuration is the same.
    """
    quiet_third_party()
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise ConfigurationError(
            f"No value for {', '.join(missing)}: expected one on the command line, e.g. {missing[0]}=..."
        )
    if config.job not in JOBS:
        raise ConfigurationError(f"job={config.job!r}: expected one of {', '.join(JOBS)}.")
    check_objectives(config)
    for key in ("seed", "float.epochs", "qat.epochs", "overlays", "report.samples", "report.sensitivity_samples"):
        value = OmegaConf.select(config, key)
        if not isinstance(value, int) or value < 0:
            raise ConfigurationError(f"{key}={value!r}: expected a whole number of at least 0.")
    folder = Path(HydraConfig.get().runtime.output_dir)
    record = _new_record(config)
    if config.skip_finished and (finished := _earlier(folder, record.config_hash, "finished")):
        log.info("Skipped: %s holds the finished run of this configuration.", folder)
        return finished
    with _alone(folder):
        return _run(config, folder, record)


def _run(config: DictConfig, folder: Path, record: RunRecord) -> RunRecord:
    earlier = _earlier(folder, record.config_hash) if config.skip_finished else None
    if earlier is not None:  # what was measured is not measured again
        _keep_logs(folder)
        record.metric, record.seconds = earlier.metric, earlier.seconds
        record.class_figures, record.confusion = earlier.class_figures, earlier.confusion
    record.write(folder)
    try:
        stages = Stages(Parts(config, folder), record, resumes=earlier is not None)
        if config.job == "sensitivity":
            stages.draw_sensitivity()
        else:
            stages.quantize()
    except (SIGTERMException, KeyboardInterrupt, SystemExit) as error:
        if (received := _signal_of(error)) is None:
            raise
        how = f"With hydra.run.dir={folder} skip_finished=true the same command resumes."
        log.warning("Stopped by %s. %s", received.name, how)
        sys.exit(128 + received)
    except LightningQuantError as error:  # what was measured until then is kept
        record.status, record.error = "failed", f"{type(error).__name__}: {error}"
        record.write(folder)
        if config.job == "quantize":
            write_report(folder)
        raise
    except Exception as error:  # of the user's code, or a defect: the run is over
        record.status, record.error = "failed", f"{type(error).__name__}: {error}"
        with suppress(OSError):  # a full disk may be what it failed of
            record.write(folder)
        raise
    record.status = "finished"
    if config.job == "quantize":
        record.artifacts["report"] = REPORT_NAME
    path = record.write(folder)
    if config.job == "quantize":
        write_report(folder)
    if HydraConfig.get().mode.name == "RUN" and config.job == "quantize":
        print_summary([record], f"Results: {path}")
        print_artifacts(record, folder)
    return record


def _signal_of(error: BaseException) -> signal.Signals | None:
    """Return the signal that stopped a run; ``None`` for an exit that the user's code asked for."""
    if isinstance(error, SIGTERMException):
        return signal.SIGTERM
    # the Trainer exits where it is interrupted
    is_interrupt = any(isinstance(one, KeyboardInterrupt) for one in (error, error.__context__))
    return signal.SIGINT if is_interrupt else None


def record_failure(config: DictConfig, error: Exception) -> None:
    """Leave a record of a run that failed before it had one, with its message; none where another run is active."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    record = _new_record(config)
    record.status, record.error = "failed", f"{type(error).__name__}: {error}"
    with suppress(ConfigurationError), _alone(folder):
        if _earlier(folder, record.config_hash) is None:
            record.write(folder)


def _alone(folder: Path) -> AbstractContextManager[None]:
    """Refuse a second run in a folder."""
    busy = f"Another run is writing to {folder}: expected a folder for each. Give another hydra.run.dir, or wait."
    return exclusive_lock(folder / ".lock", ConfigurationError(busy))


def _keep_logs(folder: Path) -> None:
    """Number the tables of a run that was stopped: CSVLogger removes what it finds under its name."""
    for path in sorted(folder.glob("logs/*/metrics.csv")):
        number = len(list(path.parent.glob("metrics.*.csv"))) + 1
        path.rename(path.with_name(f"metrics.{number}.csv"))


def _new_record(config: DictConfig) -> RunRecord:
    choices = HydraConfig.get().runtime.choices
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    plain = {str(key): value for key, value in values.items() if key not in _NON_RESULT_KEYS}
    packages = ("lightning-quant", "lightning", "torch", "aimet-torch", "onnx", "onnxruntime", "torchmetrics")
    return RunRecord(
        status="running",
        model=choices["model"],
        data=choices["data"],
        precision=Precision.parse(config.precision),
        config_hash=config_hash(plain),
        monitor=config.monitor,
        mode=config.mode,
        versions={name: importlib.metadata.version(name) for name in packages},
        config=plain,
        reproduce=shlex.join(["lightning-quant", *HydraConfig.get().overrides.task]),
    )


def _earlier(folder: Path, wanted: str, status: str | None = None) -> RunRecord | None:
    """Return the record that an earlier run of the same configuration left, with this status if one is given."""
    if not (folder / RECORD_NAME).is_file():
        return None
    try:
        record = RunRecord.read(folder / RECORD_NAME)
    except DataError:  # damaged: run again
        return None
    return record if status in (None, record.status) and record.config_hash == wanted else None
