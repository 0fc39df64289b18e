"""One rung on top of another, each rolled back bit for bit, interrupted, and trained on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lightning_quant.errors import LightningQuantError
from lightning_quant.ladder.registry import parse_rungs
from lightning_quant.ladder.rung import Rung, RungContext
from lightning_quant.simulation.calibrate import calibrate
from lightning_quant.simulation.network import QuantizedNetwork
from tests.callbacks.rung_cases import images, unequal
from tests.helpers.small import assert_same_tensors
from tests.ladder.rungs.contexts import batches, context_of
from tests.ladder.rungs.test_bn_reestimation import normed

pytestmark = pytest.mark.slow

RUNGS: list[Any] = [
    "tf_enhanced",
    "cle",
    "seq_mse",
    {"adaround": {"iterations": 5}},
    {"mixed": {"budget": 1.0}},
    "bias_correction",
    "bn_reestimation",
    "percentile",
    {"rounding": {"iterations": 5}},  # on other ranges: what adaround put on its grid is rounded already
]


def apply(rung: Rung, network: QuantizedNetwork, context: RungContext) -> None:
    with torch.no_grad():
        rung.apply(network, context)


def ends(network: QuantizedNetwork) -> dict[str, bool]:
    """Which parameters learn, and which ranges may be computed again."""
    flags = {name: value.requires_grad for name, value in network.named_parameters()}
    modules = network.network.named_modules()
    return flags | {name: module._allow_overwrite for name, module in modules if hasattr(module, "_allow_overwrite")}


@pytest.mark.parametrize("precision", ["w4a8", "w8a8"])
def test_every_state_on_the_way_can_be_restored(precision: str) -> None:
    network, context = context_of(network=normed(), precision=precision)
    states = [(network.snapshot(), network(images()).detach())]
    parameters, flags = dict(network.named_parameters()), ends(network)
    for rung in parse_rungs(RUNGS):
        if rung.skip_reason(network, context) is None:
            apply(rung, network, context)
            states.append((network.snapshot(), network(images()).detach()))
            (before, _), (after, _) = states[-2:]
            with pytest.raises(AssertionError):  # it has changed something
                assert_same_tensors(after, before)
    assert len(states) == len(RUNGS) + (precision == "w4a8")
    for snapshot, answer in (*reversed(states), *states[::3]):
        network.restore(snapshot)
        assert_same_tensors(network.state_dict(), snapshot)
        assert torch.equal(network(images()), answer)
        assert ends(network) == flags
    assert all(value is parameters[name] for name, value in network.named_parameters())


@pytest.mark.parametrize("precision", ["w4a8", "w8a8"])
def test_the_recipe_can_be_restored_from_any_state(precision: str) -> None:
    network, context = context_of(network=normed(), precision=precision)
    snapshot = network.snapshot()
    for rung in parse_rungs(RUNGS):
        if rung.skip_reason(network, context) is None:
            apply(rung, network, context)
    with torch.no_grad():
        network.reset_to(context.prepared.network)
    apply(parse_rungs(["ptq"])[0], network, context)
    assert_same_tensors(network.state_dict(), snapshot)


def test_a_network_that_every_rung_has_changed_can_be_trained() -> None:
    network, context = context_of(network=normed(), precision="w4a8")
    before = copy.deepcopy(context.float_network.state_dict())
    for rung in parse_rungs(RUNGS[1:-1]):
        apply(rung, network, context)
    start = {name: value.detach().clone() for name, value in network.named_parameters()}
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    targets = context.float_network(images()).detach()
    losses = []
    for _ in range(10):
        losses.append(F.mse_loss(network(images()), targets))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    still = {name for name, value in network.named_parameters() if torch.equal(value, start[name])}
    assert still == {name for name, value in network.named_parameters() if not value.requires_grad}
    assert_same_tensors(context.float_network.state_dict(), before)


def _interruptions() -> list[Any]:
    names = [rung if isinstance(rung, str) else next(iter(rung)) for rung in RUNGS]
    return [
        pytest.param(rung, passes, id=f"{name}-{passes}")
        for rung, name in zip(RUNGS, names, strict=True)
        for passes in (2, 6, 9)
    ]


@pytest.mark.parametrize(("rung", "passes"), _interruptions())
def test_an_interrupted_rung_is_rolled_back(rung: Any, passes: int) -> None:
    network, context = context_of(network=normed(), precision="w4a8")
    snapshot, flags, answer = network.snapshot(), ends(network), network(images())
    places = [(name, id(module)) for name, module in network.network.named_modules()]
    (rung,) = parse_rungs([rung])
    done = 0

    def fail(*_: Any) -> None:
        nonlocal done
        done += 1
        if done == passes:
            raise RuntimeError("out of memory")

    handle = network.network.last.register_forward_pre_hook(fail)
    try:
        apply(rung, network, context)
    except (LightningQuantError, RuntimeError):
        assert done == passes
    handle.remove()
    network.restore(snapshot)
    assert ends(network) == flags
    assert [(name, id(module)) for name, module in network.network.named_modules()] == places
    assert torch.equal(network(images()), answer)
    with torch.no_grad():
        calibrate(network, batches())
    assert_same_tensors(network.state_dict(), snapshot)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.network.modules())


@pytest.mark.parametrize("percentile", [99.9, 99.99])
def test_percentiles_suffice_where_extremes_do_not(percentile: float) -> None:
    network, context = context_of(precision="w8a8")
    first, *others = batches()
    first = first.map(torch.clone)
    first.args[0][0, 0, 0, 0] = 300.0  # one broken pixel in the calibration data
    context.samples = lambda: iter([first, *others])
    reached = {}
    for rung in parse_rungs(["min_max", {"percentile": {"percentile": percentile}}]):
        apply(rung, network, context)
        reached[rung.name] = context.measure()
    assert reached["min_max"] < 25
    assert reached["percentile"] > 29


def test_equalization_on_top_of_other_repairs_starts_from_float_again() -> None:
    once, context = context_of(unequal, precision="w4a8")
    (cle, *others) = parse_rungs(["cle", "seq_mse", "bias_correction", {"mixed": {"budget": 1.0}}])
    apply(cle, once, context)
    twice, context = context_of(unequal, precision="w4a8")
    for rung in (cle, *others, cle):
        apply(rung, twice, context)
    assert_same_tensors(twice.state_dict(), once.state_dict())
