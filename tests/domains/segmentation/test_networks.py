"""Taking over a published network: its weights, and the proof that nothing else changed."""

import importlib.util

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.domains.segmentation.ffnet import FFNet, ffnet_40s, ffnet_nano
from lightning_quant.domains.segmentation.networks import adopt_ffnet_40s, pretrained_ffnet_40s
from lightning_quant.errors import CheckpointError, ConfigurationError


@pytest.mark.skipif(importlib.util.find_spec("qai_hub_models") is not None, reason="the package is there")
def test_without_the_package_the_error_says_how_to_get_it() -> None:
    expected = r"pip install 'lightning-quant\[qai-hub-models\]'. It downloads the weights"
    with pytest.raises(ConfigurationError, match=expected):
        pretrained_ffnet_40s()


def test_adopts_weights_and_function() -> None:
    published = ffnet_40s()
    network = adopt_ffnet_40s(published)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(network(image), published(image))
    assert not network.training
    assert network is not published


def test_refuses_another_network() -> None:
    with pytest.raises(CheckpointError, match="FFNet is not the FFNet-40S that this package knows"):
        adopt_ffnet_40s(ffnet_nano())


class Mirrored(FFNet):
    """FFNet-40S in names and weights, but not in what it computes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flip(-1))


def test_refuses_the_same_weights_in_another_graph() -> None:
    network: nn.Module = Mirrored()
    with pytest.raises(CheckpointError, match="Mirrored has the weights of FFNet-40S but computes something"):
        adopt_ffnet_40s(network)
