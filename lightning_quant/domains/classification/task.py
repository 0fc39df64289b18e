"""The LightningModule of the domain: trains and evaluates any network that tells images apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix
from typing_extensions import override

from lightning_quant.domains.classification.pictures import compare_scores
from lightning_quant.domains.training import Task, first_tensor
from lightning_quant.errors import ConfigurationError
from lightning_quant.report.confusion import MOST_CLASSES
from lightning_quant.report.pictures import Comparison

Batch = Sequence[Tensor]
"""``(images, labels)``: float (N, 3, H, W) and int64 (N,)."""
# Where packages keep the logits in a dict: transformers and torchvision.
_LOGITS = ("logits", "out")
_TOP = 5


class ClassificationTask(Task):
    """Train and evaluate a network that classifies images; knows nothing of quantization.

    The network lives in the attribute ``model``, where the callbacks of this package look for it by default.
    It maps normalized images ``(N, 3, H, W)`` to logits ``(N, num_classes)``, as a tensor, as the first element of a
    tuple or as the entry ``"logits"`` or ``"out"`` of a dict.

    Logged: ``train_loss`` every step; ``val_loss``, ``val_acc`` and, with more than five classes, ``val_acc5``
    (``test_…``) every epoch: the share of images whose label is the likeliest class, or among the five likeliest, over
    all processes. :meth:`class_figures` and :meth:`class_confusion` are of the last validation.

    The optimizer is AdamW, weight decay on convolution and linear weights only; the learning rate climbs
    linearly for a fraction of the steps and falls to zero along a cosine. Where the trainer cannot tell its
    number of steps (``max_epochs=-1``), it is constant.

    The network is not a hyperparameter; pass it again when loading::

        task = ClassificationTask(resnet18(num_classes=10), num_classes=10)
        task = ClassificationTask.load_from_checkpoint("last.ckpt", network=resnet18(num_classes=10))

    Args:
        network: the network, trained in place.
        learning_rate: highest learning rate of the schedule.
        weight_decay: AdamW's decoupled weight decay.
        num_classes: length of the logits, at least 2.
        label_smoothing: part of each label that is spread over all classes in the training loss, 0 to below 1.
        warmup_fraction: part of all optimizer steps in which the learning rate climbs, 0 to below 1.

    Raises:
        ConfigurationError: an argument is out of range; in :meth:`setup`, the data module has another number of
            classes; or, in a step, the network returns something else than logits for ``num_classes`` classes.
    """

    def __init__(
        self,
        network: nn.Module,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        num_classes: int = 1000,
        label_smoothing: float = 0.0,
        warmup_fraction: float = 0.05,
    ) -> None:
        super().__init__(network, learning_rate, weight_decay, warmup_fraction)
        if num_classes < 2:
            raise ConfigurationError(f"num_classes={num_classes}: expected at least 2.")
        if not 0 <= label_smoothing < 1:
            raise ConfigurationError(f"label_smoothing={label_smoothing}: expected 0 to below 1.")
        self.save_hyperparameters(ignore=["network"])
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.confusion = nn.ModuleDict(
            {stage: MulticlassConfusionMatrix(num_classes, validate_args=False) for stage in ("val", "test")}
        )
        self.top = nn.ModuleDict(
            {
                stage: MulticlassAccuracy(num_classes, top_k=_TOP, average="micro", validate_args=False)
                for stage in ("val", "test")
                if num_classes > _TOP
            }
        )
        self._counts: Tensor | None = None

    @override
    def setup(self, stage: str) -> None:
        """Compare the number of classes with that of the data module, before any work."""
        names = self._names_of_data()
        if names and len(names) != self.num_classes:
            raise ConfigurationError(
                f"The data has {len(names)} classes ({', '.join(names[:5])}{', …' if len(names) > 5 else ''}) and the "
                f"task num_classes={self.num_classes}: expected the same. Pass num_classes={len(names)} to the task "
                "and to the network (task.num_classes on the command line)."
            )

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(N, num_classes)`` of images ``(N, 3, H, W)``."""
        return self._logits(self.model(images))

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels, label_smoothing=self.label_smoothing)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    @override
    def predict_step(self, batch: Tensor | Batch, batch_idx: int) -> Tensor:
        """Return classes, int64 ``(N,)``, of bare images or of the images of ``(images, labels)``."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        return self(images).argmax(dim=1)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names that the data module has for ``num_classes`` classes, else ``"class 0"`` and so on."""
        names = self._names_of_data()
        return names if len(names) == self.num_classes else tuple(f"class {i}" for i in range(self.num_classes))

    def draw_comparison(self, float_output: Any, quantized_output: Any, images: Tensor) -> Comparison:
        """Draw an image with the three likeliest classes of both networks and their scores, for the report.

        Args:
            float_output: what the float network returned for the image.
            quantized_output: the same of the quantized network.
            images: the one image, normalized, ``(1, 3, H, W)``.
        """
        one, other = (self._logits(output).softmax(dim=1)[0] for output in (float_output, quantized_output))
        return compare_scores(images[0], one, other, self.class_names)

    def class_figures(self) -> dict[str, dict[str, float]]:
        """Return recall and precision of each class in the last validation, for the report; before it, nothing.

        Recall is the share of a class's images that were recognized, precision the share of what was taken for the
        class that is of it; NaN where there were none.
        """
        if self._counts is None:
            return {}
        hits = self._counts.diag()
        figures = {"recall": hits / self._counts.sum(dim=1), "precision": hits / self._counts.sum(dim=0)}
        return {kind: dict(zip(self.class_names, found.tolist(), strict=True)) for kind, found in figures.items()}

    def class_confusion(self) -> tuple[tuple[str, ...], Tensor] | None:
        """Return the names and the counts of the last validation, (C, C), rows for labels and columns for predictions.

        ``None`` before it, and for more classes than a report can show.
        """
        if self._counts is None or self.num_classes > MOST_CLASSES:
            return None
        return self.class_names, self._counts

    def _names_of_data(self) -> tuple[str, ...]:
        try:
            data = getattr(self.trainer, "datamodule", None)
        except RuntimeError:  # there is no trainer yet
            return ()
        return tuple(getattr(data, "class_names", None) or ())

    def _logits(self, output: Any) -> Tensor:
        logits = first_tensor(output, _LOGITS)
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise ConfigurationError(
                f"The network returned shape {tuple(logits.shape)}; expected (N, {self.num_classes}). "
                f"Build it with num_classes={self.num_classes}, or pass its own number to ClassificationTask."
            )
        return logits

    @override
    def evaluate(self, stage: str, batch: Batch) -> None:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        self.log(f"{stage}_loss", loss, prog_bar=True, batch_size=len(images), sync_dist=True)
        for metric in self._metrics(stage).values():
            metric.update(logits, labels)

    @override
    def end_evaluation(self, stage: str) -> None:
        # compute() adds up the counts of all processes, so every process logs the same figures.
        found = {name: metric.compute() for name, metric in self._metrics(stage).items()}
        counts = found.pop("confusion")
        accuracies = {"acc": counts.diag().sum() / counts.sum(), **found}
        self.log_dict({f"{stage}_{name}": value for name, value in accuracies.items()}, prog_bar=True, sync_dist=True)
        if stage == "val":
            self._counts = counts.cpu()

    @override
    def start_evaluation(self, stage: str) -> None:
        for metric in self._metrics(stage).values():
            metric.reset()

    def _metrics(self, stage: str) -> dict[str, Metric]:
        found = {"confusion": self.confusion[stage]}
        if stage in self.top:
            found["acc5"] = self.top[stage]
        return {name: metric for name, metric in found.items() if isinstance(metric, Metric)}
