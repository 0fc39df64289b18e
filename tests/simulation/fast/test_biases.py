"""Biases against an integer reference of their own, and against the integers in the exported file."""

from __future__ import annotations

import copy
import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import Tensor, nn
from torchvision.models import mobilenet_v3_small, resnet18

from lightning_quant.deploy.export import export_bundle
from lightning_quant.simulation.callsites.attributes import ROUNDED_BY
from lightning_quant.simulation.fast import biases, gpu, layers
from lightning_quant.simulation.fast.biases import rounded_bias
from tests.helpers.networks import calibrated, call, images, seeded


def reference(bias: np.ndarray, of_input: tuple[float, ...], of_weight: tuple[np.ndarray, ...]) -> np.ndarray:
    """The bias as integers of 32 bits in units of both scales; a range is its ends, its steps and its least scale."""
    scales = []
    for low, high, steps, smallest in (of_input, of_weight):
        width = np.float32(high) - np.float32(low)
        scales.append(np.maximum(np.abs(width / np.float32(steps)), np.float32(smallest)).astype(np.float64))
    scale = np.resize(scales[0] * scales[1], bias.shape)  # groups have the same scales
    integers = np.array([round(value) for value in bias.astype(np.float64) / scale], np.int64)  # half to even
    return integers.astype(np.float32) * scale.astype(np.float32)


numbers = st.floats(-100, 100, width=32)


@given(
    bias=st.lists(numbers, min_size=6, max_size=6),
    of_input=st.tuples(st.floats(-8, 0, width=32), st.floats(0, 8, width=32), st.sampled_from([15, 255, 65535])),
    of_weight=st.lists(st.floats(0, 2, width=32), min_size=6, max_size=6),
    channels=st.sampled_from([1, 3, 6]),
    weight_steps=st.sampled_from([14, 15, 254, 255]),
)
@settings(max_examples=200, deadline=None)
def test_a_bias_is_integers_of_both_scales(
    bias: list[float], of_input: tuple[float, float, int], of_weight: list[float], channels: int, weight_steps: int
) -> None:
    low, high, steps = of_input
    high_of_weight = np.array(of_weight[:channels], np.float32)
    expected = reference(
        np.array(bias, np.float32), (low, high, steps, 1e-8), (-high_of_weight, high_of_weight, weight_steps, 1e-8)
    )
    arguments = (
        torch.tensor(bias), torch.tensor(low), torch.tensor(high),
        *(torch.from_numpy(one).reshape(-1, 1, 1, 1) for one in (-high_of_weight, high_of_weight)),
        float(steps), 1e-8, float(weight_steps), 1e-8,
    )  # fmt: skip
    assert np.array_equal(biases.round_bias(*arguments).numpy(), expected)
    assert np.array_equal(biases._Rounded.apply(*arguments).numpy(), expected)  # in graphs
    if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
        arguments[0].requires_grad_()
        rounded = gpu.round_bias(*arguments)
        assert np.array_equal(rounded.detach().numpy(), expected)
        rounded.sum().backward()
        assert torch.equal(arguments[0].grad, torch.ones(len(bias)))  # straight through


def test_biases_are_rounded_once_where_weights_are_cached_until_something_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = calibrated(seeded(Layers()))
    counted: list[Any] = []
    monkeypatch.setattr(layers, "rounded_bias", lambda layer: counted.append(layer) or rounded_bias(layer))
    conv = made.network.get_submodule("conv")
    of_input = conv.__dict__[ROUNDED_BY]

    def rounded_again(change: Tensor | None) -> int:
        if change is not None:
            change.mul_(1.25)
        before, fresh = len(counted), copy.deepcopy(made)
        assert torch.equal(made(images()), fresh(images()))
        return sum(layer is conv for layer in counted[before:])

    with torch.no_grad(), made.cached_weights():
        made(images())
        assert rounded_again(None) == 0
        for change in (conv.bias, of_input.max, conv.param_quantizers["weight"].max):
            assert rounded_again(change) == 1, change
        assert rounded_again(None) == 0
    assert not torch.equal(rounded_bias(conv), conv.bias)


class Layers(nn.Module):
    """Each kind of layer that has a bias, and ways to its input: a dropout, a reshape, a pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Dropout()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.grouped = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2)
        self.weight = nn.Parameter(torch.empty(5, 4, 1, 1))
        self.bias = nn.Parameter(torch.empty(5))
        self.pool = nn.MaxPool2d(4)
        self.line = nn.Conv1d(5, 4, 1)
        self.linear = nn.Linear(16, 3)
        self.tokens = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(self.grouped(self.conv(self.first(x)).relu()), self.weight, self.bias)
        x = self.line(self.pool(x).flatten(2))
        return self.tokens(self.linear(x.permute(0, 2, 1).reshape(len(x), 4, -1)))


def integers_of_file(path: Path) -> dict[str, np.ndarray]:
    """The biases in an exported file as numbers, by the name of the parameter."""
    graph = onnx.load(path).graph
    constants = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    found = {}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and "bias" in node.input[0] and node.input[0] in constants:
            values, scale = constants[node.input[0]], constants[node.input[1]]
            assert values.dtype == np.int32
            found[node.input[0].removesuffix("_q").removeprefix("network.")] = values.astype(np.float32) * scale
    return found


@pytest.mark.parametrize("precision", ["w8a8", "w8a16", "w4a16"])
def test_the_simulation_adds_the_integers_of_the_file(precision: str, tmp_path: Path) -> None:
    network = calibrated(seeded(Layers()), precision=precision)
    modules = dict(network.network.named_modules())
    with torch.no_grad():
        network(images())  # which hands the functional convolution its bias
        in_simulation = {name: rounded_bias(modules[name]) for name in modules if ROUNDED_BY in vars(modules[name])}
    in_file = integers_of_file(export_bundle(network, tmp_path / "bundle", [call(images())]).qdq)
    assert in_simulation.keys() == {"conv", "grouped", "conv2d", "line", "linear", "tokens"}
    assert len(in_file) == len(in_simulation)
    for name, bias in in_simulation.items():
        assert bias is not None
        of_module = modules[name].bias
        assert not torch.equal(bias, of_module)
        assert any(np.array_equal(bias.numpy(), other.ravel()) for other in in_file.values()), name


@pytest.mark.parametrize("make", [mobilenet_v3_small, resnet18])
def test_the_file_computes_what_the_simulation_computes(make: Any, tmp_path: Path) -> None:
    """To the bit; on another processor a value on the border between two integers may fall the other way."""
    photos = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    network = calibrated(seeded(make(num_classes=7).eval()), call(photos))
    calls = [call(photo[None]) for photo in photos]
    parities = [export_bundle(network, tmp_path / "bundle", [one]).manifest.parity.psnr_db for one in calls]
    assert parities.count(math.inf) >= 2, parities


def test_the_gradient_passes_straight_through() -> None:
    network = calibrated(nn.Sequential(nn.Conv2d(3, 4, 3)))
    layer = network.network[0]
    layer.bias.grad = None
    rounded = rounded_bias(layer)
    assert rounded is not None
    rounded.backward(torch.arange(4.0))
    assert torch.equal(layer.bias.grad, torch.arange(4.0))
    assert all(end.grad is None for end in layer.param_quantizers["weight"].parameters())
    (first,) = torch.autograd.grad(rounded_bias(layer).square().sum(), layer.bias, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), layer.bias)
    assert torch.equal(second, torch.full((4,), 2.0))


class Twice(nn.Module):
    """One layer for inputs of two grids."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x) * 50)


def test_a_bias_without_one_unit_is_left_as_it_is() -> None:
    of_two_grids = calibrated(Twice()).network.conv
    assert rounded_bias(of_two_grids) is of_two_grids.bias
    without_bias = calibrated(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False))).network[0]
    assert rounded_bias(without_bias) is None


def test_a_copy_goes_by_its_own_ranges() -> None:
    torch.manual_seed(0)
    network = calibrated(nn.Sequential(nn.Conv2d(3, 4, 3))).network
    other = copy.deepcopy(network)
    with torch.no_grad():
        for end in other[0].input_quantizers[0].parameters():
            end.mul_(1000)
    assert not torch.equal(rounded_bias(network[0]), rounded_bias(other[0]))
    distances = (rounded_bias(network[0]) - network[0].bias).abs()
    assert distances.max() < 1e-3 * network[0].bias.abs().max()
