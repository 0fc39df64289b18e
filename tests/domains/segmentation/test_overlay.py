"""Overlays: every pixel is accounted for, and the files hold what was asked for."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_quant.domains.segmentation.cityscapes import PALETTE
from lightning_quant.domains.segmentation.images import normalise_images
from lightning_quant.domains.segmentation.overlay import (
    colorize,
    comparison,
    denormalize,
    difference,
    overlay,
    overlay_folders,
    save_overlays,
)
from lightning_quant.errors import ConfigurationError

PHOTO = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
ROAD, CAR, VOID = 0, 13, 255


def normalised(photo: np.ndarray) -> torch.Tensor:
    return normalise_images()(torch.from_numpy(photo).permute(2, 0, 1))


def test_denormalize_undoes_the_data_modules_normalisation() -> None:
    assert np.array_equal(denormalize(normalised(PHOTO)), PHOTO)


def test_denormalize_clips_what_no_photo_holds() -> None:
    picture = denormalize(torch.tensor([-100.0, 0.0, 100.0]).view(3, 1, 1))
    assert picture.tolist() == [[[0, round(255 * 0.456), 255]]]


@pytest.mark.parametrize("as_tensor", [False, True])
def test_colorize_takes_the_palette_and_black_for_void(as_tensor: bool) -> None:
    classes = np.array([[*range(19), VOID]], dtype=np.uint8)
    colours = colorize(torch.from_numpy(classes).long() if as_tensor else classes)
    assert colours.dtype == np.uint8
    assert colours.tolist() == [[*PALETTE.tolist(), [0, 0, 0]]]


def test_overlay_mixes_and_leaves_void_to_the_photo() -> None:
    classes = np.full((6, 8), CAR, dtype=np.int64)
    classes[0] = VOID
    mixed = overlay(PHOTO, classes, alpha=0.25)
    assert mixed.dtype == np.uint8
    assert np.array_equal(mixed[0], PHOTO[0])
    assert np.array_equal(mixed[1:], np.rint(0.75 * PHOTO[1:] + 0.25 * PALETTE[CAR]))
    assert np.array_equal(overlay(PHOTO, classes, alpha=0), PHOTO)
    assert (overlay(PHOTO, classes, alpha=1)[1:] == PALETTE[CAR]).all()


def test_difference_is_red_exactly_where_the_maps_differ() -> None:
    first = np.full((6, 8), ROAD)
    second = first.copy()
    second[2, 3:5] = CAR
    picture = difference(PHOTO, first, second)
    red = (picture == (255, 0, 0)).all(axis=2)
    assert np.array_equal(red, first != second)
    rest = picture[~red]
    assert (rest == rest[:, :1]).all()  # grey


def test_save_overlays_writes_four_panels_a_numbered_file(tmp_path: Path) -> None:
    photos = np.random.default_rng(1).integers(0, 256, (2, 48, 64, 3), dtype=np.uint8)
    floats = torch.full((2, 48, 64), ROAD, dtype=torch.uint8)
    quantized = floats.clone()
    quantized[1, :12] = CAR
    images = torch.stack([normalised(photo) for photo in photos])
    paths = save_overlays(tmp_path / "new" / "folder", images, floats, quantized, alpha=0.5, start=7)
    assert [path.name for path in paths] == ["overlay_0007.png", "overlay_0008.png"]

    with Image.open(paths[1]) as file:
        assert file.mode == "RGB"
        picture = np.asarray(file)
    # four times as large, for a photograph of 64 pixels is too small to be looked at; a row of legend below
    assert picture.shape == (18 + 4 * 48 + 18, 4 * 256 + 3 * 4, 3)
    assert np.array_equal(picture, comparison(photos[1], floats[1], quantized[1]))
    expected = {
        "photo": photos[1],
        "float": overlay(photos[1], floats[1]),
        "quantized": overlay(photos[1], quantized[1]),
        "difference": difference(photos[1], floats[1], quantized[1]),
    }
    for column, (name, panel) in enumerate(expected.items()):
        left = 260 * column
        assert np.array_equal(picture[18:-18, left : left + 256], panel.repeat(4, axis=0).repeat(4, axis=1))
        assert (picture[:18, left : left + 256] < 128).any()  # a caption
        with Image.open(tmp_path / "new" / "folder" / "overlay_0008" / f"{name}.png") as file:
            assert np.array_equal(np.asarray(file), panel)
    legend = {tuple(colour) for colour in picture[-18:].reshape(-1, 3).tolist()}
    assert {tuple(PALETTE[ROAD]), tuple(PALETTE[CAR])} <= legend
    assert tuple(PALETTE[8]) not in legend  # vegetation does not occur
    assert [folder.name for folder in overlay_folders(tmp_path / "new" / "folder")] == ["overlay_0007", "overlay_0008"]


def test_a_batch_where_one_image_belongs_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"shape \(1, 3, 4, 4\); expected one image \(3, H, W\)"):
        denormalize(torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize(
    "class_map", [np.zeros((6, 8)), np.zeros((1, 6, 8), np.uint8), torch.zeros(19, 6, 8), torch.zeros(6, 8)]
)
def test_logits_and_batches_are_no_class_maps(class_map: np.ndarray | torch.Tensor) -> None:
    with pytest.raises(ConfigurationError, match=r"expected whole numbers \(H, W\)\. Logits become class maps"):
        colorize(class_map)


@pytest.mark.parametrize("wrong", [-1, 19, 254, 256])
def test_numbers_that_are_no_class_are_refused(wrong: int) -> None:
    with pytest.raises(ConfigurationError, match=rf"holds \[{wrong}\]; expected 0 to 18, or 255"):
        colorize(np.array([[0, wrong]]))


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_alpha_out_of_range_is_refused(alpha: float) -> None:
    with pytest.raises(ConfigurationError, match=rf"alpha={alpha} was given; expected 0 to 1"):
        overlay(PHOTO, np.zeros((6, 8), np.uint8), alpha)


@pytest.mark.parametrize("photo", [PHOTO[:5], PHOTO / 255, PHOTO[..., 0]])
def test_pictures_that_do_not_fit_are_refused(photo: np.ndarray) -> None:
    classes = np.zeros((6, 8), np.uint8)
    with pytest.raises(ConfigurationError, match=r"class map of \(6, 8\); expected uint8 \(6, 8, 3\)"):
        overlay(photo, classes)
    with pytest.raises(ConfigurationError, match=r"class map of \(6, 8\); expected uint8 \(6, 8, 3\)"):
        difference(photo, classes, classes)


def test_maps_of_two_sizes_are_refused() -> None:
    small, large = np.zeros((6, 8), np.uint8), np.zeros((12, 16), np.uint8)
    with pytest.raises(ConfigurationError, match=r"class map of \(12, 16\); expected uint8 \(12, 16, 3\)"):
        comparison(PHOTO, small, large)


def test_as_many_maps_as_images(tmp_path: Path) -> None:
    maps = [np.zeros((6, 8), np.uint8)] * 2
    with pytest.raises(ConfigurationError, match="got 1 images, 2 float maps and 2 quantized maps"):
        save_overlays(tmp_path, [normalised(PHOTO)], maps, maps)
