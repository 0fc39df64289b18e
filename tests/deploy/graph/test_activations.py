"""A ReLU whose output shares a range with values below zero."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from lightning_quant.deploy.graph.activations import part_activations, update_encodings
from lightning_quant.deploy.graph.constants import encode_constants
from lightning_quant.deploy.graph.files import write_onnx
from lightning_quant.simulation import aimet
from tests.helpers.networks import calibrated, call, images, seeded
from tests.helpers.qdq import NO_EMULATOR, QdqModel, computed, emulated, operations, psnr

aimet.load()
needs_emulator = pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))
X = {"x": np.random.default_rng(0).normal(size=(1, 4, 8, 8)).astype(np.float32)}


def beside_values_below_zero(
    activation: str, zero_point: int = 128, limits: tuple[float, float] = (0.0, 6.0), rounded: bool = False
) -> onnx.ModelProto:
    """A convolution and its activation, concatenated with the input; numbers up to 3.81."""
    made = QdqModel(x=(1, 4, 8, 8))
    given = made.pair("x", 0.03, zero_point)
    weight = made.integers("weight", np.random.default_rng(1).integers(-127, 128, (4, 4, 3, 3), np.int8), 0.004)
    bias = made.integers("bias", np.arange(4, dtype=np.int32) * 100, 0.03 * 0.004)
    made.node("Conv", [given, weight, bias], "conv", pads=[1, 1, 1, 1])
    ends = [made.constant(name, np.float32(end)) for name, end in zip(("low", "high"), limits, strict=True)]
    taken = made.pair("conv", 0.03, zero_point) if rounded else "conv"
    made.node(activation, [taken, *ends] if activation == "Clip" else [taken], "act")
    made.node("Concat", [made.pair("act", 0.03, zero_point), given], "cat", axis=1)
    made.pair("cat", 0.03, zero_point, output="out")
    return made.model(out=(1, 8, 8, 8))


@pytest.mark.parametrize("activation", ["Relu", "Clip"])
def test_rounding_and_cutting_off_change_places(tmp_path: Path, activation: str) -> None:
    model = beside_values_below_zero(activation, 128)
    before = computed(model, tmp_path, **X)
    assert part_activations(model) == {"conv": "act"}
    np.testing.assert_array_equal(computed(model, tmp_path, **X), before)
    (node,) = operations(model, "Relu")  # 6 is beyond the grid
    assert node.input[0] == "conv_qdq"


def test_one_that_is_computed_with_the_convolution_stays() -> None:
    model = beside_values_below_zero("Relu", 0)
    assert part_activations(model) == {}
    assert operations(model, "Relu")[0].input[0] == "conv"


def test_a_limit_that_is_computed_stays() -> None:
    model = beside_values_below_zero("Clip", limits=(-1.0, 6.0), rounded=True)
    (clip,) = operations(model, "Clip")
    clip.input[1] = "lowest"
    place = list(model.graph.node).index(clip)
    model.graph.node.insert(place, onnx.helper.make_node("ReduceMin", ["x_qdq"], ["lowest"], keepdims=0))
    part_activations(model)
    (clip,) = operations(model, "Clip")
    assert list(clip.input[1:]) == ["lowest", "high"]


def test_encodings_follow() -> None:
    encodings = {"activation_encodings": [{"name": "act", "scale": [0.03]}, {"name": "other"}], "param_encodings": []}
    update_encodings(encodings, {"conv": "act"})
    assert encodings["activation_encodings"][2] == {"name": "conv", "scale": [0.03]}


@needs_emulator
@pytest.mark.parametrize("activation", ["Relu", "Clip"])
def test_the_npu_computes_it_in_integers(tmp_path: Path, activation: str) -> None:
    model = beside_values_below_zero(activation, 128)
    before, _ = emulated(model, tmp_path / "before", **X)
    assert before.float_islands or before.layers["CPU"]
    part_activations(model)
    encode_constants(model)
    report, (output,) = emulated(model, tmp_path / "after", **X)
    assert not report.float_islands
    assert not report.layers["CPU"]
    np.testing.assert_allclose(output, computed(model, tmp_path, **X)[0], atol=0.031)


@needs_emulator
@pytest.mark.parametrize(
    ("limits", "operation"), [((-1.0, 6.0), "Max"), ((-6.0, 1.0), "Min"), ((0.0, 6.0), "Relu"), ((-1.0, 1.0), "Clip")]
)
def test_a_limit_beyond_the_grid_does_not_lose_the_other(
    tmp_path: Path, limits: tuple[float, float], operation: str
) -> None:
    model = beside_values_below_zero("Clip", limits=limits, rounded=True)
    before = computed(model, tmp_path, **X)[0]
    _, (lost,) = emulated(model, tmp_path / "before", **X)
    assert (np.abs(lost - before).max() > 0.5) == (operation != "Clip"), "the compiler was mended: write Clip again"
    assert part_activations(model) == {}
    encode_constants(model)
    assert operations(model, operation)
    _, (output,) = emulated(model, tmp_path / "after", **X)
    np.testing.assert_allclose(output, before, atol=0.031)


class Clipped(nn.Module):
    """Values between two limits beside others, with which they share a range."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.limits = low, high
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(16, 4, 1)
        seeded(self)

    def forward(self, x: Tensor) -> Tensor:
        x = 5 * x
        return self.head(torch.cat([self.first(x).clamp(*self.limits), self.second(x)], 1))


@needs_emulator
@pytest.mark.parametrize(
    ("limits", "precision", "written"),
    [
        ((0.0, 6.0), "w8a8", ["Clip"]),
        ((0.0, 6.0), "w8a16", ["Relu", "Min"]),
        ((-1.0, 2.0), "w8a16", ["Max", "Min"]),
        ((0.5, 100.0), "w8a8", ["Max"]),
        ((-100.0, 2.0), "w4a16", ["Min"]),
    ],
)
def test_what_a_clip_cuts_off_stays_cut_off(
    tmp_path: Path, limits: tuple[float, float], precision: str, written: list[str]
) -> None:
    network = calibrated(Clipped(*limits), call(images(8)), precision=precision)
    files = write_onnx(network, call(images(1)), tmp_path / "float.onnx", tmp_path / "qdq.onnx")
    model = onnx.load(tmp_path / "qdq.onnx")
    kinds = ("Relu", "Max", "Min", "Clip")
    assert [node.op_type for node in model.graph.node if node.op_type in kinds] == written
    given = images(1, seed=9)
    expected = network(given).detach().numpy()
    feeds = {files.input_names[0]: given.numpy()}
    assert psnr(expected, computed(model, tmp_path, **feeds)[0]) > 60
    report, (output,) = emulated(model, tmp_path / "emulated", **feeds)
    assert not report.float_islands
    assert psnr(expected, output) > (40 if precision == "w8a8" else 55)
