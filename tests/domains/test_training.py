"""What the tasks of all domains train with, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_quant.domains.training import cosine_with_warmup, first_tensor, parameter_groups
from lightning_quant.errors import ConfigurationError


def test_schedule_by_hand() -> None:
    factors = [cosine_with_warmup(step, steps=13, warmup=3) for step in (0, 2, 3, 8, 13, 99)]
    assert factors == pytest.approx([0.25, 0.75, 1, 0.5, 0, 0])


def test_only_weights_with_dimensions_decay() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    network.register_parameter("min", nn.Parameter(torch.zeros(8, 1, 1, 1)))  # as a per-channel range has
    network.get_parameter("3.weight").requires_grad_(False)
    decay, keep = parameter_groups(network, 0.1)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    assert (decay["weight_decay"], keep["weight_decay"]) == (0.1, 0.0)
    assert [names[id(p)] for p in decay["params"]] == ["0.weight"]
    assert {names[id(p)] for p in keep["params"]} == {"0.bias", "1.weight", "1.bias", "3.bias", "min"}


def test_logits_are_found_in_what_networks_return() -> None:
    logits = torch.zeros(1, 2, 3, 4)
    for output in (logits, {"aux": torch.ones(1), "out": logits}, (logits, torch.ones(1)), [logits]):
        assert torch.equal(first_tensor(output), logits)
    assert torch.equal(first_tensor({"out": torch.ones(1), "logits": logits}, ("logits", "out")), logits)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (
            {"logits": torch.zeros(1)},
            r"returned a dict with the keys \['logits'\]; expected logits as a tensor",
        ),
        ((), "returned tuple; expected logits"),
        (None, "returned NoneType; expected logits"),
    ],
)
def test_other_outputs_are_refused(output: object, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        first_tensor(output)
