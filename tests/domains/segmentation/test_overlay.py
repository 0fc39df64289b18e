"""Overlays: every pixel is accounted for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_quant.domains.images import denormalize
from lightning_quant.domains.segmentation.cityscapes import PALETTE
from lightning_quant.domains.segmentation.images import normalize_images
from lightning_quant.domains.segmentation.overlay import (
    colorize,
    compare_class_maps,
    overlay,
)
from lightning_quant.errors import ConfigurationError

PHOTO = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
ROAD, CAR, VOID = 0, 13, 255


def normalized(photo: np.ndarray) -> torch.Tensor:
    return normalize_images()(torch.from_numpy(photo).permute(2, 0, 1))


def test_denormalize_undoes_the_data_modules_normalization() -> None:
    assert np.array_equal(denormalize(normalized(PHOTO)), PHOTO)


def test_denormalize_clips_what_no_photo_holds() -> None:
    picture = denormalize(torch.tensor([-100.0, 0.0, 100.0]).view(3, 1, 1))
    assert picture.tolist() == [[[0, round(255 * 0.456), 255]]]


@pytest.mark.parametrize("as_tensor", [False, True])
def test_colorize_takes_the_palette_and_black_for_void(as_tensor: bool) -> None:
    classes = np.array([[*range(19), VOID]], dtype=np.uint8)
    colors = colorize(torch.from_numpy(classes).long() if as_tensor else classes)
    assert colors.dtype == np.uint8
    assert colors.tolist() == [[*PALETTE.tolist(), [0, 0, 0]]]


def test_overlay_mixes_and_leaves_void_to_the_photo() -> None:
    classes = np.full((6, 8), CAR, dtype=np.int64)
    classes[0] = VOID
    mixed = overlay(PHOTO, classes, alpha=0.25)
    assert mixed.dtype == np.uint8
    assert np.array_equal(mixed[0], PHOTO[0])
    assert np.array_equal(mixed[1:], np.rint(0.75 * PHOTO[1:] + 0.25 * PALETTE[CAR]))
    assert np.array_equal(overlay(PHOTO, classes, alpha=0), PHOTO)
    assert (overlay(PHOTO, classes, alpha=1)[1:] == PALETTE[CAR]).all()


def test_a_comparison_shows_both_networks_over_the_photo_and_the_classes_that_occur() -> None:
    one = torch.full((6, 8), ROAD)
    other = one.clone()
    other[:2] = CAR
    found = compare_class_maps(normalized(PHOTO), one, other)
    assert np.array_equal(found.input, PHOTO)
    assert np.array_equal(found.float, overlay(PHOTO, one))
    assert np.array_equal(found.quantized, overlay(PHOTO, other))
    assert found.legend == {"road": (128, 64, 128), "car": (0, 0, 142)}


@pytest.mark.parametrize("photo", [np.zeros((1, 1, 3), np.uint8), np.full((1, 1, 3), 255, np.uint8)])
def test_two_classes_never_look_the_same(photo: np.ndarray) -> None:
    seen = {tuple(overlay(photo, np.array([[one]]))[0, 0].tolist()) for one in (*range(19), VOID)}
    assert len(seen) == 20  # so the difference of the pictures is that of the classes


def test_a_batch_where_one_image_belongs_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"shape \(1, 3, 4, 4\); expected one image \(3, H, W\)"):
        denormalize(torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize(
    "class_map", [np.zeros((6, 8)), np.zeros((1, 6, 8), np.uint8), torch.zeros(19, 6, 8), torch.zeros(6, 8)]
)
def test_logits_and_batches_are_not_class_maps(class_map: np.ndarray | torch.Tensor) -> None:
    with pytest.raises(ConfigurationError, match=r"expected whole numbers \(H, W\)\. Logits become class maps"):
        colorize(class_map)


@pytest.mark.parametrize("wrong", [-1, 19, 254, 256])
def test_numbers_that_are_not_a_class_are_refused(wrong: int) -> None:
    with pytest.raises(ConfigurationError, match=rf"holds \[{wrong}\]: expected 0 to 18, or 255"):
        colorize(np.array([[0, wrong]]))


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_alpha_out_of_range_is_refused(alpha: float) -> None:
    with pytest.raises(ConfigurationError, match=rf"alpha={alpha}: expected 0 to 1"):
        overlay(PHOTO, np.zeros((6, 8), np.uint8), alpha)


@pytest.mark.parametrize("photo", [PHOTO[:5], PHOTO / 255, PHOTO[..., 0]])
def test_pictures_that_do_not_fit_are_refused(photo: np.ndarray) -> None:
    classes = np.zeros((6, 8), np.uint8)
    with pytest.raises(ConfigurationError, match=r"class map of \(6, 8\): expected uint8 \(6, 8, 3\)"):
        overlay(photo, classes)


def test_maps_of_two_sizes_are_refused() -> None:
    small, large = np.zeros((6, 8), np.uint8), np.zeros((12, 16), np.uint8)
    with pytest.raises(ConfigurationError, match=r"class map of \(12, 16\): expected uint8 \(12, 16, 3\)"):
        compare_class_maps(normalized(PHOTO), small, large)
