"""Which tensors are rounded: once behind what the hardware computes as one operation."""

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
from lightning_quant.simulation import aimet
from lightning_quant.simulation.calibrate import uncalibrated
from lightning_quant.simulation.network import QuantizedNetwork
from tests.helpers.networks import calibrated, call, images, quantized, seeded
from tests.helpers.qdq import NO_EMULATOR, computed, emulated, psnr

aimet.load()
needs_emulator = pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "ReLU": nn.ReLU(),
    "ReLU in place": nn.ReLU(inplace=True),
    "ReLU6": nn.ReLU6(),
    "Hardtanh": nn.Hardtanh(-1.0, 2.0),
    "F.relu": F.relu,
    "F.relu6": F.relu6,
    "F.hardtanh": lambda x: F.hardtanh(x, -1.0, 2.0),
    "torch.clamp": lambda x: torch.clamp(x, -1.0, 2.0),
    "x.clamp": lambda x: x.clamp(0.5, 2.0),
    "x.clamp(min)": lambda x: x.clamp(min=-0.5),
    "x.clamp(max)": lambda x: x.clamp(max=0.5),
}


class Before(nn.Module):
    """An operation and what is behind it, between two convolutions."""

    def __init__(self, operation: Any, behind: Callable[[Tensor], Tensor], last: bool = False) -> None:
        super().__init__()
        self.first, self.operation, self.head = nn.Conv2d(3, 8, 3, padding=1), operation, nn.Conv2d(8, 4, 1)
        self.behind, self.last = behind, last
        seeded(self)
        with torch.no_grad():
            self.first.weight.mul_(5)

    def forward(self, x: Tensor) -> Any:
        x = self.behind(self.operation(self.first(x)))
        return x if self.last else self.head(x)


class Product(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, x.transpose(2, 3))


class Sum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.flip(1)


class Twice(nn.Module):
    """A layer whose weights two calls use, with an activation behind each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu6(self.conv(x)))


OPERATIONS: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: nn.Conv2d(8, 8, 3, padding=1),
    "depthwise": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8),
    "transposed": lambda: nn.ConvTranspose2d(8, 8, 1),
    "linear": lambda: nn.Linear(8, 8),
    "matmul": Product,
    "sum": Sum,
    "twice": Twice,
}


def roundings_before_activations(network: QuantizedNetwork) -> list[Any]:
    """The quantizer of what goes into each activation, ``None`` where it is not rounded."""
    graph: Any = network.sim.connected_graph
    found = []
    for op in graph.ordered_ops:
        if isinstance(network.sim._get_qmodule(op), (nn.ReLU, nn.ReLU6, nn.Hardtanh)):
            found += list(network.sim._get_qmodule(op.inputs[0].producer).output_quantizers)
    return found


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_activation_behind_a_depthwise_convolution_has_the_only_rounding(activation: str) -> None:
    network = quantized(Before(OPERATIONS["depthwise"](), ACTIVATIONS[activation]).eval(), call(images()))
    assert roundings_before_activations(network) == [None]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("last", [False, True], ids=["inside", "last"])
def test_a_clip_has_the_only_rounding_behind(operation: str, last: bool) -> None:
    network = quantized(Before(OPERATIONS[operation](), nn.ReLU6(), last).eval(), call(images()))
    found = roundings_before_activations(network)
    assert found == [None] * len(found)
    assert len(found) == (2 if operation == "twice" else 1)


class TwoUsers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(0.0, 2.0) + x


@pytest.mark.parametrize(
    ("behind", "last"),
    [
        (TwoUsers(), False),
        (lambda x: (F.relu6(x), x), True),
        (lambda x: (F.relu(x), x), True),  # of which AIMET's own configuration leaves out the rounding
        (lambda x: (F.relu6(x), x.flatten(1)), True),
    ],
    ids=["two users", "returned", "returned before a ReLU", "returned as a view"],
)
@pytest.mark.parametrize("operation", ["convolution", "depthwise"])
def test_what_something_else_reads_is_rounded(behind: Any, last: bool, operation: str) -> None:
    network = calibrated(Before(OPERATIONS[operation](), behind, last).eval(), call(images(8)))
    (found,) = network.network.operation.output_quantizers
    assert found is not None
    assert found.is_initialized()


def test_limits_that_are_tensors_are_no_part_of_the_operation_before() -> None:
    limits = torch.tensor(-0.5), torch.tensor(0.5)
    network = quantized(Before(OPERATIONS["depthwise"](), lambda x: torch.clamp(x, *limits)).eval(), call(images()))
    assert network.network.operation.output_quantizers[0] is not None


def test_a_processor_without_a_hardware_config_keeps_its_own_rules() -> None:
    network = quantized(Before(OPERATIONS["depthwise"](), F.relu6).eval(), call(images()), hardware="default")
    assert roundings_before_activations(network) != [None]


def integers(quantizer: Any, values: np.ndarray) -> np.ndarray:
    scale, offset = (float(one().detach()) for one in (quantizer.get_scale, quantizer.get_offset))
    found = np.clip(np.rint(values.astype(np.float64) / scale) - offset, quantizer.qmin, quantizer.qmax)
    return found.astype(np.int64)


@pytest.mark.parametrize("precision", ["w8a8", "w4a8", "w8a16", "w4a16"])
@pytest.mark.parametrize(("low", "high"), [(0.0, 6.0), (-1.0, 2.0)])
def test_integers_are_summed_clipped_and_rounded_once(precision: str, low: float, high: float) -> None:
    """A depthwise convolution as integer hardware computes it, with 64 bits: no rounding before the clip."""
    made = Before(OPERATIONS["depthwise"](), lambda x: x.clamp(low, high), last=True)
    network = calibrated(made.eval(), call(images(8)), precision=precision)
    layer: Any = network.network.operation
    first: Any = network.network.first.output_quantizers[0]
    graph: Any = network.sim.connected_graph
    last: Any = network.sim._get_qmodule(graph.ordered_ops[-1]).output_quantizers[0]
    captured = []
    layer.register_forward_pre_hook(lambda _, given: captured.append(given[0]))
    with torch.no_grad():
        output = network(images(8)).numpy()
        x = integers(first, captured[0].numpy()) + round(float(first.get_offset()))
        of_weight = layer.param_quantizers["weight"]
        scale = of_weight.get_scale().double().numpy().reshape(-1)
        unit = float(first.get_scale()) * scale
        weight = np.rint(layer.weight.double().numpy() / scale.reshape(-1, 1, 1, 1))
        bias = np.rint(layer.bias.double().numpy() / unit).astype(np.int64)
    weight = np.clip(weight, of_weight.qmin, of_weight.qmax).astype(np.int64)
    sums = np.zeros(x.shape, np.int64) + bias.reshape(-1, 1, 1)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    for row in range(3):
        for column in range(3):
            sums += padded[:, :, row : row + 8, column : column + 8] * weight[:, 0, row, column].reshape(-1, 1, 1)
    expected = integers(last, np.clip(sums * unit.reshape(-1, 1, 1), low, high))
    difference = np.abs(integers(last, output) - expected)
    assert difference.max() <= 1  # sums of floats fall to the other side of a border here and there
    assert (difference > 0).mean() < (0.002 if precision.endswith("a8") else 0.03)


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "sum"])
@pytest.mark.parametrize("activation", ["ReLU", "ReLU6", "Hardtanh", "x.clamp"])
@pytest.mark.parametrize("precision", ["w8a8", "w4a16"])
def test_the_file_rounds_to_one_grid_around_an_activation(
    operation: str, activation: str, precision: str, tmp_path: Path
) -> None:
    """AIMET writes the grid of a Clip's output before the Clip as well, which changes no number."""
    made = Before(OPERATIONS[operation](), ACTIVATIONS[activation]).eval()
    network = calibrated(made, call(images(8)), precision=precision)
    files = write_onnx(network, call(images()), tmp_path / "float.onnx", tmp_path / "qdq.onnx")
    model = onnx.load(tmp_path / "qdq.onnx")
    graph = QdqGraph(model)
    for node in model.graph.node:
        source = graph.producers.get(node.input[0]) if node.op_type in ("Relu", "Clip", "Max", "Min") else None
        if source is None or source.op_type != "DequantizeLinear":
            continue
        (behind,) = graph.consumers[node.output[0]]
        assert [graph.array(name) for name in source.input[1:]] == [graph.array(name) for name in behind.input[1:]]
    given = images(1, seed=9)
    (output,) = computed(model, tmp_path, **{files.input_names[0]: given.numpy()})
    assert psnr(network(given).detach().numpy(), output) > 55


@needs_emulator
@pytest.mark.parametrize(("precision", "least"), [("w8a8", 47), ("w8a16", 75), ("w4a16", 50)])
def test_the_npu_computes_what_the_simulation_computes(precision: str, least: float, tmp_path: Path) -> None:
    layers: list[nn.Module] = []
    for channels in (3, 8):
        layers += [nn.Conv2d(channels, 8, 1), nn.ReLU6(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU6()]
    made: Any = seeded(nn.Sequential(*layers, nn.Conv2d(8, 4, 1)))
    with torch.no_grad():
        made[0].weight.mul_(6)  # values beyond 6
    network = calibrated(made.eval(), call(images(8)), precision=precision)
    files = write_onnx(network, call(images()), tmp_path / "float.onnx", tmp_path / "qdq.onnx")
    given = images(1, seed=9)
    feeds = {files.input_names[0]: given.numpy()}
    report, (output,) = emulated(onnx.load(tmp_path / "qdq.onnx"), tmp_path / "emulated", **feeds)
    assert not report.float_islands
    assert psnr(network(given).detach().numpy(), output) > least


NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "y + 1.0": lambda y: y + 1.0,
    "1.0 + y": lambda y: 1.0 + y,
    "1.0 - y": lambda y: 1.0 - y,
    "y.sub_(1)": lambda y: y.sub_(1),
    "torch.add(y, other=1.5)": lambda y: torch.add(y, other=1.5),
    "sum": lambda y: torch.as_tensor(sum([y, y.relu()])),
    "(y + 3) / 6": lambda y: y * F.relu6(y + 3) / 6,
    "1 / (y + 2)": lambda y: 1 / (y.abs() + 2),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_have_no_quantizer_that_no_sample_reaches(name: str) -> None:
    network = calibrated(Before(nn.Identity(), NUMBERS[name]))
    assert uncalibrated(network) == []


def test_a_tensor_that_is_added_keeps_its_quantizer() -> None:
    offset = torch.randn(8, 1, 1, generator=torch.Generator().manual_seed(0))
    network = calibrated(Before(nn.Identity(), lambda y: y + offset))
    assert any("add.input_quantizers.1" in name for name, _ in network.named_modules())
