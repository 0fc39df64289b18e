"""What a product of two activations multiplies with: signed integers of 16 bits where the NPU takes them."""

from __future__ import annotations

import copy
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
from lightning_quant.precision import Precision
from lightning_quant.simulation.calibrate import calibrate
from lightning_quant.simulation.operators import off_the_npu
from lightning_quant.simulation.precisions import quantized_layers, set_precisions
from lightning_quant.simulation.preflight import FindingKind
from tests.helpers.members import in_turn
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
    "hard sigmoid": lambda m, x: m.one(x) @ turned(F.hardsigmoid(m.other(x))),
    "tanh": lambda m, x: m.one(x) @ turned(m.other(x).tanh()),
    "joined sigmoids": lambda m, x: m.one(x) @ turned(torch.cat([m.other(x).sigmoid(), m.one(x).sigmoid()], 1)),
    "softmax": lambda m, x: turned(m.one(x)) @ m.other(x * 0.1).softmax(-1),
    "read elsewhere": lambda m, x: (lambda y: m.one(x) @ turned(y) + y[..., :16])(m.other(x)),  # type: ignore[no-any-return]
    "joined": lambda m, x: m.one(x) @ turned(torch.cat([m.other(x), m.one(x) * 3], 1)),
    "constant": lambda m, x: m.one(x) @ NUMBERS,
    "parameter": lambda m, x: m.one(x) @ m.other.weight,
    "turned parameter": lambda m, x: torch.einsum("bnd,ed->bne", m.one(x), m.other.weight),
    "einsum": lambda m, x: torch.einsum("bnd,bmd->bnm", m.one(x), m.other(x)),
    "by another name": lambda m, x: torch.linalg.matmul(m.one(x), turned(m.other(x))),
    "computed weight": lambda m, x: F.linear(m.one(x), m.other(x)[0]),
    "computed weight and bias": lambda m, x: F.linear(m.one(x), weight=m.other(x)[0], bias=m.one(x)[0, :, 0]),
    "sum with a matrix": lambda m, x: torch.addmm(m.one(x)[0, :, :16], m.one(x)[0], turned(m.other(x))[0], beta=0.5),
    "over axes": lambda m, x: torch.tensordot(m.one(x), m.other(x)[0], dims=([2], [1])),
    "over the last axis": lambda m, x: torch.tensordot(m.one(x), turned(m.other(x))[0], 1),
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


@pytest.mark.parametrize(("name", "precision"), in_turn(PRODUCTS, ["w8a16", "w4a16"]))
def test_all_16_bits_are_multiplied(name: str, precision: str, tmp_path: Path) -> None:
    known = product(name, precision=precision)
    # with 4-bit weights the NPU's own layers before it are less close; of a softmax's range a sixteenth is used
    npu_db = 45 if precision == "w4a16" else 65 if name == "softmax" else 70
    model = equal_everywhere(known, TOKENS[:1], tmp_path, npu_db=npu_db, float_db=20)
    assert second_operands(model) == {np.int16}


@pytest.mark.parametrize(("name", "precision"), in_turn(PRODUCTS, ["w8a8", "w4a8"]))
def test_as_before_with_8_bits(name: str, precision: str, tmp_path: Path) -> None:
    model = equal_everywhere(product(name, precision=precision), TOKENS[:1], tmp_path, npu_db=40, file_db=50)
    assert second_operands(model) == {np.uint8}


@pytest.mark.parametrize(
    ("name", "hardware", "precision"), in_turn(PRODUCTS, ["htp_v75", "htp_v69"], ["w8a16", "w8a8"])
)
def test_simulation_cuts_nothing_off(name: str, hardware: str, precision: str) -> None:
    """AIMET makes the second operand symmetric; half of a range that stays 0 to 1 would be below zero then."""
    known = product(name, precision=precision, hardware=hardware)
    with torch.no_grad():
        expected = known.float_network(TOKENS).numpy()
        assert psnr(expected, known(TOKENS).numpy()) > 35


@pytest.mark.parametrize("precision", ["w8a8", "w4a8"])
@pytest.mark.parametrize("name", ["two layers", "positive", "sigmoid", "softmax", "read elsewhere"])
def test_one_product_of_16_bits(name: str, precision: str, tmp_path: Path) -> None:
    """Raised by an override, as the rung ``mixed`` does it."""
    known = product(name, precision=precision, overrides={"matmul": Precision(8, 16)})
    npu_db = 40 if precision == "w4a8" or name == "read elsewhere" else 65
    model = equal_everywhere(known, TOKENS[:1], tmp_path, npu_db=npu_db, float_db=20)
    assert second_operands(model) == {np.int16}


def test_what_the_product_multiplies_with_has_8_bits(tmp_path: Path) -> None:
    known = product("two layers", precision="w8a16", overrides={"other": Precision(8, 8), "matmul": Precision(8, 16)})
    assert known.network.other.output_quantizers[0].bitwidth == 8
    model = equal_everywhere(known, TOKENS[:1], tmp_path, npu_db=45, float_db=20)  # single values of 8 bits by one step
    assert second_operands(model) == {np.int16}


@pytest.mark.parametrize("name", ["two layers", "positive", "softmax"])
def test_grids_follow_the_bits_of_the_product(name: str) -> None:
    known, always = product(name, precision="w8a8"), product(name, precision="w8a16")

    def outputs(network: Any) -> np.ndarray:
        calibrate(network, [call(TOKENS)])
        with torch.no_grad():
            found: np.ndarray = network(TOKENS).numpy()
        return found

    in_8_bits, before = outputs(known), known.snapshot()
    start = copy.deepcopy(known.float_network)
    set_precisions(known, dict.fromkeys(quantized_layers(known), Precision(8, 16)))
    assert np.array_equal(outputs(known), outputs(always))
    raised = known.snapshot()
    known.restore(before)
    with torch.no_grad():
        assert np.array_equal(known(TOKENS).numpy(), in_8_bits)
    known.restore(raised)
    with torch.no_grad():
        assert np.array_equal(known(TOKENS).numpy(), always(TOKENS).numpy())
    known.reset_to(start)
    assert np.array_equal(outputs(known), in_8_bits)


def test_product_of_8_bits_among_16() -> None:
    known = product("two layers", precision="w8a16", overrides={"matmul": Precision(8, 8)})
    conversion = known.network.matmul.input_quantizers[1]
    assert (conversion.bitwidth, conversion.symmetric) == (8, False)
    assert not known.network.other.output_quantizers[0].symmetric


def test_checkpoint_without_symmetric_grids_is_converted(tmp_path: Path) -> None:
    """One of an earlier version, which multiplied by 8 bits."""
    old, known = product("two layers", precision="w8a16"), product("two layers", precision="w8a16")
    quantizer = old.network.other.output_quantizers[0]
    quantizer.symmetric = quantizer.signed = False
    state = old.network.state_dict()
    known.network.load_state_dict(state)
    model = equal_everywhere(known, TOKENS[:1], tmp_path, npu_db=70, float_db=20)
    assert second_operands(model) == {np.int16}
    assert not known.network.other.output_quantizers[0].symmetric


def test_checkpoint_without_conversions_is_converted(tmp_path: Path) -> None:
    """One of an earlier version, whose product took the ReLU's own grid."""
    known = product("positive", precision="w8a16")
    state = product("positive", precision="w8a16").network.state_dict()
    of_conversion = [key for key in state if key.startswith("matmul.input_quantizers.1")]
    assert of_conversion
    known.network.load_state_dict({key: value for key, value in state.items() if key not in of_conversion})
    model = equal_everywhere(known, TOKENS[:1], tmp_path, npu_db=70, float_db=20)
    assert second_operands(model) == {np.int16}


@pytest.mark.parametrize("name", ["positive", "sigmoid"])
def test_converted_ranges_are_learned_with_those_they_convert(name: str) -> None:
    known = product(name, precision="w8a16")
    known.learn_ranges(True)
    conversion = known.network.matmul.input_quantizers[1]
    known(TOKENS).square().sum().backward()
    source = known.network.get_submodule(known.dataflow.second_operands["matmul", 1])
    assert conversion.max is source.max
    assert (source.max.grad is not None and bool(source.max.grad.abs() > 0)) == (name == "positive")
    with torch.no_grad():
        source.max.mul_(2)
    assert conversion.get_max().item() > 1.9 * TOKENS.new_tensor(source.max.item() / 2)


@pytest.mark.parametrize("name", ["two layers", "positive", "sigmoid", "heads"])
def test_older_chips_multiply_by_8_bits(name: str, tmp_path: Path) -> None:
    known = product(name, precision="w8a16", hardware="htp_v69")
    model = equal_everywhere(known, TOKENS[:1], tmp_path, npu_db=55, float_db=20)
    assert second_operands(model) == {np.uint8}
    assert not off_the_npu(known, 69)


@pytest.mark.parametrize("name", ["constant", "parameter", "turned parameter"])
def test_older_chips_multiply_by_constants_of_8_bits(name: str, tmp_path: Path) -> None:
    known = product(name, precision="w8a16", hardware="htp_v69")
    model = equal_everywhere(known, TOKENS[:1], tmp_path, npu_db=55, float_db=20)
    (node,) = [one for one in operations(model, "MatMul") if "matmul" in one.name or "einsum" in one.name][-1:]
    graph = QdqGraph(model)
    source = graph.source(node.input[1])
    assert source is not None
    assert graph.array(source.input[2]).dtype in (np.uint8, np.int8)
    assert not off_the_npu(known, 69)


@pytest.mark.parametrize("with_itself", [False, True])
def test_older_chips_multiply_by_inputs_of_8_bits_which_is_said(with_itself: bool) -> None:
    def found(precision: str) -> list[Any]:
        torch.manual_seed(0)
        made = Product(lambda m, x: m.other((x if with_itself else m.one(x)) @ turned(x) @ x))
        return off_the_npu(calibrated(made.eval(), call(TOKENS), precision=precision, hardware="htp_v69"), 69)

    assert [(one.module, one.kind) for one in found("w8a16")] == [
        ("matmul", FindingKind.WRONG_ON_NPU),
        ("matmul_1", FindingKind.WRONG_ON_NPU),
    ]
    assert not found("w8a8")


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
