"""The tables and weights of the showcase and of ways to train, without the networks (`make showcase training`)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import training
from benchmarks.showcase import domain, table
from lightning_quant.ladder.gate import Ladder, RungResult


def _rung(name: str, metric: float, kept: bool = True) -> RungResult:
    return RungResult(name, metric, 0.3 - metric, 10.0, None, "", kept, "")


def _line(*rungs: RungResult) -> dict[str, object]:
    return {"ladder": Ladder("val_map50", float_metric=0.3, rungs=list(rungs)).to_dict(), "errors": {}}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    table.path_of("detection", "float").write_text(json.dumps({"figure": 0.3}))
    return tmp_path


def test_training_is_told_over_the_seeds(results: Path) -> None:
    for seed, metric in enumerate((0.30, 0.31, 0.32)):
        line = _line(_rung("ptq", 0.25), _rung("cle", 0.24, kept=False), _rung("qat", metric))
        line["errors"] = {"export": {"type": "TimeLimit", "message": "stopped after 900 s"}}
        table.path_of("detection", "ours", "w4a8", seed).write_text(json.dumps(line))
        assert table.has_trained(line)
    ((row),) = table.rows()
    assert dict(zip(table.HEADS, row, strict=True)) == {
        "domain": "detection", "network": "fcos_nano", "": "W4A8", "figure": "AP at IoU 0.5", "float": "30.0",
        "AIMET min-max": "", "AIMET AdaRound": "", "PTQ": "25.0 (10)", "ladder": "25.0 (20)", "rung": "ptq",
        "QAT": "31.0 ± 1.0 (10)", "16 samples: emulated · simulated · float": "stopped after 900 s",
        "NPU / float / CPU": "",
    }  # fmt: skip


def test_where_a_rung_is_good_enough_nothing_trains(results: Path) -> None:
    assert not table.has_trained(_line(_rung("ptq", 0.299)))
    assert not table.has_trained({"errors": {"build": {"type": "TimeLimit", "message": "stopped after 900 s"}}})


def test_float_weights_are_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(domain, "TRAINED", tmp_path / "showcase")
    runs = []

    def network() -> nn.Module:
        made = nn.Sequential(nn.Linear(2, 2), nn.Dropout())

        def train() -> None:
            nn.init.constant_(made[0].weight, 7.0 + len(runs))
            runs.append(made)

        domain.trained("small", made, train)
        return made

    first, second = network(), network()
    assert len(runs) == 1
    assert torch.equal(first[0].weight, torch.full((2, 2), 7.0))
    assert torch.equal(second[0].weight, first[0].weight)
    assert not second.training


def test_ways_to_train_are_told_over_the_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "RESULTS", tmp_path)
    cells = {(training.NOTHING, 0): {"figure": 0.25}}
    for seed, figure in enumerate((0.29, 0.31)):
        cells["as it is", seed] = {"figure": figure, "oscillating": 0.02 + 0.02 * seed, "seconds": 10.0}
    for (way, seed), results in cells.items():
        training.path_of("detection", way, seed).write_text(json.dumps({"results": results}))
    assert training.rows() == [
        ["fcos_nano", "AP at IoU 0.5", "no training", "25.0", "–", "–"],
        ["fcos_nano", "AP at IoU 0.5", "as it is", "30.0 ± 1.4", "3.0", "10"],
    ]
