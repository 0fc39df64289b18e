"""What a run answers to a sweeper that searches, such as Optuna."""

from __future__ import annotations

import math
from collections.abc import Callable

from omegaconf import DictConfig

from lightning_quant.errors import ConfigurationError
from lightning_quant.report.record import RunRecord
from lightning_quant.utilities.monitor import Monitor

_OBJECTIVES: dict[str, Callable[[RunRecord], float]] = {
    "metric": lambda record: record.metric.get(record.exported or "", math.nan),
    "drop": lambda record: math.nan if record.drop is None else record.drop,
    "megabytes": lambda record: record.bytes.get("quantized", math.nan) / 1e6,
    "latency_ms": lambda record: (record.device[0].median_latency_us or math.nan) / 1000 if record.device else math.nan,
    "seconds": lambda record: sum(record.seconds.values()),
}


def check_objectives(config: DictConfig) -> None:
    """Refuse objectives that do not exist, before any work.

    Raises:
        ConfigurationError: naming the first.
    """
    if unknown := [name for name in config.objectives if name not in _OBJECTIVES]:
        raise ConfigurationError(f"objectives has {unknown[0]!r}: expected some of {', '.join(_OBJECTIVES)}.")


def objectives(config: DictConfig, record: RunRecord | None) -> float | tuple[float, ...]:
    """Return the configured figures of a run.

    One that was not measured, or of a run that failed, is the worst possible: NaN would end the search.
    """

    def value(name: str) -> float:
        found = math.nan if record is None else _OBJECTIVES[name](record)
        worst = Monitor(config.monitor, config.mode).worst if name == "metric" else math.inf
        return found if math.isfinite(found) else worst

    values = tuple(value(name) for name in config.objectives)
    return values[0] if len(values) == 1 else values
