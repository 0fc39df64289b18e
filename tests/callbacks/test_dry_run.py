"""A step that is run for calibration leaves no trace in the module, its Trainer or its loggers."""

from __future__ import annotations

import copy
import csv
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

from lightning_quant import PostTrainingQuantization, QuantizationAwareTraining
from tests.helpers.small import CLASSES, SmallModule, assert_same_tensors, small_loader

MakeTrainer = Callable[..., Trainer]


class Average:
    """A helper as people write them: neither a module nor a container."""

    def __init__(self, network: nn.Module) -> None:
        self.updates = 0
        self.shadow = {name: value.detach().clone() for name, value in network.named_parameters()}

    def update(self, network: nn.Module) -> None:
        self.updates += 1
        for name, value in network.named_parameters():
            if name in self.shadow:
                self.shadow[name].lerp_(value.detach(), 0.1)


class Busy(SmallModule):
    """Changes whatever a module can hold, before it calls the network and after."""

    def __init__(self, early: bool, called: int) -> None:
        super().__init__()
        self.early, self.times = early, called
        self.teacher = copy.deepcopy(self.model).requires_grad_(False)
        self.hidden = [copy.deepcopy(self.model)]  # of which PyTorch does not know
        self.head = nn.Linear(6, 6)
        self.updates = 0
        self.losses: list[float] = []
        self.recent: deque[int] = deque(maxlen=2)
        self.seen: set[int] = set()
        self.counts: dict[str, Any] = {"batches": {"all": 0}}
        self.average = Average(self.teacher)
        self.bank, self.table = torch.zeros(4, 3), np.zeros(3)
        self.generator = torch.Generator().manual_seed(0)
        self.dice, self.numbers, self.legacy = random.Random(0), np.random.default_rng(0), np.random.RandomState(0)
        self.register_buffer("queue", torch.zeros(3, 8))
        self.metrics = MetricCollection([MulticlassAccuracy(CLASSES), MulticlassAUROC(CLASSES, thresholds=None)])
        self.mean = MeanMetric()

    def _change(self, images: Tensor) -> None:
        self.updates += 1
        for theirs, mine in zip(self.teacher.parameters(), self.hidden[0].parameters(), strict=True):
            theirs.data.lerp_(mine.data + 1, 0.1)
        for parameter in self.hidden[0].parameters():
            parameter.data = parameter.data * 0.9
        self.teacher.train()
        self.teacher(images)  # batch norm
        self.head.requires_grad_(not self.head.weight.requires_grad)
        with torch.no_grad():
            self.head.weight.div_(self.head.weight.norm())
        self.losses.append(float(images.mean()))
        self.recent.append(self.updates)
        self.seen.add(self.updates)
        self.counts["batches"]["all"] += 1
        self.counts["new"] = True
        self.average.update(self.teacher)
        self.bank[0] += images.mean()
        self.table[0] += 1
        self.queue = torch.cat([self.queue[:, 1:], torch.rand(3, 1, generator=self.generator)], 1)
        self.dice.random(), self.numbers.random(), self.legacy.random()
        scores = torch.randn(len(images), CLASSES).softmax(1)
        self.metrics.update(scores, torch.arange(len(images)) % CLASSES)
        self.mean(images.mean())
        self.late = "an attribute that was not there"
        for logger in self.loggers:
            logger.log_metrics({"by_hand": 1.0}, step=0)
        self.trainer.should_stop = True
        images.mul_(0.5)

    def validation_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        images, labels = batch
        if self.early:
            self._change(images)
        hook = self.model.register_forward_hook(lambda *_: self.losses.append(0.0))
        for _ in range(self.times):
            loss = F.cross_entropy(self.model(images), labels)
        hook.remove()
        self.log_dict({"val_loss": loss})
        if not self.early:
            self._change(images)


def held(module: Busy) -> dict[str, Any]:
    """Everything that a step changes."""
    plain = ("updates", "losses", "seen", "counts", "bank", "recent")
    return copy.deepcopy(
        {
            "state": {name: value for name, value in module.state_dict().items() if not name.startswith("model.")},
            "hidden": module.hidden[0].state_dict(),
            "plain": {name: getattr(module, name) for name in plain},
            "average": vars(module.average),
            "table": torch.from_numpy(module.table),
            "random": [module.generator.get_state(), module.dice.getstate(), module.numbers.bit_generator.state],
            "legacy": module.legacy.get_state()[2],
            "metrics": [metric.metric_state for metric in (*module.metrics.values(), module.mean)],
            "modes": {name: part.training for name, part in module.named_modules() if not name.startswith("model")},
            "trained": {name: p.requires_grad for name, p in module.named_parameters() if not name.startswith("model")},
            "hooks": len(module.model._forward_hooks),
            "late": hasattr(module, "late"),
        }
    )


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("called", [1, 2])
def test_all_that_the_module_holds_is_restored(trainer: MakeTrainer, tmp_path: Any, early: bool, called: int) -> None:
    found: dict[str, Any] = {}

    class Ptq(PostTrainingQuantization):
        def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
            found["before"] = held(pl_module)  # type: ignore[arg-type]
            super().setup(trainer, pl_module, stage)
            found["built"] = held(pl_module)  # type: ignore[arg-type]

        def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            found["modes"] = held(pl_module)["modes"]  # type: ignore[arg-type]
            super().on_validation_start(trainer, pl_module)
            found["calibrated"] = held(pl_module)  # type: ignore[arg-type]
            found["stops"] = trainer.should_stop

    module = Busy(early, called)
    module.teacher.eval()
    loader = small_loader()
    images = loader.dataset[:][0].clone()
    logger = CSVLogger(tmp_path)
    one = trainer(Ptq(calibration_dataloader=loader), logger=logger, limit_val_batches=1)
    one.validate(module, loader, verbose=False)
    assert_same_tensors(found["built"], found["before"])
    assert_same_tensors(found["calibrated"], {**found["before"], "modes": found["modes"]})
    assert not found["stops"]
    assert module.updates == 1  # validation itself
    logger.finalize("success")
    with open(logger.experiment.metrics_file_path) as file:
        assert [row["by_hand"] for row in csv.DictReader(file)].count("1.0") == 1
    assert_same_tensors({"images": loader.dataset[:][0]}, {"images": images})
    largest = images.max() * (0.5 if early else 1)
    assert float(module.quantized.network.stem.input_quantizers[0].max) == pytest.approx(float(largest), rel=0.02)


def test_a_teacher_follows_once_a_training_batch(trainer: MakeTrainer) -> None:
    class Student(SmallModule):
        def __init__(self) -> None:
            super().__init__(optimizers=lambda module: torch.optim.SGD(module.model.parameters(), lr=1e-2))
            self.teacher = copy.deepcopy(self.model).requires_grad_(False)
            self.updates = 0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # type: ignore[override]
            with torch.no_grad():
                for theirs in self.teacher.parameters():
                    theirs.mul_(0.5)
            self.updates += 1
            return (self.model(batch[0]) - self.teacher(batch[0])).square().mean()

    module = Student()
    before = copy.deepcopy(module.teacher)
    trainer(QuantizationAwareTraining(), max_epochs=1).fit(module, small_loader())
    assert module.updates == 4
    for theirs, old in zip(module.teacher.parameters(), before.parameters(), strict=True):
        assert torch.equal(theirs, old * 0.5**4)


def test_gradients_of_a_step_that_is_looked_into_stay(trainer: MakeTrainer) -> None:
    """A step whose gradients are not finite is run once more, to find out where they come from."""

    class Spoilt(SmallModule):
        def __init__(self) -> None:
            super().__init__()
            self.steps = 0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.steps += 1
            torch.optim.SGD(self.parameters(), lr=1.0).step()  # there is no gradient yet
            self.zero_grad()
            return super().training_step(batch, batch_idx) * (torch.inf if self.steps == 3 else 1)

    module = Spoilt()
    monitor: dict[str, Any] = {"monitor": "val_loss", "mode": "min", "max_drop": -10.0}
    with pytest.warns(UserWarning, match=r"Step 3 .*it comes from the loss or its gradient, the last layer with such"):
        trainer(QuantizationAwareTraining(**monitor), max_epochs=1).fit(module, small_loader(), small_loader())
    assert module.steps == 3


def test_the_step_of_these_tests_changes_all_of_it() -> None:
    module = Busy(True, 1)
    module.teacher.eval()
    before = held(module)
    module.log_dict = lambda *_: None  # type: ignore[method-assign,assignment]
    module._trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    module.validation_step((torch.randn(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)), 0)
    after = held(module)
    assert [key for key in before if str(before[key]) == str(after[key])] == ["hooks"]
