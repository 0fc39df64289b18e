"""The state of a fit on its ladder, without a Trainer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lightning_quant.errors import CheckpointError
from lightning_quant.ladder.gate import Ladder
from lightning_quant.ladder.registry import parse_rungs
from lightning_quant.ladder.session import LadderSession


def session(max_drop: float | None = 0.1, mode: Any = "max") -> LadderSession:
    return LadderSession(Ladder("score", mode, max_drop, float_metric=1.0))


def test_training_is_needed_until_a_rung_is_good_enough() -> None:
    one = session()
    one.ladder.judge("ptq", 0.8, "", 0.0)
    assert one.needs_training
    one.ladder.judge("cle", 0.95, "", 0.0)
    assert not one.needs_training


def test_training_that_has_begun_is_resumed_even_if_a_looser_bound_is_given_now() -> None:
    one = session()
    one.ladder.judge("ptq", 0.8, "", 0.0)
    one.judge_validation(0.85)
    one.ladder.max_drop = 0.3
    assert one.ladder.satisfied
    assert one.needs_training


def test_training_stops_within_the_bound_and_no_longer_improving() -> None:
    one = session()
    one.ladder.judge("ptq", 0.5, "", 0.0)
    stops = []
    for metric in (0.8, 0.7, 0.92, 0.95, 0.94):
        one.judge_validation(metric)
        stops.append(one.should_stop)
    assert stops == [False, False, False, False, True]
    assert one.trained_metric == 0.95


@pytest.mark.parametrize(("mode", "metrics"), [("max", (0.6, 0.8, 0.75, 0.9)), ("min", (1.8, 1.2, 1.3, 1.1))])
def test_the_best_network_is_better_than_the_rungs_and_training_before(mode: str, metrics: tuple[float, ...]) -> None:
    one = session(mode=mode)
    one.ladder.judge("ptq", 0.7 if mode == "max" else 1.5, "", 0.0)
    assert [one.judge_validation(metric) for metric in metrics] == [False, True, False, True]


def test_a_metric_that_is_nan_is_no_improvement() -> None:
    one = session()
    one.ladder.judge("ptq", 0.8, "", 0.0)
    assert not one.judge_validation(math.nan)
    assert one.trained_metric is None
    assert not one.improving


def test_a_metric_that_is_nan_is_not_the_best_where_no_rung_was_kept_either() -> None:
    one = session()
    one.ladder.judge("ptq", math.nan, "", 0.0)
    assert not one.judge_validation(math.nan)
    assert one.judge_validation(0.1)


def test_training_is_recorded_once() -> None:
    one = session()
    one.ladder.judge("ptq", 0.8, "", 0.0)
    for metric in (0.85, 0.9):
        one.judge_validation(metric)
        one.judge_training(10, 1.0, None)
    assert [rung.rung for rung in one.ladder.rungs] == ["ptq", "qat"]


@pytest.mark.parametrize(
    ("mode", "metric", "compared"),
    [
        ("max", 0.9, "0.1000 worse than float 1.0000"),
        ("min", 1.2, "0.2000 worse than float 1.0000"),
        ("min", 0.8, "0.2000 better than float 1.0000"),
        ("max", 1.0, "equal to float 1.0000"),
        ("max", 0.99998, "2e-05 worse than float 1.0000"),
    ],
)
def test_it_says_in_one_line_how_the_best_compares_with_float(mode: str, metric: float, compared: str) -> None:
    one = session(mode=mode)
    one.ladder.judge("ptq", metric, "", 0.0)
    assert one.describe() == f"score {metric:.4f} by ptq, {compared} (max_drop=0.1)"


def test_it_says_which_float_network_it_compares_with() -> None:
    one = session(max_drop=None)
    one.ladder.float_reestimated = 1.02
    one.ladder.judge("bn_reestimation", 0.9, "", 0.0)
    assert one.describe() == (
        "score 0.9000 by bn_reestimation, 0.1200 worse than float 1.0200 with re-estimated batch norms"
    )


def test_rungs_that_were_added_later_are_untried() -> None:
    one = session()
    one.ladder.judge("ptq", 0.8, "", 0.0)
    one.ladder.skip("cle", "failed: no")
    assert one.untried(parse_rungs(["ptq", "mixed", "cle", "bias_correction"])) == ["bias_correction", "mixed"]


@pytest.mark.parametrize("climbed", [False, True])
def test_what_is_restored_is_what_was_saved(climbed: bool) -> None:
    one = session()
    one.ladder.judge("bias_correction", 0.8, "corrected", 0.0)
    one.correction, one.base = "bias_correction", {"bias": torch.zeros(1)}
    one.best_model_path = "ladder/best.ckpt"
    if climbed:
        one.finish_climb()
        one.judge_validation(0.9)
    other = session(max_drop=0.3)
    other.load_state_dict(one.state_dict())
    assert other.ladder.max_drop == 0.3  # of the fit that resumes
    other.ladder.max_drop = 0.1
    assert other == one


def test_a_checkpoint_from_before_the_last_validation_was_kept_is_resumed() -> None:
    state = session().state_dict()
    del state["improving"]
    other = session()
    other.load_state_dict(state)
    assert other.improving


def test_a_checkpoint_of_another_metric_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"measured by monitor='score', mode='max'.*mode='min'"):
        session(mode="min").load_state_dict(session().state_dict())
