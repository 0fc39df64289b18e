"""The table of devices: what is in it, what is left empty, and which networks nobody should ship."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lightning_quant.deploy.device_report import DeviceReport
from lightning_quant.deploy.parity import Parity
from lightning_quant.errors import DataError
from lightning_quant.precision import Precision
from lightning_quant.report.device_table import Candidate, device_notes, device_table, dominated
from lightning_quant.report.record import RunRecord
from lightning_quant.report.summary import print_summary, write_summary


def phone(precision: str, latency: int, size: int, **values: object) -> DeviceReport:
    return DeviceReport(
        tier="aihub",
        device="Samsung Galaxy S24",
        precision=Precision.parse(precision),
        soc="SM8650",
        runtime="qnn_dlc",
        latency_us=[latency, latency - 100, latency + 5000],
        float_latency_us=[4000],
        memory_bytes=[2**20, 20 * 2**20],
        layers={"NPU": ["a", "b"], "GPU": [], "CPU": ["c"]},
        against_float=Parity(31.27, 0.99),
        bytes={"float": 1_180_000, "quantized": size},
        samples=8,
        metric={"float": 0.7, "simulation": 0.69, "device": 0.6871},
        **values,  # type: ignore[arg-type]
    )


def record(precision: str, metric: float, *reports: DeviceReport, mode: str = "max") -> RunRecord:
    return RunRecord(
        status="finished",
        model="net",
        data="scenes",
        precision=Precision.parse(precision),
        config_hash="0",
        monitor="val_miou",
        mode=mode,
        metric={"float": 0.7, "ptq": metric},
        exported="ptq",
        device=list(reports),
    )


def test_a_network_is_dominated_by_one_that_is_nowhere_worse() -> None:
    best = Candidate("best", 0.7, 1.0, 2.0)
    assert dominated([best, Candidate("same", 0.7, 1.0, 2.0)]) == {}
    assert dominated([best, slower := Candidate("slower", 0.7, 1.0, 2.1)]) == {slower: best}
    assert dominated([best, Candidate("smaller", 0.6, 0.5, 2.1)]) == {}
    worse, large = Candidate("worse", 0.6, 1.0, 2.0), Candidate("large", 0.7, 1.5, 2.0)
    assert dominated([best, worse, large]) == {worse: best, large: best}
    # latency counts only where both were measured
    unmeasured = Candidate("unmeasured", 0.6, 1.0)
    assert dominated([best, unmeasured]) == {unmeasured: best}


def test_rows_of_a_phone() -> None:
    header, rows = device_table(
        [
            record("w8a8", 0.690, phone("w8a8", 1000, 370_000)),
            record("w8a16", 0.695, phone("w8a16", 2000, 370_000)),
            record("w4a16", 0.680, phone("w4a16", 2100, 380_000)),
        ]
    )
    assert all(len(row) == len(header) for row in rows)
    first = dict(zip(header, rows[0], strict=True))
    assert first == {
        "model": "net",
        "precision": "w8a8",
        "device": "Samsung Galaxy S24",
        "tier": "aihub",
        "runtime": "qnn_dlc",
        "latency ms": "1.00",  # the median
        "× float": "4.0",
        "peak MB": "1–20",
        "NPU/GPU/CPU": "2/0/1",
        "PSNR dB": "31.3",
        "miou": "0.6871 of 8",
        "MB float → quantized": "1.18 → 0.37",
        "Pareto": "on the front",
    }
    assert [row[-1] for row in rows] == ["on the front", "on the front", "dominated by w8a8"]


def test_two_runs_of_one_precision_are_distinguished() -> None:
    runs = [record("w8a8", 0.69, phone("w8a8", 1000, 1)), record("w8a8", 0.68, phone("w8a8", 1000, 1))]
    assert [row[-1] for row in device_table(runs)[1]] == ["on the front", "dominated by another w8a8"]


def test_where_lower_is_better_the_higher_metric_is_dominated() -> None:
    runs = [
        record("w8a8", 0.2, phone("w8a8", 1000, 1), mode="min"),
        record("w4a8", 0.3, phone("w4a8", 1000, 1), mode="min"),
    ]
    assert [row[-1] for row in device_table(runs)[1]] == ["on the front", "dominated by w8a8"]


def test_what_a_tier_cannot_measure_is_empty() -> None:
    emulated = DeviceReport(
        tier="htp_emulator",
        device="Samsung Galaxy S24",
        precision=Precision(8, 8),
        layers={"NPU": ["a"], "GPU": [], "CPU": []},
    )
    pending = DeviceReport(tier="aihub", device="Samsung Galaxy S23", precision=Precision(8, 8), status="pending")
    header, rows = device_table([record("w8a8", 0.69, emulated, pending)])
    first, second = (dict(zip(header, row, strict=True)) for row in rows)
    assert first["latency ms"] == first["× float"] == first["peak MB"] == first["PSNR dB"] == first["Pareto"] == ""
    assert first["NPU/GPU/CPU"] == "1/0/0"
    assert second["latency ms"] == "pending"
    assert device_notes([record("w8a8", 0.69, emulated)]) == [
        "htp_emulator: compiled for this SoC and emulated; not measured on hardware."
    ]


def test_warnings_and_the_rule_of_thumb_are_below_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [record("w8a8", 0.69, phone("w8a8", 1000, 1, warnings=["Quantized it is slower than in float."]))]
    print_summary(runs, "runs")
    shown = capsys.readouterr().out
    markdown = write_summary(runs, tmp_path)[0].read_text()
    for text in (shown, markdown):
        assert "w8a8 on Samsung Galaxy S24: Quantized it is slower than in float." in text
        assert "above 30 dB is typically good" in text
        assert "measured on a real device by Qualcomm AI Hub" in text
        assert "1.00" in text


def test_a_report_survives_its_file(tmp_path: Path) -> None:
    report = phone("w8a8", 1000, 5)
    assert report.median_latency_us == 1000
    assert DeviceReport.read(report.write(tmp_path / "a" / "report.json")) == report
    values = report.to_dict()
    assert (values["median_latency_us"], values["min_latency_us"], values["speedup"]) == (1000, 900, 4)
    assert "float_islands" not in values
    assert report.scalars()["device/aihub/Samsung Galaxy S24/qnn_dlc/latency_ms"] == 1
    assert "device/aihub/Samsung Galaxy S24/qnn_dlc/psnr_db_against_simulation" not in report.scalars()
    (tmp_path / "old.json").write_text('{"format_version": 0}')
    with pytest.raises(DataError, match="format_version=0; this version reads 1"):
        DeviceReport.read(tmp_path / "old.json")
    with pytest.raises(DataError, match=r"none\.json is not a device report"):
        DeviceReport.read(tmp_path / "none.json")


def test_a_report_in_one_sentence() -> None:
    assert phone("w8a8", 1000, 5).sentence() == (
        "w8a8 on Samsung Galaxy S24 (aihub): 1.00 ms, 4.0 times as fast as float; 2 layers on NPU, 1 layers on CPU; "
        "31.3 dB against float. Measured on a real device by Qualcomm AI Hub."
    )
    failed = DeviceReport(tier="aihub", device="S24", precision=Precision(8, 8), status="failed", error="No device.")
    assert failed.sentence() == "w8a8 on S24 (aihub): failed, No device."


def test_outputs_that_are_classes_are_compared_by_their_share() -> None:
    assert str(Parity(31.27, 0.9)) == "31.3 dB"
    assert str(Parity(math.inf)) == "equal"
    assert str(Parity(math.inf, 1.0)) == "equal"
    assert str(Parity(math.inf, 0.984)) == "98.4 % same"
