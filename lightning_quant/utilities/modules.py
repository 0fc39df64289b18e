"""Modes of modules: which parts train and which are in eval mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def preserve_modes(module: nn.Module) -> Iterator[None]:
    """Restore afterwards whether a module and each of its parts were in training mode before a block.

    Args:
        module: the module. Parts that are added in the block keep the mode they have at its end.
    """
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
