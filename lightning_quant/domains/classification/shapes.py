"""Synthetic images to classify, in the layout of torchvision's ``ImageFolder``: one shape each, on a noisy background.

Each shape has colors that it prefers and shares with the next, so that color alone tells only some of them apart.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from lightning_quant.domains.loading import claim_folder
from lightning_quant.errors import ConfigurationError
from lightning_quant.utilities.files import atomic_write

GENERATOR_VERSION = 1  # raised whenever the same parameters would draw other images
# Radius and degrees of each corner, before the shape is turned.
_SHAPES: dict[str, Sequence[tuple[float, float]]] = {
    "circle": [(1, angle) for angle in range(0, 360, 10)],
    "cross": [(r, t + q) for q in range(0, 360, 90) for r, t in ((1.0, -15.0), (1.0, 15.0), (0.37, 45.0))],
    "ring": [(1, angle) for angle in range(0, 361, 10)] + [(0.6, angle) for angle in range(360, -1, -10)],
    "square": [(1, angle) for angle in range(45, 360, 90)],
    "star": [((1, 0.42)[k % 2], 36 * k) for k in range(10)],
    "triangle": [(1, angle) for angle in (90, 210, 330)],
}
_SUPERSAMPLING = 2


def draw_shapes(root: str | Path, train: int = 768, val: int = 192, size: int = 32, seed: int = 0) -> Path:
    """Draw images of six shapes into ``train/<shape>/`` and ``val/<shape>/``, where they are not there yet.

    Args:
        root: the folder to fill; created if missing.
        train: images in the training split, in equal numbers of each shape.
        val: images in the validation split, likewise.
        size: height and width of an image in pixels, at least 16.
        seed: decides what the images show.

    Raises:
        ConfigurationError: when an argument is out of range.
        DataError: when the folder holds other data, or shapes drawn with other parameters.
    """
    counts = {"train": train, "val": val}
    if size < 16 or min(counts.values()) < len(_SHAPES):
        raise ConfigurationError(
            f"train={train}, val={val}, size={size}: expected train and val of {len(_SHAPES)} or more, an image of "
            "each shape, and at least 16x16 pixels."
        )
    root = Path(root)
    claim_folder(root, "shapes.json", {"generator": GENERATOR_VERSION, **counts, "size": size, "seed": seed})
    for split, count in counts.items():
        for index in range(count):
            shape = list(_SHAPES)[index % len(_SHAPES)]
            path = root / split / shape / f"{index:06d}.png"
            if not path.exists():
                with atomic_write(path) as partial:
                    _draw(shape, size, Random(f"{seed}/{split}/{index}")).save(partial, format="PNG")
    return root


def _draw(shape: str, size: int, random: Random) -> Image.Image:
    hue = list(_SHAPES).index(shape) / len(_SHAPES) + random.gauss(0, 0.12)
    color = 255 * np.array(colorsys.hsv_to_rgb(hue % 1, random.uniform(0.4, 1), random.uniform(0.4, 1)))
    back, radius, turn = random.uniform(20, 235), random.uniform(0.25, 0.45) * size, random.uniform(-25, 25)
    x, y = (random.uniform(radius, size - radius) for _ in range(2))
    corners = [
        (x + radius * r * math.cos(math.radians(angle + turn)), y - radius * r * math.sin(math.radians(angle + turn)))
        for r, angle in _SHAPES[shape]
    ]
    mask = Image.new("L", (_SUPERSAMPLING * size, _SUPERSAMPLING * size))
    ImageDraw.Draw(mask).polygon([(_SUPERSAMPLING * a, _SUPERSAMPLING * b) for a, b in corners], fill=255)
    share = np.asarray(mask.reduce(_SUPERSAMPLING), dtype=np.float64)[..., None] / 255
    noise = np.random.default_rng(random.getrandbits(64)).normal(0, random.uniform(4, 20), (size, size, 3))
    return Image.fromarray(np.clip(back + share * (color - back) + noise, 0, 255).astype(np.uint8))
