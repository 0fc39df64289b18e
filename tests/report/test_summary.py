"""The table over a sweep's records."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from lightning_quant.deploy.parity import Parity
from lightning_quant.ladder.gate import Ladder
from lightning_quant.report.summary import gather, print_summary, rung_table, table, write_summary
from tests.report.folders import record

FINISHED = record(
    monitor="val_miou",
    metric={"float": 0.71234, "ptq": 0.7, "qat": 0.72},
    exported="qat",
    bytes={"float": 55_600_000, "quantized": 13_900_000},
    parity=Parity(51.234),
    seconds={"float": 10.4, "ptq": 2.2},
)
FAILED = record(precision="w4a16", status="failed", error="ParityError: 12 dB")


def test_figures_stand_in_their_columns_and_missing_ones_stay_empty() -> None:
    header, rows = table([FINISHED, FAILED])
    row = dict(zip(header, rows[0], strict=True))
    assert row["miou float"] == "0.7123"
    assert row["drop"] == "-0.0077"
    assert (row["MB float"], row["MB quantized"]) == ("55.60", "13.90")
    assert row["parity with simulation"] == "51.2 dB (onnxruntime)"
    assert row["seconds"] == "13"
    failed = dict(zip(header, rows[1], strict=True))
    assert failed["exported"] == "failed"
    assert failed["miou float"] == failed["MB quantized"] == failed["seconds"] == ""


def test_drops_of_one_run_are_from_one_float_metric() -> None:
    ladder = Ladder("val_miou", max_drop=0.01, float_metric=0.7, float_reestimated=0.71)
    result = ladder.judge("ptq", 0.69, "", 1.0)
    ladder.rungs.append(result)
    run = record(monitor="val_miou", metric={"float": 0.7, "ptq": 0.69}, exported="ptq", ladder=ladder)
    header, rows = table([run])
    row = dict(zip(header, rows[0], strict=True))
    assert row["miou float"] == "0.7100 (batch norms re-estimated)"
    rungs = rung_table([run])
    assert row["drop"] == dict(zip(rungs[0], rungs[1][0], strict=True))["drop"] == "0.0200"
    for worse in (None, 0.69):
        ladder.float_reestimated = worse
        assert dict(zip(header, table([run])[1][0], strict=True))["miou float"] == "0.7000"
    untried = record(monitor="val_miou", metric={"float": 0.7, "qat": 0.69}, exported="qat", ladder=Ladder("val_miou"))
    assert dict(zip(header, table([untried])[1][0], strict=True))["miou float"] == "0.7000"


def test_the_terminal_shows_no_empty_columns(capsys: pytest.CaptureFixture[str]) -> None:
    print_summary([record()], "one run")
    printed = capsys.readouterr().out
    assert "precision" in printed
    assert "MB quantized" not in printed


def test_an_exact_export_is_called_equal() -> None:
    header, rows = table([record(parity=Parity(math.inf))])
    assert dict(zip(header, rows[0], strict=True))["parity with simulation"] == "equal (onnxruntime)"


def test_markdown_and_csv_hold_the_same_table(tmp_path: Path) -> None:
    markdown, comma = write_summary([FINISHED, FAILED], tmp_path)
    header, rows = table([FINISHED, FAILED])
    with comma.open() as file:
        assert list(csv.reader(file)) == [header, *rows]
    lines = markdown.read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells == [header, ["---"] * len(header), *rows]


def test_records_come_in_the_order_of_the_runs_and_a_damaged_one_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in (10, 2, 0):
        record(precision="w8a8" if number else "w4a16", config_hash=str(number)).write(tmp_path / f"{number}-run")
    (tmp_path / "2-run/results.json").write_text("{")
    assert [found.config_hash for found in gather(tmp_path).values()] == ["0", "10"]
    assert "2-run" in caplog.text


def test_the_printed_table_is_not_cut_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    print_summary([FINISHED], "one run")
    printed = capsys.readouterr().out
    assert "51.2 dB (onnxruntime)" in printed
    assert "…" not in printed


def test_names_are_not_broken_in_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, as Rich sees it
    monkeypatch.setenv("COLUMNS", "80")
    print_summary([record(model="a_network_of_some_length")], "one run")
    assert "a_network_of_some_length" in capsys.readouterr().out


def test_a_drop_that_rounds_to_nothing_has_no_sign() -> None:
    header, rows = table([record(metric={"float": 0.62140, "ptq": 0.62142}, exported="ptq")])
    assert dict(zip(header, rows[0], strict=True))["drop"] == "0.0000"


def test_the_rungs_have_a_table_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ladder = Ladder("val_miou", max_drop=0.01, float_metric=0.7)
    ladder.judge("ptq", 0.6, "min_max ranges", 3.2, 123_000_000)
    ladder.skip("seq_mse", "for 4-bit weights")
    run = record(monitor="val_miou", ladder=ladder)
    header, rows = rung_table([run, record()])
    assert dict(zip(header, rows[0], strict=True)) == {
        "model": run.model, "precision": "w8a8", "rung": "ptq", "miou": "0.6000", "drop": "0.1000",
        "seconds": "3", "peak MB": "123", "kept": "yes: best so far", "what it changed": "min_max ranges",
    }  # fmt: skip
    assert rows[1][3:8] == ["", "", "0", "", "no: for 4-bit weights"]
    markdown, _ = write_summary([run], tmp_path)
    assert "| what it changed |" in markdown.read_text()
    print_summary([run], "one run")
    assert "Rungs of the accuracy ladder" in capsys.readouterr().out
