"""Image files that cannot be trusted: decoded whole, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from lightning_quant.errors import DataError
from lightning_quant.utilities.images import open_image


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.new("RGB", (16, 8), (10, 0, 0)).save(path)
    return path


def test_a_file_and_its_bytes_are_the_same_image(picture: Path) -> None:
    assert open_image(picture).tobytes() == open_image(picture.read_bytes()).tobytes()


@pytest.mark.parametrize("damage", [lambda data: data[:50], lambda _: b"not a picture", lambda _: b"%!PS"])
def test_a_damaged_file_is_named(picture: Path, damage: Callable[[bytes], bytes]) -> None:
    picture.write_bytes(damage(picture.read_bytes()))
    with pytest.raises(DataError, match=r"picture\.png cannot be read as an image"):
        open_image(picture)


def test_a_wrong_checksum_is_damage(picture: Path) -> None:
    data = bytearray(picture.read_bytes())
    data[-14] ^= 1  # in the checksum of the pixels
    with pytest.raises(DataError, match="image 7 cannot be read as an image"):
        open_image(bytes(data), "image 7")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.png cannot be read as an image"):
        open_image(tmp_path / "none.png")
