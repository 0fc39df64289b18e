"""Pictures of what the float and the quantized network predict, kept with a run so that its page can show them.

A user's module draws them, see :mod:`lightning_quant.callbacks.visualizer`; nothing here knows what is in them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lightning_quant.deploy.hosts.host import with_legend
from lightning_quant.errors import ConfigurationError

Color = tuple[int, int, int]

_RED = (255, 0, 0)
_CAPTION_HEIGHT = 18
_TEXT = 12
_GAP = 4
_NARROWEST = 256


@dataclass(frozen=True)
class Comparison:
    """What the float and the quantized network predict for one sample, as pictures of one size.

    Each picture is a ``PIL.Image``, or an array or tensor of uint8, ``(H, W, 3)`` or ``(H, W)``.

    Args:
        float: the float network's prediction.
        quantized: the quantized network's.
        input: the sample itself.
        difference: where the two predictions differ. Default: red where the pictures do, over the faded input.
        legend: what colors stand for: red, green and blue from 0 to 255, by name.

    Raises:
        ConfigurationError: when something is not a picture or not a color, or the sizes differ.
    """

    float: Any
    quantized: Any
    input: Any = None
    difference: Any = None
    legend: Mapping[str, Color] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = {name: picture.size for name, picture in self._given().items()}
        if len(set(sizes.values())) > 1:
            raise ConfigurationError(f"A Comparison has pictures of {sizes} (width, height): expected one size.")
        for name, color in self.legend.items():
            if len(color) != 3 or not all(0 <= part <= 255 for part in color):
                raise ConfigurationError(
                    f"The legend of a Comparison has {name}={color!r}: expected red, green and blue, each 0 to 255."
                )

    def panels(self) -> dict[str, Image.Image]:
        """Return the pictures by name, in the order in which they are shown."""
        panels = self._given()
        if "difference" not in panels:
            # faded to gray, so that red stands out
            faded = 96 + np.asarray(panels.get("input", panels["float"]).convert("L"))[..., None] // 2
            red = np.where(_differing(panels)[..., None], _RED, faded)
            panels["difference"] = Image.fromarray(red.astype(np.uint8))
        return panels

    def row(self) -> Image.Image:
        """Draw the panels in a row, captioned, and the legend below them.

        Narrow ones are enlarged by a whole number, so that pixels stay squares.
        """
        panels = self.panels()
        # what a module has drawn by itself need not be of pixels
        share = "" if self.difference is not None else f": {_differing(panels).mean():.2%} of pixels"
        captions = {"difference": f"difference{share}"}
        width, height = panels["float"].size
        times = -(-_NARROWEST // width)
        width, height = times * width, times * height
        total = len(panels) * (width + _GAP) - _GAP
        font = ImageFont.load_default(size=_TEXT)
        canvas = Image.new("RGB", (total, _CAPTION_HEIGHT + height), "white")
        draw = ImageDraw.Draw(canvas)
        for column, (name, picture) in enumerate(panels.items()):
            left = column * (width + _GAP)
            draw.text((left + 2, 2), captions.get(name, name), fill="black", font=font)
            canvas.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, _CAPTION_HEIGHT))
        return with_legend(canvas, self.legend)

    def _given(self) -> dict[str, Image.Image]:
        fields = {name: getattr(self, name) for name in ("input", "float", "quantized", "difference")}
        return {name: _as_image(picture, name) for name, picture in fields.items() if picture is not None}


def write_comparisons(folder: str | Path, comparisons: Sequence[Comparison]) -> list[Path]:
    """Write one picture per sample, ``overlay_0000.png`` and so on: all panels in a row, and the legend.

    Single panels are in a folder of the same name, where :func:`read_comparisons` finds them.

    Args:
        folder: created if missing. Files of the same names are replaced.
        comparisons: one per sample.

    Returns:
        The paths of the rows, in order.
    """
    paths = []
    for number, comparison in enumerate(comparisons):
        path = Path(folder) / f"overlay_{number:04d}.png"
        path.with_suffix("").mkdir(parents=True, exist_ok=True)
        for name, picture in comparison.panels().items():
            picture.save(path.with_suffix("") / f"{name}.png")
        comparison.row().save(path)
        paths.append(path)
    return paths


def read_comparisons(folder: str | Path) -> list[dict[str, Path]]:
    """Return for each sample that :func:`write_comparisons` wrote the files of its panels by name.

    Those of both predictions are named even where they are missing, which is damage.
    """
    places = sorted(path for path in Path(folder).glob("overlay_*") if path.is_dir())
    return [
        {path.stem: path for path in (place / "float.png", place / "quantized.png", *sorted(place.glob("*.png")))}
        for place in places
    ]


def legend_of(comparisons: Sequence[Comparison]) -> dict[str, str]:
    """Return what the colors of all samples stand for: ``#rrggbb`` by name."""
    return {name: "#{:02x}{:02x}{:02x}".format(*color) for one in comparisons for name, color in one.legend.items()}


def _as_image(picture: Any, name: str) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    values = np.asarray(picture)
    if values.dtype != np.uint8 or values.ndim not in (2, 3) or values.shape[2:] not in ((), (3,)):
        raise ConfigurationError(
            f"{name!r} of a Comparison has shape {values.shape} and type {values.dtype}: expected a PIL image, or "
            "uint8 of shape (H, W, 3) or (H, W)."
        )
    return Image.fromarray(values).convert("RGB")


def _differing(panels: Mapping[str, Image.Image]) -> np.ndarray:
    """Return where the two predictions differ, ``(H, W)``."""
    differing: np.ndarray = np.any(np.asarray(panels["float"]) != np.asarray(panels["quantized"]), axis=2)
    return differing
