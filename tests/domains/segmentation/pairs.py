"""Photographs and labels as Cityscapes keeps them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_pair(root: Path, split: str, name: str, photo: np.ndarray, label_ids: np.ndarray) -> None:
    """Write a photograph and its labels in Cityscapes layout, in the city "aachen"."""
    image = root / "leftImg8bit" / split / "aachen" / f"{name}_leftImg8bit.png"
    labels = root / "gtFine" / split / "aachen" / f"{name}_gtFine_labelIds.png"
    for path, pixels in ((image, photo), (labels, label_ids)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
