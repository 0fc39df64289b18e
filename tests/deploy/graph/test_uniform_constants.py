"""Constants of one value, which the NPU's compiler gets wrong where they are added or joined last."""

from __future__ import annotations

import copy
import json
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.deploy.blame.file import compare_file
from lightning_quant.deploy.export import export_bundle
from tests.helpers.members import in_turn
from tests.helpers.networks import calibrated, call
from tests.helpers.qdq import NO_EMULATOR, computed, emulated, equal_everywhere, operations, psnr, values

PRECISIONS = ["w8a8", "w8a16", "w4a8", "w4a16"]
CHANNELS = 6
IMAGES, TOKENS = (1, CHANNELS, 10, 14), (1, 12, CHANNELS)


class Around(nn.Module):
    """A convolution or a linear layer, and a function of what it computes."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], of_tokens: bool = False) -> None:
        super().__init__()
        self.function = function
        self.first: nn.Module = nn.Linear(CHANNELS, CHANNELS) if of_tokens else nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.number, self.zeros = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1, CHANNELS, 1, 1))
        self.pad = nn.ConstantPad2d((0, 1, 2, 0), -9.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.first(x))


class LearnedAffine(nn.Module):
    """As HGNetV2 scales and shifts what goes into a concatenation, before it has learned to."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(4))
        self.scale, self.bias = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))
        for layer in self.layers:
            assert isinstance(layer, nn.Conv2d)
            layer.weight.data.mul_(2.0)

    def forward(self, x: Tensor) -> Tensor:
        found = [x * 1.0]
        for layer in self.layers:
            found.append(self.scale * layer(found[-1]).relu() + self.bias)
        return torch.cat(found, 1)


def ones_like(x: Tensor, axis: int) -> Tensor:
    shape = list(x.shape)
    shape[axis] = 1
    return torch.ones(shape)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "a number added": (lambda: Around(lambda m, y: y + 1.0), IMAGES),
    "a small number added": (lambda: Around(lambda m, y: 0.01 + y.relu()), IMAGES),
    "a learned number added": (lambda: Around(lambda m, y: (y.relu() + m.number) * (y + m.number)), IMAGES),
    "a number added to tokens": (lambda: Around(lambda m, y: y - 1.0 + y, of_tokens=True), TOKENS),
    "a number added to a product of tokens": (
        lambda: Around(lambda m, y: (F.elu(y) + 1) @ y.sigmoid().transpose(1, 2), of_tokens=True),
        TOKENS,
    ),
    "a small number added to a product of tokens": (
        lambda: Around(lambda m, y: (y.relu() + 0.3) @ y.transpose(1, 2), of_tokens=True),
        TOKENS,
    ),
    "learned affine": (LearnedAffine, IMAGES),
    "zeros added": (lambda: Around(lambda m, y: torch.cat([y.relu() + m.zeros, y * 9.0], 1)), IMAGES),
    "ones behind features": (lambda: Around(lambda m, y: torch.cat([y, ones_like(y, 2)], 2), True), TOKENS),
    "ones behind channels": (lambda: Around(lambda m, y: torch.cat([y, ones_like(y, 1)], 1)), IMAGES),
    "ones behind columns, moved": (
        lambda: Around(lambda m, y: torch.cat([y, ones_like(y, 3)], 3).transpose(2, 3).flatten(2)),
        IMAGES,
    ),
    "ones behind both": (
        lambda: Around(lambda m, y: torch.cat([torch.cat([y, ones_like(y, 1)], 1), ones_like(y, 1)], 1)),
        IMAGES,
    ),
    "zeros behind channels": (lambda: Around(lambda m, y: torch.cat([y, 0 * ones_like(y, 1)], 1)), IMAGES),
    "padded channels": (lambda: Around(lambda m, y: F.pad(y, (0, 0, 0, 0, 1, 2), value=0.5)), IMAGES),
    "padded features": (lambda: Around(lambda m, y: F.pad(y, (0, 3), value=1.0), of_tokens=True), TOKENS),
    "padded beyond the range": (lambda: Around(lambda m, y: F.pad(y, (2, 1, 1, 0), "constant", 20.0)), IMAGES),
    "padded by a module": (lambda: Around(lambda m, y: m.pad(y)), IMAGES),
    "padded input": (lambda: nn.Sequential(nn.ConstantPad2d(1, 5.0), nn.Conv2d(CHANNELS, 4, 3)), IMAGES),
}


@pytest.mark.parametrize(("name", "precision"), in_turn(NETWORKS, PRECISIONS))
def test_the_file_and_the_npu_compute_what_the_simulation_does(tmp_path: Path, name: str, precision: str) -> None:
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    network, samples = make().eval(), torch.randn(16, *shape[1:])
    float_network, given = copy.deepcopy(network), samples[:1]
    known = calibrated(network, call(samples), precision=precision)
    bundle = export_bundle(known, tmp_path / "net", [call(given)])
    # sums of two numbers on one grid lie between two integers of a grid of twice the step, and are rounded either way
    assert bundle.manifest.parity.psnr_db > (45 if precision.endswith("a8") else 90)
    model, in_float = onnx.load(bundle.qdq), onnx.load(bundle.aimet / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    with torch.no_grad():
        expected, exact = known(given), float_network(given)
    assert psnr(exact.numpy(), expected.numpy()) > 12
    inputs = {model.graph.input[0].name: given.numpy()}
    (output,) = computed(in_float, tmp_path, **inputs)
    assert psnr(exact.numpy(), output) > (35 if precision.startswith("w4") else 50)  # its weights are rounded
    encodings = json.loads((bundle.aimet / "model.encodings").read_text())["activation_encodings"]
    names = [entry["name"] for entry in encodings]
    tensors = {one for node in in_float.graph.node for one in (*node.input, *node.output)}
    assert len(names) == len({*names})
    assert {*names} <= tensors
    if "number" in name and precision.endswith("a16"):
        assert not operations(model, "Add") or name.endswith("tokens")
    assert not compare_file(known, model, list(inputs), [call(given)]).guilty
    if NO_EMULATOR is None:
        report, (output,) = emulated(model, tmp_path / "npu", **inputs)
        assert not report.float_islands
        assert not report.layers["CPU"]
        assert psnr(expected.numpy(), output) > (40 if precision.endswith("a8") else 60)


@pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))
@pytest.mark.parametrize("number", [0.01, 1.5, 10.0, -40.0])
@pytest.mark.parametrize("function", [operator.add, operator.sub, lambda x, number: number - x])
def test_a_number_of_any_size_costs_one_step(tmp_path: Path, function: Any, number: float) -> None:
    torch.manual_seed(0)
    samples = torch.randn(16, *IMAGES[1:])
    network = calibrated(Around(lambda m, y: function(y, number)), call(samples))
    bundle = export_bundle(network, tmp_path / "net", [call(samples[:1])])
    model = onnx.load(bundle.qdq)
    _, (output,) = emulated(model, tmp_path / "npu", **{model.graph.input[0].name: samples[:1].numpy()})
    step = values(model)[operations(model, "QuantizeLinear")[-1].input[1]]
    with torch.no_grad():
        difference = (network(samples[:1]) - torch.from_numpy(output)).abs() / step
    assert float(difference.max()) < 1.5
    assert float((difference > 0.5).float().mean()) < 0.1


NARROW: dict[str, tuple[Callable[[Any, Tensor], Tensor], bool]] = {
    "a number": (lambda m, y: (y * 0.1 + 1.0) - 1.0, False),
    "a number on tokens": (lambda m, y: (y * 0.02 + 1.0) - 1.0, True),
    "a learned number": (lambda m, y: (y * 0.1 + m.number) - m.number, False),
    "added": (lambda m, y: 1.0 + (y * 0.1 - 1.0), False),
    "exponentials": (lambda m, y: torch.expm1(y * 0.05), False),
    "probabilities": (lambda m, y: torch.sigmoid(y * 0.1) - 0.5, True),
    "a gate": (lambda m, y: y * (torch.sigmoid(y * 0.2) - 0.5), False),
}


@pytest.mark.parametrize(("name", "precision"), in_turn(NARROW, ["w8a16", "w4a16"]))
def test_sums_of_a_finer_grid_than_their_operands(tmp_path: Path, name: str, precision: str) -> None:
    """All of such a sum was wrong on the NPU with 16 bits, where a number of its own was added."""
    torch.manual_seed(0)
    function, of_tokens = NARROW[name]
    samples = torch.randn(16, *(TOKENS if of_tokens else IMAGES)[1:])
    known = calibrated(Around(function, of_tokens).eval(), call(samples), precision=precision)
    equal_everywhere(known, samples[:1], tmp_path, npu_db=55, file_db=75)


@pytest.mark.parametrize("value", [-torch.inf, -1e9, torch.finfo(torch.float32).min])
def test_padding_for_a_maximum_costs_no_range(value: float) -> None:
    torch.manual_seed(0)
    network = Around(lambda m, y: F.max_pool2d(F.pad(y, (1, 1, 1, 1), value=value), 3)).eval()
    float_network, samples = copy.deepcopy(network), torch.randn(4, *IMAGES[1:])
    known = calibrated(network, call(samples))
    assert "pad" in dict(known.network.named_modules())
    with torch.no_grad():
        assert psnr(float_network(samples).numpy(), known(samples).numpy()) > 40
