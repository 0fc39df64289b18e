"""What a report prints under "How to reproduce": pasted into Python, it makes the same callback."""

from __future__ import annotations

import ast
import subprocess
import sys

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
    )
    source = reproduce(callback)
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
