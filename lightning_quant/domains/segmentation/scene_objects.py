"""What stands in a synthetic street: drawn in meters through a pinhole camera, onto a photo and its labels.

World coordinates: ``x`` to the right of the camera, ``y`` up from the ground, ``z`` ahead, all in meters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

from PIL import Image, ImageDraw

from lightning_quant.domains.segmentation.cityscapes import CLASSES

Color = tuple[float, float, float]
Point = tuple[float, float, float]

LABEL = {c.name: c.label_id for c in CLASSES}
VOID_EGO, VOID_STATIC = 1, 4
CAMERA_HEIGHT = 1.4
CLOTHES: tuple[Color, ...] = (
    (40, 45, 60), (150, 40, 45), (60, 90, 60), (190, 185, 175), (90, 75, 65), (40, 70, 130), (120, 120, 125)
)  # fmt: skip
_METALS: tuple[Color, ...] = ((95, 97, 100), (52, 54, 58), (175, 178, 182))
SAFETY_VESTS: tuple[Color, ...] = ((205, 215, 60), (235, 120, 45), (215, 215, 75))
PAINTS: tuple[Color, ...] = (
    (200, 200, 205), (55, 58, 64), (125, 128, 132), (150, 35, 35), (40, 60, 110), (70, 95, 80),
    (170, 150, 110),
)  # fmt: skip


def shade(color: Color, factor: float) -> Color:
    """Return a color that is brighter or darker by ``factor``."""
    return color[0] * factor, color[1] * factor, color[2] * factor


def vary(random: Random, color: Color, amount: float = 18) -> Color:
    """Return a color with each channel moved by up to ``amount``."""
    r, g, b = color
    return (
        r + random.uniform(-amount, amount),
        g + random.uniform(-amount, amount),
        b + random.uniform(-amount, amount),
    )


class Canvas:
    """A photo and its label map that receive the same shapes, seen by one camera.

    Args:
        height: height of both in pixels.
        width: width of both in pixels.
        horizon: where the horizon lies, as a fraction of the height from the top.
        focal: focal length in image heights.
        heading: sideways position of the vanishing point, in image heights from the middle.
        bend: curvature of the street: meters to the side per square meter ahead.
        haze: color that distant things fade to.
        sight: distance in meters at which about two thirds have faded.
    """

    def __init__(
        self,
        height: int,
        width: int,
        horizon: float,
        focal: float,
        heading: float,
        bend: float,
        haze: Color,
        sight: float,
    ) -> None:
        self.height, self.width = height, width
        self.horizon, self.focal, self.bend = horizon * height, focal * height, bend
        self.center = width / 2 + heading * height
        self.haze, self.sight = haze, sight
        self.photo = Image.new("RGB", (width, height))
        self.labels = Image.new("L", (width, height), LABEL["sky"])
        self._on_photo = ImageDraw.Draw(self.photo)
        self._on_labels = ImageDraw.Draw(self.labels)

    def project(self, point: Point) -> tuple[float, float]:
        """Return the pixel coordinates of a point of the world ahead of the camera."""
        x, y, z = point
        return (
            self.center + self.focal * (x / z + self.bend * z),
            self.horizon + self.focal * (CAMERA_HEIGHT - y) / z,
        )

    def polygon(self, corners: Sequence[Point], color: Color | None, label: int | None) -> None:
        """Fill a polygon. Without a label it is paint on what is there; without a color it is transparent."""
        pixels = [self.project(corner) for corner in corners]
        if color is not None:
            self._on_photo.polygon(pixels, fill=self._seen(color, corners[0][2]))
        if label is not None:
            self._on_labels.polygon(pixels, fill=label)

    def disc(self, center: Point, rx: float, ry: float, color: Color, label: int | None) -> None:
        """Fill an ellipse that faces the camera; radii in meters."""
        (u, v), scale = self.project(center), self.focal / center[2]
        box = (u - rx * scale, v - ry * scale, u + rx * scale, v + ry * scale)
        self._on_photo.ellipse(box, fill=self._seen(color, center[2]))
        if label is not None:
            self._on_labels.ellipse(box, fill=label)

    def ring(self, center: Point, radius: float, thickness: float, color: Color, label: int) -> None:
        """Draw a ring that faces the camera: a wheel. Its inside is labeled too, as annotators do."""
        (u, v), scale = self.project(center), self.focal / center[2]
        box = (u - radius * scale, v - radius * scale, u + radius * scale, v + radius * scale)
        self._on_photo.ellipse(box, outline=self._seen(color, center[2]), width=max(1, round(thickness * scale)))
        self._on_labels.ellipse(box, fill=label)

    def bar(self, points: Sequence[Point], thickness: float, color: Color, label: int | None, least: int = 2) -> None:
        """Draw a line of a thickness in meters, ``least`` pixels or more."""
        pixels = [self.project(p) for p in points]
        pixel_width = max(least, round(thickness * self.focal / points[0][2]))
        self._on_photo.line(pixels, fill=self._seen(color, points[0][2]), width=pixel_width)
        if label is not None:
            self._on_labels.line(pixels, fill=label, width=pixel_width)

    def upright(self, x0: float, x1: float, y0: float, y1: float, z: float, color: Color, label: int | None) -> None:
        """Fill a rectangle that faces the camera."""
        self.polygon([(x0, y0, z), (x1, y0, z), (x1, y1, z), (x0, y1, z)], color, label)

    def side(
        self,
        x: float,
        y0: float,
        y1: float,
        z0: float,
        z1: float,
        color: Color | None,
        label: int | None,
    ) -> None:
        """Fill a rectangle that runs along the street."""
        self.polygon([(x, y0, z0), (x, y0, z1), (x, y1, z1), (x, y1, z0)], color, label)

    def ground(self, x0: float, x1: float, z0: float, z1: float, color: Color, label: int | None) -> None:
        """Fill a strip of the ground, which follows the bend of the street."""
        # Even steps in 1/z are even steps on the picture.
        steps = [1 / (1 / z0 + (1 / z1 - 1 / z0) * i / 8) for i in range(9)]
        self.polygon([(x0, 0, z) for z in steps] + [(x1, 0, z) for z in reversed(steps)], color, label)

    def _seen(self, color: Color, z: float) -> tuple[int, int, int]:
        clear = math.exp(-z / self.sight)
        r, g, b = (min(255, max(0, int(c * clear + h * (1 - clear)))) for c, h in zip(color, self.haze, strict=True))
        return r, g, b


def building(canvas: Canvas, random: Random, x: float, z0: float, z1: float, height: float, color: Color) -> None:
    """Draw a house whose front stands along the street at ``x``, from ``z0`` to ``z1``."""
    outward = 14 if x > 0 else -14
    canvas.upright(x, x + outward, 0, height, z0, shade(color, random.uniform(0.6, 0.95)), LABEL["building"])
    canvas.side(x, 0, height, z0, z1, color, LABEL["building"])
    glass = random.choice([(60, 75, 90), (35, 38, 45), (150, 170, 190), shade(color, 0.7), (210, 190, 130)])
    floors = max(1, int(height / random.uniform(2.8, 3.6)))
    columns = max(1, int((z1 - z0) / random.uniform(2.2, 4)))
    story, bay = height / floors, (z1 - z0) / columns
    if z0 > 45:  # windows would be smaller than a pixel
        return
    for floor in range(floors):
        bottom, top = (floor + 0.3) * story, (floor + 0.82) * story
        for column in range(columns):
            near = z0 + (column + 0.25) * bay
            canvas.side(x, bottom, top, near, near + 0.5 * bay, vary(random, glass, 12), None)
    if random.random() < 0.4:  # a shop front
        canvas.side(x, 0.2, 2.6, z0 + 0.4, z1 - 0.4, vary(random, (90, 70, 60), 50), None)


def tree(canvas: Canvas, random: Random, x: float, z: float) -> None:
    """Draw a tree; its trunk counts as vegetation, as in Cityscapes."""
    trunk, crown = random.uniform(1.6, 3), random.uniform(1.2, 2.6)
    canvas.bar([(x, 0, z), (x, trunk + crown, z)], 0.34, (74, 56, 42), LABEL["vegetation"])
    leaf = random.choice([(62, 92, 42), (85, 108, 50), (45, 70, 40), (100, 115, 45), (125, 95, 50)])
    bush(canvas, random, x, trunk + 0.8 * crown, z, crown, leaf)


def bush(canvas: Canvas, random: Random, x: float, y: float, z: float, size: float, leaf: Color) -> None:
    """Draw a heap of leaves around a point."""
    for _ in range(12):
        angle, reach = random.uniform(0, 2 * math.pi), random.uniform(0, 0.75) * size
        radius = random.uniform(0.25, 0.55) * size
        center = (x + reach * math.cos(angle), max(0.2, y + reach * math.sin(angle)), z)
        tone = vary(random, shade(leaf, random.uniform(0.6, 1.3)), 10)
        canvas.disc(center, radius, radius * random.uniform(0.6, 1), tone, LABEL["vegetation"])


def fence(canvas: Canvas, random: Random, x: float, z0: float, z1: float) -> None:
    """Draw rails and posts that one can see through; the labels are filled, as annotators do."""
    top = random.uniform(1, 1.6)
    color = random.choice([(120, 122, 125), (70, 75, 72), (110, 85, 60), (190, 190, 185)])
    canvas.side(x, 0, top, z0, z1, None, LABEL["fence"])
    for y in (0.25 * top, 0.62 * top, top):
        canvas.bar([(x, y, z0), (x, y, z1)], 0.08, color, None)
    z = z0
    while z < z1:
        canvas.bar([(x, 0, z), (x, top, z)], 0.08, color, None)
        z *= 1.07


def wall(canvas: Canvas, random: Random, x: float, z0: float, z1: float) -> None:
    """Draw a garden wall with its courses of stone."""
    top, color = random.uniform(1.2, 2.4), vary(random, (140, 105, 80), 22)
    canvas.side(x, 0, top, z0, z1, color, LABEL["wall"])
    for course in range(1, 5):
        y = top * course / 5
        canvas.bar([(x, y, z0), (x, y, z1)], 0.03, shade(color, 0.65), None, least=1)


def pole(canvas: Canvas, random: Random, x: float, z: float) -> float:
    """Draw a post and return its height."""
    height, color = random.uniform(2.8, 4), random.choice(_METALS)
    canvas.bar([(x, 0, z), (x, height, z)], random.uniform(0.24, 0.36), color, LABEL["pole"])
    return height


def street_lamp(canvas: Canvas, random: Random, x: float, z: float) -> None:
    """Draw a tall post whose arm holds a lamp over the street."""
    height, color = random.uniform(5, 7.5), random.choice(_METALS)
    reach = -1.6 if x > 0 else 1.6
    canvas.bar([(x, 0, z), (x, height, z)], random.uniform(0.24, 0.36), color, LABEL["pole"])
    canvas.bar([(x, height, z), (x + reach, height + 0.2, z)], 0.2, color, LABEL["pole"])
    canvas.disc((x + reach, height + 0.15, z), 0.3, 0.12, (200, 195, 175), LABEL["pole"])


def traffic_light(canvas: Canvas, random: Random, x: float, z: float) -> None:
    """Draw a post with the three lamps in their dark box."""
    top = pole(canvas, random, x, z)
    dark = vary(random, (32, 34, 34), 10)
    canvas.upright(x - 0.32, x + 0.32, top - 1.4, top, z, dark, LABEL["traffic light"])
    lit = random.randrange(3)
    for lamp, color in enumerate([(230, 50, 40), (235, 180, 50), (60, 210, 120)]):
        tone = color if lamp == lit else shade(color, 0.25)
        canvas.disc((x, top - 0.26 - 0.43 * lamp, z), 0.18, 0.18, tone, None)


def traffic_sign(canvas: Canvas, random: Random, x: float, z: float) -> None:
    """Draw a post with a round, triangular or rectangular sign."""
    y, r, label = pole(canvas, random, x, z), random.uniform(0.45, 0.65), LABEL["traffic sign"]
    kind = random.randrange(4)
    if kind == 0:
        canvas.disc((x, y, z), r, r, (190, 40, 40), label)
        canvas.disc((x, y, z), 0.65 * r, 0.65 * r, (225, 225, 220), None)
    elif kind == 1:
        canvas.polygon([(x - r, y - 0.6 * r, z), (x + r, y - 0.6 * r, z), (x, y + r, z)], (190, 45, 40), label)
        canvas.disc((x, y - 0.2 * r, z), 0.35 * r, 0.35 * r, (225, 225, 215), None)
    elif kind == 2:
        canvas.upright(x - r, x + r, y - r, y + r, z, (45, 85, 165), label)
        canvas.disc((x, y, z), 0.4 * r, 0.4 * r, (225, 228, 230), None)
    else:
        canvas.upright(x - 1.3 * r, x + 1.3 * r, y - 0.5 * r, y + 0.5 * r, z, (205, 180, 60), label)


def person(
    canvas: Canvas,
    random: Random,
    x: float,
    z: float,
    foot: float = 0,
    label: int = LABEL["person"],
    coats: Sequence[Color] = CLOTHES,
) -> None:
    """Draw someone who stands or walks, seen from the front or behind."""
    tall = random.uniform(1.5, 1.95)
    coat, trousers = vary(random, random.choice(coats)), vary(random, random.choice(CLOTHES))
    stride, shoulder = random.uniform(0.05, 0.28), random.uniform(0.2, 0.27)
    for leg in (-stride, stride):
        canvas.bar([(x, foot + 0.5 * tall, z), (x + leg, foot, z)], 0.24, trousers, label)
    hip, neck = foot + 0.45 * tall, foot + 0.83 * tall
    body = [(x - 0.17, hip, z), (x + 0.17, hip, z), (x + shoulder, neck, z), (x - shoulder, neck, z)]
    canvas.polygon(body, coat, label)
    for arm in (-1, 1):
        hand = (x + arm * random.uniform(0.25, 0.42), hip, z)
        canvas.bar([(x + arm * shoulder, neck - 0.05, z), hand], 0.15, shade(coat, 0.85), label)
    skin = random.choice([(205, 160, 135), (130, 90, 70), (85, 60, 48)])
    canvas.disc((x, foot + 0.92 * tall, z), 0.13, 0.17, skin, label)


def cyclist(canvas: Canvas, random: Random, x: float, z: float) -> None:
    """Draw a bicycle crossing the view, with its rider."""
    bicycle(canvas, random, x, z)
    person(canvas, random, x, z, foot=0.3, label=LABEL["rider"], coats=[*CLOTHES[:3], *SAFETY_VESTS])


def bicycle(canvas: Canvas, random: Random, x: float, z: float) -> None:
    """Draw a bicycle seen from the side, or foreshortened."""
    paint, label = vary(random, random.choice(PAINTS)), LABEL["bicycle"]
    half = random.uniform(0.3, 0.55)
    for wheel in (-half, half):
        canvas.ring((x + wheel, 0.34, z), 0.36, 0.08, (35, 35, 38), label)
    frame = [(x - half, 0.34, z), (x - 0.1, 0.85, z), (x + 0.7 * half, 0.85, z), (x + half, 0.34, z)]
    canvas.bar(frame, 0.09, paint, label)
    canvas.bar([(x - 0.1, 0.85, z), (x, 0.34, z), (x + 0.7 * half, 0.85, z)], 0.09, paint, label)


def car(canvas: Canvas, random: Random, x: float, z: float) -> None:
    """Draw a car along the street, its near end at ``z``."""
    paint, label = vary(random, random.choice(PAINTS)), LABEL["car"]
    half, length, waist, roof = (
        0.88,
        random.uniform(3.6, 4.8),
        random.uniform(0.85, 1),
        random.uniform(1.4, 1.75),
    )
    far = z + length
    canvas.ground(x - half, x + half, z, far, (30, 30, 33), None)
    flank = x - half if x > 0 else x + half
    _box(canvas, x, half, 0.22, waist, z, far, paint, label)
    cabin_near, cabin_far = z + random.uniform(0.1, 0.9), far - 1.2
    _box(canvas, x, 0.8 * half, waist, roof, cabin_near, cabin_far, shade(paint, 0.95), label)
    glass: Color = random.choice([(45, 52, 60), (110, 130, 145)])
    inner = x + 0.8 * half * (-1 if x > 0 else 1)
    canvas.side(inner, waist + 0.05, roof - 0.1, cabin_near + 0.2, cabin_far - 0.2, glass, None)
    canvas.upright(x - 0.66 * half, x + 0.66 * half, waist + 0.05, roof - 0.1, cabin_near, glass, None)
    lights = random.choice([(190, 35, 30), (240, 235, 205)])
    for end in (-0.75, 0.75):
        canvas.upright(x + half * (end - 0.18), x + half * (end + 0.18), 0.6 * waist, 0.8 * waist, z, lights, None)
        canvas.upright(x + half * (end - 0.18), x + half * (end + 0.18), 0, 0.3, z, (22, 22, 24), label)
    for wheel in (z + 0.75, far - 0.8):
        squeeze = min(1.0, abs(flank) / wheel + 0.15)  # how much of the wheel's width the camera sees
        canvas.disc((flank, 0.32, wheel), 0.32 * squeeze, 0.32, (22, 22, 24), label)


def bus(canvas: Canvas, random: Random, x: float, z: float) -> None:
    """Draw a bus: one long box with a band of windows."""
    livery = random.choice([(205, 170, 40), (170, 40, 40), (60, 130, 120), *PAINTS[:2]])
    paint, label, far = vary(random, livery), LABEL["bus"], z + random.uniform(8, 11)
    flank = x - 1.25 if x > 0 else x + 1.25
    _box(canvas, x, 1.25, 0.3, 3, z, far, paint, label)
    canvas.side(flank, 1.4, 2.4, z + 0.4, far - 0.4, (50, 58, 66), None)
    canvas.upright(x - 1.05, x + 1.05, 1.3, 2.5, z, (50, 58, 66), None)
    canvas.upright(x - 0.6, x + 0.6, 2.6, 2.85, z, (230, 170, 60), None)
    canvas.upright(x - 1.1, x + 1.1, 0, 0.3, z, (22, 22, 24), label)


def truck(canvas: Canvas, random: Random, x: float, z: float) -> None:
    """Draw a truck seen from behind: a plain box on wheels, its cab showing beyond."""
    tarpaulin = random.choice([(215, 215, 210), (150, 150, 155), (120, 140, 165), (185, 160, 120)])
    paint, label, far = vary(random, tarpaulin), LABEL["truck"], z + random.uniform(5, 8)
    _box(canvas, x, 1.1, 0.4, 2.4, far, far + 1.8, vary(random, random.choice(PAINTS)), label)
    _box(canvas, x, 1.25, 0.8, random.uniform(2.7, 3.5), z, far, paint, label)
    canvas.bar([(x, 0.8, z), (x, 2.7, z)], 0.05, shade(paint, 0.6), None, least=1)
    for end in (-0.8, 0.8):
        canvas.upright(x + end - 0.25, x + end + 0.25, 0, 0.85, z, (24, 24, 26), label)


def clutter(canvas: Canvas, random: Random, x: float, z: float) -> None:
    """Draw a bin or a box: "static" in Cityscapes, which is not evaluated."""
    size = random.uniform(0.3, 0.9)
    color = vary(random, random.choice([(60, 75, 60), (110, 105, 95), (60, 70, 100)]), 20)
    canvas.upright(x - size / 2, x + size / 2, 0, 1.3 * size, z, color, VOID_STATIC)


def _box(
    canvas: Canvas,
    x: float,
    half: float,
    y0: float,
    y1: float,
    z0: float,
    z1: float,
    color: Color,
    label: int,
) -> None:
    """Draw a block along the street: the flank towards the camera's axis, the top if seen, then the near end."""
    flank = x - half if x > 0 else x + half
    canvas.side(flank, y0, y1, z0, z1, shade(color, 0.8), label)
    if y1 < CAMERA_HEIGHT:
        canvas.polygon(
            [(x - half, y1, z0), (x + half, y1, z0), (x + half, y1, z1), (x - half, y1, z1)],
            shade(color, 1.15),
            label,
        )
    canvas.upright(x - half, x + half, y0, y1, z0, color, label)
