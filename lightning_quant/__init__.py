"""Quantization for PyTorch Lightning: from a float network to integers proven against the device.

The names below load on first use, so ``import lightning_quant`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_quant.callbacks.checkpoint import load_quantized, read_manifest
    from lightning_quant.callbacks.device_export import DeviceExport
    from lightning_quant.callbacks.post_training import PostTrainingQuantization
    from lightning_quant.callbacks.resume_point import ResumePoint
    from lightning_quant.callbacks.training import QuantizationAwareTraining
    from lightning_quant.deploy.blame.blame import blame
    from lightning_quant.deploy.edges.spec import ImageInput, OutputEdge
    from lightning_quant.deploy.export import export_bundle
    from lightning_quant.deploy.targets.target import Target
    from lightning_quant.ladder.rung import Rung
    from lightning_quant.precision import Precision
    from lightning_quant.recipe import QuantRecipe
    from lightning_quant.report.baseline import compare
    from lightning_quant.report.pictures import Comparison
    from lightning_quant.simulation.range_estimators import RangeEstimator

_HOMES = {
    "Comparison": "lightning_quant.report.pictures",
    "DeviceExport": "lightning_quant.callbacks.device_export",
    "ImageInput": "lightning_quant.deploy.edges.spec",
    "OutputEdge": "lightning_quant.deploy.edges.spec",
    "PostTrainingQuantization": "lightning_quant.callbacks.post_training",
    "Precision": "lightning_quant.precision",
    "QuantRecipe": "lightning_quant.recipe",
    "QuantizationAwareTraining": "lightning_quant.callbacks.training",
    "RangeEstimator": "lightning_quant.simulation.range_estimators",
    "ResumePoint": "lightning_quant.callbacks.resume_point",
    "Rung": "lightning_quant.ladder.rung",
    "Target": "lightning_quant.deploy.targets.target",
    "blame": "lightning_quant.deploy.blame.blame",
    "compare": "lightning_quant.report.baseline",
    "export_bundle": "lightning_quant.deploy.export",
    "load_quantized": "lightning_quant.callbacks.checkpoint",
    "read_manifest": "lightning_quant.callbacks.checkpoint",
}

__all__ = [
    "Comparison",
    "DeviceExport",
    "ImageInput",
    "OutputEdge",
    "PostTrainingQuantization",
    "Precision",
    "QuantRecipe",
    "QuantizationAwareTraining",
    "RangeEstimator",
    "ResumePoint",
    "Rung",
    "Target",
    "blame",
    "compare",
    "export_bundle",
    "load_quantized",
    "read_manifest",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
