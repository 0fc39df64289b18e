"""``lightning-quant predict``: on photographs, as a user types it."""

from __future__ import annotations

import csv
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lightning_quant.cli.predict import Predictor, command
from lightning_quant.deploy.edges.contract import CONTRACT_NAME, Contract
from lightning_quant.errors import ConfigurationError, DataError, ExportError, LightningQuantError
from tests.helpers.handmade_bundles import HEIGHT, LABELS, WIDTH, photos, scores_of, write_app, write_numbers
from tests.report.folders import record


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_class_maps_are_drawn_over_the_images_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_app(Path("net"))
    Path("pictures/inner").mkdir(parents=True)
    first, second = photos(Path("pictures"))
    second.rename("pictures/inner/photo0.png")
    Path("pictures/notes.txt").write_text("no image")
    assert command(["net", "pictures", "--out", "seen"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "pictures/inner/photo0.png: seen/photo0.png",
        f"{first}: seen/photo0-2.png",
    ]
    drawn = np.asarray(Image.open("seen/photo0-2.png"))
    classes = scores_of(np.asarray(Image.open(first))).argmax(0)
    red, nowhere = classes == 0, np.asarray(Image.open(first))
    times = drawn.shape[1] // WIDTH
    assert np.array_equal(drawn[: times * HEIGHT : times, ::times][red], np.rint((nowhere[red] + [255.0, 0, 0]) / 2))


def test_classes_of_images_are_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_app(Path("net"), "top_k", mean=True, labels=LABELS[:3])
    Image.new("RGB", (40, 40), (255, 51, 0)).save("red.png")
    Image.new("RGB", (40, 40), (0, 51, 255)).save("blue.webp", lossless=True)
    assert command(["net", "red.png", "blue.webp"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "red.png: red 1, class 3 0.251",
        "blue.webp: blue 1, class 3 0.251",
        "predictions/predictions.csv",
    ]
    with Path("predictions/predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["image"], row["rank"], row["class"], row["name"]) for row in rows] == [
        ("red.png", "1", "0", "red"), ("red.png", "2", "3", "class 3"),
        ("blue.webp", "1", "2", "blue"), ("blue.webp", "2", "3", "class 3"),
    ]  # fmt: skip
    assert float(rows[1]["score"]) == pytest.approx(64 / 255)


def test_what_is_no_class_is_kept_as_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    write_numbers(Path("net"), shape=(1, 3, HEIGHT, WIDTH))
    (photo,) = photos(Path(), 1)
    assert command(["net", str(photo), "--mean", "0.5,0.4,0.3", "--std", "0.25"]) == 0
    assert capsys.readouterr().out == f"{photo}: predictions/photo0.npz\n"
    pixels = np.asarray(Image.open(photo)).transpose(2, 0, 1) / np.float32(255)
    with np.load("predictions/photo0.npz") as file:
        expected = (pixels - np.float32([0.5, 0.4, 0.3])[:, None, None]) / np.float32(0.25)
        assert np.array_equal(file["y_0"], expected[None])


def test_the_folder_of_a_run_stands_for_its_bundle(capsys: pytest.CaptureFixture[str]) -> None:
    write_app(Path("run/export/net"))
    record(artifacts={"bundle": "export/net"}).write("run")
    assert command(["run", *map(str, photos(Path()))]) == 0
    record(artifacts={}).write("run")
    with pytest.raises(ConfigurationError, match="has no bundle"):
        command(["run", "photo0.png"])


def test_one_bad_file_costs_none_of_the_others(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    write_app(Path("net"))
    good, bad = photos(Path())
    bad.write_bytes(bad.read_bytes()[:60])
    Image.fromarray(np.zeros((4, 4), np.float32)).save("floats.tif")
    with caplog.at_level(logging.ERROR):
        assert command(["net", str(bad), "floats.tif", "missing.png", str(good)]) == 1
    assert capsys.readouterr().out == f"{good}: predictions/photo0.png\n"
    said = [entry.message for entry in caplog.records]
    assert said[0].startswith(f"{bad} cannot be read as an image")
    assert said[1].startswith("floats.tif cannot be taken: its pixels are of 32 bits (mode F), expected 8 or 16")
    assert said[2].startswith("missing.png cannot be read as an image")


def test_one_bad_file_shows_in_the_exit_status() -> None:
    write_app(Path("net"))
    (photo,) = photos(Path(), 1)
    command = [sys.executable, "-m", "lightning_quant", "predict", "net", str(photo)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{photo}: predictions/photo0.png\n", "")
    done = subprocess.run([*command, "missing.png"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("missing.png cannot be read as an image")
    done = subprocess.run([*command[:4], "nowhere", "x"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("ExportError: nowhere/io.json cannot be read: there is no file nowhere/io.json")


def write_other(folder: Path) -> None:
    """A file that is not the one of the contract."""
    contract, other = write_app(folder), write_numbers(folder / "other")
    (folder / "other" / other.file).replace(folder / contract.file)


def write_damaged(folder: Path) -> None:
    contract = write_app(folder)
    (folder / contract.file).write_bytes(b"no network")


def write_without(folder: Path) -> None:
    (folder / write_app(folder).file).unlink()


def write_two_inputs(folder: Path) -> None:
    contract = write_app(folder)
    other = write_numbers(folder / "other")
    Contract(contract.file, (*contract.inputs, *other.inputs), contract.outputs).write(folder / CONTRACT_NAME)


@pytest.mark.parametrize(
    ("make", "arguments", "error", "says"),
    [
        (write_numbers, [], ConfigurationError, r"no pixels: .*mean and std .*inputs=\{'mean'"),
        (write_numbers, ["--mean", "0"], ConfigurationError, "belong together"),
        (write_numbers, ["--mean", "0", "--std", "0"], ConfigurationError, "std above 0"),
        (write_numbers, ["--mean", "0", "--std", "nan"], ConfigurationError, "expected numbers"),
        (write_numbers, ["--mean", "0", "--std", "1,1"], ConfigurationError, "of 3 channels: expected one number"),
        (lambda folder: write_numbers(folder, "uint8"), [], ConfigurationError, "expected an image, float32 of shape"),
        (write_app, ["--mean", "0", "--std", "1"], ConfigurationError, "leave out --mean and --std"),
        (write_app, ["--out", "photo0.png"], ConfigurationError, "cannot be written"),
        (write_two_inputs, [], ConfigurationError, "io.json names 2 inputs, 'image', 'x': expected one image"),
        (write_without, [], ExportError, "There is no net/net.app.onnx"),
        (write_damaged, [], ExportError, "ONNX Runtime refuses net/net.app.onnx"),
        (write_other, [], ExportError, "expected files of one export"),
    ],
)
def test_what_cannot_be_is_refused(
    make: Any, arguments: list[str], error: type[LightningQuantError], says: str
) -> None:
    make(Path("net"))
    photos(Path(), 1)
    with pytest.raises(error, match=says):
        command(["net", "photo0.png", *arguments])


def test_a_folder_without_images_is_refused() -> None:
    write_app(Path("net"))
    with pytest.raises(DataError, match=r"No image files in net: expected some of \.png"):
        command(["net", "net"])


def test_the_predictor_computes_what_is_written() -> None:
    write_app(Path("net"), "scores")
    (photo,) = photos(Path(), 1)
    with Image.open(photo) as image:
        (found,) = Predictor(Path("net")).predict(image).values()
        assert np.abs(found[0] - scores_of(np.asarray(image))).max() < 1e-6
