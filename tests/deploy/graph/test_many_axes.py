"""Tensors of more axes than the NPU has are in a form of fewer in the file, which computes the same on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_quant.deploy.graph.axis_groups import form_of, moves, moving_together
from lightning_quant.deploy.graph.files import write_onnx
from lightning_quant.deploy.graph.qdq import sizes_of
from tests.helpers.members import in_turn
from tests.helpers.networks import calibrated, call
from tests.helpers.qdq import computed, equal_everywhere, psnr

PRECISIONS = ["w8a8", "w8a16", "w4a8", "w4a16"]
SHAPE = (1, 8, 8, 8)


class Between(nn.Module):
    """What a function does between two convolutions with maps of 8 by 8 in 8 channels."""

    def __init__(self, function: Callable[[Between, Tensor], Tensor]) -> None:
        super().__init__()
        self.before, self.behind = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.linear, self.product, self.norm = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.LayerNorm(8)
        self.rows, self.columns = (
            nn.Parameter(torch.randn(2, 2, 2, 4, 1, 1)),
            nn.Parameter(torch.randn(2, 2, 2, 1, 4, 1)),
        )
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.function(self, self.before(x)).reshape(-1, 8, 8, 8))


def six(y: Tensor) -> Tensor:
    return y.reshape(2, 2, 2, 4, 4, 4)


def seven(y: Tensor) -> Tensor:
    return y.reshape(1, 2, 4, 2, 2, 2, 2, 4)


def five(y: Tensor) -> Tensor:
    return y.reshape(2, 2, 4, 4, 8)


FUNCTIONS: dict[str, Callable[[Between, Tensor], Tensor]] = {
    "unrolled windows": lambda m, y: seven(y).permute(0, 1, 3, 5, 2, 4, 6, 7),
    "channels last of windows": lambda m, y: seven(y).permute(0, 7, 1, 3, 5, 2, 4, 6),
    "the other way round": lambda m, y: seven(y).permute(7, 6, 5, 4, 3, 2, 1, 0).relu(),
    "two transpositions": lambda m, y: six(y).permute(0, 3, 1, 4, 2, 5).sigmoid().permute(5, 4, 3, 2, 1, 0),
    "positions by row and column": lambda m, y: six(y) + m.rows + m.columns,
    "a constant of all values": lambda m, y: six(y) * m.rows.expand(2, 2, 2, 4, 4, 4).relu(),
    "softmax of the last axis": lambda m, y: F.softmax(six(y), -1).permute(0, 3, 1, 4, 2, 5),
    "softmax in the middle": lambda m, y: F.softmax(six(y), 3),
    "log softmax": lambda m, y: F.log_softmax(five(y), -1),
    "attention": lambda m, y: F.softmax(six(y) @ six(y).transpose(-2, -1) / 4, -1) @ six(y),
    "linear layer": lambda m, y: m.linear(y.reshape(2, 2, 2, 2, 4, 8)),
    "linear layer without a bias": lambda m, y: m.product(y.reshape(2, 2, 2, 2, 4, 8)),
    "linear layer without a bias, five axes": lambda m, y: m.product(five(y)),
    "norm": lambda m, y: m.norm(y.reshape(2, 2, 2, 2, 4, 8)),
    "norm of five axes": lambda m, y: m.norm(five(y)),
    "mean that stays": lambda m, y: six(y) - six(y).mean(1, keepdim=True),
    "mean of two axes": lambda m, y: six(y) - six(y).mean((2, 4), keepdim=True),
    "sum": lambda m, y: seven(y).sum(-3).repeat(1, 2, 1, 1, 1, 1, 1),
    "maximum": lambda m, y: six(y).amax(3).repeat(1, 1, 1, 4, 1),
    "spread": lambda m, y: six(y)[:, :1].expand(2, 2, 2, 4, 4, 4),
    "slices joined": lambda m, y: torch.cat([six(y)[:, :, :, 2:], six(y)[:, :, :, :2]], 3).permute(1, 0, 2, 4, 3, 5),
    "one of an axis": lambda m, y: torch.stack([six(y)[:, :, 1], six(y)[:, :, 0]], 2),
    "chunks": lambda m, y: torch.cat(six(y).chunk(2, 4)[::-1], 4),
    "chosen by a mask": lambda m, y: torch.where(six(y) > 0, six(y), six(y) * 0.5),
    "five axes that move by none": lambda m, y: torch.roll(five(y), (0, -1, 5), (1, 2, 3)),
    **{
        f"{function.__name__} of five axes": lambda m, y, function=function: function(five(y))
        for function in (F.gelu, torch.tanh, F.hardswish, F.elu, torch.neg, torch.sin, torch.cos)
    },
    "square root of five axes": lambda m, y: (five(y).abs() + 1).sqrt(),
    "PReLU of five axes": lambda m, y: F.prelu(five(y), torch.tensor([0.2])),
}  # fmt: skip


@pytest.mark.parametrize(("name", "precision"), in_turn(FUNCTIONS, PRECISIONS))
def test_the_file_has_fewer_axes_and_computes_the_same(tmp_path: Path, name: str, precision: str) -> None:
    torch.manual_seed(0)
    samples = torch.randn(8, *SHAPE[1:])
    network, given = calibrated(Between(FUNCTIONS[name]).eval(), call(samples[:1]), precision=precision), samples[:1]
    coarse = precision.endswith("a8") or name == "attention"  # the NPU's 16-bit products of activations
    file_db = 90 if precision.endswith("a16") else 100
    equal_everywhere(network, given, tmp_path, npu_db=38 if coarse else 55, file_db=file_db)
    for file in ("float.onnx", "qdq.onnx"):
        graph = onnx.load(tmp_path / file)
        onnx.checker.check_model(graph, full_check=True)
        sizes = sizes_of(graph)
        read = [(node.op_type, len(sizes[one])) for node in graph.graph.node for one in node.input if one in sizes]
        assert max(axes for _, axes in read) <= 5
        assert ("LayerNormalization", 5) not in read


@pytest.mark.parametrize("function", ["cumsum", "output"])
def test_what_is_not_known_of_more_axes_has_all_of_them(tmp_path: Path, function: str) -> None:
    class Some(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = seven(self.conv(x)).permute(0, 1, 3, 5, 2, 4, 6, 7)
            return y if function == "output" else torch.cumsum(y, 3).permute(1, 0, 2, 3, 4, 5, 6, 7).reshape(1, 8, 8, 8)

    torch.manual_seed(0)
    given = torch.randn(SHAPE)
    network = calibrated(Some().eval(), call(given))
    write_onnx(network, call(given), tmp_path / "float.onnx", tmp_path / "qdq.onnx")
    model = onnx.load(tmp_path / "qdq.onnx")
    with torch.no_grad():
        expected = network(given).numpy()
    (output,) = computed(model, tmp_path, **{model.graph.input[0].name: given.numpy()})
    assert output.shape == expected.shape
    assert psnr(expected, output) > 100


@settings(max_examples=300, deadline=None)
@given(
    st.integers(2, 9).flatmap(
        lambda n: st.tuples(st.lists(st.integers(1, 3), min_size=n, max_size=n), st.permutations(range(n)))
    )
)
def test_moves_one_after_the_other_are_the_transposition(case: tuple[list[int], list[int]]) -> None:
    size, order = case
    array = np.arange(np.prod(size)).reshape(size)
    wanted = array.transpose(order)
    moved = array
    for move in moves(size, order):
        assert len(move.groups) <= 4
        moved = moved.reshape(form_of(size, move.groups)).transpose(move.perm)
    assert np.array_equal(moved.flatten(), wanted.flatten())
    together = moving_together(size, order)
    perm = sorted(range(len(together)), key=lambda place: order.index(together[place][0]))
    assert np.array_equal(array.reshape(form_of(size, together)).transpose(perm).flatten(), wanted.flatten())
    assert len(moves(size, order)) < max(len(together), 1)
