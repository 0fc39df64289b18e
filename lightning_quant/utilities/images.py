"""Image files that somebody else may have written, read whole or refused."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from lightning_quant.errors import DataError

# Pillow goes by the content, and hands some other formats, such as PostScript, to other programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")


def open_image(source: Path | bytes, name: str | None = None) -> Image.Image:
    """Open and fully decode an image file, or the bytes of one.

    Args:
        source: a path, or the encoded bytes.
        name: what to call the image in an error; the path by default.

    Raises:
        DataError: when it cannot be read, is damaged or cut short, or is not an image. The message names it.
    """
    name = name or (str(source) if isinstance(source, Path) else "image")
    try:
        data = source.read_bytes() if isinstance(source, Path) else source
        # Decoding alone accepts a PNG whose checksums are wrong; verify() checks them but uses the image up.
        with Image.open(io.BytesIO(data), formats=_FORMATS) as probe:
            probe.verify()
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        image.load()
    except Exception as error:  # a damaged file fails with whatever its bytes happen to mean
        raise DataError(f"{name} cannot be read as an image ({error}). Replace or remove the damaged file.") from error
    return image
