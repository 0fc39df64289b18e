"""Where two bit widths meet: every layer computes at one, and what converts between them loses nothing it need not."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.errors import CheckpointError
from lightning_quant.precision import Precision
from lightning_quant.simulation.calibrate import calibrate
from lightning_quant.simulation.conversions import converts
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.precisions import quantized_layers, set_precisions
from tests.helpers.networks import Body, Chain, SharedConv, calibrated, call, images, seeded
from tests.helpers.small import assert_same_tensors
from tests.simulation.test_precisions import Cat, CatInput, CatLater, bits


class Attention(nn.Module):
    """Tokens of an image, attention among them, a sum, a norm and what lies behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Conv2d(3, 8, 2, stride=2)
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.norm = nn.LayerNorm(8)
        self.wide, self.narrow = nn.Linear(8, 16), nn.Linear(16, 8)
        seeded(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x).flatten(2).transpose(1, 2)
        scores = (self.query(x) @ self.key(x).transpose(1, 2) / math.sqrt(8)).softmax(-1)
        x = self.norm(x + self.out(scores @ self.value(x)))
        return x + self.narrow(F.gelu(self.wide(x)))


class Pyramid(nn.Module):
    """Depthwise layers, pooling, a resize, a concatenation of what others read too, a sigmoid that scales."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.low, self.gate, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(16, 4, 1)
        seeded(self)

    def forward(self, x: Tensor) -> Tensor:
        high = F.relu6(self.depth(F.relu(self.stem(x))))
        low = self.low(F.max_pool2d(high, 2))
        low = low * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(low, 1)))
        return self.last(torch.cat([high, F.interpolate(low, scale_factor=2)], 1))


class Twice(nn.Module):
    """A convolution that is called on small numbers and on large ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
        seeded(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.shared(x) + self.shared(100 * x).sigmoid())


class Recurrent(nn.Module):
    """A layer whose steps share their ranges."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.last = nn.GRU(8, 4, batch_first=True), nn.Linear(4, 2)
        seeded(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.steps(x.mean(1))[0])


NETWORKS: list[Callable[[], nn.Module]] = [
    Chain,
    Body,
    Cat,
    CatInput,
    CatLater,
    Attention,
    Pyramid,
    SharedConv,
    Twice,
    Recurrent,
]


def widths(network: QuantizedNetwork) -> dict[str, set[int]]:
    """The bits of all that each layer takes and returns, as seen in a pass of the network."""
    seen: dict[str, set[int]] = {}
    last: dict[int, int] = {}  # of the tensor in this memory
    kept: list[Tensor] = []

    def note(name: str, layer: Any, args: Any, output: Any) -> None:
        taken = [
            last.get(one.data_ptr()) if quantizer is None else quantizer.bitwidth
            for one, quantizer in zip(args, [*layer.input_quantizers, None, None], strict=False)
            if isinstance(one, Tensor) and one.is_floating_point()
        ]
        own = layer.output_quantizers[0]
        bits = None if own is None else own.bitwidth
        kept.append(output)
        # what hands values on leaves them at their bits; what is not rounded is computed with the next layer
        moved = taken[0] if own is None and taken and torch.isin(output, args[0]).all() else None
        last[output.data_ptr()] = bits or moved
        seen.setdefault(name, set()).update(one for one in (*taken, bits) if one)

    handles: list[Any] = []
    for name, layer in quantized_layers(network).items():
        module: Any = layer
        handles.append(module.register_forward_hook(lambda one, args, out, name=name: note(name, one, args, out)))
    with torch.no_grad():
        network(images(2))
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("make", NETWORKS)
@pytest.mark.parametrize(("precision", "other"), [("w8a8", Precision(8, 16)), ("w8a16", Precision(8, 8))])
def test_whichever_layer_gets_another_width_every_layer_computes_at_one(
    make: Callable[[], nn.Module], precision: str, other: Precision
) -> None:
    network = calibrated(make(), precision=precision)
    assert all(len(found) <= 1 for found in widths(network).values())
    before, answer, snapshot = bits(network), network(images(2)), network.snapshot()
    for name in quantized_layers(network):
        set_precisions(network, {name: other})
        mixed = {one: found for one, found in widths(network).items() if len(found) > 1}
        assert not mixed, (name, mixed)
        network.restore(snapshot)
        assert bits(network) == before
    assert torch.equal(network(images(2)), answer)


def test_a_conversion_up_loses_nothing() -> None:
    network = calibrated(Chain(), precision="w8a16", overrides={"first": "w8a8", "relu": "w8a8"})
    last: Any = quantized_layers(network)["second"]
    (up,) = last.input_quantizers
    assert converts(up)
    assert (quantized_layers(network)["relu"].output_quantizers[0].bitwidth, up.bitwidth) == (8, 16)  # type: ignore[union-attr]
    seen: list[Tensor] = []
    last.register_forward_hook(lambda layer, args, output: seen.extend((args[0], up(args[0]))))
    with torch.no_grad():
        network(images(4))
    coarse, fine = seen
    step = float(last.input_quantizers[0].get_scale())
    assert len(coarse.unique()) > 100
    # both scales are rounded to float32
    torch.testing.assert_close(fine, coarse, rtol=1e-6, atol=step / 100)


def test_a_conversion_follows_the_range_of_what_it_converts() -> None:
    network = calibrated(Body(), precision="w8a8")
    set_precisions(network, {"branch": Precision(8, 16)})
    found = [one for one in network.quantizers() if converts(one)]
    assert found
    names = {id(value) for value in network.range_parameters()}
    assert len(names) == len(network.range_parameters())
    calibrate(network, [call(3 * images(8))])
    for (layer, index), source in network.dataflow.sources.items():
        conversion = quantized_layers(network)[layer].input_quantizers[index]
        if conversion is not None:
            like: Any = network.network.get_submodule(source)
            assert dict(conversion.named_parameters()) == dict(like.named_parameters())  # type: ignore[attr-defined]
    network.learn_ranges(True)
    network.train()
    network(images(4)).square().sum().backward()
    network.eval()
    assert all(value.grad is not None for value in found[0].parameters() if value.requires_grad)
    assert any(value.requires_grad for value in found[0].parameters())


def test_a_state_brings_its_conversions_along() -> None:
    network, other = calibrated(Attention(), precision="w8a8"), calibrated(Attention(), precision="w8a8")
    coarse = network.snapshot()
    set_precisions(network, {"norm": Precision(8, 16)})
    calibrate(network, [call(images(8))])
    fine, answer = network.snapshot(), network(images(2))
    assert fine.keys() > coarse.keys()
    for known in (other, copy.deepcopy(other)):
        known.restore(fine)
        assert torch.equal(known(images(2)), answer)
        assert_same_tensors(known.state_dict(), fine)
        known.restore(coarse)
        assert_same_tensors(known.state_dict(), coarse)
    assert not any(converts(one) for one in other.quantizers())


def test_a_state_that_is_refused_leaves_the_conversions_as_they_were() -> None:
    network = calibrated(Attention(), precision="w8a8", overrides={"norm": "w8a16"})
    before, answer = network.snapshot(), network(images(2))
    coarse = calibrated(Attention(), precision="w8a8").snapshot()
    name = next(key for key in coarse if key.endswith("query.output_quantizers.0.max"))
    with pytest.raises(CheckpointError, match="rounded here and not there"):
        network.restore({key: value for key, value in coarse.items() if key != name})
    assert_same_tensors(network.state_dict(), before)
    assert torch.equal(network(images(2)), answer)
