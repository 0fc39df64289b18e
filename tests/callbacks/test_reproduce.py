"""What a report prints under "How to reproduce": pasted into Python, it makes the same callback."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from typing import Any

import pytest

import lightning_quant as lq
from lightning_quant.callbacks.reproduce import reproduce
from tests.helpers.estimators import Deviations
from tests.helpers.rungs import ScaledWeights


def pasted(source: str) -> str:
    """Return what reproduces the callback that the source makes in a process that has imported nothing else."""
    *statements, made = ast.parse(source).body
    imports = "\n".join(map(ast.unparse, statements))
    code = (
        f"{imports}\nfrom lightning_quant.callbacks.reproduce import reproduce\nprint(reproduce({ast.unparse(made)}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.removesuffix("\n")


def test_options_and_classes_of_the_users_own_are_in_it() -> None:
    rungs = ("ptq", {"mixed": {"budget": 0.05}}, {"ptq": {"range_estimator": Deviations(2.0)}}, ScaledWeights(1.1))
    callback = lq.QuantizationAwareTraining(
        "w4a8",
        range_estimator=Deviations(4.0),
        max_drop=0.01,
        monitor="val_loss",
        mode="min",
        rungs=rungs,
        compile={"backend": "eager"},
        distillation={"kl": 0.5, "temperature": 2.0},
        oscillations="freeze",
    )
    source = reproduce(callback)
    assert "distillation={'kl': 0.5, 'temperature': 2.0}" in source
    assert "tests.helpers.rungs.ScaledWeights" in source
    assert "'budget': 0.05" in source
    assert "compile={'backend': 'eager'}" in source
    assert pasted(source) == source


@pytest.mark.parametrize(
    ("callback", "made"),
    [
        (lq.PostTrainingQuantization("w8a16", strict=True), "PostTrainingQuantization('w8a16', strict=True)"),
        (lq.QuantizationAwareTraining(monitor=None), "QuantizationAwareTraining('w8a8', monitor=None)"),
        (lq.QuantizationAwareTraining(compile=True), "QuantizationAwareTraining('w8a8', compile=True)"),
    ],
)
def test_defaults_are_left_out(callback: lq.PostTrainingQuantization | lq.QuantizationAwareTraining, made: str) -> None:
    assert reproduce(callback) == f"import lightning_quant as lq\n\nlq.{made}"


@pytest.mark.parametrize("cls", [lq.PostTrainingQuantization, lq.QuantizationAwareTraining])
def test_no_argument_is_forgotten(cls: type[Any]) -> None:
    """All but where things are read from and kept: those are of one machine."""
    given = {
        "precision": "w4a8",
        "network": "other",
        "hardware": "htp_v73",
        "calibration_samples": 7,
        "range_estimator": "tf_enhanced",
        "overrides": {"head": "w8a8"},
        "strict": True,
        "max_drop": 0.5,
        "monitor": "val_loss",
        "mode": "min",
        "rungs": ("ptq", "cle"),
        "train_ranges": False,
        "distillation": 0.5,
        "oscillations": "note",
        "compile": True,
    }
    names = inspect.signature(cls).parameters.keys() - {"calibration_dataloader", "statistics_cache"}
    source = reproduce(cls(**{name: given[name] for name in names}))
    (call,) = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    assert {keyword.arg for keyword in call.keywords} == names - {"precision"}
