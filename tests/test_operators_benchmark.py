"""The table of what the NPU takes: how it is made of results, and that page, shipped table and emulator agree."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.operators import page, shipped
from benchmarks.operators.__main__ import RESULTS
from benchmarks.operators.catalogue import catalogue
from benchmarks.operators.measure import CHIPS, measure
from benchmarks.zoo.limits import measured
from benchmarks.zoo.record import read
from lightning_quant.deploy.socs import HEXAGON
from lightning_quant.precision import Precision
from lightning_quant.simulation.operators import Placement, operator_table
from tests.helpers.qdq import NO_EMULATOR

REFUSED_HERE = {"placement": "refused", "error": {"type": "ConfigurationError", "message": "w8a16 on SM8350"}}


def on(placement: str = "npu", **found: Any) -> dict[str, Any]:
    return {"placement": placement, "cpu": {}, "islands": [], "qairt": "2.51.0", "equal": 1.0, "steps": 0.0} | found


def line(network: str, precision: str = "w8a8", **values: Any) -> dict[str, Any]:
    chips = {"SM8350": on(), "SM8650": on()} | values.pop("chips", {})
    made = {"network": network, "precision": precision, "family": catalogue()[network].family, "chips": chips}
    made |= {"errors": {}, "operations": ["Any"], "versions": {"torch": "2.0"}, "date": "2026-01-01"}
    return made | values


def test_only_what_every_network_of_an_operation_says_is_shipped() -> None:
    lines = [
        line("PReLU", operations=["PReLU"], chips={"SM8350": on("float")}),
        line("PReLU per channel", operations=["PReLU"], chips={"SM8350": on("cpu")}),
        line("PReLU", "w8a16", operations=["PReLU"], chips={"SM8350": REFUSED_HERE}),
        line("cat over channels", operations=["ReLU", "ReLU", "Concat"]),
        line("slice", operations=["ReLU"]),
        line("pow 3", operations=["Square", "Multiply"]),
        line("erf", operations=[]),
    ]
    table = shipped.shipped(lines)
    assert table.operations == {
        "Concat": {"w8a8": {"npu": [68, 75]}},
        "PReLU": {"w8a16": {"npu": [75]}, "w8a8": {"npu": [75]}},
    }
    assert table.versions == {"QAIRT": "2.51.0", "torch": "2.0"}
    assert table.placement("PReLU", Precision(8, 8), 75) is Placement.NPU
    assert table.placement("PReLU", Precision(8, 8), 68) is None
    assert table.placement("Erf", Precision(8, 8), 75) is None


def test_chips_that_no_operator_tells_apart_share_a_column() -> None:
    same = [line("PReLU"), line("PReLU", "w8a16", chips={"SM8350": REFUSED_HERE, "SM8650": on(equal=0.5, steps=3.0)})]
    assert page.joined(same) == [("SM8350", "SM8650")]
    apart = [*same, line("erf", chips={"SM8350": on(equal=0.9, steps=1.0)})]
    assert page.joined(apart) == [("SM8350",), ("SM8650",)]


def test_the_page_says_where_and_why() -> None:
    reasons = {"/network/Erf": "Erf | not `supported`"}
    crashed = {"placement": "crashed", "error": {"type": "DeviceError", "message": "died"}}
    island = on("float", islands=["/network/prelu/PRelu_token_3"], equal=0.75, steps=2.0)
    text = page.page(
        [
            line("erf", chips={"SM8350": on("cpu", cpu=reasons), "SM8650": on("cpu", cpu=reasons)}),
            line("PReLU", chips={"SM8650": island}),
            line("PReLU", "w4a16", chips={"SM8350": crashed, "SM8650": crashed}),
            line("prod", errors={"export": {"type": "ExportError", "message": "no"}}) | {"chips": {}},
        ]
    )
    assert "| erf | **CPU** | W8A8 on every chip | Erf / not 'supported' | – |" in text
    assert "| PReLU | float | W8A8 on SM8650 | in float: PRelu | – |" in text
    assert "| PReLU | **crashes** | W4A16 on every chip | the compiler's process dies | – |" in text
    assert "| PReLU | float 75.0 %, 2 | equal | – | – | **crashes** |" in text
    assert "| prod | not exported (`ExportError`) | W8A8 | `ExportError`: no | – |" in text


def test_page_and_shipped_table_are_those_of_the_results() -> None:
    lines = read(RESULTS)
    assert page.PAGE.read_text() == page.page(lines)
    assert operator_table() == shipped.shipped(lines)
    names = {found["network"] for found in lines}
    assert names == catalogue().keys()
    assert {chip for found in lines for chip in found["chips"]} == set(CHIPS)
    assert sorted(HEXAGON[chip] for chip in CHIPS) == sorted(set(HEXAGON.values()))


@pytest.mark.slow
@pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))
@pytest.mark.parametrize(
    ("network", "precision"),
    [
        ("Conv2d depthwise 1×1", "w4a16"),
        pytest.param("PReLU", "w8a8", marks=pytest.mark.torture),
        pytest.param("erf", "w8a16", marks=pytest.mark.torture),
    ],
)
def test_a_fresh_run_says_the_same(network: str, precision: str) -> None:
    (known,) = [one for one in read(RESULTS) if (one["network"], one["precision"]) == (network, precision)]
    fresh = measured(measure, {"network": network, "precision": precision}, 300.0, 8.0)
    assert fresh["errors"] == {}
    assert {chip: found["placement"] for chip, found in fresh["chips"].items()} == {
        chip: found["placement"] for chip, found in known["chips"].items()
    }
