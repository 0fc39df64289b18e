"""The LightningModule for detection: trains and evaluates a detector that returns class scores and box distances."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision
from typing_extensions import override

from lightning_quant.domains.detection.boxes import Boxes, Detections, decode, raw_maps
from lightning_quant.domains.detection.drawing import colors_of, compare_boxes
from lightning_quant.domains.detection.losses import detection_losses
from lightning_quant.domains.training import Task, figures_of_epoch
from lightning_quant.errors import ConfigurationError
from lightning_quant.report.pictures import Comparison

Batch = tuple[Tensor, list[Boxes]]
"""``(images, targets)``: float (N, 3, H, W), and the boxes of each image with their classes."""

# What torchmetrics computes average precision with, and the package that has it.
_BACKENDS: tuple[Literal["pycocotools"], Literal["faster_coco_eval"]] = ("pycocotools", "faster_coco_eval")


class DetectionTask(Task):
    """Train and evaluate a one-level anchor-free detector; knows nothing of quantization.

    The network lives in the attribute ``model``, where the callbacks of this package look for it by default. It maps
    normalized images ``(N, 3, H, W)`` to a dict of ``scores``, logits ``(N, C, h, w)``, and ``distances``,
    ``(N, 4, h, w)``, or to a pair of them: see :class:`~lightning_quant.domains.detection.network.Detector`. Boxes are
    made of them here, outside the network: nothing of that is quantized or runs on the device.

    Logged: ``train_loss``, ``train_score_loss`` and ``train_box_loss`` every step; ``val_loss``, ``val_map`` and
    ``val_map50`` (``test_…``) every epoch. ``map`` is COCO's average precision, the mean over classes and over
    thresholds of the intersection over union from 0.5 to 0.95; ``map50`` that at 0.5 alone. Both are NaN where the
    labels hold no box. They are computed by torchmetrics with ``pycocotools`` or ``faster_coco_eval``.

    The optimizer is AdamW, as in :func:`~lightning_quant.domains.training.Task`.

    The network is not a hyperparameter; pass it again when loading::

        task = DetectionTask(fcos_nano(2), class_names=["person", "car"])
        task = DetectionTask.load_from_checkpoint("last.ckpt", network=fcos_nano(2))

    Args:
        network: the network, trained in place.
        class_names: the classes by index, as in the data module.
        learning_rate: highest learning rate of the schedule.
        weight_decay: AdamW's decoupled weight decay.
        warmup_fraction: part of all optimizer steps in which the learning rate climbs, 0 to below 1.
        score_threshold: score below which nothing is detected, 0 to below 1. Average precision wants a low one.
        iou_threshold: intersection over union above which the lower of two boxes of one class is dropped, 0 to 1.
        max_detections: boxes of one image at most; COCO's average precision looks at 100.
        drawn_score: score from which a detection is drawn in the pictures of the report, 0 to 1.

    Raises:
        ConfigurationError: an argument is out of range, or nothing is installed that computes average precision; or, in
            a step, the network returns something else than described, or images have a size that it does not take.
    """

    def __init__(
        self,
        network: nn.Module,
        class_names: Sequence[str],
        learning_rate: float = 3e-3,
        weight_decay: float = 0.01,
        warmup_fraction: float = 0.05,
        score_threshold: float = 0.05,
        iou_threshold: float = 0.6,
        max_detections: int = 100,
        drawn_score: float = 0.4,
    ) -> None:
        super().__init__(network, learning_rate, weight_decay, warmup_fraction)
        if class_names is None or isinstance(class_names, str) or not len(class_names):
            raise ConfigurationError(f"class_names={class_names!r}: expected the names of the classes, one or more.")
        for name, value in (
            ("score_threshold", score_threshold),
            ("iou_threshold", iou_threshold),
            ("drawn_score", drawn_score),
        ):
            if not 0 <= value <= 1:
                raise ConfigurationError(f"{name}={value}: expected 0 to 1.")
        if max_detections < 1:
            raise ConfigurationError(f"max_detections={max_detections}: expected at least 1.")
        self.class_names = tuple(str(name) for name in class_names)
        self.save_hyperparameters(
            {
                "class_names": list(self.class_names),
                "learning_rate": learning_rate,
                "weight_decay": weight_decay,
                "warmup_fraction": warmup_fraction,
                "score_threshold": score_threshold,
                "iou_threshold": iou_threshold,
                "max_detections": max_detections,
                "drawn_score": drawn_score,
            }
        )
        self.score_threshold = score_threshold
        self.iou_threshold = iou_threshold
        self.max_detections = max_detections
        self.drawn_score = drawn_score
        self.precision_metrics = nn.ModuleDict({stage: _average_precision() for stage in ("val", "test")})
        self._class_map: dict[str, dict[str, float]] = {}

    @property
    def class_colors(self) -> tuple[str, ...]:
        """The colors of the boxes in pictures, ``#rrggbb`` for each class."""
        return tuple(f"#{bytes(color).hex()}" for color in colors_of(len(self.class_names)))

    @override
    def forward(self, images: Tensor) -> list[Detections]:
        """Return what is detected in each of ``images`` ``(N, 3, H, W)``, best first."""
        scores, distances = self._maps(images)
        return self._decoded(scores, distances, images)

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets = batch
        scores, boxes = detection_losses(*self._maps(images), targets, _size(images))
        loss = scores + boxes
        for name, value in (("score_loss", scores), ("box_loss", boxes)):
            self.log(f"train_{name}", value, batch_size=len(images))
        self.log("train_loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    @override
    def predict_step(self, batch: Tensor | Batch, batch_idx: int) -> list[Detections]:
        """Return what is detected in bare images or in the images of ``(images, targets)``, best first."""
        return self(batch if isinstance(batch, Tensor) else batch[0])

    def draw_comparison(self, float_output: Any, quantized_output: Any, images: Tensor) -> Comparison:
        """Draw the boxes of both networks over an image, for the report: those with a score of ``drawn_score`` or more.

        Args:
            float_output: what the float network returned for the image.
            quantized_output: the same of the quantized network.
            images: the one image, normalized, ``(1, 3, H, W)``.
        """
        in_float, quantized = (self._drawn(output, images) for output in (float_output, quantized_output))
        return compare_boxes(images[0], in_float, quantized, self.class_names)

    def class_figures(self) -> dict[str, dict[str, float]]:
        """Return the average precision of each class in the last validation, for the report."""
        return {"AP": self.per_class_map()}

    def per_class_map(self, stage: str = "val") -> dict[str, float]:
        """Return the average precision of each class that occurred in the labels of the last epoch of ``stage``.

        Args:
            stage: ``"val"`` or ``"test"``.

        Returns:
            The mean over COCO's thresholds, 0 to 1, by the names in ``class_names``.

        Raises:
            ConfigurationError: there has been no such epoch.
        """
        return figures_of_epoch(self._class_map, stage, "per_class_map")

    def _maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        divisor = getattr(self.model, "divisor", 1)
        if any(side % divisor for side in _size(images)):
            raise ConfigurationError(
                f"Images of {images.shape[-2]}x{images.shape[-1]} (height x width): this detector takes multiples of "
                f"{divisor}. Pass such a size=(height, width) to the data module."
            )
        return raw_maps(self.model(images), len(self.class_names))

    def _decoded(self, scores: Tensor, distances: Tensor, images: Tensor) -> list[Detections]:
        return decode(scores, distances, _size(images), self.score_threshold, self.iou_threshold, self.max_detections)

    def _drawn(self, output: Any, images: Tensor) -> Detections:
        (found,) = self._decoded(*raw_maps(output, len(self.class_names)), images)
        count = int((found["scores"] >= self.drawn_score).sum())  # the best come first
        return {
            "boxes": found["boxes"][:count],
            "labels": found["labels"][:count],
            "scores": found["scores"][:count],
        }

    @override
    def evaluate(self, stage: str, batch: Batch) -> None:
        images, targets = batch
        scores, distances = self._maps(images)
        loss = sum(detection_losses(scores, distances, targets, _size(images)))
        self.log(f"{stage}_loss", loss, prog_bar=True, batch_size=len(images), sync_dist=True)
        metric: Any = self._metric(stage)  # which takes dicts of any names
        metric.update(self._decoded(scores, distances, images), targets)

    @override
    def start_evaluation(self, stage: str) -> None:
        self._metric(stage).reset()

    @override
    def end_evaluation(self, stage: str) -> None:
        # compute() gathers the boxes of all processes, so every process logs the same figure.
        found = self._metric(stage).compute()
        names = dict(enumerate(self.class_names))
        classes, values = found["classes"].view(-1).tolist(), found["map_per_class"].view(-1).tolist()
        self._class_map[stage] = {names[c]: ap for c, ap in zip(classes, values, strict=True) if ap >= 0}
        for name, key in (("map", "map"), ("map50", "map_50")):
            value = found[key].to(self.device)  # -1 where there is no box to find
            self.log(f"{stage}_{name}", torch.where(value < 0, torch.nan, value), prog_bar=True, sync_dist=True)

    def _metric(self, stage: str) -> MeanAveragePrecision:
        metric = self.precision_metrics[stage]
        assert isinstance(metric, MeanAveragePrecision)
        return metric


def _size(images: Tensor) -> tuple[int, int]:
    height, width = images.shape[-2:]
    return height, width


def _average_precision() -> MeanAveragePrecision:
    """Return torchmetrics' metric with what is installed.

    Raises:
        ConfigurationError: nothing is.
    """
    backend = next((name for name in _BACKENDS if importlib.util.find_spec(name) is not None), None)
    if backend is None:
        raise ConfigurationError(
            f"Average precision is computed by {' or '.join(_BACKENDS)}, and neither is installed: "
            "pip install 'lightning-quant[detection]'."
        )
    metric = MeanAveragePrecision(class_metrics=True, backend=backend)
    metric.warn_on_many_detections = False
    return metric
