"""What a user adds to a Trainer. Thin: the algorithms are in :mod:`lightning_quant.simulation`.

The names below load on first use, as those of :mod:`lightning_quant` itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_quant.callbacks.device_export import DeviceExport
    from lightning_quant.callbacks.post_training import PostTrainingQuantization
    from lightning_quant.callbacks.resume_point import ResumePoint
    from lightning_quant.callbacks.training import QuantizationAwareTraining

_FILES = {
    "DeviceExport": "device_export",
    "PostTrainingQuantization": "post_training",
    "QuantizationAwareTraining": "training",
    "ResumePoint": "resume_point",
}

__all__ = ["DeviceExport", "PostTrainingQuantization", "QuantizationAwareTraining", "ResumePoint"]


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_FILES])
