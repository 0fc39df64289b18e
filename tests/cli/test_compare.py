"""``lightning-quant compare``: tables, JSON, the exit status, the baseline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_quant.cli.app import main
from lightning_quant.deploy.bundle import load_bundle
from lightning_quant.deploy.export import export_bundle
from tests.helpers.networks import Body, calibrated, call, images


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two exports of one network in other ranges."""
    folder = tmp_path_factory.mktemp("exports")
    samples = [call(images(1, seed=9))]
    made = {"old": calibrated(Body()), "new": calibrated(Body(), call(2 * images(8)))}
    return {name: export_bundle(network, folder / name, samples).path for name, network in made.items()}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["lightning-quant", "compare", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_a_table_and_the_exit_status(
    exports: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, exports["old"], exports["old"]) == 0
    assert "The files are the same to the bit." in capsys.readouterr().out
    assert run(monkeypatch, exports["old"], exports["new"]) == 1
    said = capsys.readouterr().out
    assert "scale ×2" in said
    assert "✗ encodings: changed, and nothing that is recorded explains it: " in said


def test_the_same_as_json(
    exports: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, exports["old"], exports["new"], "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["within_bounds"] is False
    assert [one["bound"] for one in found["exceeded"]] == [
        {"part": "encodings", "bound": "explained"},
        {"part": "weights", "bound": "explained"},
    ]
    (x,) = (one for one in found["encodings"] if one["tensor"] == "x")
    assert x["ratio"] == pytest.approx([2, 2])
    (parity,) = (one for one in found["figures"] if one["part"] == "parity")
    assert parity["old"] in ("inf", load_bundle(exports["old"]).manifest.parity.psnr_db)


def test_a_baseline_and_bounds(
    exports: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline, bounds = tmp_path / "kept/baseline.json", tmp_path / "bounds.yaml"
    bounds.write_text("weights: unchanged\n")
    assert run(monkeypatch, exports["old"], "--write-baseline", baseline) == 0
    assert run(monkeypatch, baseline, exports["old"], "--bounds", bounds) == 0
    assert run(monkeypatch, baseline, exports["new"], "--bounds", bounds, "--write-baseline", baseline) == 1
    assert f"Baseline: {baseline}" in capsys.readouterr().out
    assert run(monkeypatch, baseline, exports["new"], "--bounds", bounds, "--json", "--write-baseline", baseline) == 0
    json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none", "old"], "ConfigurationError: "),
        (["old"], "NEW is missing"),
        (["old", "--write-baseline", "new.json", "--json"], "need two to compare"),
        (["old", "old", "--bound", "1"], "unrecognized arguments"),
        (["old", "old", "old"], "unrecognized arguments"),
        (["bounds.yaml", "old"], "is not a baseline"),
        (["old", "old", "--bounds", "bounds.yaml"], "Unknown bound 'speed'"),
        (["old", "--write-baseline", "bounds.yaml/x.json"], "File exists: 'bounds.yaml'"),
    ],
)
def test_bad_input_ends_with_2(
    exports: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    arguments: list[str],
    said: str,
) -> None:
    (tmp_path / "bounds.yaml").write_text("speed: +2 %\n")
    monkeypatch.chdir(tmp_path)
    given = [exports.get(one, one) for one in arguments]
    assert run(monkeypatch, *given) == 2
    assert said in capsys.readouterr().err + caplog.text
