"""Layers that the NPU computes wrongly or refuses are others in the file, which compute the same on it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.deploy.blame.file import compare_file
from lightning_quant.deploy.graph.files import write_onnx
from lightning_quant.deploy.graph.qdq import QdqGraph
from lightning_quant.simulation import aimet
from lightning_quant.simulation.network import QuantizedNetwork
from tests.helpers.members import in_turn
from tests.helpers.networks import calibrated, call, seeded
from tests.helpers.qdq import NO_EMULATOR, computed, emulated, operations, psnr, values

aimet.load()
needs_emulator = pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))
PRECISIONS = ["w8a8", "w8a16", "w4a8", "w4a16"]
CHANNELS = 6


def trained(norm: Any) -> Any:
    """Statistics whose deviations span two powers of ten: one scale for all factors would lose the small ones."""
    generator = torch.Generator().manual_seed(3)
    norm.running_mean.copy_(torch.randn(CHANNELS, generator=generator))
    norm.running_var.copy_(10 ** (4 * torch.rand(CHANNELS, generator=generator) - 2))
    if norm.affine:
        norm.weight.data.copy_(torch.randn(CHANNELS, generator=generator))
        norm.bias.data.copy_(torch.randn(CHANNELS, generator=generator))
    return norm


def silenced() -> nn.Module:
    """What training with weight decay leaves: channels that are constant, or all but."""
    norm = trained(nn.BatchNorm2d(CHANNELS))
    norm.weight.data[:2] = torch.tensor([0.0, 1e-9])
    norm.bias.data[:2] = 3.0
    return nn.Sequential(norm)


class Called(nn.Module):
    """The function, with what a module holds."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = trained(nn.BatchNorm2d(CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        return F.relu(F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.1, 1e-3))


class Activated(nn.BatchNorm2d):
    """A batch norm that does more than normalize, as some libraries have it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class Dense(nn.Module):
    """The pre-activated block of a DenseNet: what one convolution made is normalized more than once."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(CHANNELS, CHANNELS // 2, 3, padding=1)
        self.norm = trained(nn.BatchNorm2d(CHANNELS))
        self.last = nn.Conv2d(CHANNELS, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        made = self.first(x)
        return self.last(F.relu(self.norm(torch.cat([made, x[:, : CHANNELS // 2]], 1))))


class ToOne(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(1, CHANNELS, 3, 3)), nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias).relu()


class InGroups(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(CHANNELS, 2, 3, 3)), nn.Parameter(torch.randn(2 * 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.weight, self.bias, 2, 1, 1, groups=3).relu()


class Depthwise(nn.Module):
    """A layer, a function of the module's own whose blocks lie side by side, and another layer."""

    def __init__(self, channels: int, sizes: tuple[int, int]) -> None:
        super().__init__()
        self.sizes, self.channels = sizes, channels
        self.first, self.last = nn.Conv2d(CHANNELS, channels, 3, padding=1), nn.Conv2d(channels, 4, 1)
        self.weight = nn.Parameter(torch.randn(channels, 1, *sizes))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.conv2d(self.first(x), self.weight, None, self.sizes, groups=self.channels).relu())


def depthwise(channels: int, *args: Any, **settings: Any) -> nn.Module:
    """A layer, and one whose channels have filters of their own."""
    return nn.Sequential(
        nn.Conv2d(CHANNELS, channels, 3, padding=1), nn.Conv2d(channels, channels, *args, groups=channels, **settings)
    )


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.weight = nn.Conv3d(CHANNELS, CHANNELS, 1), nn.Parameter(torch.rand(CHANNELS) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.instance_norm(self.conv(x), weight=self.weight).relu()


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.avg_pool2d(self.conv(x).relu(), kernel_size=4)
        return self.conv(pooled) + F.adaptive_avg_pool2d(pooled, 1)


class Largest(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        largest = F.max_pool2d(self.conv(x).relu(), 8, padding=(1, 4))
        return torch.cat([largest, F.max_pool2d(x, (8, 8), 8, 2, ceil_mode=True)[:, :, : largest.shape[2]]], 1)


class Tokens(nn.Module):
    """As LeViT normalizes: the vectors of all tokens, one below the other."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(CHANNELS, CHANNELS), trained(nn.BatchNorm1d(CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.linear(x.transpose(1, 2))
        return self.norm(tokens.flatten(0, 1)).reshape_as(tokens).relu()


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = trained(nn.BatchNorm2d(CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.norm(x).sigmoid())


def tapped(**settings: Any) -> nn.Module:
    made = nn.Conv2d(CHANNELS, CHANNELS, 1, groups=CHANNELS, **settings)
    assert made.bias is not None
    made.weight.data.copy_(torch.linspace(-1, 2, CHANNELS).reshape(-1, 1, 1, 1) + 0.1)
    made.bias.data.copy_(torch.linspace(-1, 1, CHANNELS))
    return made


MAPS, SEQUENCES, VECTORS, VOLUMES = (1, CHANNELS, 8, 10), (1, CHANNELS, 12), (1, CHANNELS), (1, CHANNELS, 4, 6, 8)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "maps": (lambda: nn.Sequential(trained(nn.BatchNorm2d(CHANNELS))), MAPS),
    "a channel of zeros": (silenced, MAPS),
    "sequences": (lambda: nn.Sequential(nn.ReLU(), trained(nn.BatchNorm1d(CHANNELS)), nn.ReLU()), SEQUENCES),
    "vectors": (
        lambda: nn.Sequential(nn.Linear(CHANNELS, CHANNELS), nn.ReLU(), trained(nn.BatchNorm1d(CHANNELS)), nn.ReLU()),
        VECTORS,
    ),
    "vectors of tokens": (Tokens, (1, CHANNELS, 196)),
    "volumes": (lambda: nn.Sequential(trained(nn.BatchNorm3d(CHANNELS))), VOLUMES),
    "no weights": (lambda: nn.Sequential(nn.ReLU(), trained(nn.BatchNorm2d(CHANNELS, affine=False))), MAPS),
    "a function": (Called, MAPS),
    "a class of its own": (lambda: nn.Sequential(nn.ReLU(), trained(Activated(CHANNELS))), MAPS),
    "a dense block": (Dense, MAPS),
    "called twice": (Twice, MAPS),
    "to one channel": (lambda: nn.Sequential(nn.Conv2d(CHANNELS, 1, 3)), MAPS),
    "to one channel, transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(CHANNELS, 1, 2)), MAPS),
    "three dimensions": (lambda: nn.Sequential(nn.Conv3d(CHANNELS, 4, (1, 3, 3), bias=False)), VOLUMES),
    "three dimensions, transposed": (lambda: nn.Sequential(nn.ConvTranspose3d(CHANNELS, 4, 2)), VOLUMES),
    "depthwise, transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(CHANNELS, CHANNELS, 2, 2, groups=CHANNELS)),
        MAPS,
    ),
    "in groups, transposed": (
        lambda: nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(CHANNELS, 4, 3, 2, 1, 1, groups=2, bias=False)),
        MAPS,
    ),
    "sequences in groups, transposed": (
        lambda: nn.Sequential(nn.ConvTranspose1d(CHANNELS, 9, 4, 2, groups=3), nn.Conv1d(9, 4, 1)),
        SEQUENCES,
    ),
    "a transposed function in groups": (InGroups, MAPS),
    "a depthwise function, blocks of 4 by 4": (lambda: Depthwise(8, (4, 4)), (1, CHANNELS, 16, 16)),
    "a depthwise function, blocks of 2 by 2": (lambda: Depthwise(3, (2, 2)), MAPS),
    "depthwise, blocks of 8 by 4": (lambda: depthwise(12, (8, 4), (8, 4)), (1, CHANNELS, 16, 20)),
    "depthwise, blocks of 2 by 2": (lambda: depthwise(4, 2, 2), MAPS),
    "depthwise, a long stride": (lambda: nn.Sequential(depthwise(8, 3, (1, 5), 1), nn.ReLU()), MAPS),
    "depthwise, reflected": (lambda: depthwise(8, 5, 4, 2, padding_mode="reflect", bias=False), MAPS),
    "a function to one channel": (ToOne, MAPS),
    "means of blocks": (lambda: nn.Sequential(nn.ReLU(), nn.AvgPool2d(4)), (1, CHANNELS, 8, 12)),
    "means of padded blocks": (lambda: nn.Sequential(nn.AvgPool2d((8, 4), padding=(2, 1))), (1, CHANNELS, 12, 10)),
    "means of as many blocks": (lambda: nn.Sequential(nn.AdaptiveAvgPool2d((2, None))), (1, CHANNELS, 12, 10)),
    "means of 2 by 3 blocks": (lambda: nn.Sequential(nn.AdaptiveAvgPool2d((2, 3))), (1, CHANNELS, 12, 18)),
    "means by a function": (Pooled, (1, CHANNELS, 16, 16)),
    "maxima of blocks": (lambda: nn.Sequential(nn.MaxPool2d(8)), (1, CHANNELS, 24, 32)),
    "maxima of padded blocks": (lambda: nn.Sequential(nn.MaxPool2d(8, padding=4), nn.ReLU()), (1, CHANNELS, 8, 8)),
    "maxima rounded up": (lambda: nn.Sequential(nn.MaxPool2d(8, ceil_mode=True)), (1, CHANNELS, 20, 30)),
    "maxima of 2 by 3 blocks": (lambda: nn.Sequential(nn.AdaptiveMaxPool2d((2, 3))), (1, CHANNELS, 16, 24)),
    "maxima by a function": (Largest, (1, CHANNELS, 16, 16)),
    "an instance norm": (lambda: nn.Sequential(nn.ReLU(), nn.InstanceNorm2d(CHANNELS)), MAPS),
    "an instance norm with running statistics": (
        lambda: nn.Sequential(
            nn.Conv2d(CHANNELS, CHANNELS, 3),
            trained(nn.InstanceNorm2d(CHANNELS, affine=True, track_running_stats=True)),
        ),
        MAPS,
    ),
    "an instance norm of sequences with running statistics": (
        lambda: nn.Sequential(trained(nn.InstanceNorm1d(CHANNELS, track_running_stats=True)), nn.ReLU()),
        SEQUENCES,
    ),
    "an instance norm of volumes": (lambda: nn.Sequential(nn.Conv3d(CHANNELS, 4, 1), nn.InstanceNorm3d(4)), VOLUMES),
    "an instance norm of volumes, weighted": (
        lambda: nn.Sequential(nn.Conv3d(CHANNELS, 4, 3), seeded(nn.InstanceNorm3d(4, affine=True)), nn.LeakyReLU()),
        VOLUMES,
    ),
    "an instance norm of volumes by a function": (lambda: Normed(), VOLUMES),
    "volumes in groups, transposed": (
        lambda: nn.Sequential(nn.Conv3d(CHANNELS, 4, 1), nn.ConvTranspose3d(4, 6, 2, 2, groups=2), nn.ReLU()),
        VOLUMES,
    ),
    "volumes, depthwise, transposed": (
        lambda: nn.Sequential(nn.ConvTranspose3d(CHANNELS, CHANNELS, 3, 2, groups=CHANNELS, bias=False)),
        VOLUMES,
    ),
    "one tap": (lambda: nn.Sequential(tapped()), MAPS),
    "one tap, strided and padded": (lambda: nn.Sequential(tapped(stride=2, padding=1)), MAPS),
}


def simulated(name: str, precision: str, **recipe: Any) -> tuple[QuantizedNetwork, Tensor]:
    """A network, and an input of it."""
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    samples = torch.randn(16, *shape[1:])
    return calibrated(make().eval(), call(samples), precision=precision, **recipe), samples[:1]


def written(network: QuantizedNetwork, given: Tensor, folder: Path) -> tuple[onnx.ModelProto, Tensor]:
    write_onnx(network, call(given), folder / "float.onnx", folder / "qdq.onnx")
    with torch.no_grad():
        return onnx.load(folder / "qdq.onnx"), network(given)


@pytest.mark.parametrize(("name", "precision"), in_turn(NETWORKS, PRECISIONS))
def test_the_file_computes_what_the_simulation_does(tmp_path: Path, name: str, precision: str) -> None:
    network, given = simulated(name, precision)
    kept = {part: (module, type(module), set(vars(module))) for part, module in network.network.named_modules()}
    with torch.no_grad():
        before = network(given)
    model, expected = written(network, given, tmp_path)
    assert {part: (one, type(one), set(vars(one))) for part, one in network.network.named_modules()} == kept
    assert torch.equal(expected, before)
    assert not operations(model, "BatchNormalization")
    assert not operations(onnx.load(tmp_path / "float.onnx"), "BatchNormalization")
    (output,) = computed(model, tmp_path, **{model.graph.input[0].name: given.numpy()})
    assert psnr(expected.numpy(), output) > 100


@needs_emulator
@pytest.mark.slow
@pytest.mark.parametrize(("name", "precision"), in_turn(NETWORKS, PRECISIONS))
def test_the_npu_computes_it_too(tmp_path: Path, name: str, precision: str) -> None:
    model, expected = written(*simulated(name, precision), tmp_path)
    given = {model.graph.input[0].name: simulated(name, precision)[1].numpy()}
    report, (output,) = emulated(model, tmp_path / "npu", **given)
    assert not report.float_islands
    assert not report.layers["CPU"]
    assert psnr(expected.numpy(), output) > (40 if precision.endswith("a8") else 55)


@pytest.mark.parametrize("name", NETWORKS)
def test_blame_names_no_layer_and_the_one_that_is_changed(tmp_path: Path, name: str) -> None:
    network, given = simulated(name, "w4a8")
    model, _ = written(network, given, tmp_path)
    inputs = [model.graph.input[0].name]
    assert not compare_file(network, model, inputs, [call(given)]).guilty
    if any(kind in name for kind in ("means", "maxima", "instance")):
        return  # without a weight that could be changed
    graph = QdqGraph(model)
    weight = next(
        graph.source(node.input[1]) for node in model.graph.node if node.op_type in ("Gemm", "Conv", "ConvTranspose")
    )
    assert weight is not None
    graph.write(weight.input[1], 1.5 * graph.array(weight.input[1]))
    changed = {layer.layer for layer in compare_file(network, model, inputs, [call(given)]).guilty}
    assert len(changed) == (2 if name == "called twice" else 1)  # which share the weight


class Gated(nn.Module):
    """A layer, and what it computes times its own sigmoid."""

    def __init__(self, layer: nn.Module, gate: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        self.layer, self.gate = layer, gate

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.layer(x))


class Unfolded(nn.Module):
    """Patches of a feature map as tokens, and a feature map of them again, as MobileViT has it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.behind = nn.Conv2d(8, 8, 1), nn.LayerNorm(8), nn.Conv2d(16, 8, 3, padding=1)
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        many = len(x)
        y = x.reshape(64 * many, 2, 8, 2).transpose(1, 2).reshape(many, 8, 64, 4)
        y = y.transpose(1, 3).reshape(4 * many, 64, 8)
        y = (y + self.layers(self.norm(y))).reshape(many, 4, 64, 8).transpose(1, 3)
        y = y.reshape(64 * many, 8, 2, 2).transpose(1, 2).reshape(many, 8, 16, 16)
        return self.behind(torch.cat([self.first(x), y], 1))


def convolution(**settings: Any) -> nn.Module:
    return nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, **settings)


def gelu_by_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


IDENTITY = F.pad(torch.ones(CHANNELS, 1, 1, 1), (1, 1, 1, 1))
MISCOMPUTED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "9 rows": (lambda: nn.Sequential(convolution(), nn.SiLU(), convolution()), (CHANNELS, 9, 7)),
    "10 rows, strided": (lambda: Gated(convolution(stride=2)), (CHANNELS, 20, 32)),
    "11 rows, by hand": (lambda: Gated(convolution(), lambda x: torch.sigmoid(x) * x), (CHANNELS, 11, 16)),
    "12 rows, depthwise": (lambda: Gated(convolution(groups=CHANNELS), nn.SiLU()), (CHANNELS, 12, 20)),
    "12 rows, transposed": (lambda: Gated(nn.ConvTranspose2d(CHANNELS, CHANNELS, 2, 2)), (CHANNELS, 6, 6)),
    "10 rows, behind a ReLU": (lambda: Gated(nn.Sequential(convolution(), nn.ReLU())), (CHANNELS, 10, 16)),
    "12 rows, a mean": (lambda: Gated(nn.Sequential(convolution(), nn.AvgPool2d(3, 1, 1))), (CHANNELS, 12, 12)),
    "few columns": (lambda: Gated(convolution(), nn.SiLU()), (CHANNELS, 30, 8)),
    "large values": (lambda: Gated(convolution(), lambda x: F.silu(30 * x)), (CHANNELS, 12, 20)),
    "channels last": (lambda: Gated(nn.Linear(16, 16)), (10, 6, 16)),
    "softplus": (lambda: nn.Sequential(convolution(), nn.Softplus()), (CHANNELS, 12, 20)),
    "softplus, few columns": (lambda: Gated(convolution(), F.softplus), (CHANNELS, 18, 8)),
    "mish": (lambda: nn.Sequential(convolution(), nn.Mish(), convolution()), (CHANNELS, 12, 20)),
    "tanh by a number": (lambda: Gated(convolution(), lambda x: x[:, 1].tanh() * 9), (CHANNELS, 16, 16)),
    "tanh by a number, of rows": (lambda: Gated(convolution(), lambda x: x[:, :, 1].tanh() * 0.3), (CHANNELS, 12, 16)),
    "tanh by another": (lambda: Gated(convolution(), lambda x: x[:, 1].tanh() * x[:, 2]), (CHANNELS, 16, 8)),
    "tanh of an input": (lambda: Gated(nn.Identity(), lambda x: x.tanh()[:, None] * x.cos()), (16, 32)),
    "tanh of 16 rows": (lambda: nn.Sequential(nn.Linear(32, 32), nn.Tanh()), (16, 32)),
    "tanh of 16 rows, first": (lambda: nn.Sequential(nn.Tanh(), nn.Linear(24, 24)), (16, 24)),
    "tanh of a matrix": (lambda: Gated(nn.Linear(8, 8), lambda x: x[0].tanh()), (16, 8)),
    "tanh of 16 rows, scaled": (lambda: Gated(nn.Linear(64, 64), lambda x: torch.tanh(0.8 * x)), (16, 64)),
    "tanh of 16 rows, divided": (lambda: Gated(nn.Linear(64, 64), lambda x: torch.tanh(x / -3)), (16, 64)),
    "GELU by tanh": (lambda: Gated(nn.Linear(64, 64), gelu_by_tanh), (16, 64)),
    "tanh of 16 rows, joined": (lambda: Gated(nn.Linear(32, 32), lambda x: torch.cat([x.tanh(), x], 1)), (16, 32)),
    "mish of one channel": (lambda: Gated(convolution(), lambda x: F.mish(x[:, 1])), (CHANNELS, 16, 16)),
    "identity": (
        lambda: Gated(nn.Conv2d(CHANNELS, CHANNELS, 1), lambda x: F.conv2d(x, IDENTITY, groups=CHANNELS)),
        MAPS[1:],
    ),
    "windows": (lambda: Gated(nn.Conv2d(CHANNELS, 4, 1), lambda x: F.unfold(x, 3, padding=1)), MAPS[1:]),
    "hard sigmoid": (lambda: Gated(convolution(), F.hardsigmoid), (CHANNELS, 10, 16)),
    "patches": (Unfolded, (8, 16, 16)),
    "hard sigmoid before a layer": (
        lambda: nn.Sequential(convolution(), nn.Hardsigmoid(), convolution()),
        (CHANNELS, 14, 14),
    ),
}


@pytest.mark.parametrize(("name", "precision"), in_turn(MISCOMPUTED, ["w8a16", "w4a16"]))
def test_what_is_miscompiled_with_16_bits(tmp_path: Path, name: str, precision: str) -> None:
    torch.manual_seed(0)
    make, shape = MISCOMPUTED[name]
    samples = torch.randn(8, *shape)
    network, given = calibrated(make().eval(), call(samples), precision=precision), samples[:1]
    model, expected = written(network, given, tmp_path)
    onnx.checker.check_model(model, full_check=True)
    inputs = {model.graph.input[0].name: given.numpy()}
    assert psnr(expected.numpy(), computed(model, tmp_path, **inputs)[0]) > 90
    entries = json.loads((tmp_path / "float.encodings").read_text())["activation_encodings"]
    in_float = onnx.load(tmp_path / "float.onnx")
    assert {entry["name"] for entry in entries} <= {
        one for node in in_float.graph.node for one in (*node.input, *node.output)
    }
    assert not compare_file(network, model, list(inputs), [call(given)]).guilty
    if NO_EMULATOR is None:
        report, (output,) = emulated(model, tmp_path / "npu", **inputs)
        assert not report.float_islands
        assert not report.layers["CPU"]
        is_coarse = "mish" in name or "softplus" in name  # 16-bit softplus has the precision of 9 bits
        assert psnr(expected.numpy(), output) > (40 if is_coarse else 75 if precision == "w8a16" else 50)


def test_factors_and_sums_are_those_of_the_batch_norm(tmp_path: Path) -> None:
    model, _ = written(*simulated("maps", "w4a16"), tmp_path)
    norm, found = trained(nn.BatchNorm2d(CHANNELS)), values(model)
    (node,) = operations(model, "Conv")
    graph = QdqGraph(model)
    weight, bias = (graph.source(name) for name in node.input[1:])
    assert weight is not None
    assert bias is not None
    factors = norm.weight / (norm.running_var + norm.eps).sqrt()
    taps = found[weight.input[0]] * found[weight.input[1]].reshape(-1, 1, 1, 1)
    assert torch.allclose(torch.from_numpy(taps[:, 0, 1, 1]), factors, rtol=1e-6)
    assert (abs(found[weight.input[0]]).sum((1, 2, 3)) == 127).all()  # in all of 8 bits, and nothing beside the middle
    sums = torch.from_numpy(found[bias.input[0]] * found[bias.input[1]])
    assert torch.allclose(sums.float(), norm.bias - norm.running_mean * factors, atol=1e-4)


@pytest.mark.parametrize("name", ["to one channel", "a function to one channel", "three dimensions, transposed"])
def test_few_bits_are_stored_in_more(tmp_path: Path, name: str) -> None:
    model, _ = written(*simulated(name, "w4a8"), tmp_path)
    (node,) = [node for node in model.graph.node if node.op_type in ("Conv", "ConvTranspose")]
    graph = QdqGraph(model)
    weight = graph.source(node.input[1])
    assert weight is not None
    stored = graph.constants[weight.input[0]]
    assert stored.data_type == onnx.TensorProto.INT8
    integers = values(model)[stored.name]
    assert -8 <= integers.min() < integers.max() <= 7


def test_hardware_with_one_scale_for_all_channels_keeps_the_batch_norm(tmp_path: Path) -> None:
    model, _ = written(*simulated("maps", "w8a8", hardware="htp_v66"), tmp_path)
    assert len(operations(model, "BatchNormalization")) == 1
    assert not operations(model, "Conv")


def test_training_goes_on_as_in_float() -> None:
    network, _ = simulated("a dense block", "w4a8")
    network.network.train()
    norm: Any = network.network.norm
    assert not dict(norm.param_quantizers)["weight"]
    mean, given = norm.running_mean.clone(), torch.randn(4, *MAPS[1:])
    network(given).square().sum().backward()
    assert float(norm.weight.grad.abs().sum()) > 0
    assert not torch.equal(norm.running_mean, mean)


def test_with_fixed_statistics_weights_are_trained_as_in_float() -> None:
    torch.manual_seed(0)
    given = torch.randn(4, *MAPS[1:])
    norm = trained(nn.BatchNorm2d(CHANNELS))
    norm.eval()(given).square().sum().backward()
    network, _ = simulated("maps", "w8a16")
    network(given).square().sum().backward()
    for name, parameter in norm.named_parameters():
        found = network.network.get_parameter(f"0.{name}").grad
        assert found is not None
        assert parameter.grad is not None
        assert torch.allclose(found, parameter.grad, rtol=0.05, atol=0.05 * float(parameter.grad.abs().max()))
