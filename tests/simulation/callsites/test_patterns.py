"""With nothing rounded, a quantized network computes, learns and draws what the float one does: pattern by pattern."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.precision import Precision
from lightning_quant.recipe import QuantRecipe
from lightning_quant.simulation.build import quantize
from lightning_quant.simulation.calibrate import calibrate
from lightning_quant.simulation.callsites.attributes import is_range
from lightning_quant.simulation.inputs import NetworkInputs, tensors_in
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.switched_off import unrounded
from tests.helpers.members import in_turn
from tests.simulation.callsites.patterns import PATTERNS, Pattern

# Sums in another order, relative to the largest value; a wrong one is off by far more.
ROUNDING = 2e-5


def made(pattern: Pattern) -> tuple[nn.Module, list[NetworkInputs]]:
    torch.manual_seed(1)
    network, calls = pattern.network(), pattern.calls()
    with torch.no_grad():
        calls[0].call(network)  # lazy layers
    return network, calls


def quantized(network: nn.Module, calls: list[NetworkInputs]) -> QuantizedNetwork:
    recipe = QuantRecipe(Precision.parse("w8a8"), calibration_samples=6)
    known = quantize(network, calls[0].first(1), recipe, [call.first(1) for call in calls[1:]])
    calibrate(known, calls)
    return known


def run(network: nn.Module, call: NetworkInputs) -> tuple[list[Tensor], dict[str, Tensor], Tensor]:
    """Outputs, gradients by the float network's names, and where the random numbers stand afterwards."""
    torch.manual_seed(2)
    network.zero_grad()
    outputs = [tensor for tensor in tensors_in(call.call(network)) if tensor.is_floating_point()]
    sum((output.square().sum() for output in outputs), torch.zeros(())).backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    return [output.detach() for output in outputs], gradients, torch.get_rng_state()


def assert_same(actual: Tensor, expected: Tensor, exact: bool, what: str) -> None:
    assert actual.shape == expected.shape, what
    if exact:
        assert torch.equal(actual, expected), what
    else:
        assert (actual - expected).abs().max() <= ROUNDING * expected.abs().max().clamp_min(1), what


@pytest.mark.parametrize(("name", "training"), in_turn(PATTERNS, [True, False]))
def test_nothing_rounded(name: str, training: bool) -> None:
    pattern = PATTERNS[name]
    network, calls = made(pattern)
    float_network = copy.deepcopy(network)
    known = quantized(network, calls)
    names = [one for one, _ in float_network.named_parameters()]
    assert [one for one, _ in network.named_parameters()][: len(names)] == names
    assert type(network).__name__ == type(float_network).__name__
    assert isinstance(network, type(float_network))
    float_network.load_state_dict(state_of(network, float_network))  # counters and means that calibration moved
    for one in (network, float_network):
        one.train(training)
    with unrounded(known):
        for call in calls:
            expected, expected_gradients, expected_state = run(float_network, call)
            actual, gradients, state = run(network, call)
            assert len(actual) == len(expected)
            for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
                assert_same(a, b, not pattern.split, f"output {index}")
            assert expected_gradients.keys() <= gradients.keys()
            assert not {key for key in gradients if key in names} - expected_gradients.keys()
            for key, gradient in expected_gradients.items():
                assert_same(gradients[key], gradient, not pattern.split, key)
            assert torch.equal(state, expected_state)


def state_of(network: nn.Module, like: nn.Module) -> dict[str, Any]:
    return {name: network.state_dict()[name] for name in like.state_dict()}


@pytest.mark.parametrize("name", PATTERNS)
def test_rounded(name: str) -> None:
    """Quantized for real: near float, other than float, and every weight and range that is used gets a gradient."""
    network, calls = made(PATTERNS[name])
    float_network = copy.deepcopy(network).eval()
    quantized(network, calls)
    network.eval()
    float_network.load_state_dict(state_of(network, float_network))
    expected, expected_gradients, _ = run(float_network, calls[0])
    actual, gradients, _ = run(network, calls[0])
    for a, b in zip(actual, expected, strict=True):
        assert not torch.equal(a, b)
        assert (a - b).norm() <= 0.25 * b.norm().clamp_min(0.1)
    assert expected_gradients.keys() <= gradients.keys()
    assert not {name for name, _ in network.named_parameters() if not is_range(name)} - set(
        dict(float_network.named_parameters())
    )
    assert any(key not in expected_gradients for key in gradients)  # the ranges


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "way"),
    in_turn((one for one in PATTERNS if one not in ("hooks", "weight norm", "orthogonal")), ["deepcopy", "pickle"]),
)
def test_copies(name: str, way: str) -> None:
    network, calls = made(PATTERNS[name])
    if way == "pickle":
        try:
            pickle.dumps(network)
        except (AttributeError, TypeError, pickle.PicklingError):
            pytest.skip("the float network cannot be pickled either: it holds a lambda")
    quantized(network, calls)
    network.eval()
    other = copy.deepcopy(network) if way == "deepcopy" else pickle.loads(pickle.dumps(network))
    expected = run(copy.deepcopy(network), calls[0])[0]
    for a, b in zip(run(other, calls[0])[0], expected, strict=True):
        assert torch.equal(a, b)
    known = QuantizedNetwork.of(other)
    assert known is not None
    assert known.network is other
    assert known.sim.model.network is other
