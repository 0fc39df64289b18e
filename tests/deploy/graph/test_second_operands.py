"""What a product of two activations multiplies with: signed integers of 16 bits where the NPU takes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.deploy.graph.files import write_onnx
from lightning_quant.deploy.graph.qdq import QdqGraph
from lightning_quant.simulation.operators import off_the_npu
from lightning_quant.simulation.preflight import FindingKind
from tests.helpers.networks import calibrated, call
from tests.helpers.qdq import NO_EMULATOR, emulated, equal_everywhere, operations, psnr

TOKENS = torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(0))
NUMBERS = torch.linspace(-1, 2, 256).view(32, 8)


class Product(nn.Module):
    """A function of two linear layers' outputs, which multiplies them."""

    def __init__(self, function: Callable[[Product, Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(32, 32), nn.Linear(32, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def turned(y: Tensor) -> Tensor:
    return y.transpose(1, 2)


def heads(y: Tensor) -> Tensor:
    return y.unflatten(-1, (4, 8)).transpose(1, 2)


PRODUCTS: dict[str, Callable[[Product, Tensor], Tensor]] = {
    "two layers": lambda m, x: m.one(x) @ turned(m.other(x)),
    "itself": lambda m, x: (lambda y: y @ turned(y))(m.one(x)),  # type: ignore[no-any-return]
    "positive": lambda m, x: m.one(x) @ turned(m.other(x).relu()),
    "sigmoid": lambda m, x: m.one(x) @ turned(m.other(x).sigmoid()),
    "softmax": lambda m, x: turned(m.one(x)) @ m.other(x * 0.1).softmax(-1),
    "read elsewhere": lambda m, x: (lambda y: m.one(x) @ turned(y) + y[..., :16])(m.other(x)),  # type: ignore[no-any-return]
    "joined": lambda m, x: m.one(x) @ turned(torch.cat([m.other(x), m.one(x) * 3], 1)),
    "constant": lambda m, x: m.one(x) @ NUMBERS,
    "einsum": lambda m, x: torch.einsum("bnd,bmd->bnm", m.one(x), m.other(x)),
    "heads": lambda m, x: (heads(m.one(x)) @ heads(m.other(x)).transpose(2, 3)).flatten(1, 2),
    "linear attention": lambda m, x: (F.elu(m.one(x)) + 1) @ (turned(F.elu(m.other(x)) + 1) @ x),
}


def product(name: str, **recipe: Any) -> Any:
    torch.manual_seed(0)
    return calibrated(Product(PRODUCTS[name]).eval(), call(TOKENS), **recipe)


def second_operands(model: onnx.ModelProto) -> set[type]:
    """The types of the integers that products multiply with."""
    graph = QdqGraph(model)
    sources = [graph.producers[node.input[1]] for node in operations(model, "MatMul") if node.input[1]]
    activations = [one for one in sources if graph.array(one.input[1]).size == 1]  # weights have a scale a channel
    return {graph.array(one.input[2]).dtype.type for one in activations}


@pytest.mark.parametrize("precision", ["w8a16", "w4a16"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_all_16_bits_are_multiplied(name: str, precision: str, tmp_path: Path) -> None:
    known = product(name, precision=precision)
    # with 4-bit weights the NPU's own layers before the product are less close
    model = equal_everywhere(known, TOKENS[:1], tmp_path, npu_db=70 if precision == "w8a16" else 45, float_db=20)
    assert second_operands(model) == {np.int16}


@pytest.mark.parametrize("name", PRODUCTS)
def test_as_before_with_8_bits(name: str, tmp_path: Path) -> None:
    model = equal_everywhere(product(name, precision="w8a8"), TOKENS[:1], tmp_path, npu_db=40, file_db=50)
    assert second_operands(model) == {np.uint8}


@pytest.mark.parametrize(("precision", "hardware"), [("w8a16", "htp_v75"), ("w8a8", "htp_v69"), ("w8a16", "htp_v69")])
@pytest.mark.parametrize("name", PRODUCTS)
def test_simulation_cuts_nothing_off(name: str, precision: str, hardware: str) -> None:
    """AIMET makes the second operand symmetric; half of a range that stays 0 to 1 would be below zero then."""
    known = product(name, precision=precision, hardware=hardware)
    with torch.no_grad():
        expected = known.float_network(TOKENS).numpy()
        assert psnr(expected, known(TOKENS).numpy()) > 35


def test_older_chips_multiply_by_8_bits(tmp_path: Path) -> None:
    known = product("two layers", precision="w8a16", hardware="htp_v69")
    write_onnx(known, call(TOKENS[:1]), tmp_path / "float.onnx", tmp_path / "qdq.onnx")
    assert second_operands(onnx.load(tmp_path / "qdq.onnx")) == {np.uint16}
    assert not off_the_npu(known, 69)


def test_older_chips_are_named_before_calibration() -> None:
    known = product("two layers", precision="w8a16")
    (found,) = off_the_npu(known, 69)
    assert (found.module, found.kind) == ("matmul", FindingKind.ON_CPU)
    assert 'hardware="htp_v69"' in found.remedy
    assert not off_the_npu(known, 73)
    assert not off_the_npu(product("two layers", precision="w8a8"), 69)


class Cut(nn.Module):
    """Queries, keys and values cut out of one tensor that was transposed, as EfficientViT has them."""

    def __init__(self, cut: Callable[[Tensor], Any], function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.all = nn.Conv2d(32, 96, 1, bias=False)
        self.cut, self.function = cut, function

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.cut(self.all(x).reshape(1, -1, 24, 64).transpose(-1, -2))
        made: Tensor = self.function(q) @ (self.function(k).transpose(-1, -2) @ v)
        return made


# How close the NPU comes: behind slices it multiplies by 8 bits.
CUTS: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "chunk": (lambda y: y.chunk(3, -1), 70),
    "uneven chunks": (lambda y: y[..., :-1].chunk(3, -1)[:1] * 3, 40),
    "split": (lambda y: y.split(8, -1), 70),
    "split by sizes": (lambda y: y.split([8, 8, 8], -1), 70),
    "unbind": (lambda y: y.unflatten(-1, (3, 8)).unbind(-2), 70),
    "slices": (lambda y: (y[..., :8], y[..., 8:16], y[..., 16:]), 40),
    "narrow": (lambda y: [y.narrow(-1, 8 * part, 8) for part in range(3)], 40),
}


@pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))
@pytest.mark.parametrize("function", [torch.relu, lambda y: y])
@pytest.mark.parametrize("cut", CUTS)
def test_parts_of_what_was_transposed_stay_on_the_npu(
    cut: str, function: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    given, (cutting, npu_db) = torch.randn(1, 32, 8, 8), CUTS[cut]
    known = calibrated(Cut(cutting, function).eval(), call(given), precision="w8a16")
    equal_everywhere(known, given, tmp_path, npu_db=npu_db)


@pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))
def test_unsigned_operands_lose_8_bits(tmp_path: Path) -> None:
    """What this is for: without it, ONNX Runtime's provider converts the second operand to 8 bits."""
    known = product("two layers", precision="w8a16", hardware="htp_v69")
    write_onnx(known, call(TOKENS[:1]), tmp_path / "float.onnx", tmp_path / "qdq.onnx")
    model = onnx.load(tmp_path / "qdq.onnx")
    _, (output,) = emulated(model, tmp_path / "npu", **{model.graph.input[0].name: TOKENS[:1].numpy()})
    with torch.no_grad():
        assert psnr(known(TOKENS[:1]).numpy(), output) < 65
