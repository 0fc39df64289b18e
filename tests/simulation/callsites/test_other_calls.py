"""One place in the code, called in another way than the examples did: never answered by what does not fit."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.simulation.callsites.passes import noting
from lightning_quant.simulation.inputs import NetworkInputs
from lightning_quant.simulation.switched_off import unrounded
from tests.simulation.callsites.test_patterns import quantized


class Varying(nn.Module):
    """A function after a convolution; what it is called with depends on ``other``."""

    def __init__(self, function: Callable[[Varying, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.function = function
        self.other = False

    def either(self, usual: object, other: object) -> object:
        return other if self.other else usual

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.conv(x))


def in_turn(m: Varying, x: Tensor) -> Tensor:
    for function in (torch.sigmoid, F.relu) if m.other else (F.relu, torch.sigmoid):
        x = function(x)
    return x


OTHER_CALLS: dict[str, Callable[[Varying, Tensor], Tensor]] = {
    "one of two functions": lambda m, x: m.either(F.relu, F.gelu)(x),
    "two functions in turn": in_turn,
    "one of two operators": lambda m, x: m.either(torch.add, torch.sub)(x, x * x),
    "alpha": lambda m, x: torch.add(x, x * x, alpha=m.either(1, 3)),
    "no factor": lambda m, x: x * m.either(1, 3),
    "a factor of one": lambda m, x: x * m.either(3, 1),
    "rounding": lambda m, x: torch.div(x, 0.3, rounding_mode=m.either(None, "floor")),
    "stride": lambda m, x: F.conv2d(x, m.conv.weight.transpose(0, 1) * 1, stride=m.either(1, 2)),
    "dilation": lambda m, x: F.conv2d(x, m.conv.weight.transpose(0, 1) * 1, None, 1, 0, m.either(1, 2)),
    "output padding": lambda m, x: F.conv_transpose2d(x, m.conv.weight, stride=2, output_padding=m.either(0, 1)),
    "epsilon": lambda m, x: F.layer_norm(x, (8,), m.norm.weight, m.norm.bias, m.either(1e-5, 1.0)),
    "axes": lambda m, x: F.layer_norm(x, m.either((8,), (8, 8))),
    "epsilon by name": lambda m, x: F.instance_norm(x, eps=m.either(1e-5, 1.0)),
    "slope": lambda m, x: F.leaky_relu(x, m.either(0.1, 0.7)),
    "limits": lambda m, x: x.clamp(m.either(-0.2, -0.1), m.either(0.2, None)),
    "limits in tensors": lambda m, x: x.clamp(m.either(-0.2, torch.tensor(-0.1)), m.either(0.2, torch.tensor(0.1))),
    "axis": lambda m, x: torch.cat([x, x * 2], m.either(1, 2)) * 2,
    "mean": lambda m, x: x.mean(m.either(2, 3)),
    "out": lambda m, x: torch.mul(x.detach(), 2, out=torch.empty_like(x)) + x,
}
# Computed by the function itself, in float, where the module cannot, with a warning.
IN_FLOAT = {"one of two functions", "one of two operators", "alpha", "no factor", "rounding", "stride"}
IN_FLOAT |= {"dilation", "output padding", "epsilon", "axes", "epsilon by name", "limits in tensors"}


@pytest.mark.parametrize("name", OTHER_CALLS)
def test_computed_as_called(name: str) -> None:
    torch.manual_seed(1)
    network = Varying(OTHER_CALLS[name])
    calls = [NetworkInputs((torch.randn(2, 3, 8, 8),)) for _ in range(2)]
    float_network = copy.deepcopy(network).eval()
    known = quantized(network, calls)
    network.eval()
    with torch.no_grad(), unrounded(known):
        for other in (False, True, False):
            network.other = float_network.other = other
            with noting() as noted:
                actual = calls[0].call(network)
            expected = calls[0].call(float_network)
            assert actual.shape == expected.shape
            assert (actual - expected).abs().max() <= 2e-5 * expected.abs().max().clamp_min(1)
            assert bool(noted) is (name == "out" or (other and name in IN_FLOAT))
