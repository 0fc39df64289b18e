"""A metric and its direction."""

from __future__ import annotations

import math

import pytest

from lightning_quant.errors import ConfigurationError
from lightning_quant.utilities.monitor import Monitor

ACCURACY, LOSS = Monitor("accuracy", "max"), Monitor("loss", "min")


def test_a_drop_is_positive_where_the_metric_is_worse() -> None:
    assert ACCURACY.drop(0.5, 0.75) == LOSS.drop(0.75, 0.5) == 0.25
    assert ACCURACY.drop(0.75, 0.5) == LOSS.drop(0.5, 0.75) == -0.25


@pytest.mark.parametrize("monitor", [ACCURACY, LOSS])
def test_lowered_is_the_inverse_of_drop(monitor: Monitor) -> None:
    assert monitor.drop(monitor.lowered(0.5, 0.25), 0.5) == 0.25


def test_more_of_the_score_is_better() -> None:
    assert ACCURACY.score(0.5) == 0.5
    assert LOSS.score(0.5) == -0.5
    assert LOSS.score(LOSS.score(0.5)) == 0.5


def test_which_is_better() -> None:
    assert ACCURACY.is_better(0.6, 0.5)
    assert not ACCURACY.is_better(0.5, 0.5)
    assert LOSS.is_better(0.5, 0.6)
    assert ACCURACY.best([0.1, 0.3, 0.2]) == 0.3
    assert LOSS.best([0.3, 0.1, 0.2]) == 0.1


@pytest.mark.parametrize("monitor", [ACCURACY, LOSS])
def test_any_value_is_better_than_none_nan_and_the_worst(monitor: Monitor) -> None:
    assert all(monitor.is_better(0.5, other) for other in (None, math.nan, monitor.worst))
    assert not monitor.is_better(math.nan, None)


def test_another_mode_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="mode='high': expected 'max' or 'min'"):
        Monitor("loss", "high")  # type: ignore[arg-type]
