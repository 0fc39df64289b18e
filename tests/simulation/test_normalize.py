"""Subclasses that are PyTorch's own in all but name become PyTorch's own; others stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.simulation import aimet
from lightning_quant.simulation.callsites.attributes import FOLDED
from lightning_quant.simulation.normalize import use_torch_classes
from lightning_quant.simulation.switched_off import unrounded
from tests.helpers.networks import Body, calibrated, call, images, quantized, seeded

timm = pytest.importorskip("timm")
aimet.load()


def test_timm_layers_become_torch_classes_and_compute_the_same() -> None:
    from timm.layers import BatchNormAct2d, LayerNorm, Linear

    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), BatchNormAct2d(4, act_layer=nn.ReLU), nn.Flatten(), LayerNorm(144), Linear(144, 5)
    )
    seeded(network).eval()
    before = network(images(2))
    state = {name: value.clone() for name, value in network.state_dict().items()}
    assert {LayerNorm, Linear, BatchNormAct2d} <= {type(module) for module in network}
    use_torch_classes(network, call(images(2)))
    assert [type(module) for module in network[1]] == [nn.BatchNorm2d, nn.ReLU]
    assert type(network[3]) is nn.LayerNorm
    assert type(network[4]) is nn.Linear
    assert torch.equal(network(images(2)), before)
    assert all(torch.equal(value, state[name.replace("1.0.", "1.")]) for name, value in network.state_dict().items())


class PaddedLikeTensorFlow(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Negated(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


class Raising(nn.ReLU):
    def forward(self, x: Tensor, *, sharp: bool) -> Tensor:
        return super().forward(x) if sharp else x


class Caller(nn.Module):
    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child

    def forward(self, x: Tensor) -> Any:
        return self.child(x, sharp=True)


def test_what_computes_something_else_stays() -> None:
    network = nn.Sequential(PaddedLikeTensorFlow(3, 4, 2), nn.Flatten(), Negated(256, 3))
    before = network(images())
    use_torch_classes(network, call(images()))
    assert type(network[0]) is PaddedLikeTensorFlow
    assert type(network[2]) is Negated
    assert torch.equal(network(images()), before)
    raising = Caller(Raising())
    use_torch_classes(raising, call(images()))
    assert type(raising.child) is Raising


def test_no_hook_is_left_behind() -> None:
    from timm.layers import Linear

    network = nn.Sequential(nn.Flatten(), Linear(192, 2), PaddedLikeTensorFlow(1, 1, 1))
    with pytest.raises(RuntimeError):  # the last layer cannot take what it gets
        use_torch_classes(network, call(images()))
    network = Body()
    use_torch_classes(network, call(images()))
    assert not any(module._forward_hooks for module in network.modules())


def test_timm_network_is_quantized_fully() -> None:
    network = timm.create_model("mobilenetv3_small_050", num_classes=4).eval()
    made = quantized(network, call(torch.randn(1, 3, 32, 32)))
    assert made.findings == []
    norms = [m for m in made.network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert not any(type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm) for norm in norms)
    assert all(
        FOLDED in vars(norm) and norm.weight is norm.running_mean is None for norm in norms
    )  # its activation is still computed


class PaddedAsTensorFlow(nn.Conv2d):
    """As timm's: the size of the padding follows from that of the input, and the function is called."""

    def forward(self, input: Tensor) -> Tensor:
        missing = [max(0, (-(-size // 2) - 1) * 2 + 3 - size) for size in input.shape[-2:]]
        padding = [part for one in reversed(missing) for part in (one // 2, one - one // 2)]
        return F.conv2d(F.pad(input, padding), self.weight, self.bias, self.stride)


@pytest.mark.parametrize("bias", [True, False])
def test_a_batch_norm_behind_a_convolution_that_is_called_as_a_function(bias: bool) -> None:
    network = nn.Sequential(PaddedAsTensorFlow(3, 4, 3, 2, bias=bias), nn.BatchNorm2d(4), nn.ReLU())
    seeded(network)
    network.eval()
    images = torch.randn(2, 3, 9, 8)
    expected = network(images)
    made = calibrated(network, call(images))
    assert isinstance(made.network[1], nn.Identity)
    assert not made.findings
    assert made.network[0].bias is not None
    with unrounded(made):
        torch.testing.assert_close(made.network(images), expected, rtol=1e-4, atol=1e-5)


def test_a_batch_norm_behind_weights_that_are_computed_is_left() -> None:
    network = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.ReLU())
    seeded(network)
    network.eval()
    images = torch.randn(2, 3, 9, 8)
    expected = network(images)
    made = calibrated(network, call(images))
    assert isinstance(made.network[1], nn.BatchNorm2d)
    with unrounded(made):
        torch.testing.assert_close(made.network(images), expected, rtol=1e-4, atol=1e-5)
