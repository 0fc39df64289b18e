"""How closely two computations agree: the figures against independent ones, the bars against made-up figures."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from lightning_quant.deploy.device_report import DeviceReport
from lightning_quant.deploy.parity import LOWEST_PSNR, Parity, check_parity, compare, is_explained_by_ties
from lightning_quant.deploy.push import check_bounds
from lightning_quant.errors import DeviceBoundError, ExportError, ParityError
from lightning_quant.precision import Precision


def outputs(seed: int, shape: tuple[int, ...], noise: float) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    reference = generator.normal(size=shape).astype(np.float32) * 3
    return reference, reference + generator.normal(size=shape).astype(np.float32) * noise


def test_psnr_is_the_formula() -> None:
    for seed in range(5):
        reference, actual = outputs(seed, (4, 3, 5, 6), 10.0**-seed)
        a, b = torch.from_numpy(reference).double(), torch.from_numpy(actual).double()
        expected = 10 * torch.log10(a.abs().max() ** 2 / torch.nn.functional.mse_loss(b, a))
        assert compare([([reference], [actual])]).psnr_db == pytest.approx(float(expected), abs=1e-6)
    # by hand: peak 4, differences 0 and 0.04, so rmse 0.04 / sqrt(2)
    by_hand = compare([([np.array([[4.0, 1.0]])], [np.array([[4.0, 1.04]])])])
    assert by_hand.psnr_db == pytest.approx(20 * math.log10(4 / (0.04 / math.sqrt(2))))


def test_uneven_batches_give_what_one_batch_gives() -> None:
    reference, actual = outputs(0, (7, 4, 5), 0.5)
    aux, aux_actual = outputs(1, (7, 2), 0.1)
    whole = compare([([reference, aux], [actual, aux_actual])])
    parts = compare(([reference[a:b], aux[a:b]], [actual[a:b], aux_actual[a:b]]) for a, b in ((0, 1), (1, 5), (5, 7)))
    assert parts.samples == whole.samples == 7
    assert parts.psnr_db == pytest.approx(whole.psnr_db)
    assert parts.argmax_agreement == whole.argmax_agreement


def test_lowest_psnr_over_the_outputs() -> None:
    good, bad = outputs(0, (2, 3), 1e-4), outputs(1, (2, 3), 1.0)
    together = compare([([good[0], bad[0]], [good[1], bad[1]])])
    assert together.psnr_db == compare([([bad[0]], [bad[1]])]).psnr_db
    # a large output does not hide a small one
    assert together.psnr_db < compare([([good[0]], [good[1]])]).psnr_db - 30


def test_agreement_counts_positions() -> None:
    reference = np.array([[[1.0, 0.0], [0.0, 1.0], [0.0, 0.5]]])  # 1 sample, 3 classes, 2 positions
    actual = reference.copy()
    assert compare([([reference], [actual])]).argmax_agreement == 1
    actual[0, :, 1] = [0, 0.4, 0.5]  # another class wins at one of two positions
    assert compare([([reference], [actual])]).argmax_agreement == 0.5


def test_decided_agreement_leaves_out_positions_without_a_lead() -> None:
    # highest score 10: a lead has to exceed 2 * 10 * 10^(-35 / 20) = 0.3557
    undecided = np.array([[[0.0, 5.0, 10.0], [10.0, 5.35, 0.0]]])
    flipped = undecided.copy()
    flipped[0, :, 1] = [5.36, 5.0]
    measured = compare([([undecided], [flipped])])
    assert measured.argmax_agreement == pytest.approx(2 / 3)
    assert measured.decided_agreement == 1
    decided = undecided.copy()
    decided[0, 1, 1] = 5.36
    assert compare([([decided], [flipped])]).decided_agreement == pytest.approx(2 / 3)
    nowhere = np.ones((2, 3))
    assert compare([([nowhere], [nowhere])]).decided_agreement == 1  # falls back on all positions


def test_outputs_without_classes() -> None:
    for shape in ((3,), (3, 1), ()):
        x = np.ones(shape)
        measured = compare([([x], [x])])
        assert (measured.argmax_agreement, measured.decided_agreement) == (None, None)
        assert measured.samples == (3 if shape else 1)


def test_equal_outputs_are_none_in_json() -> None:
    x = np.ones((2, 3))
    same = compare([([x], [x])])
    assert same.psnr_db == math.inf
    assert json.loads(json.dumps(same.to_dict(), allow_nan=False))["psnr_db"] is None
    assert compare([]).samples == 0


def test_silence_and_nan_are_no_agreement() -> None:
    zeros, ones = np.zeros((1, 2)), np.ones((1, 2))
    assert compare([([zeros], [ones])]).psnr_db == -math.inf
    assert compare([([ones], [ones * np.nan])]).psnr_db == -math.inf
    with pytest.raises(ParityError, match="-inf dB"):
        check_parity(compare([([ones], [ones * np.nan])]), Precision(8, 16))


def test_another_number_of_outputs_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        compare([([np.ones(2)], [np.ones(2), np.ones(2)])])


@pytest.mark.parametrize(
    ("precision", "psnr", "agreement", "passes"),
    [
        ("w8a16", 60.0, 1.0, True),
        ("w8a16", 59.9, 1.0, False),
        ("w4a16", 59.9, None, False),
        ("w4a16", math.inf, None, True),
        ("w8a8", 60.0, 0.99, True),
        ("w8a8", 59.9, 1.0, False),
        ("w8a8", 60.0, 0.989, False),
        ("w4a8", 60.0, None, True),
        ("w4a8", -math.inf, 1.0, False),
        ("w8a8", math.nan, 1.0, False),
    ],
)
def test_bars(precision: str, psnr: float, agreement: float | None, passes: bool) -> None:
    measured = Parity(psnr, 0.5, agreement, 3)
    if passes:
        check_parity(measured, Precision.parse(precision))
        return
    with pytest.raises(ParityError, match=rf"differs from the simulation.*over 3 samples at {precision}") as caught:
        check_parity(measured, Precision.parse(precision))
    assert isinstance(caught.value, ExportError)


@pytest.mark.parametrize(
    ("precision", "psnr", "agreement", "explained"),
    [
        ("w8a8", 35.0, 0.99, True),
        ("w4a8", 35.0, None, True),
        ("w8a8", 34.9, 1.0, False),
        ("w8a8", 50.0, 0.98, False),
        ("w8a16", 50.0, 1.0, False),
        ("w8a8", math.nan, None, False),
    ],
)
def test_values_on_a_border_explain_so_much(
    precision: str, psnr: float, agreement: float | None, explained: bool
) -> None:
    assert is_explained_by_ties(Parity(psnr, 0.5, agreement, 3), Precision.parse(precision)) is explained


def test_integer_outputs_are_compared_as_classes() -> None:
    expected = np.array([[0, 1, 2, 3]])
    parity = compare([([expected], [np.array([[0, 1, 2, 9]])])])
    assert parity.argmax_agreement == 0.75
    assert math.isinf(parity.psnr_db)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_noise_beyond_measure_is_not_taken_for_equal(wrong: float) -> None:
    """In JSON neither NaN nor infinity has a place, and None means equal."""
    values = compare([([np.ones((1, 1, 4))], [np.full((1, 1, 4), wrong)])]).rounded()
    assert values.to_dict()["psnr_db"] == LOWEST_PSNR
    assert str(values) == "not comparable"
    report = DeviceReport("aihub", "phone", Precision(8, 8), against_float=values)
    with pytest.raises(DeviceBoundError, match="min_psnr=40"):
        check_bounds([report], min_psnr=40, max_metric_drop=None)
