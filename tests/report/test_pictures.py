"""Comparisons: checked when they are made, written panel by panel and as a row, found again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_quant.errors import ConfigurationError
from lightning_quant.report.pictures import Comparison, legend_of, read_comparisons, write_comparisons

PHOTO = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
GRAY = np.zeros((48, 64), np.uint8)


def differing() -> Comparison:
    """Float and quantized differ in the upper quarter."""
    quantized = PHOTO.copy()
    quantized[:12] ^= 255
    return Comparison(PHOTO, quantized, PHOTO, legend={"road": (128, 64, 128), "car": (0, 0, 142)})


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as file:
        assert file.mode == "RGB"
        return np.asarray(file)


def test_every_panel_is_kept_and_found(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    paths = write_comparisons(folder, [Comparison(PHOTO, PHOTO), differing()])
    assert [path.name for path in paths] == ["overlay_0000.png", "overlay_0001.png"]
    first, second = read_comparisons(folder)
    assert set(first) == {"float", "quantized", "difference"}
    assert set(second) == {"float", "quantized", "difference", "input"}
    assert np.array_equal(pixels(second["input"]), PHOTO)
    assert np.array_equal(pixels(second["quantized"]), differing().quantized)


def test_the_difference_is_red_exactly_where_the_predictions_differ(tmp_path: Path) -> None:
    write_comparisons(tmp_path, [differing()])
    (panels,) = read_comparisons(tmp_path)
    picture = pixels(panels["difference"])
    red = (picture == (255, 0, 0)).all(axis=2)
    assert red[:12].all()
    assert not red[12:].any()
    rest = picture[~red]
    assert (rest == rest[:, :1]).all()  # gray


def test_a_difference_that_is_given_is_kept(tmp_path: Path) -> None:
    write_comparisons(tmp_path, [Comparison(PHOTO, PHOTO, difference=GRAY + 7)])
    (panels,) = read_comparisons(tmp_path)
    assert (pixels(panels["difference"]) == 7).all()


def test_the_row_has_captions_every_panel_and_the_legend(tmp_path: Path) -> None:
    (path,) = write_comparisons(tmp_path, [differing()])
    picture = pixels(path)
    # four times as large, for a picture of 64 pixels is too small to be looked at; a row of legend below
    assert picture.shape == (18 + 4 * 48 + 18, 4 * 256 + 3 * 4, 3)
    (panels,) = read_comparisons(tmp_path)
    for column, name in enumerate(("input", "float", "quantized", "difference")):
        left = 260 * column
        enlarged = pixels(panels[name]).repeat(4, axis=0).repeat(4, axis=1)
        assert np.array_equal(picture[18:-18, left : left + 256], enlarged)
        assert (picture[:18, left : left + 256] < 128).any()  # a caption
    assert np.array_equal(picture, np.asarray(differing().row()))
    assert {(128, 64, 128), (0, 0, 142)} <= {tuple(color) for color in picture[-18:].reshape(-1, 3).tolist()}


@pytest.mark.parametrize("picture", [PHOTO, Image.fromarray(PHOTO), torch.from_numpy(PHOTO)])
def test_arrays_tensors_and_images_are_pictures(picture: Any) -> None:
    panels = Comparison(picture, GRAY).panels()
    assert np.array_equal(np.asarray(panels["float"]), PHOTO)
    assert panels["quantized"].mode == "RGB"


@pytest.mark.parametrize("wrong", [PHOTO / 255, PHOTO[None], PHOTO[..., :2], PHOTO[0, 0]])
def test_what_is_not_a_picture_is_refused(wrong: np.ndarray) -> None:
    with pytest.raises(ConfigurationError, match=r"'quantized' of a Comparison has shape .*: expected a PIL image, or"):
        Comparison(PHOTO, wrong)


def test_pictures_of_two_sizes_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"'float': \(64, 48\), 'quantized': \(64, 40\).*expected one size"):
        Comparison(PHOTO, PHOTO[:40])


@pytest.mark.parametrize("color", [(1, 2), (0, 0, 256), (-1, 0, 0)])
def test_what_is_not_a_color_is_refused(color: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"legend of a Comparison has car=.*each 0 to 255"):
        Comparison(PHOTO, PHOTO, legend={"car": color})


def test_the_legend_of_a_run_is_that_of_all_its_samples() -> None:
    other = Comparison(PHOTO, PHOTO, legend={"sky": (70, 130, 180), "car": (0, 0, 142)})
    assert legend_of([differing(), other]) == {"road": "#804080", "car": "#00008e", "sky": "#4682b4"}
