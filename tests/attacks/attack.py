"""A hostile file: what it tries, and what its refusal has to name."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARKER = Path("marker-of-code-that-ran")


@dataclass(frozen=True)
class Attack:
    """A hostile file.

    Args:
        name: what it tries.
        data: its bytes.
        field: what the message names besides the file, if the file must be refused; ``None``: it may be read.
    """

    name: str
    data: bytes
    field: str | None = None


class Code:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (MARKER,)


def instantiate(*_: Any) -> None:
    """What a checkpoint must not have called."""
    MARKER.touch()


def damage(genuine: bytes, seed: int = 0, count: int = 40) -> Iterator[Attack]:
    """A binary file cut at some lengths and with some bits flipped."""
    generator = random.Random(seed)
    for length in sorted(generator.sample(range(len(genuine)), count // 2)):
        yield Attack(f"cut at {length}", genuine[:length])
    for _ in range(count):
        at = generator.randrange(len(genuine))
        yield Attack(
            f"byte {at} flipped", genuine[:at] + bytes([genuine[at] ^ 1 << generator.randrange(8)]) + genuine[at + 1 :]
        )
