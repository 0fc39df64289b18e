"""Calls cut into single samples of one size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_quant.deploy.single_samples import first_samples
from lightning_quant.errors import CalibrationError
from tests.helpers.networks import call, images


def test_first_samples_are_cut_out_of_the_batches() -> None:
    stream = iter([call(images(3)), call(images(4, seed=1))])
    found = first_samples(stream, 5)
    assert [sample.batch_size for sample in found] == [1] * 5
    assert torch.equal(torch.cat([sample.args[0] for sample in found]), torch.cat([images(3), images(4, seed=1)[:2]]))
    assert len(first_samples([call(images(2))], 5)) == 2
    with pytest.raises(CalibrationError, match="gave no batch"):
        first_samples([], 5)


def test_first_samples_have_one_size() -> None:
    large, small = images(6), images(6)[..., :4]
    stream = [call(large[:2]), call(small[:3]), call(large[2:4]), call(small[3:])]
    found = first_samples(stream, 3, call(small[:1]))
    assert all(torch.equal(one.args[0][0], image) for one, image in zip(found, small[:3], strict=True))
    found = first_samples(stream, 5, call(small[:1]))
    assert all(torch.equal(one.args[0][0], image) for one, image in zip(found, small[:5], strict=True))
    # where no sample has the size, that of the first is taken
    for like in (None, call(large[..., :2])):
        found = first_samples(stream, 3, like)
        assert all(torch.equal(one.args[0][0], image) for one, image in zip(found, large[:3], strict=True))
    assert len(first_samples(stream, 3, call(large[..., :2]), among=2)) == 2


def test_first_samples_are_dealt_out_over_the_calls_of_a_step() -> None:
    steps = [
        [call(images(4), None), call(images(4), torch.ones(4, 2)), call(images(4), torch.full((4, 2), 2.0))]
        for _ in range(2)
    ]
    stream = [replace(one, last=one is step[-1]) for step in steps for one in step]
    found = first_samples(stream, 6, steps[0][1].first(1))
    assert [float(one.args[1][0, 0]) for one in found] == [1, 2, 1, 2, 1, 2]
    assert all(torch.equal(one.args[0][0], images(4)[i % 4]) for i, one in enumerate(found))
