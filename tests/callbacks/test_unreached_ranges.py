"""Ranges that a pass in the modules' own modes does not come to."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.callbacks.unreached_ranges import unreached_ranges
from tests.helpers.networks import calibrated, call

ROWS = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class TwoModes(nn.Module):
    """A head that decodes in eval mode, and one that only training has; a norm and a draw of random numbers."""

    def __init__(self, wants_targets: bool = False) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)
        self.wants_targets, self.passes = wants_targets, 0

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        self.passes += 1
        y: Tensor = self.head(F.dropout(self.norm(torch.tanh(self.body(x))), 0.5, self.training))
        if self.training and self.wants_targets:
            assert targets is not None
        return y if self.training else torch.relu(y) * 0.5


@pytest.mark.parametrize("training", [True, False])
def test_what_eval_mode_alone_computes_is_out_of_reach_of_training(training: bool) -> None:
    known = calibrated(TwoModes().eval(), call(ROWS))
    known.network.train(training)
    before = {name: value.clone() for name, value in known.network.state_dict().items() if isinstance(value, Tensor)}
    passes, state = known.network.passes, torch.get_rng_state()
    found = {id(one) for one in unreached_ranges(known)}
    names = [name for name, one in known.network.named_parameters() if id(one) in found]
    assert names == (["relu.output_quantizers.0.min", "relu.output_quantizers.0.max"] if training else [])
    # nothing is left of the pass
    assert known.network.passes == passes
    assert torch.equal(torch.get_rng_state(), state)
    after = known.network.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert known.network.training is training


def test_nothing_is_said_of_a_network_that_wants_more_in_training() -> None:
    known = calibrated(TwoModes(wants_targets=True).eval(), call(ROWS))
    known.network.train()
    assert unreached_ranges(known) == []
