"""Whole networks on the short path against AIMET's own classes."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

import lightning_quant as lq
from lightning_quant.domains.segmentation.ffnet import ffnet_nano
from lightning_quant.simulation import aimet
from lightning_quant.simulation.calibrate import calibrate
from lightning_quant.simulation.inputs import NetworkInputs
from lightning_quant.simulation.network import QuantizedNetwork
from tests.helpers.members import in_turn
from tests.helpers.networks import Body, calibrated, images, quantized
from tests.helpers.small import SmallModule, small_loader

aimet.load()

from lightning_quant.simulation.fast.biases import unrounded_biases  # noqa: E402
from lightning_quant.simulation.fast.short_path import accelerate, slow_down  # noqa: E402

pytestmark = pytest.mark.slow


class PositiveKeys(nn.Module):
    """A product that multiplies with the outputs of a ReLU, for which their grid is made symmetric."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys = nn.Linear(64, 16), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1, 2)
        return self.queries(x) @ self.keys(x).relu().transpose(1, 2)


MakeTrainer = Callable[..., Trainer]
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ffnet_nano": lambda: ffnet_nano(),
    "lraspp": lambda: lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=19),
    "converted": PositiveKeys,  # third: among the members that the suite runs, of 16 bits and learned ranges
    "resnet": lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 2, stride=2), nn.PReLU(), nn.Conv2d(4, 2, 1)),
    "normed": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.GroupNorm(2, 4),
        nn.ZeroPad2d(1),
        nn.ReLU6(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.LazyLinear(3),
    ),
}


def call_of(name: str, seed: int = 0) -> NetworkInputs:
    return NetworkInputs((torch.randn(2, 3, 32, 64, generator=torch.Generator().manual_seed(seed)),))


def made(name: str, precision: str = "w8a8", **recipe: Any) -> QuantizedNetwork:
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    network(*call_of(name).args)  # lazy layers
    return quantized(network, call_of(name), precision=precision, **recipe).eval()


@functools.lru_cache(maxsize=2)  # those of the network whose tests are running
def known(name: str, precision: str) -> QuantizedNetwork:
    """A calibrated network, to be copied."""
    network = made(name, precision)
    calibrate(network, [call_of(name, 1)])
    return network


def step(network: QuantizedNetwork, inputs: NetworkInputs) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Loss, gradients and outputs without gradients. AIMET rounds no biases: see test_biases."""
    with unrounded_biases(network.modules()):
        return _step(network, inputs)


def _step(network: QuantizedNetwork, inputs: NetworkInputs) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    network.zero_grad()
    output = inputs.call(network)
    loss = (output["out"] if isinstance(output, dict) else output).square().mean()
    loss.backward()
    gradients = {key: p.grad.clone() for key, p in network.named_parameters() if p.grad is not None}
    with torch.no_grad():
        output = inputs.call(network)
    return loss.detach(), gradients, output["out"] if isinstance(output, dict) else output


@pytest.mark.parametrize(("name", "precision", "learned"), in_turn(NETWORKS, ["w8a8", "w4a16"], [True, False]))
def test_losses_and_gradients_are_those_of_aimet(name: str, precision: str, learned: bool) -> None:
    network = copy.deepcopy(known(name, precision))
    network.learn_ranges(learned)
    slow_down(network)
    loss, gradients, output = step(network, call_of(name))
    accelerate(network)
    fast_loss, fast_gradients, fast_output = step(network, call_of(name))
    assert torch.equal(fast_loss, loss)
    assert torch.equal(fast_output, output)
    assert fast_gradients.keys() == gradients.keys()
    for key, gradient in gradients.items():
        if key.endswith((".min", ".max")):
            # sums that cancel are compared to the largest of their layer; exactness is shown in test_kernels
            assert (fast_gradients[key] - gradient).abs().max() <= 5e-3 * max(gradient.abs().max(), 1e-6), key
        else:
            assert torch.equal(fast_gradients[key], gradient), key


# The large one takes two minutes.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.torture if name == "lraspp" else ()) for name in NETWORKS]
)
@pytest.mark.parametrize("estimator", ["min_max", "tf_enhanced", "percentile"])
def test_calibration_is_that_of_aimet(name: str, estimator: str) -> None:
    """Batches whose range grows: first a little, then beyond what tf_enhanced lets a histogram grow to."""
    batches = [NetworkInputs((factor * call_of(name, k).args[0],)) for k, factor in enumerate((1, 0.5, 1.7, 40))]
    network = made(name, range_estimator=estimator)
    calibrate(network, batches)
    fast = ranges(network)
    slow_down(network)
    calibrate(network, batches)
    slow = ranges(network)
    assert fast.keys() == slow.keys()
    for key, value in slow.items():
        assert torch.equal(fast[key], value), key


def test_training_gives_the_same_as_with_aimets_classes() -> None:
    """Ten steps of Adam: the differences in the last digits of the ranges' gradients stay there."""
    ends = []
    for turn in (slow_down, accelerate):
        network = calibrated(Body())
        turn(network)
        optimizer = torch.optim.Adam(network.parameters(), 1e-3)
        for seed in range(10):
            optimizer.zero_grad()
            network(images(4, seed)).square().mean().backward()
            optimizer.step()
        ends.append(network.state_dict())
    for key, value in ends[0].items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(ends[1][key], value, rtol=1e-3, atol=1e-5)


def ranges(network: nn.Module) -> dict[str, Tensor]:
    return {key: p.detach().clone() for key, p in network.named_parameters() if key.endswith((".min", ".max"))}


def test_slow_down_restores_the_classes() -> None:
    network = calibrated(Body())
    before = [type(module) for module in network.modules()]
    slow_down(network)
    from aimet_torch.nn import QuantizedConv2d
    from aimet_torch.quantization.affine import QuantizeDequantize

    classes = {type(module) for module in network.modules()}
    assert {QuantizedConv2d, QuantizeDequantize} <= classes
    accelerate(network)
    assert [type(module) for module in network.modules()] == before
    assert not classes & {kind for kind in before if kind.__module__.startswith("lightning_quant.simulation.fast")}
    conv = network.network.get_submodule("conv")
    assert type(conv.get_original_module()) is nn.Conv2d  # type: ignore[operator]


def test_copies_and_pickles_are_on_the_short_path() -> None:
    network = calibrated(Body())
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    for other in (copy.deepcopy(network), torch.load(file, weights_only=False)):
        kinds = [[(type(m).__module__, type(m).__name__) for m in one.modules()] for one in (other, network)]
        assert kinds[0] == kinds[1]
        assert torch.equal(other(images()), network(images()))


def test_quantizers_with_blocks_stay_with_aimet() -> None:
    from aimet_torch.quantsim.config_utils import set_blockwise_quantization_for_weights

    network = quantized(Body(), precision="w4a16")
    assert accelerate(network) == []
    set_blockwise_quantization_for_weights(
        network.sim, [network.network.get_submodule("head")], bitwidth=4, symmetric=True, block_size=3
    )
    assert accelerate(network) == ["head.param_quantizers.weight"]
    calibrate(network, [NetworkInputs((images(4),))])
    fast = step(network, NetworkInputs((images(),)))
    slow_down(network)
    slow = step(network, NetworkInputs((images(),)))
    assert torch.equal(fast[0], slow[0])
    assert torch.equal(fast[2], slow[2])


def test_hooks_are_called() -> None:
    network = calibrated(Body())
    relus = (module for module in network.modules() if isinstance(module, nn.ReLU))
    relu: Any = next(module for module in relus if hasattr(module, "output_quantizers"))
    seen: list[str] = []
    relu.register_forward_hook(lambda *_: seen.append("layer"))
    relu.output_quantizers[0].register_forward_hook(lambda *_: seen.append("quantizer"))
    network(images())
    assert seen == ["quantizer", "layer"]


def test_under_autocast_it_is_aimet() -> None:
    results = []
    for turn in (slow_down, accelerate):
        network = calibrated(Body())
        turn(network)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(network(images()))
    assert torch.equal(*results)


def test_weights_written_without_a_trace_are_quantized_again() -> None:
    """As averaged weights are put in the place of others, through ``.data``, and taken back."""
    network = calibrated(Body())
    x, weights = images(2), dict(network.network.named_parameters())
    kept = {name: value.detach().clone() for name, value in weights.items()}
    others = {name: value * 0.7 if name.endswith("weight") else value for name, value in kept.items()}
    found = {}
    for cached in (True, False):
        with torch.no_grad(), network.cached_weights() if cached else nullcontext():
            outputs = []
            for values in (kept, others, kept):
                for name, value in weights.items():
                    value.data.copy_(values[name])
                outputs.append(network(x))
        found[cached] = outputs
    assert not torch.equal(found[False][0], found[False][1])
    assert all(torch.equal(one, other) for one, other in zip(found[True], found[False], strict=True))


def test_cached_weights_are_quantized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network = calibrated(Body())
    expected = network(images()).detach()
    quantizer = network.network.get_submodule("conv.param_quantizers.weight")
    count = 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1

    quantizer.register_forward_hook(counted)
    weight = network.network.get_parameter("conv.weight")
    with network.cached_weights():
        with torch.no_grad():
            assert torch.equal(network(images()), expected)
            assert torch.equal(network(images()), expected)
            assert count == 1
            weight.mul_(1.5)  # a weight that changes is quantized again
            changed = network(images())
            assert count == 2
        network(images())  # with gradients nothing is held
        assert count == 3
    with torch.no_grad():
        assert torch.equal(network(images()), changed)
    assert count == 4


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_loops_without_gradients_cache_the_weights(trainer: MakeTrainer, stage: str) -> None:
    """The numbers are AIMET's, and nothing is held any more when the loop is over or has failed."""
    held: list[int] = []

    class Watched(SmallModule):
        fails = False

        def _loss(self, batch: Any) -> Tensor:
            held.append(len([module for module in self.model.modules() if "_held_weight" in vars(module)]))
            if self.fails:
                raise ValueError("lost")
            return super()._loss(batch)

    module = Watched()
    callback = lq.PostTrainingQuantization("w8a8", calibration_samples=8, calibration_dataloader=small_loader())
    run = getattr(trainer(callback), stage)
    fast = run(module, small_loader(), verbose=False)
    assert held[-1] == 3  # two convolutions and a linear layer
    module.fails = True
    with pytest.raises(ValueError, match="lost"):
        run(module, small_loader(), verbose=False)
    assert not [m for m in module.modules() if "_held_weight" in vars(m)]
    module.fails = False
    slow_down(module.model)
    assert run(module, small_loader(), verbose=False) == fast
