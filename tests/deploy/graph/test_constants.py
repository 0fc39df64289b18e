"""What does not depend on the inputs is computed when the file is written, and stands on a grid."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import Tensor, nn

from lightning_quant.deploy.graph import constants
from lightning_quant.deploy.graph.constants import encode_constants, fold_constants
from lightning_quant.deploy.graph.files import write_onnx
from lightning_quant.deploy.graph.qdq import QdqGraph
from tests.helpers.networks import calibrated, call
from tests.helpers.qdq import NO_EMULATOR, QdqModel, computed, emulated, operations, values

needs_emulator = pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))
X = {"x": np.linspace(-1, 1, 2 * 4 * 6, dtype=np.float32).reshape(2, 4, 6)}
SHAPE = (2, 4, 6)


def taken_from_a_table() -> onnx.ModelProto:
    """Positions out of a table of weights, next to an input."""
    made = QdqModel(x=SHAPE)
    table = made.integers("table", np.arange(48, dtype=np.uint8).reshape(8, 6), 0.02)
    rows = made.node("Gather", [table, made.constant("rows", np.array([5, 0, 2, 7]))], "rows_of_it")
    made.node("Add", [made.pair("x", 0.01), rows], "y")
    made.pair("y", 0.02, output="out")
    return made.model(out=SHAPE)


def mask_by_size() -> onnx.ModelProto:
    """A mask that is written into zeros of the size of an input."""
    made = QdqModel(x=SHAPE)
    given = made.pair("x", 0.01)
    made.node("Shape", [given], "size")
    made.node("ConstantOfShape", ["size"], "zeros")
    at = made.constant("at", np.array([[0, 1], [1, 3]]))
    made.node("ScatterND", ["zeros", at, made.constant("low", np.full((2, 6), -100.0, np.float32))], "mask")
    made.node("Add", [given, "mask"], "y")
    made.pair("y", 0.4, 250, output="out")
    return made.model(out=SHAPE)


def number(operation: str, number: float) -> onnx.ModelProto:
    made = QdqModel(x=SHAPE)
    made.nodes.append(
        helper.make_node("Constant", [], ["number"], value=onnx.numpy_helper.from_array(np.float32(number), "number"))
    )
    made.node(operation, [made.pair("x", 0.01), "number"], "y")
    made.pair("y", 0.05, output="out")
    return made.model(out=SHAPE)


def test_weights_of_4_bits_that_are_rounded_in_the_graph_become_integers(tmp_path: Path) -> None:
    made = QdqModel(x=SHAPE)
    weight = made.constant("weight", np.linspace(-0.8, 0.7, 6, dtype=np.float32))
    grid = [made.constant("scale", np.float32(0.1)), made.constant("zero", np.array(0, ml_dtypes.int4))]
    rounded = made.node("QuantizeLinear", [weight, *grid], "rounded")
    made.node("Add", [made.pair("x", 0.01), made.node("DequantizeLinear", [rounded, *grid], "read")], "y")
    made.pair("y", 0.02, output="out")
    model = made.model(out=SHAPE)
    before = computed(model, tmp_path, **X)
    fold_constants(model)
    (stored,) = [one for one in model.graph.initializer if one.name == "rounded"]
    assert stored.data_type == onnx.TensorProto.INT4
    np.testing.assert_array_equal(computed(model, tmp_path, **X), before)


def test_rows_of_a_table_stay_on_its_grid(tmp_path: Path) -> None:
    model = taken_from_a_table()
    before = computed(model, tmp_path, **X)
    fold_constants(model)
    assert encode_constants(model) == {}
    np.testing.assert_array_equal(computed(model, tmp_path, **X), before)
    assert not operations(model, "Gather")
    assert "table_q" not in values(model)
    folded = values(model)["rows_of_it_q"]
    assert folded.dtype == np.uint8
    np.testing.assert_array_equal(folded, np.arange(48, dtype=np.uint8).reshape(8, 6)[[5, 0, 2, 7]])


def test_what_follows_from_sizes_is_known(tmp_path: Path) -> None:
    model = mask_by_size()
    before = computed(model, tmp_path, **X)
    gone = fold_constants(model)
    assert {"size", "zeros"} <= gone
    assert "mask" not in gone
    assert [node.op_type for node in model.graph.node] == [
        *("QuantizeLinear", "DequantizeLinear", "Add", "QuantizeLinear", "DequantizeLinear")
    ]
    (entry,) = encode_constants(model).values()
    assert entry["name"] == "mask"
    assert entry["scale"] == [pytest.approx(100 / 255)]
    assert entry["offset"] == [-255]
    np.testing.assert_allclose(computed(model, tmp_path, **X), before, atol=1e-5)


OPERATIONS = ("Add", "Sub", "Mul", "Div", "Max", "Min")
NUMBERS = [(operation, value) for operation in OPERATIONS for value in (1.0, -0.044715, 1e-6, 0.0)]


@pytest.mark.parametrize(("operation", "value"), [one for one in NUMBERS if one not in (("Div", 0.0), ("Div", 1e-6))])
def test_a_number_is_on_its_grid_exactly(tmp_path: Path, operation: str, value: float) -> None:
    model = number(operation, value)
    before = computed(model, tmp_path, **X)
    fold_constants(model)
    (entry,) = encode_constants(model).values()
    assert entry["bw"] == 8
    np.testing.assert_array_equal(computed(model, tmp_path, **X), before)
    assert all(len(node.input) < 2 or "_qdq" in node.input[1] for node in operations(model, operation))


@pytest.mark.parametrize("value", [1.0, -0.044715, 7.3, 1e-6, 1e6])
def test_the_grid_of_a_number_that_is_added_is_like_the_others(value: float) -> None:
    model = number("Add", value)
    other = values(model)[operations(model, "DequantizeLinear")[0].input[1]].item()
    fold_constants(model)
    (entry,) = encode_constants(model).values()
    (scale,) = entry["scale"]
    count = round(float(np.float32(abs(value))) / scale)
    assert count in 2 ** np.arange(8)  # divided exactly
    assert np.float32(abs(value)) == np.float32(scale) * np.float32(count)
    assert count in (1, 128) or 0.7 < scale / other < 1.5


def test_whole_numbers_are_on_their_grid_exactly(tmp_path: Path) -> None:
    model = number("Div", 1.0)
    (node,) = (node for node in model.graph.node if node.op_type == "Constant")
    node.attribute[0].t.CopyFrom(onnx.numpy_helper.from_array(np.float32([[1], [3], [64], [32]]), "number"))
    before = computed(model, tmp_path, **X)
    assert encode_constants(model)
    np.testing.assert_array_equal(computed(model, tmp_path, **X), before)


def test_encodings_follow() -> None:
    entries = [{"name": "kept"}, {"name": "folded"}]
    encodings = {"activation_encodings": entries, "param_encodings": [{"name": "table"}]}
    constants.update_encodings(
        encodings, {"folded", "table"}, {"kept": {"name": "kept", "bw": 4}, "new": {"name": "new"}}
    )
    assert encodings == {"activation_encodings": [{"name": "kept"}, {"name": "new"}], "param_encodings": []}


def test_what_is_drawn_is_not_a_constant() -> None:
    made = QdqModel(x=SHAPE)
    made.nodes.append(helper.make_node("RandomNormal", [], ["noise"], shape=list(SHAPE)))
    made.node("Add", ["x", "noise"], "out")
    model = made.model(out=SHAPE)
    assert fold_constants(model) == set()
    assert operations(model, "RandomNormal")


@needs_emulator
@pytest.mark.parametrize("make", [taken_from_a_table, mask_by_size, lambda: number("Add", 1.0)])
def test_the_npu_computes_it_in_integers(tmp_path: Path, make: object) -> None:
    assert callable(make)
    before, _ = emulated(make(), tmp_path / "before", **X)
    assert before.float_islands or before.layers["CPU"]
    model = make()
    fold_constants(model)
    encode_constants(model)
    report, (output,) = emulated(model, tmp_path / "after", **X)
    assert not report.float_islands
    assert not report.layers["CPU"]
    np.testing.assert_allclose(output, computed(model, tmp_path, **X)[0], atol=0.41)


class Sloped(nn.Module):
    """Scores with a bias that falls with the distance, as ALiBi has it: most of it lies between two integers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        places = torch.arange(16)
        self.register_buffer("bias", -(places[:, None] - places).abs() * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.first(x) @ x.transpose(1, 2)
        return (scores + self.bias).softmax(-1) @ x


@pytest.mark.parametrize("precision", ["w8a8", "w8a16"])
def test_constants_between_two_integers_are_rounded_as_in_the_simulation(tmp_path: Path, precision: str) -> None:
    torch.manual_seed(0)
    tokens = torch.randn(4, 16, 16)
    known = calibrated(Sloped().eval(), call(tokens), precision=precision)
    quantizer = known.network.get_submodule("add").input_quantizers[1]  # type: ignore[index]
    quantizer.set_range(-9.0, 2.0**quantizer.bitwidth - 1 - 9)  # steps of 1, and a zero point that is odd
    write_onnx(known, call(tokens[:1]), tmp_path / "float.onnx", tmp_path / "qdq.onnx")
    graph = QdqGraph(onnx.load(tmp_path / "qdq.onnx"))
    integers, scale, zero_point = (graph.array(name) for name in graph.producers["network.bias_qdq"].input)
    with torch.no_grad():
        simulated = quantizer(known.network.bias).numpy()
    np.testing.assert_array_equal((integers.astype(np.float64) - zero_point) * scale, simulated)
