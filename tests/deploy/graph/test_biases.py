"""Biases in the scale of the hardware, where AIMET loses track of the input's."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.deploy.bundle import Bundle
from lightning_quant.deploy.export import export_bundle
from lightning_quant.deploy.graph import files as module
from lightning_quant.deploy.graph.biases import rescale_biases
from lightning_quant.deploy.push import Push
from lightning_quant.deploy.samples import Samples
from lightning_quant.simulation.network import QuantizedNetwork
from tests.helpers.networks import calibrated, call, images
from tests.helpers.qdq import NO_EMULATOR, QdqModel, computed, emulated, operations, psnr, values

needs_emulator = pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))


class Padded(nn.Module):
    """Pads by a functional operation, as networks ported from TensorFlow do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2)
        self.second = nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.pad(F.relu6(self.first(F.pad(x, (0, 1, 0, 1)))), (1, 1, 1, 1)))


@pytest.fixture
def padded() -> QuantizedNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return calibrated(Padded(), call(images(8)))


SAMPLES = [call(images(1, seed=seed)) for seed in (1, 2, 3)]


def scales(model: onnx.ModelProto) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Scales of input, weight and bias of every convolution."""
    producers = {output: node for node in model.graph.node for output in node.output}
    constants = values(model)
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    return [tuple(constants[producers[name].input[1]] for name in node.input) for node in convolutions]  # type: ignore[misc]


def biases(model: onnx.ModelProto) -> list[np.ndarray]:
    constants = values(model)
    nodes = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and "bias" in node.name]
    return [constants[node.input[0]].astype(np.float64) * constants[node.input[1]] for node in nodes]


def test_scale_of_a_bias_is_that_of_input_times_weight(
    padded: QuantizedNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = onnx.load(export_bundle(padded, tmp_path / "net", SAMPLES).qdq)
    assert len(scales(fixed)) == 2
    for of_input, of_weight, of_bias in scales(fixed):
        np.testing.assert_allclose(of_bias, of_input * of_weight, rtol=1e-6)
    monkeypatch.setattr(module.biases, "rescale_biases", lambda model, biases: {})
    plain = onnx.load(export_bundle(padded, tmp_path / "plain", SAMPLES).qdq)
    assert any(not np.allclose(b, i * w, rtol=1e-3) for i, w, b in scales(plain))  # else there is nothing to do here
    for (of_input, of_weight, _), mine, theirs in zip(scales(fixed), biases(fixed), biases(plain), strict=True):
        assert np.abs(mine - theirs).max() <= (of_input * of_weight).max() / 2 * 1.001
    floats = {name: value.detach().numpy() for name, value in padded.sim.model.named_parameters()}
    assert rescale_biases(plain, floats) == {}  # no weight needed another scale
    assert plain.SerializeToString() == fixed.SerializeToString()


@pytest.fixture
def dead() -> QuantizedNetwork:
    """A network with channels of all but zero weights, as training with weight decay leaves them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    with torch.no_grad():
        for channel, bias in ((1, -5.5), (2, 3.0)):
            network[0].weight[channel] = 1e-12
            network[0].bias[channel] = bias
    return calibrated(network, call(images(8)))


@pytest.mark.parametrize("precision", ["w8a8", "w4a16"])
def test_a_bias_that_overflows_gets_room(dead: QuantizedNetwork, tmp_path: Path, precision: str) -> None:
    if precision != "w8a8":
        dead = calibrated(nn.Sequential(*copy.deepcopy(dead.float_network)), call(images(8)), precision=precision)  # type: ignore[arg-type]
    bundle = export_bundle(dead, tmp_path / "net", SAMPLES)
    model = onnx.load(bundle.qdq)
    constants = values(model)
    (first, *_) = [name for name in constants if name.endswith("bias_q")]
    assert np.abs(constants[first].astype(np.int64)).max() <= 2**30
    for of_input, of_weight, of_bias in scales(model):
        np.testing.assert_allclose(of_bias, of_input * of_weight, rtol=1e-6)
    (scale, *_) = [constants[name] for name in constants if name.endswith("weight_scale")]
    encodings = json.loads((bundle.aimet / "model.encodings").read_text())["param_encodings"]
    (entry,) = [entry for entry in encodings if entry["name"] + "_q" == first.replace("bias", "weight")]
    np.testing.assert_allclose(entry["scale"], scale, rtol=1e-6)


@needs_emulator
def test_the_npu_does_not_overflow(dead: QuantizedNetwork, tmp_path: Path) -> None:
    bundle = export_bundle(dead, tmp_path / "net", SAMPLES)
    (measured,) = Push("htp_emulator", ["SM8650"], 60, {}).run(bundle, Samples.of(dead, bundle.manifest, SAMPLES))
    assert measured.report.against_simulation is not None
    assert measured.report.against_simulation.psnr_db > 45


@needs_emulator
def test_the_npu_computes_what_the_simulation_does_behind_padding(padded: QuantizedNetwork, tmp_path: Path) -> None:
    bundle = export_bundle(padded, tmp_path / "net", SAMPLES)
    (measured,) = Push("htp_emulator", ["SM8650"], 60, {}).run(bundle, Samples.of(padded, bundle.manifest, SAMPLES))
    assert measured.report.against_simulation is not None
    assert measured.report.against_simulation.psnr_db > 45  # with AIMET's scales it is 1


class Attention(nn.Module):
    """Linear layers on three axes behind reshapes, as every transformer has them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(16), nn.Linear(16, 48)
        self.softmax, self.out, self.last = nn.Softmax(-1), nn.Linear(16, 16), nn.Linear(16, 16)
        nn.init.zeros_(self.last.bias)  # equal to that of the norm: the exporter writes one for both

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).reshape(-1, 6, 3, 2, 8).permute(2, 0, 3, 1, 4)
        x = torch.matmul(self.softmax(torch.matmul(q, k.transpose(-2, -1)) * 8**-0.5), v)
        return self.last(self.out(x.transpose(1, 2).reshape(-1, 6, 16)))


class OneBias(nn.Module):
    """Two layers that share a bias; it has another scale in each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.second = nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)
        self.second.bias = self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.relu(self.first(x)))


def transformed(network: type[nn.Module], path: Path) -> tuple[onnx.ModelProto, Bundle, Samples]:
    calls = [call(torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(seed))) for seed in (1, 2)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = calibrated(network(), call(torch.randn(8, 6, 16)))
    bundle = export_bundle(made, path, calls)
    return onnx.load(bundle.qdq), bundle, Samples.of(made, bundle.manifest, calls)


@pytest.mark.parametrize(("network", "linears"), [(Attention, 3), (OneBias, 2)])
def test_linear_layers_on_three_axes(tmp_path: Path, network: type[nn.Module], linears: int) -> None:
    model, _, _ = transformed(network, tmp_path / "net")
    producers = {output: node for node in model.graph.node for output in node.output}
    constants = values(model)
    sums = [node for node in operations(model, "Add") if any("MatMul" in name for name in node.input)]
    assert len(sums) == linears
    owned = []
    for node in sums:
        (bias,) = [producers[name] for name in node.input if "MatMul" not in name]
        (product,) = [producers[name] for name in node.input if "MatMul" in name]
        of_input, of_weight = (constants[producers[name].input[1]] for name in product.input)
        assert of_weight.shape == constants[bias.input[1]].shape == constants[bias.input[2]].shape
        np.testing.assert_allclose(constants[bias.input[1]], of_input * of_weight, rtol=1e-6)
        assert [attribute.i for attribute in bias.attribute] == [0]
        owned += [bias.output[0], *bias.input]
    for norm in operations(model, "LayerNormalization"):
        bias = producers[norm.input[2]]
        assert constants[bias.input[1]].shape == ()
        owned += [bias.output[0], *bias.input]
    assert len(owned) == len(set(owned))


@needs_emulator
@pytest.mark.parametrize("network", [Attention, OneBias])
def test_the_npu_computes_linear_layers_on_three_axes(tmp_path: Path, network: type[nn.Module]) -> None:
    _, bundle, samples = transformed(network, tmp_path / "net")
    (measured,) = Push("htp_emulator", ["SM8650"], 60, {}).run(bundle, samples)
    assert (measured.report.float_islands, measured.report.fallen_back) == ([], {})
    assert measured.report.against_simulation is not None
    assert measured.report.against_simulation.psnr_db > 38  # with AIMET's scales below 0


X = {"x": np.random.default_rng(0).normal(size=(1, 6, 16)).astype(np.float32)}
BIAS = np.random.default_rng(1).normal(size=16).astype(np.float32)


def one_for_all(*, reshaped: bool = False) -> onnx.ModelProto:
    """Two linear layers and a norm that take one and the same bias of AIMET's finest scale."""
    generator = np.random.default_rng(2)
    made = QdqModel(x=(1, 6, 16))
    tensor = made.pair("x", 0.03)
    finest = np.abs(BIAS).max() / (2**31 - 1)
    bias = made.integers("b", np.rint(BIAS / finest).astype(np.int32), finest)
    if reshaped:
        bias = made.node("Reshape", [bias, made.constant("shape", np.int64([1, 1, 16]))], "b_reshaped")
    for name in ("one", "two"):
        integers = generator.integers(-127, 128, (16, 16)).astype(np.int8)
        weight = made.integers(f"w_{name}", integers, generator.uniform(0.001, 0.003, 16), axis=1)
        added = made.node("Add", [made.node("MatMul", [tensor, weight], f"p_{name}"), bias], f"a_{name}")
        if name == "one":
            gain = made.integers("g", np.full(16, 255, np.uint8), 1 / 255)
            flat = bias if not reshaped else "b_qdq"
            normed = made.node("LayerNormalization", [made.pair(added, 0.03), gain, flat], "n", axis=-1)
            tensor = made.pair(normed, 0.03)
        else:
            made.pair(added, 0.03, name="y", output="y")
    return made.model(y=(1, 6, 16))


@pytest.mark.parametrize("reshaped", [False, True])
@pytest.mark.parametrize("known", [{"b": BIAS}, {}])
def test_each_operation_has_a_bias_of_its_own(tmp_path: Path, known: dict[str, np.ndarray], reshaped: bool) -> None:
    model = one_for_all(reshaped=reshaped)
    (before,) = computed(model, tmp_path, **X)
    assert rescale_biases(model, known) == {}
    constants = values(model)
    integers = {name for name, value in constants.items() if value.dtype == np.int32 and not name.endswith("point")}
    biased = [node for node in operations(model, "DequantizeLinear") if node.input[0] in integers]
    assert len({name for node in biased for name in node.input}) == 9
    assert sorted(constants[node.input[1]].shape for node in biased) == [(), (16,), (16,)]
    (after,) = computed(model, tmp_path, **X)
    assert np.abs(before - after).max() <= 0.0301  # one step of the output at most
    once = model.SerializeToString()
    assert rescale_biases(model, known) == {}
    assert model.SerializeToString() == once


@needs_emulator
def test_the_npu_takes_biases_that_were_one(tmp_path: Path) -> None:
    model = one_for_all()
    report, (wrong,) = emulated(model, tmp_path / "before", **X)
    (expected,) = computed(model, tmp_path, **X)
    assert psnr(expected, wrong) < 20  # ONNX Runtime and the NPU read the same file otherwise
    rescale_biases(model, {"b": BIAS})
    report, (actual,) = emulated(model, tmp_path / "after", **X)
    assert (report.float_islands, report.fallen_back) == ([], {})
    assert psnr(*computed(model, tmp_path, **X), actual) > 40


def test_a_weight_that_two_layers_take_is_made_room_for_both(tmp_path: Path) -> None:
    made = QdqModel(x=(1, 6, 16))
    weight = made.integers("w", np.full((16, 16), 100, np.int8), np.full(16, 1e-14), axis=1)
    tensor = made.pair("x", 0.03)
    for name in ("one", "two"):
        bias = made.integers(f"b_{name}", np.full(16, 2**31 - 1, np.int32), 1e-9)
        made.node("Add", [bias, made.node("MatMul", [tensor, weight], f"p_{name}")], f"y_{name}")
    model = made.model(y_one=(1, 6, 16), y_two=(1, 6, 16))
    coarser = rescale_biases(model, {"b_one": np.full(16, 5.0, np.float32), "b_two": np.full(16, -3.0, np.float32)})
    constants = values(model)
    np.testing.assert_allclose(coarser["w"], constants["w_scale"])
    np.testing.assert_allclose(constants["w_scale"], 5 / (0.03 * 2**30), rtol=1e-5)
    assert np.abs(constants["b_one_q"].astype(np.int64)).max() <= 2**30
    for scale in ("b_one_scale", "b_two_scale"):
        np.testing.assert_allclose(constants[scale], 0.03 * constants["w_scale"], rtol=1e-6)
    one, two = computed(model, tmp_path, **X)
    np.testing.assert_allclose(one, 5, rtol=1e-4)
    np.testing.assert_allclose(two, -3, rtol=1e-4)


def test_a_transposed_convolution_in_groups(tmp_path: Path) -> None:
    made = QdqModel(x=(1, 4, 4, 4))
    weight = made.integers("w", np.full((4, 3, 2, 2), 50, np.int8), [0.01, 0.02, 0.03], axis=1)  # of each group
    bias = made.integers("b", np.arange(6, dtype=np.int32) * 10**8, 1e-8)
    made.pair(
        made.node("ConvTranspose", [made.pair("x", 0.05), weight, bias], "c", group=2), 0.05, name="y", output="y"
    )
    model = made.model(y=(1, 6, 5, 5))
    x = np.random.default_rng(0).normal(size=(1, 4, 4, 4)).astype(np.float32)
    (before,) = computed(model, tmp_path, x=x)
    assert rescale_biases(model, {}) == {}
    np.testing.assert_allclose(values(model)["b_scale"], 0.05 * np.array([0.01, 0.02, 0.03] * 2), rtol=1e-6)
    assert np.abs(before - computed(model, tmp_path, x=x)[0]).max() <= 0.0501


def test_one_scale_for_the_bias_of_a_norm() -> None:
    made = QdqModel(x=(1, 6, 16))
    bias = made.integers("b", np.arange(16, dtype=np.int32), np.linspace(0.1, 1, 16), axis=0)
    gain = made.integers("g", np.full(16, 255, np.uint8), 1 / 255)
    made.node("LayerNormalization", [made.pair("x", 0.03), gain, bias], "y", axis=-1)
    model = made.model(y=(1, 6, 16))
    rescale_biases(model, {})
    scale, integers = values(model)["b_scale"], values(model)["b_q"]
    assert scale.shape == values(model)["b_zero_point"].shape == ()
    np.testing.assert_allclose(integers * scale, np.arange(16) * np.linspace(0.1, 1, 16), atol=1e-6)


def test_a_sum_that_is_not_a_linear_layer_stays_as_it_is() -> None:
    made = QdqModel(x=(1, 6, 16))
    x = made.pair("x", 0.03)
    along = made.integers("w", np.full((16, 16), 9, np.int8), np.linspace(0.1, 1, 16), axis=0)  # summed over
    bias = made.integers("b", np.arange(16, dtype=np.int32), 0.1)
    made.node("Add", [made.node("MatMul", [x, along], "p"), bias], "a")
    made.node("Add", [x, made.integers("c", np.arange(16, dtype=np.int32), 0.1)], "d")
    made.node("Add", ["a", "d"], "y")
    model = made.model(y=(1, 6, 16))
    before = model.SerializeToString()
    assert rescale_biases(model, {}) == {}
    assert model.SerializeToString() == before
