"""What a network keeps from pass to pass, and a change that fails half way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.precision import Precision
from lightning_quant.recipe import QuantRecipe
from lightning_quant.simulation.build import quantize
from lightning_quant.simulation.calibrate import calibrate
from lightning_quant.simulation.inplace import state_kept, undone_on_error
from tests.helpers.networks import call

RECIPE = QuantRecipe(Precision.parse("w8a8"), calibration_samples=4)


class Keeping(nn.Module):
    mean: Tensor
    history: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("history", torch.zeros(0, 3))
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + x.mean(0)  # assigned, not changed in place
        self.history = torch.cat([self.history, x])  # of another shape
        self.seen.append(len(x))
        return x - self.mean


def test_reassigned_buffers_are_restored() -> None:
    network = nn.Sequential(Keeping(), nn.BatchNorm1d(3))
    kept = network[0]
    assert isinstance(kept, Keeping)
    before = kept.mean, kept.history, kept.seen
    with state_kept(network):
        network(torch.ones(4, 3))
        assert len(kept.history) == 4
    assert (kept.mean, kept.history, kept.seen) == before  # the very objects
    assert kept.mean.sum() == 0
    assert kept.seen == []
    assert network[1].num_batches_tracked == 0


def test_hooks_can_be_removed_after_a_failed_change() -> None:
    network = nn.Sequential(nn.Linear(3, 3))
    calls: list[int] = []
    handle = network[0].register_forward_hook(lambda *_: calls.append(1))

    @undone_on_error(network)
    def change() -> None:
        network[0].register_forward_hook(lambda *_: calls.append(2))
        network.append(nn.ReLU())
        raise KeyError

    with pytest.raises(KeyError):
        change()
    assert len(network) == 1
    network(torch.ones(1, 3))
    assert calls == [1]
    handle.remove()
    network(torch.ones(1, 3))
    assert calls == [1]


class Convolution(nn.Module):
    """As in a library: one activation for all, an attribute of the class."""

    activation = nn.SiLU()

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.act = self.activation

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))  # type: ignore[no-any-return]


def test_networks_that_share_an_activation_are_independent() -> None:
    torch.manual_seed(0)
    teacher, student = (nn.Sequential(Convolution(), Convolution()) for _ in range(2))
    images = torch.randn(4, 3, 8, 8)
    expected = teacher(images)
    quantized = quantize(student, call(images), RECIPE)
    assert torch.equal(teacher(images), expected)
    assert type(Convolution.activation) is nn.SiLU
    assert {"0.act.mul", "1.act.mul"} <= dict(quantized.network.named_modules()).keys()
    both = quantize(teacher, call(images), RECIPE)
    assert next(both.sim.quantizers()) is not next(quantized.sim.quantizers())


class Listener:
    def __init__(self) -> None:
        self.heard: list[int] = []

    def hear(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.heard.append(output.shape[1])


def test_hooks_on_a_shared_module_are_still_called() -> None:
    act, listener = nn.ReLU(), Listener()
    network = nn.Sequential(nn.Linear(4, 3), act, nn.Linear(3, 2), act)
    handle = act.register_forward_hook(listener.hear)
    known = quantize(network, call(torch.randn(2, 4)), RECIPE)
    calibrate(known, [call(torch.randn(2, 4))])
    listener.heard.clear()
    network(torch.randn(2, 4))
    assert listener.heard == [3, 2]
    handle.remove()
    network(torch.randn(2, 4))
    assert listener.heard == [3, 2]


def test_a_shared_module_with_weights_stays_shared() -> None:
    shared = nn.Linear(3, 3)
    network = nn.Sequential(shared, nn.ReLU(), shared)
    quantize(network, call(torch.randn(4, 3)), RECIPE)
    assert network[0] is network[2] is shared
