"""The results record: round trip, drop, damage."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lightning_quant.errors import DataError
from lightning_quant.report.confusion import Confusion
from lightning_quant.report.record import RunRecord, config_hash
from tests.report.folders import record


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    written = record(metric={"float": 0.7, "ptq": 0.6}, exported="ptq", bytes={"float": 4, "quantized": 1})
    path = written.write(tmp_path / "run")
    assert RunRecord.read(path) == written
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]
    assert json.loads(path.read_text())["drop"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("mode", "metric", "drop"),
    [("max", {"float": 0.7, "qat": 0.6}, 0.1), ("min", {"float": 0.2, "qat": 0.3}, 0.1), ("max", {"qat": 0.6}, None)],
)
def test_drop_is_what_was_lost_whichever_direction_is_better(
    mode: str, metric: dict[str, float], drop: float | None
) -> None:
    found = record(mode=mode, metric=metric, exported="qat").drop
    assert found == (None if drop is None else pytest.approx(drop))


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"format_version": 3}', '{"format_version": 3, "surprise": 2}', '"text"', "null"],
)
def test_a_damaged_record_is_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"results\.json is not a results record"):
        RunRecord.read(path)


def test_a_record_of_a_later_format_is_refused(tmp_path: Path) -> None:
    path = record().write(tmp_path)
    path.write_text(path.read_text().replace('"format_version": 3', '"format_version": 9'))
    with pytest.raises(DataError, match="format_version=9"):
        RunRecord.read(path)


def test_a_record_of_the_version_before_is_read(tmp_path: Path) -> None:
    written = record(class_figures={"float": {"IoU": {"road": 0.9}}})
    path = written.write(tmp_path)
    values = json.loads(path.read_text()) | {"format_version": 2, "per_class_iou": {"float": {"road": 0.9}}}
    path.write_text(json.dumps({name: one for name, one in values.items() if name not in ("class_figures", "legend")}))
    assert RunRecord.read(path) == written
    path.write_text(json.dumps(values | {"per_class_iou": [1]}))
    with pytest.raises(DataError, match=r"per_class_iou is .*, expected names with values"):
        RunRecord.read(path)


def test_a_confusion_matrix_is_kept_without_its_zeros(tmp_path: Path) -> None:
    found = Confusion.of(["cat", "dog", "<b>"], [[8, 2, 0], [0, 0, 0], [1, 0, 4]])
    written = record(confusion={"float": found, "ptq": Confusion.of(["1", "2"], np.eye(2))})
    path = written.write(tmp_path)
    assert RunRecord.read(path) == written
    values = json.loads(path.read_text())
    assert values["confusion"]["float"] == {"cat": {"cat": 8, "dog": 2}, "dog": {}, "<b>": {"cat": 1, "<b>": 4}}
    del values["confusion"]  # as earlier versions wrote it
    path.write_text(json.dumps(values))
    assert RunRecord.read(path).confusion == {}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ([[1, 0], [0, 1]], r"confusion\.ptq is .*, expected names with values"),
        ({"cat": {"cat": 1}}, "the number of classes is 1, expected 2 to 200"),
        ({"cat": {"cow": 1}, "dog": {}}, r"confusion\.ptq\.cat is .*cow.*, expected names of classes"),
        ({"cat": {"cat": -1}, "dog": {}}, "the least count is -1, expected 0 or more"),
        ({"cat": {"cat": 0.5}, "dog": {}}, r"confusion\.ptq\.cat\.cat is 0\.5, expected a whole number"),
    ],
)
def test_a_damaged_confusion_matrix_is_refused(tmp_path: Path, damage: object, message: str) -> None:
    path = record().write(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"confusion": {"ptq": damage}}))
    with pytest.raises(DataError, match=message):
        RunRecord.read(path)


@pytest.mark.parametrize("color", ["red", "#12345", "#123456;background:url(x)", "#12345G"])
def test_a_legend_holds_colors_only(tmp_path: Path, color: str) -> None:
    path = record(legend={"road": color}).write(tmp_path)
    with pytest.raises(DataError, match=r"legend\.road is .*, expected #rrggbb"):
        RunRecord.read(path)


def test_the_hash_depends_on_values_and_not_on_their_order() -> None:
    assert config_hash({"a": 1, "b": {"c": 2, "d": 3}}) == config_hash({"b": {"d": 3, "c": 2}, "a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 2})
