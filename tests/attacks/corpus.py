"""Every hostile file for a reader, made by damaging a genuine one."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator

from tests.attacks.archive_attacks import (
    checkpoint_attacks,
    manifest_attacks,
    npz_attacks,
    sample_attacks,
    statistics_attacks,
)
from tests.attacks.attack import Attack, damage
from tests.attacks.json_attacks import field_attacks, json_attacks, value_attacks


def picture_attacks(genuine: bytes) -> Iterator[Attack]:
    """Pictures."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    def png(width: int, height: int, data: bytes) -> bytes:
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", data) + chunk(b"IEND", b"")

    yield Attack("huge", png(2**31 - 1, 2**31 - 1, zlib.compress(b"")), "")
    yield Attack("large and cut", png(2**15, 2**14, zlib.compress(b"")), "")
    yield Attack("a bomb", png(30_000, 30_000, zlib.compress(bytes(10**7))), "")
    yield Attack("no pixels", png(0, 0, zlib.compress(b"")), "")
    yield Attack(
        "text that unfolds", genuine[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8))) + genuine[33:], ""
    )
    yield Attack("PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) (w) file\n", "")
    yield Attack("empty", b"", "")
    yield Attack("no picture", b"GIF89a" + bytes(20), "")


def onnx_attacks(genuine: bytes) -> Iterator[Attack]:
    """Files that are hashed: any change is one."""
    yield Attack("empty", b"", "")
    yield Attack("a bit flipped", genuine[:-1] + bytes([genuine[-1] ^ 1]), "")
    yield Attack("twice", genuine * 2, "")


BINARY: dict[str, tuple[Callable[[bytes], Iterator[Attack]], ...]] = {
    "samples": (npz_attacks, sample_attacks),
    "AI Hub's outputs": (npz_attacks,),
    "checkpoint": (checkpoint_attacks, manifest_attacks),
    "float checkpoint": (checkpoint_attacks,),
    "weights": (checkpoint_attacks,),
    "statistics": (npz_attacks, statistics_attacks),
    "photograph": (picture_attacks,),
    "labels": (picture_attacks,),
    "picture in a report": (picture_attacks,),
    "model": (onnx_attacks,),
    "encodings": (onnx_attacks,),
}


def corpus(reader: str, genuine: bytes, slow: bool) -> Iterator[Attack]:
    """Every attack on a reader."""
    if reader in BINARY:
        for make in BINARY[reader]:
            yield from make(genuine)
        yield from damage(genuine, count=10 if slow else 100)
        return
    yield from json_attacks(genuine)
    yield from field_attacks(reader, genuine)
    if not slow:
        yield from value_attacks(genuine)
