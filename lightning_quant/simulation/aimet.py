"""The one door through which AIMET enters: lazily, quietly, and without touching the user's program.

Importing AIMET takes seconds, adds warning filters, puts a handler on the root logger and makes its own
loggers print to stdout. :func:`load` imports it once and puts all of that back.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType

import torch

from lightning_quant.errors import LightningQuantError


@functools.cache
def load() -> ModuleType:
    """Import ``aimet_torch`` and return it.

    A program that had imported AIMET itself before keeps its logging as it set it up. Otherwise AIMET's
    loggers stay silent below WARNING and hand the rest to the standard ``logging`` configuration.
    """
    if "aimet_torch" in sys.modules:
        return sys.modules["aimet_torch"]
    root = logging.getLogger()
    handlers, level, filters = list(root.handlers), root.level, list(warnings.filters)
    try:
        root.setLevel(logging.WARNING)  # AIMET greets at INFO
        with contextlib.redirect_stdout(sys.stderr):
            import aimet_torch
            from aimet_torch.common.utils import AimetLogger
        for area in AimetLogger.LogAreas:
            logger = AimetLogger.get_area_logger(area)
            logger.handlers.clear()
            logger.propagate = True
            logger.setLevel(logging.WARNING)
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        warnings.filters[:] = filters  # type: ignore[index]
        warnings._filters_mutated()  # type: ignore[attr-defined]  # invalidates the per-module caches
    return aimet_torch


@contextlib.contextmanager
def failing_as(what: str) -> Iterator[None]:
    """Turn whatever AIMET raises in a block (RuntimeError, KeyError, AssertionError …) into this package's error.

    Raises:
        LightningQuantError: named after ``what`` was being done.
    """
    try:
        yield
    except LightningQuantError:
        raise
    except Exception as error:
        raise LightningQuantError(f"AIMET failed in {what}: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def quiet() -> Iterator[ModuleType]:
    """AIMET for the length of a block, without the warnings it causes in PyTorch and cannot help."""
    aimet = load()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message=r".*torch\.jit\..* is deprecated")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="To copy construct from a tensor")
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", message="Exporting to ONNX opset version")
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        yield aimet
