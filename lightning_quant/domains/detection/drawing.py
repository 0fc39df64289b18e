"""What a detector sees: boxes with class and score over the photograph, float and quantized."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lightning_quant.domains.detection.boxes import Detections
from lightning_quant.domains.images import denormalize
from lightning_quant.report.pictures import Color, Comparison

# Small photographs are enlarged to this, in pixels, so that what is written on the boxes can be read.
_NARROWEST = 768
_TEXT = 13
_LINE = 2


def colors_of(count: int) -> list[Color]:
    """Return a color for each of ``count`` classes, red, green and blue from 0 to 255; beyond 20 they repeat."""
    palette = colormaps["tab10" if count <= 10 else "tab20"]
    colors = [palette(index % palette.N) for index in range(count)]
    return [(round(255 * red), round(255 * green), round(255 * blue)) for red, green, blue, _ in colors]


def compare_boxes(
    image: Tensor, float_found: Detections, quantized_found: Detections, names: Sequence[str]
) -> Comparison:
    """Draw what two networks detect in an image.

    Args:
        image: the normalized image, float ``(3, H, W)``.
        float_found: what the float network detects in it.
        quantized_found: the same of the quantized network.
        names: of the classes, by index.
    """
    photo = Image.fromarray(denormalize(image))
    times = -(-_NARROWEST // photo.width)
    photo = photo.resize((times * photo.width, times * photo.height), Image.Resampling.BICUBIC)
    colors = colors_of(len(names))
    occurring = {int(label) for found in (float_found, quantized_found) for label in found["labels"]}
    return Comparison(
        float=draw_boxes(photo, float_found, names, times),
        quantized=draw_boxes(photo, quantized_found, names, times),
        input=photo,
        legend={names[index]: colors[index] for index in sorted(occurring)},
    )


def draw_boxes(photo: Image.Image, found: Detections, names: Sequence[str], times: float = 1) -> Image.Image:
    """Return a photograph with boxes over it, the best on top, each with its class and score.

    Args:
        photo: RGB.
        found: what was detected, in pixels.
        names: of the classes, by index.
        times: how many pixels of ``photo`` one of the boxes' is.
    """
    picture = photo.copy()
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=_TEXT)
    colors = colors_of(len(names))
    rows = list(zip(found["boxes"].tolist(), found["labels"].tolist(), found["scores"].tolist(), strict=True))
    for box, label, _ in reversed(rows):
        draw.rectangle([times * side for side in box], outline=colors[label], width=_LINE)
    for box, label, score in reversed(rows):  # behind all boxes, so that none crosses what is written
        text = f"{names[label]} {score:.2f}"
        width, height = int(font.getlength(text)) + 4, _TEXT + 4
        # above the box where there is room, and always whole
        left = max(0, min(int(times * box[0]), picture.width - width))
        top = max(0, int(times * box[1]) - height)
        draw.rectangle((left, top, left + width, top + height), fill=colors[label])
        draw.text((left + 2, top + 1), text, fill=_on(colors[label]), font=font)
    return picture


def _on(color: Color) -> str:
    """Return the color of text on another one, by its luminance (ITU-R BT.601)."""
    red, green, blue = color
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"
