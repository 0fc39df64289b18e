"""Folders of images of one color each, which a mean over pixels tells apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

COLORS = {"blue": (30, 30, 220), "green": (30, 200, 30), "red": (220, 30, 30)}


def write_images(root: Path, split: str, count: int = 4, size: tuple[int, int] = (20, 24), **others: int) -> Path:
    """Write noisy images of each color into ``<split>/<color>/``.

    Args:
        root: the data set.
        split: such as ``"train"``.
        count: images of each color.
        size: (height, width).
        others: another count for some colors.
    """
    noise = np.random.default_rng(0)
    for name, color in COLORS.items():
        folder = root / split / name
        folder.mkdir(parents=True)
        for index in range(others.get(name, count)):
            pixels = np.array(color) + noise.normal(0, 20, (*size, 3))
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{index}.png")
    return root
