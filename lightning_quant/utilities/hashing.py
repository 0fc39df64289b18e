"""Hashes of files, texts and arrays: SHA-256, whole or as a short key."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

_SHORT = 12


def file_sha256(path: Path) -> str:
    """Compute the SHA-256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def short_hash(text: str) -> str:
    """Compute a key of 12 hexadecimal digits for a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:_SHORT]


def arrays_hash(samples: Sequence[Mapping[str, np.ndarray]]) -> str:
    """Compute a key of 12 hexadecimal digits over names, types, shapes and values of arrays."""
    digest = hashlib.sha256()
    for arrays in samples:
        for name, value in arrays.items():
            digest.update(f"{name} {value.dtype} {value.shape} ".encode())
            digest.update(np.ascontiguousarray(value).data)
    return digest.hexdigest()[:_SHORT]
