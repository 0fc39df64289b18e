"""The figures of layers as a file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lightning_quant.errors import DataError
from lightning_quant.report.layers import LayerFigures
from lightning_quant.simulation.sensitivity import LayerSensitivity
from tests.helpers.networks import Body, calibrated, call, images


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    figures = LayerFigures.of(calibrated(Body()).eval(), [call(images(1, seed)) for seed in range(3)], 1)
    figures.sensitivity.append(LayerSensitivity("last", "weights", 8, math.inf, 0.1, ("last.weight",)))
    figures.drift, figures.drift_steps = {"head.weight": [0.0, 0.5]}, [0, 10]
    path = figures.write(tmp_path / "run")
    read = LayerFigures.read(path.parent)
    assert read.sensitivity == figures.sensitivity
    assert (read.drift, read.drift_steps) == (figures.drift, figures.drift_steps)
    assert [one.counts for one in read.tensors] == [one.counts for one in figures.tensors]
    assert {(one.layer, one.tensor) for one in read.tensors} >= {("head", "weight"), ("head", "output")}
    assert [file.name for file in path.parent.iterdir()] == ["layers.json"]
    json.loads(path.read_text(), parse_constant=pytest.fail)  # standard JSON, without Infinity


def test_without_samples_for_it_sensitivity_is_left_out() -> None:
    assert LayerFigures.of(calibrated(Body()).eval(), [call(images(1))], 0).sensitivity == []


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"format_version": 1}',
        '{"format_version": 9}',
        '{"format_version": 1, "tensors": [{}], "sensitivity": []}',
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "layers.json").write_text(content)
    with pytest.raises(DataError, match=r"layers\.json"):
        LayerFigures.read(tmp_path)
