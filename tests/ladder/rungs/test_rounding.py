"""Learned rounding: what it reaches, what it leaves alone, and how it goes on."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_quant.errors import CalibrationError, ConfigurationError
from lightning_quant.ladder.registry import parse_rungs
from lightning_quant.ladder.rung import RungContext
from lightning_quant.ladder.rungs.blocks import learnable_layers
from lightning_quant.ladder.rungs.rounding import LearnedRounding, _dropped
from lightning_quant.ladder.rungs.soft_weight import SoftWeight
from lightning_quant.recipe import QuantRecipe
from lightning_quant.simulation.build import quantize
from lightning_quant.simulation.calibrate import calibrate
from lightning_quant.simulation.calibration_cache import StatisticsCache
from lightning_quant.simulation.inputs import NetworkInputs
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.precisions import quantized_layers
from tests.callbacks.rung_cases import halfway, images
from tests.helpers.small import assert_same_tensors
from tests.ladder.rungs.contexts import context_of


def apply(network: QuantizedNetwork, context: RungContext, **options: Any) -> str:
    with torch.no_grad():
        return LearnedRounding(**options).apply(network, context)


def weights(network: QuantizedNetwork) -> dict[str, torch.Tensor]:
    layers = quantized_layers(network)
    return {
        n: layer.weight.detach().clone() for n, layer in layers.items() if isinstance(layer, (nn.Conv2d, nn.Linear))
    }


@pytest.mark.parametrize("unit", ["block", "layer"])
def test_each_weight_becomes_an_integer_beside_it_and_nothing_else_changes(unit: Any) -> None:
    network, context = context_of(halfway, precision="w4a8")
    before, state, quality = weights(network), network.snapshot(), context.measure()
    scales = {
        name: layer.param_quantizers["weight"].get_scale()
        for name, layer in quantized_layers(network).items()
        if name in before
    }
    said = apply(network, context, iterations=150, unit=unit)
    assert said.endswith("in 1 blocks" if unit == "block" else "in 3 blocks")
    turned = total = 0
    for name, weight in weights(network).items():
        layer, scale = network.network.get_submodule(name), scales[name]
        steps = weight / scale
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)  # on the grid: rounded again it is the same
        torch.testing.assert_close(layer.param_quantizers["weight"](weight), weight)
        inside = (before[name] / scale).clamp(-8, 7)
        assert bool(((steps - inside).abs() <= 1 + 1e-4).all())
        turned += int((steps.round() != (before[name] / scale).round().clamp(-8, 7)).sum())
        total += weight.numel()
    assert said.startswith(f"turned {turned / total:.1%} ")
    assert turned / total > 0.01
    assert context.measure() > quality + 3
    for name, value in network.named_parameters():
        assert value.grad is None
        if name.endswith(".bias"):
            assert torch.equal(value, state[name])


def test_it_begins_at_the_nearest_rounding_and_ends_decided() -> None:
    network, _ = context_of(precision="w4a8")
    layer = network.network.head
    soft = SoftWeight(layer)
    inside = layer.weight.detach().clamp(soft.scale * -8, soft.scale * 7)
    torch.testing.assert_close(soft.soft().detach(), inside, rtol=0, atol=float(1e-3 * soft.scale.max()))
    torch.testing.assert_close(soft.hard(), layer.param_quantizers["weight"](layer.weight).detach())
    assert soft.turned() == 0
    assert float(soft.penalty(20.0).detach()) > 0
    soft.decide(torch.ones_like(soft.upwards))
    assert float(soft.penalty(2.0)) == 0
    assert bool((soft.hard() >= layer.param_quantizers["weight"](layer.weight)).all())


def test_the_papers_setting_comes_to_what_aimets_adaround_comes_to() -> None:
    reached = {}
    for options in (
        {"adaround": {"iterations": 1000, "samples": 128}},
        {"rounding": {"iterations": 1000, "samples": 128, "batch": 32, "unit": "layer", "drop": 1.0}},
    ):
        network, context = context_of(halfway, precision="w4a16")
        (rung,) = parse_rungs([options])
        with torch.no_grad():
            rung.apply(network, context)
        reached[rung.name] = context.measure()
    assert reached["rounding"] > reached["adaround"] - 1, reached


@pytest.mark.parametrize("drop", [0.0, 0.3, 1.0])
def test_a_share_of_the_activations_is_not_rounded(drop: float) -> None:
    network, _ = context_of(precision="w4a8")
    chain = network.network
    inner = torch.randn(64, 16, 8, 8, generator=torch.Generator().manual_seed(3)).abs()
    with torch.no_grad():
        rounded = chain.relu(inner)
        with _dropped(chain, drop, torch.Generator().manual_seed(0)):
            one, other = chain.relu(inner), chain.relu(inner)
        assert torch.equal(chain.relu(inner), rounded)
    apart = rounded != inner
    assert apart.float().mean() > 0.9
    assert bool(((one == inner) | (one == rounded)).all())
    assert float((one == inner)[apart].float().mean()) == pytest.approx(drop, abs=0.01)
    assert torch.equal(one, other) == (drop in (0.0, 1.0))  # others each time


class Ended(Exception):
    """Stands for the end of the process."""


def test_a_run_that_was_ended_goes_on_with_the_next_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"iterations": 30, "unit": "layer"}
    learned: list[tuple[str, ...]] = []
    learn = LearnedRounding._learn

    def counted(self: Any, network: Any, block: Any, *rest: Any) -> None:
        if len(learned) == 2 and end:
            raise Ended
        learned.append(block.layers)
        learn(self, network, block, *rest)

    def fresh() -> tuple[QuantizedNetwork, RungContext]:
        network, context = context_of(halfway, precision="w4a8")
        return network, replace(context, cache=StatisticsCache(tmp_path))

    monkeypatch.setattr(LearnedRounding, "_learn", counted)
    end = False
    network, context = context_of(halfway, precision="w4a8")
    apply(network, context, **options)
    whole = network.snapshot()
    learned.clear()
    end = True
    network, context = fresh()
    with pytest.raises(Ended):
        apply(network, context, **options)
    end = False
    network, context = fresh()
    apply(network, context, **options)
    assert learned == [("first",), ("second",), ("head",)]
    assert_same_tensors(network.snapshot(), whole)

    network, context = fresh()  # a different question
    apply(network, context, **{**options, "iterations": 31})
    assert len(learned) == 6
    network, context = context_of(halfway, precision="w8a8")
    apply(network, replace(context, cache=StatisticsCache(tmp_path)), **options)
    assert len(learned) == 9

    for path in tmp_path.rglob("rounding-*/1.npz"):
        path.write_bytes(path.read_bytes()[:100])
    network, context = fresh()
    apply(network, context, **options)
    assert learned[9:] == [("second",)]
    assert_same_tensors(network.snapshot(), whole)


def test_layers_that_share_a_weight_or_have_none_are_left(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(192, 192), nn.Linear(192, 192), nn.Linear(192, 4)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.b(torch.relu(self.a(x.flatten(1)))))

    network, context = context_of(network=Tied(), precision="w4a8")
    before = copy.deepcopy(network.network.a.weight)
    apply(network, context, iterations=20)
    assert network.network.a.weight is network.network.b.weight
    assert torch.equal(network.network.a.weight, before)
    bare, context = context_of(network=nn.Sequential(nn.ReLU(), nn.Flatten()), precision="w4a8")
    assert LearnedRounding().skip_reason(bare, context) == "no convolution or linear layer has rounded weights"


class Masked(nn.Module):
    """Attention with a mask of -inf, which is an argument of the block."""

    def __init__(self) -> None:
        super().__init__()
        self.block = MaskedBlock()
        self.head = nn.Sequential(nn.Linear(192, 32), nn.ReLU(), *[nn.Linear(32, 32) for _ in range(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(2)
        mask = torch.full((3, 3), -torch.inf).triu(1)
        return self.head(self.block(x, mask).flatten(1))


class MaskedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        scores = self.q(x) @ self.k(x).transpose(1, 2) / 8 + mask
        return torch.softmax(scores, -1) @ self.v(x)


class Scores(nn.Module):
    """Returns scores of which some are -inf."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(192, 32), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.second(torch.relu(self.first(x.flatten(1))))
        return scores.masked_fill(torch.tensor([False, True, False, False]), -torch.inf)


class Unbounded(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(Scores(), nn.Softmax(-1), *[nn.Linear(4, 4) for _ in range(5)])


@pytest.mark.parametrize("kind", [Masked, Unbounded])
def test_what_is_infinite_does_not_decide(kind: Any) -> None:
    torch.manual_seed(0)
    network, context = context_of(network=kind(), precision="w4a8")
    before = context.measure()
    said = apply(network, context, iterations=150)
    assert int(said.split()[-2]) > 1  # what is infinite goes into a block, or comes out
    assert context.measure() > before + 0.5


class Steep(nn.Module):
    """Its gradient is NaN, as that of a division by zero that is masked out behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(192, 32), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x.flatten(1)))
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient * torch.nan)
        return self.head(x)


def test_without_a_finite_gradient_it_fails() -> None:
    network, context = context_of(network=Steep(), precision="w4a8")
    with pytest.raises(CalibrationError, match="rounding: the network has no finite gradient"):
        apply(network, context, iterations=5)


class Halves(nn.Module):
    """Two calls of a step, each of a part of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Sequential(nn.Linear(64, 32), nn.ReLU()), nn.Linear(32, 4)

    def forward(self, images: torch.Tensor | None = None, code: torch.Tensor | None = None) -> torch.Tensor:
        return self.decoder(code) if images is None else self.encoder(images.flatten(1)[:, :64])


def test_parts_that_only_some_calls_come_to() -> None:
    torch.manual_seed(0)
    made = Halves().eval()
    calls = []
    for batch in images().split(32):
        calls += [NetworkInputs((batch,), last=False), NetworkInputs((), {"code": made(batch).detach()})]
    recipe = QuantRecipe(precision="w4a8", calibration_samples=128)
    network = quantize(made, calls[0].first(1), recipe, [calls[1].first(1)]).eval()
    calibrate(network, calls)
    before = weights(network)
    context = RungContext(made, calls[0], lambda: iter(calls), lambda: 0.0, None, lambda _: 0.0)
    assert apply(network, context, iterations=60).endswith("in 2 blocks")
    assert all(not torch.equal(value, before[name]) for name, value in weights(network).items())


def test_a_weight_that_an_embedding_has_as_well_is_left() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.inner, self.scores = nn.Embedding(10, 16), nn.Linear(16, 16), nn.Linear(16, 10, bias=False)
            self.scores.weight = self.words.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.scores(torch.relu(self.inner(self.words(ids))))

    ids = torch.arange(10).repeat(2, 1)
    network = quantize(Words().eval(), NetworkInputs((ids[:1],)), QuantRecipe(precision="w4a8", calibration_samples=2))
    calibrate(network.eval(), [NetworkInputs((ids,))])
    assert list(learnable_layers(network)) == ["inner"]


def test_fewer_samples_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    collect = LearnedRounding._samples

    def counted(*arguments: Any) -> Any:
        found = collect(*arguments)
        seen.append(len(found))
        return found

    monkeypatch.setattr(LearnedRounding, "_samples", counted)
    network, context = context_of(precision="w4a8")
    apply(network, context, iterations=2, samples=128, batch=8)
    apply(network, context, iterations=2, samples=128, batch=8, memory_gb=1e-4)
    assert seen == [16, 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, r"iterations=0: expected a whole number"),
        ({"batch": 1.5}, r"batch=1\.5: expected a whole number"),
        ({"unit": "stage"}, r"unit='stage': expected 'block' or 'layer'"),
        ({"drop": 2}, r"drop=2: expected a share from 0 to 1"),
        ({"memory_gb": 0}, r"memory_gb=0: expected a number above 0"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        parse_rungs([{"rounding": options}])
