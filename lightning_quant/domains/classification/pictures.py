"""What a classifier sees: the image with its likeliest classes and their scores, float and quantized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lightning_quant.domains.images import denormalize
from lightning_quant.report.pictures import Color, Comparison

_WIDTH, _ROW, _TEXT, _MARGIN = 440, 24, 15, 6
_SHOWN = 3
_BLUE, _ORANGE, _BLACK, _RED = (170, 207, 240), (246, 205, 160), (20, 20, 20), (200, 20, 20)


class _Row(NamedTuple):
    """One line of a list: a class, its figure, and the bar behind both, its length from 0 to 1."""

    name: str
    figure: str
    length: float
    color: Color


def compare_scores(image: Tensor, float_scores: Tensor, quantized_scores: Tensor, names: Sequence[str]) -> Comparison:
    """Draw an image above the three likeliest classes of both networks, float to the left and quantized to the right.

    The two lists stand beside each other, so that both are read where a page lays one picture over the other. The
    difference says whether the likeliest class is another, and which score changes most.

    Args:
        image: the normalized image, float ``(3, H, W)``.
        float_scores: the float network's probability of each class, ``(C,)``.
        quantized_scores: the quantized network's.
        names: of the classes.

    Raises:
        ConfigurationError: when :func:`~lightning_quant.domains.images.denormalize` refuses the image.
    """
    photo = Image.fromarray(denormalize(image))
    # pixels of a small image stay squares
    resample = Image.Resampling.NEAREST if photo.width < _WIDTH // 2 else Image.Resampling.BICUBIC
    photo = photo.resize((_WIDTH, max(1, round(photo.height * _WIDTH / photo.width))), resample)
    half, shown = _WIDTH // 2, min(_SHOWN, len(names))
    best, other = (scores.topk(shown).indices.tolist() for scores in (float_scores, quantized_scores))
    changes = (quantized_scores - float_scores).tolist()
    moved = max({*best, *other}, key=lambda index: abs(changes[index]))
    same = best[0] == other[0]
    verdict = f"still {names[best[0]]}" if same else f"{names[best[0]]} becomes {names[other[0]]}"
    # without the minus of a zero
    most = _Row(names[moved], f"{round(100 * changes[moved], 1) + 0.0:+.1f} points", abs(changes[moved]), _ORANGE)
    faded = photo.convert("L").convert("RGB").point(lambda value: 96 + value // 2)
    return Comparison(
        float=_listed(photo, "float", _rows(names, float_scores, best, _BLUE), 0, half),
        quantized=_listed(photo, "quantized", _rows(names, quantized_scores, other, _ORANGE), half, half),
        input=_listed(photo, "", [], 0, half),
        # a page shows it at half the size
        difference=_listed(faded, verdict, [most], 0, _WIDTH, _BLACK if same else _RED, times=2),
    )


def _rows(names: Sequence[str], scores: Tensor, chosen: Sequence[int], color: Color) -> list[_Row]:
    return [_Row(names[i], f"{float(scores[i]):.1%}", float(scores[i]), color) for i in chosen]


def _listed(
    photo: Image.Image, title: str, rows: Sequence[_Row], left: int, width: int, color: Color = _BLACK, times: int = 1
) -> Image.Image:
    """Return the picture with a list below it: names to the left, figures to the right."""
    canvas = Image.new("RGB", (photo.width, photo.height + _ROW * (_SHOWN + 1) + 2 * _MARGIN), "white")
    canvas.paste(photo)
    draw = ImageDraw.Draw(canvas)
    font, height = ImageFont.load_default(size=times * _TEXT), times * _ROW
    start, end, top = left + _MARGIN, left + width - _MARGIN, photo.height + _MARGIN
    draw.text((start, top + 2), _cut(draw, title, font, end - start), fill=color, font=font)
    for row in rows:
        top += height
        draw.rectangle((start, top, start + round(row.length * (end - start)), top + height - 4), fill=row.color)
        room = end - start - draw.textlength(row.figure, font=font) - 2 * _MARGIN
        draw.text((start + 3, top + 1), _cut(draw, row.name, font, room), fill=_BLACK, font=font)
        draw.text((end - 3, top + 1), row.figure, fill=_BLACK, font=font, anchor="ra")
    return canvas


def _cut(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, room: float) -> str:
    """Return as much of a text as there is room for."""
    if draw.textlength(text, font=font) <= room:
        return text
    while text and draw.textlength(text + "…", font=font) > room:
        text = text[:-1]
    return text + "…"
