"""The optimizer that the worked domains share: its schedule, and which parameters decay."""

import pytest
import torch
from torch import nn

from lightning_quant.domains.optimization import check_optimization, cosine_with_warmup, parameter_groups
from lightning_quant.errors import ConfigurationError


def test_schedule_by_hand() -> None:
    factors = [cosine_with_warmup(step, steps=13, warmup=3) for step in (0, 2, 3, 8, 13, 99)]
    assert factors == pytest.approx([0.25, 0.75, 1, 0.5, 0, 0])


def test_only_weights_with_dimensions_decay() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    network.register_parameter("min", nn.Parameter(torch.zeros(8, 1, 1, 1)))  # as a per-channel range has
    network.get_parameter("3.weight").requires_grad_(False)
    decay, keep = parameter_groups(network, 0.1)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    assert (decay["weight_decay"], keep["weight_decay"]) == (0.1, 0.0)
    assert [names[id(p)] for p in decay["params"]] == ["0.weight"]
    assert {names[id(p)] for p in keep["params"]} == {"0.bias", "1.weight", "1.bias", "3.bias", "min"}


@pytest.mark.parametrize("wrong", [(0, 0, 0), (float("nan"), 0, 0), (1, -1, 0), (1, 0, 1), (1, 0, -0.1)])
def test_what_is_out_of_range_is_refused(wrong: tuple[float, float, float]) -> None:
    check_optimization(1e-3, 0, 0)
    with pytest.raises(ConfigurationError, match="expected"):
        check_optimization(*wrong)
