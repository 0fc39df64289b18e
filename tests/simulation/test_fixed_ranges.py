"""Sigmoid and tanh of 16 bits: on the grid that the NPU's provider writes, whatever calibration and training see."""

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
from lightning_quant.precision import Precision
from lightning_quant.simulation import aimet
from lightning_quant.simulation.calibrate import calibrate
from lightning_quant.simulation.calibration_cache import StatisticsCache
from lightning_quant.simulation.fixed_ranges import fixed_range
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.precisions import set_precisions
from tests.helpers.networks import calibrated, call, images, quantized, seeded
from tests.helpers.qdq import NO_EMULATOR, computed, emulated, psnr

aimet.load()
needs_emulator = pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))
# scale and zero point that the provider's public source has
GRIDS = {"Sigmoid": (2.0**-16, 0), "Tanh": (2.0**-15, 32768)}


class Recurrent(nn.Module):
    """The outputs of a recurrent layer as an image."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.layer = kind(64, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(2))[0].unflatten(2, (2, 4))  # type: ignore[no-any-return]


class Behind(nn.Module):
    """A function of the outputs of a convolution, and a convolution behind it."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.function = nn.Conv2d(3, 8, 3, padding=1), function
        with torch.no_grad():
            channels = function(self.first(images(2))).shape[1]
        self.head = nn.Conv2d(channels, 4, 1)
        seeded(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.first(x)))  # type: ignore[no-any-return]


FUNCTIONS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "nn.Sigmoid": nn.Sigmoid,
    "nn.Tanh": nn.Tanh,
    "torch.sigmoid": lambda: torch.sigmoid,
    "x.tanh": lambda: lambda x: x.tanh(),
    "SiLU": nn.SiLU,
    "F.silu": lambda: F.silu,
    "mish": lambda: F.mish,
    "gated": lambda: lambda x: F.glu(x, 1),
    "squeeze and excite": lambda: lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
    "max pool": lambda: lambda x: F.max_pool2d(x.sigmoid(), 2),
    "resize": lambda: lambda x: F.interpolate(x.tanh(), scale_factor=2.0, mode="bilinear"),
    "two sigmoids": lambda: lambda x: torch.cat([x.sigmoid(), x.flip(1).neg().sigmoid()], 1),
}


def grids(model: onnx.ModelProto) -> list[tuple[str, float, int]]:
    """Each Sigmoid and Tanh with scale and zero point of its output."""
    graph = QdqGraph(model)
    found = []
    for node in model.graph.node:
        for taker in graph.consumers[node.output[0]] if node.op_type in GRIDS else ():
            scale, zero_point = (graph.array(name).item() for name in taker.input[1:])
            found.append((node.op_type, scale, zero_point))
    return found


def file_of(network: QuantizedNetwork, folder: Path) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    files = write_onnx(network, call(images()), folder / "float.onnx", folder / "qdq.onnx")
    return onnx.load(folder / "qdq.onnx"), {files.input_names[0]: images(1, seed=9).numpy()}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_form_has_the_grid_of_the_npu(name: str, tmp_path: Path) -> None:
    network = calibrated(Behind(FUNCTIONS[name]()).eval(), call(images(8)), precision="w8a16")
    model, feeds = file_of(network, tmp_path)
    found = grids(model)
    assert found
    assert found == [(kind, *GRIDS[kind]) for kind, _, _ in found]
    (output,) = computed(model, tmp_path, **feeds)
    assert psnr(network(images(1, seed=9)).detach().numpy(), output) > 75


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_gates_of_recurrent_layers_too(kind: Any, tmp_path: Path) -> None:
    network = calibrated(Recurrent(kind).eval(), call(images(8)), precision="w8a16")
    found = grids(file_of(network, tmp_path)[0])
    assert len(found) > 8
    assert found == [(name, *GRIDS[name]) for name, _, _ in found]


def test_integers_of_a_sigmoid() -> None:
    """Against numbers of 64 bits: the integer is the rounded multiple of 2⁻¹⁶, at most 65535."""
    network = calibrated(Behind(torch.sigmoid).eval(), call(20 * images(8)), precision="w8a16")
    captured: list[Tensor] = []
    module: Any = next(one for one in network.network.modules() if isinstance(one, nn.Sigmoid))
    module.register_forward_hook(lambda _, given, made: captured.extend((given[0], made)))
    with torch.no_grad():
        network(20 * images(8))  # up to one
    given, made = (one.double().numpy() for one in captured)
    expected = np.minimum(np.rint(65536 / (1 + np.exp(-given))), 65535).astype(np.int64)
    difference = np.abs((made * 65536).astype(np.int64) - expected)
    assert np.array_equal(made * 65536, np.rint(made * 65536))
    assert difference.max() <= 1  # a sigmoid of 32 bits falls to the other side of a border here and there
    assert (difference > 0).mean() < 0.01
    assert expected.max() == 65535


def test_with_8_bits_it_is_the_range_of_the_hardware_config(tmp_path: Path) -> None:
    network = calibrated(Behind(torch.sigmoid).eval(), call(images(8)))
    ((_, scale, zero_point),) = grids(file_of(network, tmp_path)[0])
    assert (scale, zero_point) == (pytest.approx(1 / 255), 0)


def test_beside_other_values_it_has_the_range_of_all(tmp_path: Path) -> None:
    network = calibrated(Behind(lambda x: torch.cat([x, x.sigmoid()], 1)).eval(), call(images(8)), precision="w8a16")
    ((_, scale, _),) = grids(file_of(network, tmp_path)[0])
    assert scale > 2 * 2.0**-16
    module: Any = next(one for one in network.network.modules() if isinstance(one, nn.Sigmoid))
    assert fixed_range(module.output_quantizers[0]) is None


@pytest.mark.parametrize("function", [torch.sigmoid, FUNCTIONS["resize"]()], ids=["sigmoid", "resize"])
def test_bits_that_change_bring_their_range(function: Any, tmp_path: Path) -> None:
    """Raised by mixed precision, lowered by an override, restored."""
    network = calibrated(Behind(function).eval(), call(images(8)))
    before = network.snapshot()
    (kind,) = {name for name, _, _ in grids(file_of(network, tmp_path)[0])}
    set_precisions(network, {"head": Precision(8, 16)})
    calibrate(network, [call(images(8))])
    raised = network.snapshot()
    assert grids(file_of(network, tmp_path)[0]) == [(kind, *GRIDS[kind])]
    network.restore(before)
    for name, value in network.snapshot().items():
        assert not isinstance(value, Tensor) or torch.equal(value, before[name])
    network.restore(raised)
    assert grids(file_of(network, tmp_path)[0]) == [(kind, *GRIDS[kind])]
    lowered = quantized(Behind(function).eval(), precision="w8a16", overrides={"*": "w8a8"}).eval()
    calibrate(lowered, [call(images(8))])
    assert grids(file_of(lowered, tmp_path)[0])[0][1] > 1e-3


def test_a_checkpoint_from_before_gets_the_grid_of_the_npu() -> None:
    network = calibrated(Behind(torch.sigmoid).eval(), call(images(8)), precision="w8a16")
    state = network.snapshot()
    (name,) = (name for name in state if name.endswith("sigmoid.output_quantizers.0.max"))
    network.restore(state | {name: torch.tensor(1.0)})
    assert float(network.network.state_dict()[name]) == 1 - 2.0**-16


@pytest.mark.parametrize("precision", ["w8a8", "w8a16"])
def test_training_learns_no_fixed_range(precision: str) -> None:
    network = calibrated(Behind(FUNCTIONS["resize"]()).eval(), call(images(8)), precision=precision)
    network.learn_ranges(True)
    (fixed,) = {one.output_quantizers[0] for one in network.network.modules() if isinstance(one, nn.Tanh)}
    learned = {parameter.requires_grad for parameter in fixed.parameters()}
    assert learned == {precision == "w8a8"}
    set_precisions(network, {"head": Precision(8, 16)})
    calibrate(network, [call(images(8))])
    network.learn_ranges(True)
    assert {parameter.requires_grad for parameter in fixed.parameters()} == {False}
    network.train()
    network(images(8)).sum().backward()
    assert all(parameter.grad is None for parameter in fixed.parameters() if precision == "w8a16")


def test_precisions_that_observe_other_tensors_share_no_statistics(tmp_path: Path) -> None:
    cache = StatisticsCache(tmp_path)
    for precision in ("w8a16", "w8a8"):
        network = quantized(Behind(FUNCTIONS["resize"]()).eval(), precision=precision).eval()
        calibrate(network, [call(images(8))], cache=cache)
        alone = calibrated(Behind(FUNCTIONS["resize"]()).eval(), call(images(8)), precision=precision)
        expected = alone.network.state_dict()
        for name, value in network.network.state_dict().items():
            assert not isinstance(value, Tensor) or torch.equal(value, expected[name]), name


@needs_emulator
@pytest.mark.parametrize("name", ["nn.Sigmoid", "nn.Tanh", "max pool", "resize"])
def test_the_npu_agrees(name: str, tmp_path: Path) -> None:
    network = calibrated(Behind(FUNCTIONS[name]()).eval(), call(images(8)), precision="w8a16")
    model, feeds = file_of(network, tmp_path)
    report, (output,) = emulated(model, tmp_path / "emulated", **feeds)
    assert not report.float_islands
    assert psnr(network(images(1, seed=9)).detach().numpy(), output) > 80
