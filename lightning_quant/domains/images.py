"""Photographs as torchvision's networks take them: normalized with ImageNet's mean and standard deviation."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_quant.errors import ConfigurationError

IMAGE_MEAN = (0.485, 0.456, 0.406)
"""Mean of ImageNet's red, green and blue, for values in 0..1: what pretrained backbones expect."""
IMAGE_STD = (0.229, 0.224, 0.225)
"""Standard deviation of ImageNet's red, green and blue, for values in 0..1."""


def denormalize(image: Tensor) -> NDArray[np.uint8]:
    """Undo the normalization of the data modules: float ``(3, H, W)`` to a picture ``(H, W, 3)``.

    Raises:
        ConfigurationError: when ``image`` has another shape, such as a batch.
    """
    if image.ndim != 3 or image.shape[0] != 3:
        raise ConfigurationError(f"denormalize got shape {tuple(image.shape)}; expected one image (3, H, W).")
    values = image.detach().float().cpu().numpy().transpose(1, 2, 0) * IMAGE_STD + IMAGE_MEAN
    return np.clip(np.rint(values * 255), 0, 255).astype(np.uint8)
