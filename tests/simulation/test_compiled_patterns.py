"""The patterns of `callsites/patterns.py`: `Compiled`, they compute and learn what they do otherwise."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.simulation.callsites.attributes import is_range
from lightning_quant.simulation.compiled import Compiled, Why
from tests.simulation.callsites.patterns import PATTERNS
from tests.simulation.callsites.test_patterns import made, quantized, run

pytestmark = pytest.mark.slow

# What a graph would lose, or the compiler does not take, and why.
NOT_COMPILED = {
    "values": Why.COMPILER,
    "checkpointed block, reentrant": Why.COMPILER,
    "checkpointed functions, reentrant": Why.COMPILER,
    "counter": Why.COMPILER,
    "auxiliary loss in an attribute": Why.ATTRIBUTE,
    "hooks": Why.HOOK,
    "weight norm of old": Why.HOOK,
    "pruned": Why.HOOK,
    "moving mean": Why.BUFFER,
    "rows of a buffer": Why.BUFFER,
}
# The compiler computes a resize in other steps: a number on the border falls the other way.
A_STEP = {"interpolation": 0.02}
# Compiled in every run of the suite, for a minute's sake: one of each kind of what a graph treats in a way of its own.
ALWAYS = {
    *NOT_COMPILED,
    *A_STEP,
    "functional dropout",
    "two modes",
    "arguments of every kind",
    "custom backward",
    "checkpointed block",
    "in place",
    "shared parts",
    "weights as parameters",
    "norms",
    "quotient",
    "attention",
}


def near(actual: Tensor, expected: Tensor, what: str, share: float = 1e-4) -> None:
    assert actual.shape == expected.shape, what
    assert (actual - expected).abs().max() <= share * expected.abs().max().clamp_min(1), what


def attributes(network: nn.Module) -> dict[str, object]:
    """Flags and numbers that modules keep."""
    return {
        f"{name}.{key}": value
        for name, module in network.named_modules()
        for key, value in vars(module).items()
        if type(value) in (bool, int, float, str) and not key.startswith("_")
    }


def test_what_is_always_compiled_is_a_pattern() -> None:
    assert PATTERNS.keys() >= ALWAYS


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.torture) for name in PATTERNS]
)
def test_compiled(name: str) -> None:
    network, calls = made(PATTERNS[name])
    quantized(network, calls)
    twin = copy.deepcopy(network)
    network.train()
    twin.train()
    compiled = Compiled(network, {"backend": "aot_eager"})
    with compiled.active():
        for turn in range(2):
            for call in calls:
                actual, gradients, state = run(network, call)
                expected, expected_gradients, expected_state = run(twin, call)
                for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
                    near(a, b, f"output {index} of turn {turn}", A_STEP.get(name, 1e-4))
                assert gradients.keys() == expected_gradients.keys()
                for key, gradient in expected_gradients.items():
                    near(gradients[key], gradient, key, 2e-2 if is_range(key) else A_STEP.get(name, 1e-4))
                assert torch.equal(state, expected_state)
    for key, buffer in twin.named_buffers():
        near(network.get_buffer(key).float(), buffer.float(), key)
    assert attributes(network) == attributes(twin)
    assert (compiled.why_not and compiled.why_not.why) is NOT_COMPILED.get(name)
