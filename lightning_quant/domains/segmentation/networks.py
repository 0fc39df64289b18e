"""Published networks with their trained weights, from optional packages that download them."""

from __future__ import annotations

import torch
from torch import nn

from lightning_quant.domains.segmentation.ffnet import FFNet, ffnet_40s
from lightning_quant.errors import CheckpointError, ConfigurationError


def pretrained_ffnet_40s() -> FFNet:
    """Return FFNet-40S trained on Cityscapes, as AI Hub serves it (package ``qai_hub_models``).

    Needs the internet on the first call: the package then downloads the weights (55 MB) and the authors'
    source code into its own cache.

    Returns:
        This package's FFNet-40S with the published weights, in eval mode. It takes images normalized with
        ImageNet's mean and standard deviation: the normalization that AI Hub's model does inside itself, from
        images in 0..1, is left to the data module.

    Raises:
        ConfigurationError: when the package is not installed.
        CheckpointError: when what was downloaded is not FFNet-40S as this package knows it.
    """
    try:
        from qai_hub_models.models.ffnet_40s import Model
    except ImportError as error:
        raise ConfigurationError(
            "pretrained_ffnet_40s needs the package qai_hub_models, which is not there: "
            "pip install 'lightning-quant[qai-hub-models]'. It downloads the weights (55 MB) on "
            f"the first call. Offline, use ffnet_40s(weights=...) with a file you already have. ({error})"
        ) from error
    # Model.forward normalizes its input and then calls this attribute, the authors' network.
    return adopt_ffnet_40s(Model.from_pretrained().model)


def adopt_ffnet_40s(published: nn.Module) -> FFNet:
    """Move the weights of the authors' FFNet-40S into this package's, and check that both compute the same.

    The authors' class reuses ReLU modules, works in place and cannot be pickled outside their source tree,
    all of which stands in the way of quantization; the weights are the same under the same names.

    Args:
        published: the authors' network; left as it is, but in eval mode.

    Returns:
        FFNet-40S in eval mode.

    Raises:
        CheckpointError: when names, shapes or the logits of a random image differ.
    """
    network = ffnet_40s()
    try:
        network.load_state_dict(published.state_dict(), strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"{type(published).__name__} is not the FFNet-40S that this package knows; install a version of "
            f"qai_hub_models that serves it as segmentation_ffnet40S_dBBB_mobile. {error}"
        ) from error
    published.eval()
    network.eval()
    image = torch.randn(1, 3, 64, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = published(image), network(image)
    if expected.shape != found.shape or not torch.allclose(found, expected, rtol=1e-3, atol=1e-3):
        raise CheckpointError(
            f"{type(published).__name__} has the weights of FFNet-40S but computes something else: logits "
            f"{tuple(expected.shape)} against {tuple(found.shape)} here. Use the published network as it is "
            "and report the version of qai_hub_models."
        )
    return network
