"""What a user's LightningModule may have for its report: how predictions are drawn, and what is known of its classes.

All are methods that are called where a module has them, so no base class is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_quant.callbacks.lightning_packages import either
from lightning_quant.deploy.edges.contract import ClassLabel
from lightning_quant.report.confusion import Confusion
from lightning_quant.report.pictures import Comparison
from lightning_quant.simulation.inputs import NetworkInputs
from lightning_quant.utilities.modules import on_cpu_in_eval

_DIGITS = 4


@runtime_checkable
class DrawsComparisons(Protocol):
    """A module that draws what its network predicts."""

    def draw_comparison(self, float_output: Any, quantized_output: Any, *args: Any, **kwargs: Any) -> Comparison | None:
        """Draw the predictions of the float and of the quantized network for one sample.

        Args:
            float_output: what the float network returned, on the CPU, for a batch of one sample.
            quantized_output: the same of the quantized network.
            *args: what the network was called with.
            **kwargs: what the network was called with by name.

        Returns:
            The pictures; ``None`` for a call that is not to be drawn, such as one of another network of the module.
        """


@runtime_checkable
class HasClassFigures(Protocol):
    """A module that measures single classes."""

    def class_figures(self) -> Mapping[str, Mapping[str, float]]:
        """Return figures of the last validation: for each kind, such as ``"IoU"``, one for each class by name."""


@runtime_checkable
class HasClassConfusion(Protocol):
    """A module that counts which of its classes are taken for each other."""

    def class_confusion(self) -> tuple[Sequence[str], Any] | None:
        """Return the names of the classes and the counts of the last validation.

        Returns:
            Up to 200 names, and a square table of whole numbers, rows for labels and columns for predictions, as
            nested lists, an array or a tensor; ``None`` where nothing was counted.
        """


@runtime_checkable
class HasClassNames(Protocol):
    """A module that knows what its network tells apart; it may have ``class_colors`` too, ``"#rrggbb"`` each."""

    @property
    def class_names(self) -> Sequence[str]:
        """The names of the classes, by index."""


def class_labels(module: pl.LightningModule) -> list[ClassLabel]:
    """Return the classes that a module names, with its colors where it has one for each; none, with a warning, else."""
    if not isinstance(module, HasClassNames):
        return []
    try:
        names = [str(name) for name in module.class_names]
        colors = list(getattr(module, "class_colors", ())) or [None] * len(names)
        return [ClassLabel(name, color) for name, color in zip(names, colors, strict=True)]
    except Exception as error:  # an export is not lost to a name
        _warn(module, "class_names", "names of classes", error)
        return []


def draw_comparisons(
    module: pl.LightningModule, float_network: nn.Module | None, network: nn.Module, calls: Sequence[NetworkInputs]
) -> list[Comparison]:
    """Let a module draw samples; none where it does not, where float is not known, or, with a warning, where it fails.

    Args:
        module: of the user.
        float_network: the float network.
        network: the quantized one.
        calls: samples, one each.
    """
    if not isinstance(module, DrawsComparisons) or float_network is None:
        return []
    try:
        with on_cpu_in_eval(float_network), on_cpu_in_eval(network):
            drawn = [
                module.draw_comparison(call.call(float_network), call.call(network), *call.args, **call.kwargs)
                for call in (one.to(torch.device("cpu")) for one in calls)
            ]
        if wrong := [one for one in drawn if not isinstance(one, Comparison | None)]:
            raise TypeError(f"it returned {type(wrong[0]).__name__}, expected a Comparison or None")
    except Exception as error:  # a run is not lost to a picture
        _warn(module, "draw_comparison", "pictures", error)
        return []
    return [one for one in drawn if one is not None]


def class_figures(module: pl.LightningModule) -> dict[str, dict[str, float]]:
    """Return a module's figures of its classes, finite and rounded; where it fails there are none, and a warning."""
    if not isinstance(module, HasClassFigures):
        return {}
    try:
        return {
            kind: {name: round(float(value), _DIGITS) for name, value in values.items() if math.isfinite(value)}
            for kind, values in module.class_figures().items()
        }
    except Exception as error:  # nor to a table
        _warn(module, "class_figures", "classes", error)
        return {}


def class_confusion(module: pl.LightningModule) -> Confusion | None:
    """Return which classes a module takes for each other; where it fails there is none, and a warning."""
    if not isinstance(module, HasClassConfusion):
        return None
    try:
        found = module.class_confusion()
        return None if found is None else Confusion.of(*found)
    except Exception as error:  # nor to a matrix
        _warn(module, "class_confusion", "confusion matrix", error)
        return None


def log_pictures(loggers: Iterable[Logger], pictures: Mapping[str, Path], step: int) -> None:
    """Give PNG files to the loggers that take pictures: TensorBoard, Weights & Biases, MLflow."""
    from matplotlib.image import imread

    for logger in loggers:
        for name, path in pictures.items():
            if isinstance(logger, either(TensorBoardLogger)):
                logger.experiment.add_image(name, imread(path)[..., :3], step, dataformats="HWC")
            elif isinstance(logger, either(WandbLogger)):
                logger.log_image(name, [str(path)], step=step)
            elif isinstance(logger, either(MLFlowLogger)):
                logger.experiment.log_artifact(logger.run_id, str(path), name.partition("/")[0])


def _warn(module: pl.LightningModule, method: str, what: str, error: Exception) -> None:
    rank_zero_warn(
        f"{type(module).__name__}.{method} failed: {type(error).__name__}: {error}. The report has no {what}."
    )
