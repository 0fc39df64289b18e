"""Synthetic street scenes in Cityscapes layout: data to start with, without a download or a license.

Every scene follows from the seed, its split and its number alone. They are made to be learned in minutes but
not to perfection: thin things, colors shared between classes, things in front of things, and changing light.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from lightning_quant.domains.loading import claim_folder
from lightning_quant.domains.segmentation import scene_objects as things
from lightning_quant.domains.segmentation.scene_objects import LABEL, Canvas, Color, shade, vary
from lightning_quant.errors import ConfigurationError
from lightning_quant.utilities.files import atomic_write

GENERATOR_VERSION = 1
"""Raised whenever the same parameters would draw other pictures."""
MANIFEST = "scenes.json"

Thing = tuple[float, Callable[..., object], tuple[Any, ...]]
"""Its distance in meters, what draws it (on a canvas, with a random generator), and where it stands."""

_SUPERSAMPLING = 2
_FAR = 90.0  # meters: where the street ends

# How coarse each class's surface looks: standard deviation in gray levels of its fine and its patchy texture.
_TEXTURE = {
    "road": (5, 4), "sidewalk": (6, 5), "building": (6, 6), "wall": (12, 10), "fence": (10, 8),
    "vegetation": (15, 12), "terrain": (14, 11), "sky": (2, 5), "car": (6, 5), "person": (9, 5),
}  # fmt: skip
_FINE, _PATCHY = (np.full(256, 5, np.float32) for _ in range(2))
for _name, (_fine, _patchy) in _TEXTURE.items():
    _FINE[LABEL[_name]], _PATCHY[LABEL[_name]] = _fine, _patchy

_PLASTER: tuple[Color, ...] = (
    (150, 130, 110), (120, 118, 115), (165, 155, 135), (130, 85, 70), (95, 105, 115), (120, 120, 100)
)  # fmt: skip

# Things along the curb: what, how many at most on one side, from and to which distance in meters, and whether
# they stand anywhere across the pavement or in a line at its edge.
_ROADSIDE = (
    (things.pole, 2, 4, 15, False),
    (things.street_lamp, 2, 5, 18, False),
    (things.traffic_light, 2, 4.5, 16, False),
    (things.traffic_sign, 3, 4.5, 16, False),
    (things.tree, 3, 4.5, 30, False),
    (things.person, 5, 3.5, 11, True),
    (things.bicycle, 2, 3.5, 9, True),
    (things.clutter, 2, 5, 30, True),
)


def generate_scenes(
    root: str | Path, train: int = 600, val: int = 120, height: int = 128, width: int = 256, seed: int = 0
) -> Path:
    """Draw synthetic street scenes into a folder in Cityscapes layout; draw only those not there yet.

    The folder's ``scenes.json`` records the parameters. A generation that was interrupted resumes where it
    stopped, and a finished one is left as it is.

    Args:
        root: the folder to fill; created if missing.
        train: scenes in the training split.
        val: scenes in the validation split.
        height: height of a scene in pixels, at least 32.
        width: width of a scene in pixels, at least 32.
        seed: decides what the scenes show.

    Returns:
        ``root``.

    Raises:
        ConfigurationError: when an argument is out of range.
        DataError: when the folder holds something else: other data, or scenes drawn with other parameters.
    """
    if min(height, width) < 32 or min(train, val) < 0:
        raise ConfigurationError(
            f"train={train}, val={val}, height={height}, width={width}: expected train and val "
            "of 0 or more, and at least 32x32 pixels."
        )
    root = Path(root)
    counts = {"train": train, "val": val}
    claim_folder(
        root, MANIFEST, {"generator": GENERATOR_VERSION, **counts, "height": height, "width": width, "seed": seed}
    )
    for split, count in counts.items():
        photos, labels = (root / kind / split / "synthetic" for kind in ("leftImg8bit", "gtFine"))
        for index in range(count):
            photo_path = photos / f"synthetic_{index:06d}_leftImg8bit.png"
            if photo_path.exists():
                continue
            photo, label_ids = draw_scene(height, width, seed, split, index)
            # The photo comes last: once it exists, its labels do too.
            for picture, path in (
                (label_ids, labels / f"synthetic_{index:06d}_gtFine_labelIds.png"),
                (photo, photo_path),
            ):
                with atomic_write(path) as partial:
                    picture.save(partial, compress_level=1)
    return root


def draw_scene(height: int, width: int, seed: int, split: str, index: int) -> tuple[Image.Image, Image.Image]:
    """Draw one scene: the photo (RGB) and its label ids (8-bit gray), each ``height`` x ``width``."""
    random = Random(f"{seed}/{split}/{index}")
    noise = np.random.default_rng(random.getrandbits(64))
    dusk = random.random() < 0.12
    haze = vary(random, random.choice([(200, 208, 215), (170, 185, 205), (150, 150, 155), (205, 190, 175)]), 12)
    canvas = Canvas(
        height * _SUPERSAMPLING,
        width * _SUPERSAMPLING,
        horizon=random.uniform(0.38, 0.5),
        focal=random.uniform(0.85, 1.35),
        heading=random.uniform(-0.25, 0.25),
        bend=random.uniform(-0.0012, 0.0012),
        haze=haze,
        sight=random.choice([110, 180, 300]),
    )
    _paint_sky(canvas, random, haze)
    left, right = random.uniform(3.2, 7.5), random.uniform(3.2, 7.5)
    pavement = random.uniform(1.8, 4)
    _paint_ground(canvas, random, left, right, pavement)
    _fill_street(canvas, random, left, right, pavement)
    if random.random() < 0.3:
        _paint_hood(canvas, random)
    label_ids = canvas.labels.resize((width, height), Image.Resampling.NEAREST)
    pixels = np.asarray(canvas.photo.reduce(_SUPERSAMPLING), dtype=np.float32)
    lit = _light(pixels, np.asarray(label_ids), canvas.horizon / canvas.height, random, noise, dusk)
    return Image.fromarray(lit), label_ids


def _paint_sky(canvas: Canvas, random: Random, haze: Color) -> None:
    zenith = np.array(
        vary(random, random.choice([(110, 150, 205), (165, 180, 195), (140, 142, 148), (205, 160, 130)]), 15)
    )
    down = np.linspace(0, 1, canvas.height)[:, None] / (canvas.horizon / canvas.height)
    rows = zenith + (np.array(haze) - zenith) * np.clip(down, 0, 1)
    column = Image.fromarray(np.clip(rows, 0, 255).astype(np.uint8)[:, None])
    canvas.photo.paste(column.resize(canvas.photo.size))


def _paint_ground(canvas: Canvas, random: Random, left: float, right: float, pavement: float) -> None:
    gray = random.uniform(70, 125)
    asphalt = vary(random, (gray, gray, gray), 6)
    slabs = vary(random, shade(asphalt, random.uniform(1.2, 1.6)), 12)
    soil = random.choice([(95, 115, 55), (120, 125, 65), (80, 110, 48), slabs])
    near = 1.0  # nearer than anything the camera sees
    soil_label = LABEL["sidewalk"] if soil is slabs else LABEL["terrain"]
    canvas.ground(-60, 60, near, 400, soil, soil_label)
    canvas.ground(-left - pavement, right + pavement, near, _FAR, slabs, LABEL["sidewalk"])
    canvas.ground(-left, right, near, _FAR, asphalt, LABEL["road"])
    for edge in (-left, right):  # the curb
        canvas.ground(edge - 0.08, edge + 0.08, near, _FAR, shade(slabs, random.choice([0.75, 1.2])), None)
    paint = vary(random, (200, 200, 195), 25)
    middle = (right - left) / 2 + random.uniform(-0.8, 0.8)
    z, dash, gap = near, random.uniform(2, 4), random.uniform(2, 6)
    while z < _FAR and random.random() < 0.97:
        canvas.ground(middle - 0.08, middle + 0.08, z, z + dash, paint, None)
        z += dash + gap
    if random.random() < 0.25:  # a zebra crossing
        z = random.uniform(6, 16)
        for stripe in range(int(left + right)):
            canvas.ground(-left + stripe + 0.1, -left + stripe + 0.6, z, z + 3, paint, None)
    for _ in range(random.randrange(6)):  # patches and stains
        x, z = random.uniform(-left, right - 1), random.uniform(3, 25)
        canvas.ground(x, x + random.uniform(0.5, 2), z, z + random.uniform(1, 4), shade(asphalt, 0.82), None)


def _fill_street(canvas: Canvas, random: Random, left: float, right: float, pavement: float) -> None:
    """Put everything that stands on the ground in its place and draw it."""
    houses: list[Thing] = []
    barriers: list[Thing] = []
    rest = list(_traffic(random, left, right))
    for side, curb in ((-1, left), (1, right)):
        houses += _houses(random, side, curb + pavement)
        barriers += _barriers(random, side, curb + pavement)
        rest += _roadside(random, side, curb, pavement)
    # Seen from the road, what is farther out is behind; within each of the three, what is farther away is.
    for layer in (houses, barriers, rest):
        for _, draw, place in sorted(layer, key=lambda thing: -thing[0]):
            draw(canvas, random, *place)


def _houses(random: Random, side: int, edge: float) -> Iterator[Thing]:
    """One side's houses, and trees in the gaps between them, from the pavement's outer ``edge`` outwards."""
    front = edge + random.choice([0.1, random.uniform(4, 11)])
    z = random.uniform(2.5, 8)
    while z < _FAR:
        end = z + random.uniform(7, 18)
        if random.random() < 0.8:
            plaster = vary(random, random.choice(_PLASTER), 20)
            place = (side * front, z, z + 0.98 * (end - z), random.uniform(5, 17), plaster)
            yield end, things.building, place
        else:
            for _ in range(4):
                yield end, things.tree, (side * (front + random.uniform(0, 5)), random.uniform(z, end))
        z = end


def _barriers(random: Random, side: int, edge: float) -> Iterator[Thing]:
    """Fences and walls along the pavement's outer ``edge``."""
    for draw, chance in ((things.fence, 0.45), (things.wall, 0.35)):
        if random.random() < chance:
            z = random.uniform(3, 12)
            yield z, draw, (side * edge, z, z + random.uniform(8, 20))


def _roadside(random: Random, side: int, curb: float, pavement: float) -> Iterator[Thing]:
    """What stands along one side: poles, signs, trees, people, bicycles, parked cars."""
    for draw, most, nearest, farthest, across in _ROADSIDE:
        for _ in range(random.randrange(most + 1)):
            z = random.uniform(nearest, farthest)
            yield z, draw, (side * (curb + random.uniform(0.3, pavement if across else 0.7)), z)
    if random.random() < 0.6:
        z = random.uniform(4, 14)
        for _ in range(random.randrange(1, 6)):
            yield z, things.car, (side * (curb - 1), z)
            z += random.uniform(5.2, 8)


def _traffic(random: Random, left: float, right: float) -> Iterator[Thing]:
    """What moves on the road."""
    for _ in range(random.randrange(3)):
        z = random.uniform(6, 26)
        vehicle = random.choices([things.car, things.bus, things.truck], [3, 2, 2])[0]
        yield z, vehicle, (random.uniform(-left + 2.4, right - 2.4), z)
    for draw, chance in ((things.cyclist, 0.5), (things.cyclist, 0.3), (things.person, 0.3)):
        if random.random() < chance:
            z = random.uniform(4, 10)
            yield z, draw, (random.uniform(-left + 0.5, right - 0.5), z)


def _paint_hood(canvas: Canvas, random: Random) -> None:
    """The front of the car that carries the camera: not evaluated."""
    w, h, rise = canvas.width, canvas.height, random.uniform(0.05, 0.1)
    box = (w * 0.08, h * (1 - rise), w * 0.92, h * (1 + rise))
    tone = int(random.uniform(25, 70))
    ImageDraw.Draw(canvas.photo).ellipse(box, fill=(tone, tone, tone + 4))
    ImageDraw.Draw(canvas.labels).ellipse(box, fill=things.VOID_EGO)


def _light(
    pixels: NDArray[np.float32],
    label_ids: NDArray[np.uint8],
    horizon: float,
    random: Random,
    noise: np.random.Generator,
    dusk: bool,
) -> NDArray[np.uint8]:
    """Give surfaces their texture, and the scene its light, shadow, blur and camera noise."""
    height, width = label_ids.shape
    fine = noise.standard_normal((height, width), dtype=np.float32)
    patchy = _smooth_noise(noise, height, width, cell=8)
    pixels = pixels + (_FINE[label_ids] * fine + 2 * _PATCHY[label_ids] * patchy)[..., None]
    if not dusk and random.random() < 0.6:
        pixels *= _shadow(random, height, width, horizon)[..., None]
    pixels *= (1 + 0.3 * _smooth_noise(noise, height, width, cell=64))[..., None]  # clouds, vignetting
    gain = random.uniform(0.5, 0.75) if dusk else random.uniform(0.8, 1.2)
    cast = np.array([random.uniform(0.95, 1.05) for _ in range(3)], dtype=np.float32)
    if dusk:
        cast *= np.array([0.95, 0.97, 1.15], dtype=np.float32)
    pixels *= gain * cast
    photo = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    photo = photo.filter(ImageFilter.GaussianBlur(random.uniform(0, 0.5) * height / 128))
    strength = random.uniform(1, 4) * (1.5 if dusk else 1)
    grain = strength * noise.standard_normal((height, width, 3), dtype=np.float32)
    return np.clip(np.asarray(photo) + grain, 0, 255).astype(np.uint8)


def _smooth_noise(noise: np.random.Generator, height: int, width: int, cell: int) -> NDArray[np.float32]:
    """Noise in -0.5..0.5 whose patches are about ``cell`` pixels wide at 128 pixels of height."""
    cells = 128 // cell
    small = noise.random((cells + 1, max(2, cells * width // height) + 1), dtype=np.float32) - 0.5
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def _shadow(random: Random, height: int, width: int, horizon: float) -> NDArray[np.float32]:
    """Factors below 1 where a row of houses keeps the sun from the ground and the other side."""
    mask = Image.new("L", (width, height), 255)
    draw = ImageDraw.Draw(mask)
    depth = int(random.uniform(110, 185))
    edge, foot = random.uniform(-0.2, 1.2) * width, random.uniform(0.2, 0.8) * width
    side = 0 if random.random() < 0.5 else width
    draw.polygon([(side, 0.6 * horizon * height), (foot, horizon * height), (edge, height), (side, height)], depth)
    for _ in range(random.randrange(4)):  # the shadows of trees
        x, y = random.uniform(0, width), random.uniform(horizon, 1) * height
        draw.ellipse((x, y, x + 0.25 * width, y + 0.1 * height), fill=depth)
    mask = mask.filter(ImageFilter.GaussianBlur(0.012 * height))
    return np.asarray(mask, dtype=np.float32) / np.float32(255)
