"""Hashes of files, texts, arrays and tensors: SHA-256, whole or as a short key."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

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


def add_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    """Add name, type, shape and values of a tensor to a digest of :mod:`hashlib`."""
    import torch  # a process that talks to a device needs none

    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
