"""Products with numbers that the NPU's compiler does not end with, or computes wrongly, are written otherwise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from lightning_quant.deploy.graph.files import write_onnx
from lightning_quant.deploy.graph.qdq import QdqGraph
from tests.helpers.networks import calibrated, call, images, seeded
from tests.helpers.qdq import NO_EMULATOR, emulated, operations, psnr

needs_emulator = pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))


class Fusion(nn.Module):
    """Two feature maps by learned weights that add up to one, as in a BiFPN."""

    def __init__(self, weights: list[float]) -> None:
        super().__init__()
        self.first, self.second, self.behind = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
        self.weights = nn.Parameter(torch.tensor(weights))
        seeded(self)
        self.weights.data = torch.tensor(weights)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.weights.relu()
        weights = weights / (weights.sum() + 1e-4)
        return self.behind((weights[0] * self.first(x) + self.second(x) * weights[1]).relu())


def test_scales_of_a_product_are_not_above_that_of_its_output(tmp_path: Path) -> None:
    for index in range(12):
        network = calibrated(Fusion([1.0, 1.0 + index / 7]).eval(), precision="w8a16")
        write_onnx(network, call(images(1)), tmp_path / "float.onnx", tmp_path / "qdq.onnx")
        graph = QdqGraph(onnx.load(tmp_path / "qdq.onnx"))
        products = operations(graph.model, "Mul")
        assert len(products) == 2
        for product in products:
            scales = [np.float32(graph.array(graph.producers[name].input[1])) for name in product.input]
            (taker,) = graph.consumers[product.output[0]]
            assert np.float32(scales[0] * scales[1]) <= np.float32(graph.array(taker.input[1]))


@needs_emulator
@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.4, 0.7]])
def test_weighted_feature_maps_compile_with_16_bits(tmp_path: Path, weights: list[float]) -> None:
    network = calibrated(Fusion(weights).eval(), precision="w8a16")
    write_onnx(network, call(images(1)), tmp_path / "float.onnx", tmp_path / "qdq.onnx")
    _, (output,) = emulated(onnx.load(tmp_path / "qdq.onnx"), tmp_path / "device", x=images(1).numpy())
    assert psnr(network.network(images(1)).detach().numpy(), output) > 65


class Joined(nn.Module):
    """Features, and what a layer makes of them times a number, in one tensor: the number is not computed."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.first, self.second, self.behind = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(16, 8, 1)
        seeded(self)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        features = self.first(x).relu()
        return self.behind(torch.cat([features, self.second(features) * self.factor], 1))


def test_numbers_of_the_code_keep_a_product_within_the_scale_of_its_output(tmp_path: Path) -> None:
    moved = 0
    for factor in (7.2, 8.6, 13.0, 16.3):
        network = calibrated(Joined(factor).eval(), precision="w8a16")
        write_onnx(network, call(images(1)), tmp_path / "float.onnx", tmp_path / "qdq.onnx")
        graph = QdqGraph(onnx.load(tmp_path / "qdq.onnx"))
        (product,) = operations(graph.model, "Mul")
        scales = [np.float32(graph.array(graph.producers[name].input[1])) for name in product.input]
        (taker,) = graph.consumers[product.output[0]]
        assert np.float32(scales[0] * scales[1]) <= np.float32(graph.array(taker.input[1]))
        moved += int(scales[1] != np.float32(factor))
        assert scales[1] == pytest.approx(factor, rel=1e-6)
    assert moved  # else nothing was tested


@needs_emulator
def test_features_times_a_number_join_with_16_bits(tmp_path: Path) -> None:
    for factor in (7.2, 16.3):
        network = calibrated(Joined(factor).eval(), precision="w8a16")
        write_onnx(network, call(images(1)), tmp_path / "float.onnx", tmp_path / "qdq.onnx")
        _, (output,) = emulated(onnx.load(tmp_path / "qdq.onnx"), tmp_path / f"{factor}", x=images(1).numpy())
        assert psnr(network.network(images(1)).detach().numpy(), output) > 50


class Scores(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.conv, self.factor = nn.Conv2d(3, 8, 3), factor

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv(x) * self.factor).log_softmax(1)


@needs_emulator
@pytest.mark.parametrize("precision", ["w8a8", "w8a16"])
def test_scores_times_a_number_in_front_of_a_log_softmax(tmp_path: Path, precision: str) -> None:
    torch.manual_seed(0)
    network = calibrated(Scores(3.0).eval(), precision=precision)
    write_onnx(network, call(images(1)), tmp_path / "float.onnx", tmp_path / "qdq.onnx")
    for file in ("float.onnx", "qdq.onnx"):
        model = onnx.load(tmp_path / file)
        assert not operations(model, "Mul")
        assert len(operations(model, "Div")) == 1
    _, (output,) = emulated(onnx.load(tmp_path / "qdq.onnx"), tmp_path / "device", x=images(1).numpy())
    assert psnr(network.network(images(1)).detach().numpy(), output) > 40


class Clipped(nn.Module):
    """A layer times a number, within bounds: between them the grids of both differ by rounding errors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.behind = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.behind((self.first(x) * 0.01).clamp(-0.99, 0.99))


def test_a_product_is_within_the_scale_behind_a_clip(tmp_path: Path) -> None:
    different = 0
    for seed in range(6):
        torch.manual_seed(seed)
        tokens = torch.randn(4, 12, 16)
        network = calibrated(Clipped().eval(), call(tokens), precision="w8a16")
        write_onnx(network, call(tokens[:1]), tmp_path / "float.onnx", tmp_path / "qdq.onnx")
        model = onnx.load(tmp_path / "qdq.onnx")
        graph = QdqGraph(model)
        (product,) = operations(model, "Mul")
        one, other = (np.float32(graph.array(graph.producers[name].input[1])) for name in product.input)
        grids = [np.float32(graph.array(node.input[1])) for node in operations(model, "QuantizeLinear")]
        near = [scale for scale in grids if np.isclose(scale, one * other, rtol=1e-5, atol=0)]
        different += len({*near}) > 1
        assert one * other <= min(near)
        if NO_EMULATOR is None and (seed == 0 or len({*near}) > 1):
            name = model.graph.input[0].name
            _, (output,) = emulated(model, tmp_path / f"device{seed}", **{name: tokens[:1].numpy()})
            with torch.no_grad():
                assert psnr(network(tokens[:1]).numpy(), output) > 65
    assert different  # else nothing was tested
