"""One grid for one tensor: what AIMET writes more than once, and in scales that differ by a rounding."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from lightning_quant.deploy.bundle import Bundle
from lightning_quant.deploy.export import export_bundle
from lightning_quant.deploy.graph.shared_grids import share_grids, update_encodings
from lightning_quant.deploy.push import Push
from lightning_quant.deploy.samples import Samples
from lightning_quant.simulation import aimet
from tests.helpers.networks import calibrated, call, images
from tests.helpers.qdq import NO_EMULATOR, QdqModel, computed, emulated, operations, psnr, values

aimet.load()
needs_emulator = pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))
NEAR = np.float32(0.02) * (1 + 3e-6)
X = {"x": np.random.default_rng(0).normal(size=(1, 4, 8, 8)).astype(np.float32)}


def upsampled(after: float, *, again: float | None = None, zero_point: int = 128) -> onnx.ModelProto:
    """A sigmoid's product, resized; ``again``: the product is quantized once more, for an output."""
    made = QdqModel(x=(1, 4, 8, 8))
    x = made.pair("x", 0.03)
    product = made.node("Mul", [x, made.pair(made.node("Sigmoid", [x], "s"), 1 / 255, 0)], "m")
    if again is not None:
        made.pair(product, again, name="y2", output="y2")
    resized = made.node(
        "Resize", [made.pair(product, 0.02), "", made.constant("by", np.float32([1, 1, 2, 2]))], "r", mode="nearest"
    )
    made.pair(resized, after, zero_point, name="y", output="y")
    outputs = {"y": (1, 4, 16, 16)} | ({"y2": (1, 4, 8, 8)} if again is not None else {})
    return made.model(**outputs)


def test_what_only_hands_on_keeps_the_scale(tmp_path: Path) -> None:
    model = upsampled(NEAR)
    before = computed(model, tmp_path, **X)
    assert share_grids(model) == {"y": np.float32(0.02)}
    (resize,) = operations(model, "Resize")
    scales = {node.input[1] for node in model.graph.node if node.output[0] in ("m_q", "m_qdq", "y_q", "y")}
    assert scales == {"m_scale"}
    assert "y_scale" not in values(model)  # used by nothing
    (after,) = computed(model, tmp_path, **X)
    assert np.abs(before[0] - after).max() < 1e-4
    assert resize.input[0] == "m_qdq"
    assert share_grids(model) == {}


@pytest.mark.parametrize(
    "model",
    [upsampled(0.02), upsampled(0.02 * 1.001), upsampled(NEAR, zero_point=127)],
    ids=["equal", "far", "shifted"],
)
def test_other_grids_stay_as_they_are(model: onnx.ModelProto) -> None:
    before = model.SerializeToString()
    assert share_grids(model) == {}
    assert model.SerializeToString() == before


@pytest.mark.parametrize("again", [0.02, float(NEAR)])
def test_a_tensor_is_quantized_once(tmp_path: Path, again: float) -> None:
    model = upsampled(0.02, again=again)
    before = computed(model, tmp_path, **X)
    changed = share_grids(model)
    scale = np.float32(again)  # of the first one, which stays; the resize after it follows
    assert changed == ({"m": scale} if scale == np.float32(0.02) else {"m": scale, "y": scale})
    assert [node.input[0] for node in operations(model, "QuantizeLinear")].count("m") == 1
    after = computed(model, tmp_path, **X)
    for one, two in zip(before, after, strict=True):  # a value halfway between two steps may take the other one
        assert np.abs(one - two).max() < 0.021
        assert np.abs(one - two).mean() < 1e-3


def test_a_second_rounding_to_the_same_grid_is_left_out(tmp_path: Path) -> None:
    made = QdqModel(x=(1, 4, 8, 8))
    copied = made.node("Identity", [made.pair("x", 0.02)], "x_dup_0")
    made.node("Sigmoid", [made.pair(copied, float(NEAR))], "y")
    model = made.model(y=(1, 4, 8, 8))
    before = computed(model, tmp_path, **X)
    assert share_grids(model) == {"x_dup_0": np.float32(0.02)}
    assert [node.op_type for node in model.graph.node].count("QuantizeLinear") == 1
    assert np.abs(before[0] - computed(model, tmp_path, **X)[0]).max() < 1e-5


def test_all_that_a_concatenation_takes_gets_one_grid() -> None:
    made = QdqModel(x=(1, 4, 8, 8))
    x = made.pair("x", 0.02)
    pooled = made.pair(made.node("MaxPool", [x], "p", kernel_shape=[3, 3], pads=[1, 1, 1, 1]), float(NEAR))
    table = made.integers("t", np.zeros((1, 4, 8, 8), np.uint8), 0.02 * (1 - 3e-6))
    made.constants[-1].CopyFrom(onnx.numpy_helper.from_array(np.uint8(128), "t_zero_point"))
    made.pair(made.node("Concat", [pooled, x, table], "c", axis=1), 0.02 * (1 + 6e-6), output="y", name="y")
    model = made.model(y=(1, 12, 8, 8))
    assert share_grids(model) == dict.fromkeys(("p", "t", "y"), np.float32(0.02))
    scales = {node.input[1] for node in model.graph.node if node.op_type.endswith("Linear")}
    assert scales == {"x_scale"}


def moved(scale: float, zero_point: int) -> onnx.ModelProto:
    """A pooled and transposed tensor that is rounded to another grid, and joined with one of that grid."""
    made = QdqModel(x=(1, 4, 8, 8))
    x = made.pair("x", 0.02)
    pooled = made.node("MaxPool", [x], "p", kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    other = made.pair(made.node("Sigmoid", [x], "s"), scale, zero_point)
    turned = made.pair(made.node("Transpose", [pooled], "t", perm=[0, 1, 3, 2]), scale, zero_point)
    made.pair(made.node("Concat", [turned, other], "c", axis=1), scale, zero_point, name="y", output="y")
    return made.model(y=(1, 8, 8, 8))


OTHER_GRIDS = [(0.05, 128), (0.01, 128), (0.02, 100), (0.03, 3)]


@pytest.mark.parametrize(("scale", "zero_point"), OTHER_GRIDS)
def test_what_hands_on_to_another_grid_is_followed_by_a_conversion(
    tmp_path: Path, scale: float, zero_point: int
) -> None:
    model = moved(scale, zero_point)
    before = computed(model, tmp_path, **X)
    assert share_grids(model) == {}
    behind = {node.input[0]: list(node.input[1:]) for node in operations(model, "QuantizeLinear")}
    assert behind["t"] == behind["x"]
    np.testing.assert_array_equal(computed(model, tmp_path, **X), before)


def test_encodings_follow() -> None:
    encodings = {
        "activation_encodings": [{"name": "m", "scale": [1.0], "offset": [-3]}, {"name": "n", "scale": [1.0]}],
        "param_encodings": [{"name": "t", "scale": [1.0]}],
    }
    update_encodings(encodings, {"m": 0.5, "t": 0.25, "gone": 2.0})
    assert encodings["activation_encodings"] == [
        {"name": "m", "scale": [0.5], "offset": [-3]},
        {"name": "n", "scale": [1.0]},
    ]
    assert encodings["param_encodings"] == [{"name": "t", "scale": [0.25]}]


@needs_emulator
@pytest.mark.parametrize("model", [upsampled(float(NEAR)), upsampled(0.02, again=0.02)], ids=["resize", "twice"])
def test_the_npu_computes_integers_only_then(tmp_path: Path, model: onnx.ModelProto) -> None:
    before, _ = emulated(model, tmp_path / "before", **X)
    assert before.float_islands != []
    share_grids(model)
    after, outputs = emulated(model, tmp_path / "after", **X)
    assert (after.float_islands, after.fallen_back) == ([], {})
    for expected, actual in zip(computed(model, tmp_path, **X), outputs, strict=True):
        assert psnr(expected, actual) > 40


@needs_emulator
@pytest.mark.parametrize(("scale", "zero_point"), OTHER_GRIDS)
def test_the_npu_converts_from_one_grid_to_another(tmp_path: Path, scale: float, zero_point: int) -> None:
    """ONNX Runtime would round once instead of twice, to a grid of neither, and the NPU transpose in float."""
    model = moved(scale, zero_point)
    share_grids(model)
    report, (output,) = emulated(model, tmp_path / "npu", **X)
    assert (report.float_islands, report.fallen_back) == ([], {})
    steps = np.abs(output - computed(model, tmp_path, **X)[0]) / scale
    assert steps.max() < 1.5
    assert (steps > 0.5).mean() < 0.02


class Pyramid(nn.Module):
    """One tensor goes into a pool, a concatenation and a resize, as in detectors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate = nn.Conv2d(3, 8, 3, padding=1), nn.Sigmoid()
        self.pool, self.up, self.head = nn.MaxPool2d(5, 1, 2), nn.Upsample(scale_factor=2), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x * self.gate(x)
        return self.head(self.up(torch.cat([x, self.pool(x)], 1)))


def exported(path: Path) -> tuple[Bundle, Samples]:
    """With ranges of its own at the resize, a rounding away from those before it."""
    torch.manual_seed(0)
    made = calibrated(Pyramid(), call(images(8)))
    made.network.up.output_quantizers[0] = copy.deepcopy(made.network.up.output_quantizers[0])
    with torch.no_grad():
        for end in made.network.up.output_quantizers[0].parameters():
            end.mul_(1 + 1e-6)
    calls = [call(images(1, seed=seed)) for seed in (1, 2)]
    bundle = export_bundle(made, path, calls)
    return bundle, Samples.of(made, bundle.manifest, calls)


def test_both_files_of_a_bundle_say_the_same(tmp_path: Path) -> None:
    bundle, _ = exported(tmp_path / "net")
    model = onnx.load(bundle.qdq)
    constants = values(model)
    written = {
        node.output[0].removesuffix("_q"): constants[node.input[1]] for node in operations(model, "QuantizeLinear")
    }
    encodings = json.loads((bundle.aimet / "model.encodings").read_text())["activation_encodings"]
    scales = {entry["name"]: entry["scale"][0] for entry in encodings}
    assert {name: np.float32(scales[name]) for name in written} == written
    (resize,) = operations(onnx.load(bundle.aimet / "model.onnx"), "Resize")
    assert scales[resize.input[0]] == scales[resize.output[0]]


@needs_emulator
def test_no_float_island_at_a_resize_of_another_last_digit(tmp_path: Path) -> None:
    bundle, samples = exported(tmp_path / "net")
    (measured,) = Push("htp_emulator", ["SM8650"], 60, {}).run(bundle, samples)
    assert (measured.report.float_islands, measured.report.fallen_back) == ([], {})
    assert measured.report.against_simulation is not None
    assert measured.report.against_simulation.psnr_db > 40
