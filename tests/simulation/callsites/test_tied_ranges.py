"""Whatever hands values on has one grid before and behind it, in the exported file."""

from __future__ import annotations

import random
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
from lightning_quant.simulation.switched_off import unrounded
from tests.helpers.networks import calibrated, call, images, seeded
from tests.helpers.qdq import NO_EMULATOR, computed, emulated, operations, psnr

aimet.load()
needs_emulator = pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))

# Operations of ONNX that output values of their first input.
HAND_ON = frozenset(
    """
    MaxPool GlobalMaxPool Resize Reshape Flatten Transpose Slice Pad Gather GatherElements Split Expand Tile Squeeze
    Unsqueeze DepthToSpace SpaceToDepth Identity ReduceMax ReduceMin TopK
    """.split()  # noqa: SIM905
)


def handed_on(node: onnx.NodeProto) -> list[str]:
    """The inputs of a node whose values it outputs."""
    return list(node.input if node.op_type == "Concat" else node.input[: node.op_type in HAND_ON])


class Net(nn.Module):
    """What a function makes of two convolutions of the images, and a layer behind it."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.function = function
        self.layers = nn.ModuleDict(layers)
        with torch.no_grad():
            channels = self.joined(images(2)).shape[1]
        self.head = nn.Conv2d(channels, 4, 1)
        seeded(self)
        with torch.no_grad():
            self.one.weight.mul_(4)  # of another range than the other

    def joined(self, x: Tensor) -> Tensor:
        made = self.function(self.one(x), self.two(x), x, **self.layers)  # type: ignore[call-arg]
        return made if made.dim() == 4 else made[..., None]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.joined(x))  # type: ignore[no-any-return]


def pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 1, 1)


def up(x: Tensor, mode: str = "nearest") -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode=mode)


def cat(*tensors: Tensor) -> Tensor:
    return torch.cat(tensors, 1)


def dense(a: Tensor, b: Tensor, x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
    features = [a, F.relu(b)]
    for layer in (first, second):
        features.append(F.relu(layer(cat(*features))))
    return cat(*features)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "max pool": lambda: Net(lambda a, b, x: cat(pool(a), b)),
    "max pool as a module": lambda: Net(lambda a, b, x, p: cat(p(a), p(b)), p=nn.MaxPool2d(2)),
    "max pool of what is used elsewhere": lambda: Net(
        lambda a, b, x, layer: cat(layer(a), pool(a), b), layer=nn.Conv2d(8, 8, 1)
    ),
    "max pool in one dimension": lambda: Net(
        lambda a, b, x: torch.cat([F.max_pool1d(a.flatten(2), 2), b.flatten(2)], 2)
    ),
    "adaptive max pool": lambda: Net(lambda a, b, x: cat(F.adaptive_max_pool2d(a, 4), F.max_pool2d(b, 2))),
    "adaptive max pool as a module": lambda: Net(lambda a, b, x, p: p(a + b), p=nn.AdaptiveMaxPool2d(4)),
    "amax": lambda: Net(lambda a, b, x: cat(a.amax((2, 3), keepdim=True), b.mean((2, 3), keepdim=True))),
    "max": lambda: Net(lambda a, b, x: cat(a.max(2, keepdim=True)[0], b[:, :, :1])),
    "top": lambda: Net(lambda a, b, x: cat(a.topk(4, -1)[0], b[..., :4])),
    "pyramid of pools": lambda: Net(lambda a, b, x: cat(a, pool(a), pool(pool(a)))),
    "concatenation of a concatenation": lambda: Net(lambda a, b, x: cat(cat(a, x), b)),
    "one tensor in two concatenations": lambda: Net(
        lambda a, b, x, layer: cat(layer(cat(a, b)), cat(a, x)), layer=nn.Conv2d(16, 8, 1)
    ),
    "dense": lambda: Net(dense, first=nn.Conv2d(16, 8, 1), second=nn.Conv2d(24, 8, 1)),
    "images": lambda: Net(lambda a, b, x: cat(x, pool(x), a)),
    "images in another order": lambda: Net(lambda a, b, x: cat(x.flip(-1), a)),
    "resize": lambda: Net(lambda a, b, x: cat(up(a), up(b, "bilinear"))),
    "resize of a pool": lambda: Net(lambda a, b, x: cat(up(F.max_pool2d(a, 2)), b)),
    "pool of a resize": lambda: Net(lambda a, b, x: pool(up(cat(a, b)))),
    "resize as a reused module": lambda: Net(
        lambda a, b, x, u, layer: cat(u(layer(u(a))), u(u(b))), u=nn.Upsample(scale_factor=2), layer=nn.Conv2d(8, 8, 1)
    ),
    "resize of what is used elsewhere": lambda: Net(
        lambda a, b, x, layer: cat(up(a), up(layer(a))), layer=nn.Conv2d(8, 8, 1)
    ),
    "stack": lambda: Net(lambda a, b, x: torch.stack([a, b], 1).flatten(1, 2)),
    "split": lambda: Net(
        lambda a, b, x, layer: cat(layer(a.chunk(2, 1)[0]), a.chunk(2, 1)[1]), layer=nn.Conv2d(4, 4, 1)
    ),
    "split in sizes": lambda: Net(lambda a, b, x: cat(*torch.split(a, [2, 6], 1)[::-1], b)),
    "shuffled channels": lambda: Net(
        lambda a, b, x: cat(a, b).view(-1, 2, 8, 8, 8).transpose(1, 2).reshape(-1, 16, 8, 8)
    ),
    "pixel shuffle": lambda: Net(lambda a, b, x: cat(F.pixel_shuffle(a, 2), up(b))),
    "flip": lambda: Net(lambda a, b, x: cat(a.flip(-1), b)),
    "roll": lambda: Net(lambda a, b, x: cat(a.roll(1, -1), b)),
    "pad": lambda: Net(lambda a, b, x: cat(F.pad(a, (0, 1, 0, 1)), F.pad(b, (1, 0, 1, 0), mode="reflect"))),
    "gather": lambda: Net(lambda a, b, x: cat(a[:, [2, 0]], torch.index_select(b, 1, torch.tensor([1, 3])))),
    "repeat": lambda: Net(lambda a, b, x: cat(a.mean((2, 3), keepdim=True).repeat(1, 1, 8, 8), b)),
    "expand": lambda: Net(lambda a, b, x: cat(a.mean((2, 3), keepdim=True).expand(-1, -1, 8, 8), b)),
    "strided slices": lambda: Net(lambda a, b, x: cat(a[..., ::2, ::2], b[..., 1::2, ::2])),
    "dropout": lambda: Net(lambda a, b, x, d: cat(d(a), F.dropout(b, training=False)), d=nn.Dropout()),
    "constant": lambda: Net(lambda a, b, x: cat(a, torch.full_like(b, 0.7), b)),
    "other activations": lambda: Net(lambda a, b, x: cat(F.hardswish(a), F.relu6(b))),
    "pooled image features": lambda: Net(
        lambda a, b, x: cat(F.interpolate(a.mean((2, 3), keepdim=True), size=(8, 8), mode="bilinear"), b)
    ),
}


class Random(nn.Module):
    """A network of random operations, most of which hand values on."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.layers = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1, groups=groups) for groups in (1, 8, 1, 8)])
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.LazyConv2d(4, 1)
        self.eval()(images())
        seeded(self, seed)

    def forward(self, x: Tensor) -> Any:
        choose = random.Random(self.seed)
        made = [self.stem(x)]
        layers = list(self.layers)
        for _ in range(8):
            one = (
                made.pop(choose.randrange(len(made)))
                if choose.random() < 0.5 and len(made) > 1
                else choose.choice(made)
            )
            kind = choose.choice(["layer", "layer", "pool", "up", "flip", "join", "half", "roll", "add"])
            if kind == "layer" and layers:
                made.append(F.relu6(layers.pop()(one)))
            elif kind == "pool":
                made.append(pool(one))
            elif kind == "up":
                made.append(F.max_pool2d(up(one, choose.choice(["nearest", "bilinear"])), 2))
            elif kind == "flip":
                made.append(one.flip(-1).transpose(2, 3))
            elif kind == "join":
                made.append(cat(one[:, :4], choose.choice(made)[:, 4:]) if made else one)
            elif kind == "half":
                made.append(cat(*one.chunk(2, 1)[::-1]))
            elif kind == "roll":
                made.append(one.roll(1, 1))
            elif kind == "add" and made:
                made.append(one + choose.choice(made))
            else:
                made.append(one)
        return self.head(cat(*made))


def untied(model: onnx.ModelProto) -> list[str]:
    """The nodes that hand values on from one grid to another."""
    graph = QdqGraph(model)

    def grid(node: onnx.NodeProto) -> tuple[float, int]:
        scale, zero_point = (graph.array(name) for name in node.input[1:])
        return float(scale.item()), int(zero_point.item())

    def before(name: str) -> set[Any]:
        node = graph.producers.get(name)
        if node is None or node.op_type == "Constant":  # an image that is not rounded yet, a size
            return set()
        if node.op_type == "DequantizeLinear":
            return {grid(node)}
        return {one for given in handed_on(node) for one in before(given)} or {node.op_type}

    found = []
    for node in model.graph.node:
        if names := handed_on(node):
            takers = [taker for name in node.output for taker in graph.consumers[name]]
            grids = {grid(taker) for taker in takers if taker.op_type == "QuantizeLinear"}
            grids = grids.union(*map(before, names))
            if len(grids) > 1:
                found.append(f"{node.name}: {grids}")
    return found


def exported(network: nn.Module, precision: str, folder: Path) -> tuple[onnx.ModelProto, np.ndarray, dict[str, Any]]:
    """The file, what the simulation makes of an image, and the image."""
    made = calibrated(network.eval(), call(images(8)), precision=precision)
    files = write_onnx(made, call(images()), folder / "float.onnx", folder / "qdq.onnx")
    given = images(1, seed=9)
    return onnx.load(folder / "qdq.onnx"), made(given).detach().numpy(), {files.input_names[0]: given.numpy()}


@pytest.mark.parametrize("name", NETWORKS)
def test_each_operation_that_hands_values_on_has_one_grid(name: str, tmp_path: Path) -> None:
    model, expected, feeds = exported(NETWORKS[name](), "w8a8", tmp_path)
    assert untied(model) == []
    assert any(map(handed_on, model.graph.node))
    (output,) = computed(model, tmp_path, **feeds)
    assert psnr(expected, output) > 50


@pytest.mark.parametrize("seed", range(16))
def test_in_random_networks_too(seed: int, tmp_path: Path) -> None:
    model, expected, feeds = exported(Random(seed), "w8a16", tmp_path)
    assert untied(model) == []
    (output,) = computed(model, tmp_path, **feeds)
    assert psnr(expected, output) > 75


def test_an_image_that_several_operations_read_is_rounded_once(tmp_path: Path) -> None:
    """To two grids one after the other, as AIMET writes it, the file computed something else than the simulation."""
    model, expected, feeds = exported(NETWORKS["images"](), "w8a8", tmp_path)
    (given,) = feeds
    assert [node.input[0] for node in operations(model, "QuantizeLinear")].count(given) == 1
    assert psnr(expected, computed(model, tmp_path, **feeds)[0]) > 60


def test_what_others_read_as_well_keeps_its_own_range(tmp_path: Path) -> None:
    """It is converted on the way into the concatenation, behind the pool."""
    made = Net(lambda a, b, x, layer: cat(layer(F.relu(b)), pool(F.relu(b)), 4 * a), layer=nn.Conv2d(8, 8, 1))
    network = calibrated(made.eval(), call(images(8)))
    joined: Any = next(one for one in network.network.modules() if isinstance(one, aimet.custom.Concat))
    read: Any = network.network.layers["layer"]
    relus = [one for one in network.network.modules() if isinstance(one, nn.ReLU)]
    assert joined.input_quantizers[1] is None  # its own ReLU, which nothing else reads
    assert read.input_quantizers[0] is None
    assert relus[0].output_quantizers[0] is not joined.output_quantizers[0] is relus[1].output_quantizers[0]

    def shared(a: Tensor, b: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
        b = F.relu(b)
        return cat(layer(b), pool(b), 4 * a)

    network = calibrated(Net(shared, layer=nn.Conv2d(8, 8, 1)).eval(), call(images(8)))
    joined = next(one for one in network.network.modules() if isinstance(one, aimet.custom.Concat))
    (relu,) = (one for one in network.network.modules() if isinstance(one, nn.ReLU))
    assert joined.input_quantizers[1] is joined.output_quantizers[0] is not relu.output_quantizers[0]
    assert float(relu.output_quantizers[0].get_min().detach()) == 0
    write_onnx(network, call(images()), tmp_path / "float.onnx", tmp_path / "qdq.onnx")
    assert untied(onnx.load(tmp_path / "qdq.onnx")) == []


def boxes_and_scores(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """As YOLOv5's head: places and sizes in pixels, made of what is between 0 and 1, and the scores beside them."""
    y = b.sigmoid()
    return cat((y[:, :2] * 2 - 0.5 + torch.arange(8.0)) * 8, (y[:, 2:4] * 2) ** 2 * 30, y[:, 4:])


def boxes_and_scores_in_place(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    y = b.sigmoid()
    y[:, :2] = (y[:, :2] * 2 - 0.5 + torch.arange(8.0)) * 8
    y[:, 2:4] = (y[:, 2:4] * 2) ** 2 * 30
    return y


def with_multiples(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    return torch.stack([b.square() * 9, b * 20, b], 1).flatten(1, 2)


@pytest.mark.parametrize("function", [boxes_and_scores, boxes_and_scores_in_place, with_multiples])
def test_what_is_made_of_a_tensor_does_not_make_its_steps_coarse(function: Any, tmp_path: Path) -> None:
    net = Net(function).eval()
    net.head = nn.Identity()
    known, given = calibrated(net, call(images(8))), images(1)
    with unrounded(known):
        expected = known.network(given)
    assert psnr(expected.detach().numpy(), known.network(given).detach().numpy()) > 45  # 15 to 25 with one range
    write_onnx(known, call(given), tmp_path / "float.onnx", tmp_path / "qdq.onnx")
    model = onnx.load(tmp_path / "qdq.onnx")
    assert len(operations(model, "Concat")) == 1
    if NO_EMULATOR is None:
        report, (output,) = emulated(model, tmp_path / "emulated", x=given.numpy())
        assert not report.float_islands
        assert psnr(known.network(given).detach().numpy(), output) > 40


class Averaged(nn.Module):
    """A moving average over the columns of a map, and a recurrent layer."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.conv, self.gru, self.steps = nn.Conv2d(3, 8, 3, padding=1), nn.GRU(8, 8, batch_first=True), steps

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        columns, state, states = self.conv(x).mean(2), torch.zeros(x.shape[0], 8), []
        for step in range(self.steps):
            state = state * 0.5 + columns[..., step]
            states.append(state)
        return torch.stack(states, 1), self.gru(columns[..., : self.steps].transpose(1, 2))[0]


@pytest.mark.parametrize("steps", [3, 6])
def test_steps_of_a_recurrence_keep_one_range(steps: int) -> None:
    known = calibrated(Averaged(steps).eval(), call(images(4)))
    joins = [one for one in known.network.modules() if isinstance(one, aimet.custom.Concat)]
    assert len(joins) == 2
    assert not [quantizer for one in joins for quantizer in one.input_quantizers if quantizer is not None]


@needs_emulator
@pytest.mark.parametrize("name", ["adaptive max pool as a module", "max pool of what is used elsewhere", "images"])
@pytest.mark.parametrize(("precision", "least"), [("w8a8", 40), ("w8a16", 75)])
def test_the_npu_computes_it_in_integers(name: str, precision: str, least: float, tmp_path: Path) -> None:
    model, expected, feeds = exported(NETWORKS[name](), precision, tmp_path)
    report, (output,) = emulated(model, tmp_path / "emulated", **feeds)
    assert not report.float_islands
    assert not report.layers["CPU"]
    assert psnr(expected, output) > least
