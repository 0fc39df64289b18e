"""Networks of any structure: steps drawn at random, nested, repeated and branching, compute and learn as in float."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_quant.simulation.switched_off import unrounded
from tests.helpers.networks import call
from tests.simulation.callsites.patterns import image
from tests.simulation.callsites.test_patterns import assert_same, quantized, run, state_of

pytestmark = pytest.mark.slow

# Steps of four channels in and out. A tuple nests: a branch around its inside, or its inside twice.
STEPS = (
    *("conv", "same conv", "relu", "silu", "shared", "norm", "batch norm", "layer norm", "dropout", "gate", "halves"),
    *("cat", "pool", "power", "length", "softmax", "pad", "mask", "in place", "attention", "no grad"),
)
PLANS: Any = st.recursive(
    st.sampled_from(STEPS),
    lambda inner: st.tuples(st.sampled_from(["branch", "twice"]), st.lists(inner, min_size=1, max_size=3)),
    max_leaves=6,
)


class Planned(nn.Module):
    """Computes the steps of a plan; each that needs weights has its own."""

    shared = nn.SiLU()

    def __init__(self, plan: list[Any]) -> None:
        super().__init__()
        self.plan = plan
        self.act = self.shared
        self.parts = nn.ModuleList(self._part(step) for step in plan)

    def _part(self, step: Any) -> nn.Module:
        if isinstance(step, tuple):
            return Planned(step[1])
        made = {
            "conv": lambda: nn.Conv2d(4, 4, 3, padding=1),
            "norm": lambda: nn.GroupNorm(2, 4),
            "batch norm": lambda: nn.BatchNorm2d(4),
            "dropout": lambda: nn.Dropout(0.3),
            "attention": lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        }
        return made[step]() if step in made else nn.Conv2d(4, 4, 1) if step == "same conv" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for step, part in zip(self.plan, self.parts, strict=True):
            x = self._taken(step, part, x)
        return x

    def _taken(self, step: Any, part: nn.Module, x: Tensor) -> Tensor:
        if isinstance(step, tuple):
            return x + part(x) if step[0] == "branch" else part(part(x))  # type: ignore[no-any-return]
        height, width = x.shape[-2:]
        match step:
            case "same conv":
                return F.conv2d(F.pad(x, (0, 1)), part.weight, part.bias)[..., :width]  # type: ignore[arg-type]
            case "relu":
                return F.relu(x)
            case "silu":
                return F.silu(x)
            case "shared":
                return self.act(x)  # type: ignore[no-any-return]
            case "layer norm":
                return F.layer_norm(x, (width,))
            case "gate":
                return x * torch.sigmoid(x.mean((2, 3), keepdim=True))
            case "halves":
                a, b = x.chunk(2, 1)
                return torch.cat([b, a * 0.5], 1)
            case "cat":
                return torch.cat([x, torch.tanh(x)], 1).unflatten(1, (2, 4)).mean(1)
            case "pool":
                return F.interpolate(F.avg_pool2d(x, 2), size=(height, width))
            case "power":
                return x.pow(2) * 0.1 + x**3 * 0.01
            case "length":
                return x / (x.norm(dim=1, keepdim=True) + 0.1)
            case "softmax":
                return x.flatten(2).softmax(-1).reshape(x.shape)
            case "pad":
                return F.pad(x, (1, 1, 1, 1), "reflect")[..., 1:-1, 1:-1] - 0.1
            case "mask":
                mask = x.new_zeros(x.shape[1:])
                mask[:, height // 2 :] = -1.0
                return x + mask
            case "in place":
                x = x + 0.5
                x *= 0.5
                return x.clamp_(-2, 2)
            case "attention":
                rows = x.flatten(2).transpose(1, 2)
                return part(rows, rows, rows, need_weights=False)[0].transpose(1, 2).reshape(x.shape)  # type: ignore[no-any-return]
            case "no grad":
                with torch.no_grad():
                    scale = x.abs().amax((2, 3), keepdim=True)
                return x / (1 + scale)
        return part(x)  # type: ignore[no-any-return]


class Whole(nn.Module):
    def __init__(self, plan: list[Any]) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 4, 3, 2, 1), Planned(plan), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)))  # type: ignore[no-any-return]


@settings(deadline=None, derandomize=True, max_examples=15)
@given(plan=st.lists(PLANS, min_size=1, max_size=4), training=st.booleans())
def test_nothing_rounded(plan: list[Any], training: bool) -> None:
    """Batch norms are folded, so with one of them training is compared in its eval mode.

    In 64 bits, as nested norms make much of what 32 bits round.
    """
    torch.manual_seed(1)
    network = Whole(plan).eval()
    float_network = copy.deepcopy(network).double()
    known = quantized(network, [call(image())])
    network.double()
    inputs = call(image().double())
    if not any(isinstance(module, nn.BatchNorm2d) for module in float_network.modules()):
        float_network.load_state_dict(state_of(network, float_network))
        for one in (network, float_network):
            one.train(training)
    with unrounded(known):
        expected, expected_gradients, expected_state = run(float_network, inputs)
        actual, gradients, state = run(network, inputs)
    assert_same(actual[0], expected[0], False, "output")
    assert torch.equal(state, expected_state)
    for name, gradient in expected_gradients.items():
        if name in gradients and not any(isinstance(one, nn.BatchNorm2d) for one in float_network.modules()):
            assert_same(gradients[name], gradient, False, name)
