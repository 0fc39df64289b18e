"""The end of a sweep: the summary of its folder, and the exit status. Whole sweeps are run in test_app.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lightning_quant.cli.sweep import SweepSummary
from tests.report.folders import full_record


def end_of_sweep(folder: Path) -> None:
    SweepSummary().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(folder)}}}))


def run_folder(folder: Path, name: str) -> Path:
    (folder / name / ".hydra").mkdir(parents=True)
    return folder / name


def test_a_sweep_whose_runs_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("0-w8a8", "1-w4a8"):
        full_record().write(run_folder(tmp_path, name))
    end_of_sweep(tmp_path)
    assert (tmp_path / "report.html").is_file()
    assert f"Table: {tmp_path / 'summary.md'}" in capsys.readouterr().out


@pytest.mark.parametrize("state", ["failed", "running", "damaged", "without a record"])
def test_a_run_that_did_not_finish_is_the_exit_status(tmp_path: Path, state: str) -> None:
    full_record().write(run_folder(tmp_path, "0-w8a8"))
    place = run_folder(tmp_path, "1-w4a8")
    if state == "damaged":
        (place / "results.json").write_text("{")
    elif state != "without a record":
        replace(full_record(), status=state).write(place)
    with pytest.raises(SystemExit) as stopped:
        end_of_sweep(tmp_path)
    assert stopped.value.code == 1
    assert (tmp_path / "summary.csv").is_file()


def test_a_summary_that_cannot_be_written_is_the_exit_status(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    full_record().write(run_folder(tmp_path, "0-w8a8"))
    (tmp_path / "report.html").mkdir()
    with pytest.raises(SystemExit):
        end_of_sweep(tmp_path)
    assert "could not be written" in caplog.text
