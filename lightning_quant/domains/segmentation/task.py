"""The LightningModule of the worked example: trains and evaluates any segmentation network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix
from typing_extensions import override

from lightning_quant.domains.segmentation.cityscapes import CLASS_NAMES, CLASSES, IGNORE_INDEX, NUM_CLASSES
from lightning_quant.domains.segmentation.overlay import compare_class_maps
from lightning_quant.domains.training import Task, figures_of_epoch, first_tensor
from lightning_quant.errors import ConfigurationError
from lightning_quant.report.confusion import MOST_CLASSES
from lightning_quant.report.pictures import Comparison

Batch = Sequence[Tensor]
"""``(images, targets)``: float (N, 3, H, W) and int64 (N, H, W)."""


class SegmentationTask(Task):
    """Train and evaluate a segmentation network; knows nothing of quantization.

    The network lives in the attribute ``model``, where the callbacks of this package look for it by default.
    It maps normalized images ``(N, 3, H, W)`` to logits ``(N, num_classes, h, w)`` of any size, as a tensor,
    as the first element of a tuple or as the entry ``"out"`` of a dict (torchvision's models). The logits are
    upsampled bilinearly here, outside the network: the upsampling is not quantized and does not run on the
    device.

    Logged: ``train_loss`` every step; ``val_loss`` and ``val_miou`` (``test_…``) every epoch. The mean
    intersection over union comes from one confusion matrix over the whole epoch and all processes, see
    :func:`class_iou`; :meth:`per_class_iou` returns its terms.

    The optimizer is AdamW, weight decay on convolution and linear weights only; the learning rate climbs
    linearly for a fraction of the steps and falls to zero along a cosine. Where the trainer cannot tell its
    number of steps (``max_epochs=-1``), it is constant.

    The network is not a hyperparameter; pass it again when loading::

        task = SegmentationTask(ffnet_nano(), learning_rate=3e-3)
        task = SegmentationTask.load_from_checkpoint("last.ckpt", network=ffnet_nano())

    Args:
        network: the network, trained in place.
        learning_rate: highest learning rate of the schedule.
        weight_decay: AdamW's decoupled weight decay.
        num_classes: channels of the logits, 2 to 255.
        ignore_index: label of pixels that count neither in the loss nor in a metric.
        class_weights: one factor for each class in the loss (not in the metrics); ``None`` weighs all alike.
        warmup_fraction: part of all optimizer steps in which the learning rate climbs, 0 to below 1.

    Raises:
        ConfigurationError: an argument is out of range; or, in a step, the network returns something else
            than logits for ``num_classes`` classes.
    """

    def __init__(
        self,
        network: nn.Module,
        learning_rate: float = 3e-3,
        weight_decay: float = 0.01,
        num_classes: int = NUM_CLASSES,
        ignore_index: int = IGNORE_INDEX,
        class_weights: list[float] | None = None,
        warmup_fraction: float = 0.05,
    ) -> None:
        super().__init__(network, learning_rate, weight_decay, warmup_fraction)
        # 255 fits the uint8 of predict_step.
        if not 2 <= num_classes <= 255:
            raise ConfigurationError(f"num_classes={num_classes}: expected 2 to 255.")
        if class_weights is not None and (len(class_weights) != num_classes or min(class_weights) < 0):
            raise ConfigurationError(
                f"class_weights={class_weights}: expected {num_classes} numbers, one per class, each 0 or more."
            )
        self.save_hyperparameters(ignore=["network"])
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        weights = None if class_weights is None else torch.tensor(class_weights)
        # Not in the checkpoint: the hyperparameters hold them already.
        self.register_buffer("class_weights", weights, persistent=False)
        self.confusion = nn.ModuleDict(
            {
                stage: MulticlassConfusionMatrix(num_classes, ignore_index=ignore_index, validate_args=False)
                for stage in ("val", "test")
            }
        )
        self._class_iou: dict[str, dict[str, float]] = {}
        self._counts: Tensor | None = None

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(N, num_classes, H, W)`` at the size of ``images`` ``(N, 3, H, W)``."""
        return self._logits(images, images.shape[-2:])

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets = batch
        loss = self._loss(self._logits(images, targets.shape[-2:]), targets)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    @override
    def predict_step(self, batch: Tensor | Batch, batch_idx: int) -> Tensor:
        """Return class maps, uint8 ``(N, H, W)``, of bare images or of the images of ``(images, targets)``."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        return self(images).argmax(dim=1).to(torch.uint8)

    def draw_comparison(self, float_output: Any, quantized_output: Any, images: Tensor) -> Comparison | None:
        """Draw the classes of both networks over an image, for the report; none for more classes than it has colors.

        Args:
            float_output: what the float network returned for the image.
            quantized_output: the same of the quantized network.
            images: the one image, normalized, ``(1, 3, H, W)``.
        """
        if self.num_classes > NUM_CLASSES:
            return None
        one, other = (
            self._upsampled(output, images.shape[-2:]).argmax(dim=1)[0] for output in (float_output, quantized_output)
        )
        return compare_class_maps(images[0], one, other, self.class_names)

    def class_figures(self) -> dict[str, dict[str, float]]:
        """Return the IoU of each class in the last validation, for the report."""
        return {"IoU": self.per_class_iou()}

    def class_confusion(self) -> tuple[tuple[str, ...], Tensor] | None:
        """Return the names and the pixels of the last validation, (C, C), rows for labels and columns for predictions.

        ``None`` before it, and for more classes than a report can show.
        """
        if self._counts is None or self.num_classes > MOST_CLASSES:
            return None
        return self.class_names, self._counts

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of Cityscapes for 19 classes, else ``"class 0"`` and so on."""
        return CLASS_NAMES if self.num_classes == NUM_CLASSES else tuple(f"class {i}" for i in range(self.num_classes))

    @property
    def class_colors(self) -> tuple[str, ...]:
        """The colors of Cityscapes for 19 classes, ``#rrggbb``; none for others."""
        return tuple(f"#{bytes(one.color).hex()}" for one in CLASSES) if self.num_classes == NUM_CLASSES else ()

    def per_class_iou(self, stage: str = "val") -> dict[str, float]:
        """Return the intersection over union of each class that occurred in the labels of the last epoch of ``stage``.

        Args:
            stage: ``"val"`` or ``"test"``.

        Returns:
            IoU between 0 and 1, by the names in :attr:`class_names`.

        Raises:
            ConfigurationError: there has been no such epoch.
        """
        return figures_of_epoch(self._class_iou, stage, "per_class_iou")

    def _logits(self, images: Tensor, size: Sequence[int]) -> Tensor:
        return self._upsampled(self.model(images), size)

    def _upsampled(self, output: Any, size: Sequence[int]) -> Tensor:
        logits = first_tensor(output)
        if logits.ndim != 4 or logits.shape[1] != self.num_classes:
            raise ConfigurationError(
                f"The network returned shape {tuple(logits.shape)}; expected (N, {self.num_classes}, h, w). "
                f"Build it with num_classes={self.num_classes}, or pass its own number to SegmentationTask."
            )
        return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        weights = self.get_buffer("class_weights") if self.class_weights is not None else None
        total = F.cross_entropy(logits, targets, weights, ignore_index=self.ignore_index, reduction="sum")
        labeled = targets != self.ignore_index
        count = labeled.sum() if weights is None else (weights[targets * labeled] * labeled).sum()
        # reduction="mean" divides 0 by 0 where a batch is all void, and one NaN ends the training.
        return total / count.to(total.dtype).clamp(min=torch.finfo(total.dtype).tiny)

    @override
    def evaluate(self, stage: str, batch: Batch) -> None:
        images, targets = batch
        logits = self._logits(images, targets.shape[-2:])
        loss = self._loss(logits, targets)
        self.log(f"{stage}_loss", loss, prog_bar=True, batch_size=len(images), sync_dist=True)
        self._confusion(stage).update(logits.argmax(dim=1), targets)

    @override
    def start_evaluation(self, stage: str) -> None:
        self._confusion(stage).reset()

    @override
    def end_evaluation(self, stage: str) -> None:
        # compute() adds up the matrices of all processes, so every process logs the same figure.
        counts = self._confusion(stage).compute()
        if stage == "val":
            self._counts = counts.cpu()
        iou = class_iou(counts)
        named = zip(self.class_names, iou.tolist(), strict=True)
        self._class_iou[stage] = {name: value for name, value in named if not math.isnan(value)}
        self.log(f"{stage}_miou", iou.nanmean(), prog_bar=True, sync_dist=True)

    def _confusion(self, stage: str) -> MulticlassConfusionMatrix:
        metric = self.confusion[stage]
        assert isinstance(metric, MulticlassConfusionMatrix)
        return metric


def class_iou(confusion: Tensor) -> Tensor:
    """Compute the intersection over union of each class: ``TP / (TP + FP + FN)``.

    A class that no label holds gets NaN and so does not count in the mean, even where pixels were predicted
    to be of that class: those count as missed pixels (FN) of their true classes. Cityscapes' own script and
    torchmetrics' Jaccard index would add a zero for such a class, which makes the mean of a small validation
    split jump when one stray pixel appears; with all 19 classes in the labels, the three agree.

    Args:
        confusion: counts of pixels, (C, C), rows are labels and columns predictions.

    Returns:
        float (C,), each 0 to 1 or NaN.
    """
    hits = confusion.diag()
    labeled = confusion.sum(dim=1)
    union = labeled + confusion.sum(dim=0) - hits
    # 0 / 0 never reaches the result: a class with labels has a union.
    return torch.where(labeled > 0, hits / union, torch.nan)
