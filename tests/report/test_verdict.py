"""The verdict in one sentence."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_quant.deploy.device_report import DeviceReport
from lightning_quant.ladder.gate import Ladder
from lightning_quant.precision import Precision
from lightning_quant.report.verdict import sweep_verdict, verdict
from tests.report.folders import record

W8A8 = Precision(8, 8)
SIZES = {"float": 55_600_000, "quantized": 7_500_000}


def trained(**values: Any) -> dict[str, Any]:
    metric = {"float": 0.700, "ptq": 0.669, "qat": 0.696}
    return {
        "precision": "w4a16",
        "metric": metric,
        "exported": "qat",
        "ladder": Ladder("val_miou", max_drop=0.01),
        **values,
    }


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (trained(bytes=SIZES), "W4A16 needs QAT: 3.1 points lost by PTQ, 0.4 points lost after QAT; 7.4x smaller."),
        (trained(ladder=None), "W4A16 is best after QAT: 3.1 points lost by PTQ, 0.4 points lost after QAT."),
        (
            trained(ladder=Ladder("val_miou", max_drop=0.001)),
            "W4A16 falls short of the 0.1 points it may lose: 3.1 points lost by PTQ, 0.4 points lost after QAT.",
        ),
        (
            trained(ladder=Ladder("val_miou", max_drop=-0.02)),
            "W4A16 falls short of what it has to gain (2.0 points gained): 3.1 points lost by PTQ, 0.4 points lost "
            "after QAT.",
        ),
        (  # float is the better for its batch norms re-estimated: rungs that do so gain nothing by that
            trained(ladder=Ladder("val_miou", max_drop=0.01, float_metric=0.7, float_reestimated=0.71)),
            "W4A16 falls short of the 1.0 point it may lose: 4.1 points lost by PTQ, 1.4 points lost after QAT.",
        ),
        ({"metric": {"float": 0.7, "ptq": 0.699}, "exported": "ptq"}, "W8A8 needs no training: 0.1 points lost."),
        ({"metric": {"float": 0.7, "ptq": 0.71}, "exported": "ptq"}, "W8A8 needs no training: 1.0 point gained."),
        (
            {"metric": {"float": 0.7, "ptq": 0.6, "cle": 0.69}, "exported": "cle"},
            "W8A8 needs cle, no training: 10.0 points lost by PTQ, 1.0 point lost after cle.",
        ),
        (
            {"metric": {"float": 2.0, "ptq": 2.5}, "exported": "ptq", "mode": "min", "monitor": "val_loss"},
            "W8A8 needs no training: val_loss worse by 0.5.",
        ),
        ({"status": "failed", "error": "ParityError: 12 dB"}, "W8A8 failed: ParityError: 12 dB"),
        ({}, "W8A8 was not exported."),
        ({"exported": "ptq", "bytes": {"float": 100, "quantized": 120}}, "W8A8 after PTQ; 1.2x larger."),
    ],
)
def test_a_run_in_one_sentence(values: dict[str, Any], sentence: str) -> None:
    assert verdict(record(**values)) == sentence


def test_the_phone_has_its_say() -> None:
    def on_phone(quantized: int) -> str:
        report = DeviceReport("aihub", "Samsung Galaxy S24", W8A8, latency_us=[quantized], float_latency_us=[8000])
        return verdict(record(metric={"float": 0.7, "ptq": 0.7}, exported="ptq", device=[report]))

    assert on_phone(2000) == "W8A8 needs no training: 0.0 points lost; 4.0x faster on Samsung Galaxy S24."
    assert on_phone(16000).endswith("2.0x slower on Samsung Galaxy S24.")


def test_a_sweep_in_one_sentence() -> None:
    runs = [
        record(metric={"float": 0.7, "ptq": 0.699}, exported="ptq", bytes={"float": 100, "quantized": 26}),
        record(
            precision="w4a16", metric={"float": 0.7, "ptq": 0.68}, exported="ptq", bytes={"float": 100, "quantized": 14}
        ),
        record(precision="w8a16", status="failed"),
    ]
    assert sweep_verdict(runs) == (
        "W8A8 is closest to float (0.1 points lost); W4A16 is smallest (7.1x smaller, 2.0 points lost); "
        "1 of 3 runs did not finish."
    )
    assert sweep_verdict(runs[2:]) == "None of 1 runs finished."
