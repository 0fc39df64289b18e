"""16 bits between the layers of a transformer: where they are needed, what they cost, and that the rest keeps 8."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.errors import ConfigurationError
from lightning_quant.ladder.rungs.attention import AttentionPrecision
from lightning_quant.simulation.sensitivity import layer_sensitivity
from tests.helpers.networks import seeded
from tests.ladder.rungs.contexts import batches, context_of
from tests.ladder.rungs.test_mixed import apply, bits, raised_bits

WIDTH = 16


class Outliers(nn.Module):
    """A transformer block whose residual sum has one channel that is a thousand times as large as the others."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Conv2d(3, WIDTH, 2, stride=2)
        self.before, self.norm, self.after = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.wide, self.narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 4)
        seeded(self)
        with torch.no_grad():
            for norm, scale in ((self.before, 1.0), (self.norm, 500.0), (self.after, 500.0)):
                norm.weight.fill_(scale)
                norm.bias.zero_()
            self.out.bias[0] += 2000  # the norms that follow make the others as large as they were, and this one small
            self.norm.weight[0] = self.after.weight[0] = 1.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x).flatten(2).transpose(1, 2)
        y = self.before(x)
        scores = (self.query(y) @ self.key(y).transpose(1, 2) / math.sqrt(WIDTH)).softmax(-1)
        x = x + self.out(scores @ self.value(y))
        x = x + self.narrow(F.gelu(self.wide(self.norm(x))))
        return self.head(self.after(x).mean(1))


def test_it_suffices_where_the_sums_collapse_and_layers_with_weights_elsewhere_keep_8_bits() -> None:
    network, context = context_of(network=Outliers(), precision="w8a8")
    collapsed = context.measure()
    context.suffices = lambda metric: metric > collapsed + 5
    before = bits(network)
    changed = apply(AttentionPrecision(), network, context)
    assert context.measure() > collapsed + 5, changed
    after = raised_bits(network, before)
    assert after
    assert set(after.values()) == {16}
    assert not any("param" in name for name in after)
    assert not any(name.startswith(("query", "key", "value", "wide", "head")) for name in after)
    assert {str(one) for one in network.promoted.values()} == {"w8a16"}
    kinds = {type(network.network.get_submodule(name)) for name in network.promoted}
    assert not any(issubclass(kind, (nn.Linear, nn.Conv2d)) for kind in kinds)


def test_the_budget_bounds_what_is_computed_at_16_bits() -> None:
    for budget in (1e-6, 0.3, 1.0):
        network, context = context_of(network=Outliers(), precision="w8a8")
        shares = {one.layer: one.shares for one in layer_sensitivity(network, batches()) if one.part == "activations"}
        apply(AttentionPrecision(budget), network, context)
        spent = {layer: share for name in network.promoted for layer, share in shares[name].items()}
        assert sum(spent.values()) <= budget + 1e-9
        assert network.promoted


def test_it_is_skipped_where_activations_have_16_bits() -> None:
    network, context = context_of(network=Outliers(), precision="w4a16")
    assert AttentionPrecision().skip_reason(network, context) == "activations have 16 bits"
    network, context = context_of(network=Outliers(), precision="w4a8")
    assert AttentionPrecision().skip_reason(network, context) is None


@pytest.mark.parametrize("budget", [0, 1.5])
def test_a_budget_that_is_none_is_refused(budget: float) -> None:
    with pytest.raises(ConfigurationError, match="attention: budget="):
        AttentionPrecision(budget)
