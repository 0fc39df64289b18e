"""Charts of classes: what is drawn of a confusion matrix, and of more classes than there is room for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lightning_quant.report import charts
from lightning_quant.report.confusion import Confusion
from tests.report.folders import record


def cells(chart: Any) -> dict[tuple[str, str], dict[str, Any]]:
    """The drawn cells of a matrix by label and prediction."""
    (drawn,) = chart.renderers
    columns = drawn.data_source.data
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return {(row["is"], row["taken for"]): row for row in rows}


def test_cells_are_colored_by_their_share_of_the_row() -> None:
    exported = Confusion.of(["cat", "dog", "cow"], [[6, 2, 0], [0, 0, 0], [0, 40, 40]])
    in_float = Confusion.of(["cat", "dog", "cow"], [[7, 0, 1], [0, 0, 0], [0, 0, 80]])
    chart = charts.confusion(record(exported="ptq", confusion={"float": in_float, "ptq": exported}))
    drawn = cells(chart)
    assert drawn.keys() == {("cat", "cat"), ("cat", "dog"), ("cat", "cow"), ("cow", "dog"), ("cow", "cow")}
    assert drawn["cat", "dog"]["samples"] == 2
    assert drawn["cat", "dog"]["share"] == "25.0% of 8"
    assert (drawn["cat", "dog"]["label"], drawn["cat", "dog"]["prediction"]) == (0, 1)
    assert drawn["cow", "dog"]["alpha"] == drawn["cow", "cow"]["alpha"] > drawn["cat", "dog"]["alpha"] > 0.15
    assert drawn["cat", "cow"]["alpha"] == 0  # in float only
    assert (drawn["cat", "cow"]["in float"], drawn["cat", "dog"]["in float"]) == (1, 0)
    assert drawn["cat", "cat"]["color"] != drawn["cat", "dog"]["color"] == drawn["cow", "dog"]["color"]
    assert chart.y_range.start > chart.y_range.end  # the first class is on top
    assert chart.yaxis[0].major_label_overrides == {0: "cat", 1: "dog", 2: "cow"}


def test_nothing_is_drawn_of_what_was_not_exported() -> None:
    found = Confusion.of(["cat", "dog"], np.eye(2))
    assert charts.confusion(record(exported="qat", confusion={"float": found, "ptq": found})) is None
    assert charts.confusion(record()) is None
    other = Confusion.of(["cow", "dog"], np.eye(2))  # float was of other classes: nothing to be compared
    chart = charts.confusion(record(exported="ptq", confusion={"float": other, "ptq": found}))
    assert "in float" not in dict(chart.select_one({"type": charts.HoverTool}).tooltips)


@pytest.mark.parametrize("size", [2, 10, 41, 200])
def test_names_do_not_stand_on_each_other(size: int) -> None:
    found = Confusion.of([f"a class with a long name, {index}" for index in range(size)], np.eye(size))
    chart = charts.confusion(record(exported="ptq", confusion={"ptq": found}))
    assert len(cells(chart)) == size
    for axis, most in ((chart.xaxis[0], 24), (chart.yaxis[0], 40)):
        assert min(size, most) / 2 <= len(axis.ticker.ticks) <= most
        assert all(len(axis.major_label_overrides[tick]) <= 23 for tick in axis.ticker.ticks)
    assert chart.height < 900


def test_of_many_classes_those_are_drawn_that_change_most() -> None:
    in_float = {f"class {index}": 0.9 for index in range(100)}
    exported = {name: 0.9 - (0.5 if index >= 70 else 0.0) for index, name in enumerate(in_float)}
    figures = {"float": {"recall": in_float}, "ptq": {"recall": exported}}
    (chart,) = charts.classes(record(exported="ptq", class_figures=figures))
    assert set(chart.y_range.factors) >= {f"class {index}" for index in range(70, 100)}
    assert len(chart.y_range.factors) == 40
    assert chart.title.text == "recall of 40 of 100 classes, those that change most"
    (chart,) = charts.classes(record(exported="ptq", class_figures={"ptq": {"recall": exported}}))
    assert set(chart.y_range.factors) >= {f"class {index}" for index in range(70, 100)}
    assert chart.title.text == "recall of 40 of 100 classes, those with the least"
