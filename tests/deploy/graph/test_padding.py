"""Padding, concatenations with one value and slices, which the NPU's compiler takes as a part of their neighbors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.members import in_turn
from tests.helpers.networks import calibrated, call
from tests.helpers.qdq import equal_everywhere, operations

PRECISIONS = ["w8a8", "w8a16", "w4a8", "w4a16"]


def zeros(y: Tensor, columns: int = 2) -> Tensor:
    return torch.zeros_like(y[..., :columns])


# What moves, cuts off and surrounds values of maps of 8 by 8.
FILLED: dict[str, Callable[[Tensor], Tensor]] = {
    "cut and padded at the left": lambda y: F.pad(y[..., 2:], (2, 0)),
    "cut and padded at the top": lambda y: F.pad(y[:, :, 2:], (0, 0, 2, 0)),
    "moved to the right": lambda y: F.pad(y[..., :-1], (1, 0)),
    "moved to the left": lambda y: F.pad(y[..., 1:], (0, 1)),
    "padded by more than was cut": lambda y: F.pad(y[..., 1:], (3, 0)),
    "padded all around": lambda y: F.pad(y, (1, 1, 1, 1)),
    "padded with ones": lambda y: F.pad(y, (2, 0), value=1.0),
    "cut, and padded with ones": lambda y: F.pad(y[..., 2:], (2, 0), value=1.0),
    "zeros first": lambda y: torch.cat([zeros(y), y[..., 2:]], -1),
    "zeros last": lambda y: torch.cat([y, zeros(y)], -1),
    "zeros in place of the last": lambda y: torch.cat([y[..., :-2], zeros(y)], -1),
    "values times zero first": lambda y: torch.cat([y * 0, y], -1),
    "zeros and ones": lambda y: torch.cat([zeros(y), y, zeros(y) + 1.0], -1),
    "some channels moved": lambda y: torch.cat(
        [F.pad(y[:, :2, :, 1:], (0, 1)), F.pad(y[:, 2:4, :, :-1], (1, 0)), y[:, 4:]], 1
    ),
}
READERS: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: nn.Conv2d(8, 4, 3, padding=1),
    "1×1 convolution": lambda: nn.Conv2d(8, 4, 1),
    "maximum": lambda: nn.MaxPool2d(2),
    "mean of blocks": lambda: nn.AvgPool2d(2),
    "mean": lambda: nn.AdaptiveAvgPool2d(1),
    "ReLU": nn.ReLU,
    "nothing": nn.Identity,
}
MEANS: dict[str, Callable[[Tensor], Tensor]] = {
    "blocks of two, padded": lambda y: F.avg_pool2d(y, 2, padding=1),
    "blocks of three, padded": lambda y: F.avg_pool2d(y, 3, padding=1),
    "blocks in a row, padded": lambda y: F.avg_pool1d(y.flatten(1, 2), 4, padding=2),
    "blocks, without what is around": lambda y: F.avg_pool2d(y, 2, padding=1, count_include_pad=False),
    "windows, padded": lambda y: F.avg_pool2d(y, 3, 1, 1),
    "blocks of what was cut at the left": lambda y: F.avg_pool2d(y[..., 2:], 2),
    "blocks of what was cut, behind a ReLU": lambda y: F.avg_pool2d(y[:, :, 1:, 1:].relu(), 2),
    "blocks of a row": lambda y: F.avg_pool2d(y[..., 2:], (1, 2)),
    "blocks of three of what was cut": lambda y: F.avg_pool2d(y[:, :, 2:, 2:], 3),
    "windows of three of what was cut": lambda y: F.avg_pool2d(y[..., 3:], 3, 1),
    "windows of what was cut, apart": lambda y: F.avg_pool2d(y[..., 1:], 3, 2),
    "blocks of chunks": lambda y: torch.cat([F.avg_pool2d(part, 2) for part in y.chunk(2, 2)], 1),
    "blocks of uneven parts": lambda y: torch.cat([F.avg_pool2d(part, 2) for part in y.split([3, 5], -1)], -1),
    "windows of rows": lambda y: torch.cat([F.avg_pool1d(part.flatten(1, 2), 3, 1) for part in y.chunk(2, -1)], -1),
    "blocks of parts behind a sigmoid": lambda y: sum(F.avg_pool2d(one.sigmoid(), 2) for one in y.chunk(2, -1)),
    "blocks, moved by one": lambda y: F.avg_pool2d(F.pad(y, (-1, 1, -1, 1)), 2),
    "windows, cut by a padding": lambda y: F.avg_pool2d(F.pad(y, (-2, 0, -1, 0)), 3, 1),
    "blocks of channels": lambda y: F.avg_pool2d(y[:, 2:4, 2:], 2),
}


class Filled(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor], reader: nn.Module | None = None) -> None:
        super().__init__()
        reader = nn.Identity() if reader is None else reader
        self.first, self.function, self.reader = nn.Conv2d(4, 8, 3, padding=1), function, reader

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(self.function(self.first(x)))


def check(network: nn.Module, precision: str, folder: Path) -> onnx.ModelProto:
    samples = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    known = calibrated(network.eval(), call(samples), precision=precision)
    npu_db, float_db = (40, 30) if precision.endswith("a8") else (55, 40)
    return equal_everywhere(known, samples[:1], folder, npu_db=npu_db, float_db=float_db)


@pytest.mark.parametrize("precision", ["w8a8", pytest.param("w8a16", marks=pytest.mark.torture)])
@pytest.mark.parametrize(("filling", "reader"), in_turn(FILLED, READERS))
def test_one_value_around_others_is_there_on_the_npu(tmp_path: Path, filling: str, reader: str, precision: str) -> None:
    torch.manual_seed(0)
    check(Filled(FILLED[filling], READERS[reader]()), precision, tmp_path)


@pytest.mark.parametrize(("name", "precision"), in_turn(MEANS, PRECISIONS))
def test_means_are_of_the_blocks_that_are_meant(tmp_path: Path, name: str, precision: str) -> None:
    torch.manual_seed(0)
    check(Filled(MEANS[name]), precision, tmp_path)


CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "all channels": lambda: nn.Conv2d(8, 4, 3),
    "padded": lambda: nn.Conv2d(8, 4, 3, padding=1),
    "depthwise": lambda: nn.Conv2d(8, 8, 3, groups=8),
    "depthwise, of a row": lambda: nn.Conv2d(8, 8, (1, 2), (1, 2), groups=8),
    "behind a ReLU": lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(8, 4, 3)),
    "transposed": lambda: nn.ConvTranspose2d(8, 4, 2, 2),
    "strided": lambda: nn.Conv2d(8, 4, 3, 2),
}


@pytest.mark.parametrize("cut", ["slice", "split", "padding"])
@pytest.mark.parametrize(("name", "precision"), in_turn(CONVOLUTIONS, PRECISIONS))
def test_convolutions_begin_where_the_map_was_cut(tmp_path: Path, name: str, precision: str, cut: str) -> None:
    torch.manual_seed(0)
    function = {
        "slice": lambda y: y[:, :, 1:, 2:],
        "split": lambda y: y.split([3, 5], -1)[1],
        "padding": lambda y: F.pad(y, (-2, 1, -1, 0)),
    }[cut]
    check(Filled(function, CONVOLUTIONS[name]()), precision, tmp_path)


RIGHT: dict[str, Callable[[Tensor], Tensor]] = {
    "means": lambda y: F.avg_pool2d(y, 2),
    "means of what is joined along channels": lambda y: F.avg_pool2d(torch.cat([y, y.relu()], 1), 3, 1, 1),
    "means of some channels": lambda y: F.avg_pool2d(y.chunk(2, 1)[1].sigmoid(), 2),
    "zeros around a convolution": lambda y: F.conv2d(F.pad(y, (1, 1, 1, 1)), torch.ones(1, 8, 3, 3)),
    "zeros around a maximum": lambda y: F.max_pool2d(F.pad(y.relu(), (1, 1, 1, 1)), 3),
    "a convolution of what was cut at the end": lambda y: F.conv2d(y[..., :-2], torch.ones(1, 8, 3, 3)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_stays_as_it_is(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model = check(Filled(RIGHT[name]), "w8a8", tmp_path)
    assert not operations(model, "Where")
    kind = "AveragePool" if name.startswith("means") else "Pad" if name.startswith("zeros") else "Slice"
    assert len(operations(model, kind)) == 1
