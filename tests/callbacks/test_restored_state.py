"""Validations that leave no trace: whatever a module remembers, each rung is measured as if it were the only one."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics import MaxMetric, MeanMetric, Metric, MetricCollection, MetricTracker, MinMetric, RunningMean
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_quant import DeviceExport, QuantizationAwareTraining
from lightning_quant.callbacks.restored_state import restored_state
from tests.helpers.processes import run_two_ranks

MakeTrainer = Callable[..., Trainer]

# What is put back


class Meter:
    """The average of what it was given, as half the world writes it."""

    def __init__(self) -> None:
        self.sum, self.count, self.history = 0.0, 0, [0.0]

    def update(self, value: float) -> None:
        self.sum, self.count = self.sum + value, self.count + 1
        self.history.append(value)


def with_bins() -> Metric:
    metric = MulticlassAccuracy(2, average=None)
    metric.update(torch.tensor([0, 1]), torch.tensor([0, 1]))
    return metric


def running() -> Metric:
    metric = RunningMean(2)
    metric.update(0.0)
    return metric


def tracker() -> MetricTracker:
    made = MetricTracker(MeanMetric(), maximize=True)
    made.increment()
    made.update(1.0)
    return made


def append_to_tracker(one: Any) -> None:
    one.tracker.increment()
    one.tracker.update(3.0)


def count_collection(one: Any) -> None:
    one.collection.update(torch.tensor([0, 1]), torch.tensor([1, 1]))


CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any], Any]]] = {
    # what is there, how it is changed, what to compare
    "number": (lambda: 1.0, lambda o: setattr(o, "number", 2.0), lambda v: v),
    "new": (lambda: None, lambda o: setattr(o, "another", 2.0), lambda v: v),
    "gone": (lambda: 3, lambda o: delattr(o, "gone"), lambda v: v),
    "list": (lambda: [1, [2]], lambda o: o.list[1].append(3), lambda v: [v[0], list(v[1])]),
    "dict": (lambda: {"a": {"b": 1}}, lambda o: o.dict["a"].update(b=2, c=3), lambda v: dict(v["a"])),
    "ordered": (lambda: OrderedDict(b=1, a=2), lambda o: o.ordered.move_to_end("b"), list),
    "defaults": (lambda: defaultdict(list, a=[1]), lambda o: o.defaults["b"].append(1), lambda v: dict(v)),
    "counter": (lambda: Counter(a=2), lambda o: o.counter.update("abb"), dict),
    "deque": (lambda: deque([1, 2], maxlen=2), lambda o: o.deque.append(3), list),
    "set": (lambda: {1}, lambda o: o.set.add(2), set),
    "tuple": (lambda: ([1],), lambda o: o.tuple[0].append(2), lambda v: list(v[0])),
    "tensor": (lambda: torch.zeros(2), lambda o: o.tensor.add_(1), Tensor.tolist),
    "rebound": (lambda: torch.zeros(2), lambda o: setattr(o, "rebound", o.rebound + 1), Tensor.tolist),
    "nan": (lambda: torch.full((2,), torch.nan), lambda o: o.nan.zero_(), lambda v: v.isnan().tolist()),
    "resized": (lambda: torch.zeros(2), lambda o: o.resized.resize_(3), lambda v: v.shape),
    "array": (lambda: np.zeros(2), lambda o: o.array.__iadd__(1), np.ndarray.tolist),
    "meter": (Meter, lambda o: o.meter.update(1.0), lambda v: (v.sum, v.count, list(v.history))),
    "meters": (lambda: {"a": [Meter()]}, lambda o: o.meters["a"][0].update(1.0), lambda v: v["a"][0].count),
    "space": (lambda: SimpleNamespace(best=0), lambda o: setattr(o.space, "best", 1), lambda v: v.best),
    "best": (MaxMetric, lambda o: o.best.update(1.0), lambda v: float(v.compute())),
    "least": (MinMetric, lambda o: o.least.update(1.0), lambda v: float(v.compute())),
    "running": (running, lambda o: o.running.update(1.0), lambda v: float(v.compute())),
    "bins": (with_bins, lambda o: o.bins.update(torch.tensor([1]), torch.tensor([0])), lambda v: v.compute().tolist()),
    "listed": (lambda: [MeanMetric()], lambda o: o.listed[0].update(1.0), lambda v: v[0].update_count),
    "held": (
        lambda: nn.ModuleDict({"a": MeanMetric()}),
        lambda o: o.held["a"].update(1.0),
        lambda v: v["a"].update_count,
    ),
    "tracker": (tracker, append_to_tracker, lambda v: (v.n_steps, float(v.best_metric()))),
    "collection": (
        lambda: MetricCollection([MulticlassAccuracy(2), MulticlassF1Score(2)]),
        count_collection,
        lambda v: [metric.update_count for metric in v.values()],
    ),
    "buffered": (lambda: nn.BatchNorm1d(2), lambda o: o.buffered(torch.randn(4, 2)), lambda v: v.running_mean.tolist()),
    "generator": (
        lambda: torch.Generator().manual_seed(0),
        lambda o: torch.rand(1, generator=o.generator),
        lambda v: v.get_state().tolist(),
    ),
    "numpy": (lambda: np.random.default_rng(0), lambda o: o.numpy.random(), lambda v: v.bit_generator.state),
    "python": (lambda: random.Random(0), lambda o: o.python.random(), lambda v: v.getstate()),
}


class Holder(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(2, 2)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("inference", [True, False])
def test_is_restored(name: str, inference: bool) -> None:
    make, change, look = CHANGES[name]
    holder: Any = Holder()
    setattr(holder, name, make())
    value, before = getattr(holder, name), look(getattr(holder, name))
    names = set(vars(holder))
    for _ in range(2):
        with restored_state([holder], holder.model), torch.inference_mode(inference):
            change(holder)
            assert name in ("new", "gone") or look(getattr(holder, name)) != before
        assert getattr(holder, name) is value
        assert look(value) == before
        assert set(vars(holder)) == names


def test_what_a_metric_counted_in_validation_is_restored() -> None:
    """Tensors that were made in inference mode can be written to in it only."""
    holder: Any = Holder()
    holder.best = MaxMetric()
    holder.sum = torch.zeros(1)
    with torch.inference_mode():
        holder.best.update(1.0)
        holder.sum = holder.sum + 1
    with restored_state([holder], holder.model), torch.inference_mode():
        holder.best.update(2.0)
        holder.sum += 1
    assert float(holder.best.compute()) == 1.0
    assert float(holder.sum) == 1.0


def test_what_is_left_alone() -> None:
    class Images(Dataset[Any]):
        read = 0

        def __len__(self) -> int:
            return 1

    class Run:  # as of a logger: it is more than data
        def __init__(self, path: Path) -> None:
            self.file, self.step = path.open("w"), 0

    holder: Any = Holder()
    holder.images, holder.run = Images(), Run(Path("/dev/null"))
    with restored_state([holder], holder.model):
        holder.images.read = holder.run.step = 1
        holder.model.counted = 1
        with torch.no_grad():
            holder.model.weight.zero_()
    assert (holder.images.read, holder.run.step, holder.model.counted) == (1, 1, 1)
    assert float(holder.model.weight.detach().abs().sum()) == 0.0
    holder.run.file.close()


# The ladder


def data() -> DataLoader[Any]:
    """A small number says the class, and 8 bits over the large one beside it lose it."""
    labels = torch.arange(64) // 2 % 2  # so that each of two processes sees both
    noise = torch.randn(64, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(torch.stack((1000 * noise, 1.0 - 2.0 * labels), 1), labels), batch_size=16)


class Judged(pl.LightningModule):
    """Logs its accuracy as ``val_score``."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(2, 2, bias=False))
        with torch.no_grad():
            self.model[0].weight.copy_(torch.tensor([[0.0, 1.0], [0.0, -1.0]]))
        self.right: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.right += (self.model(batch[0]).argmax(1) == batch[1]).float().tolist()

    def score(self, accuracy: float) -> float | Tensor:
        return accuracy

    def on_validation_epoch_end(self) -> None:
        self.log("val_score", self.score(sum(self.right) / len(self.right)))
        self.right.clear()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class BestMetric(Judged):
    def __init__(self) -> None:
        super().__init__()
        self.best = MaxMetric()

    def score(self, accuracy: float) -> Tensor:
        self.best.update(accuracy)
        return self.best.compute()


class BestAttribute(Judged):
    best = 0.0

    def score(self, accuracy: float) -> float:
        self.best = max(self.best, accuracy)
        return self.best


class BestOfHistory(Judged):
    def __init__(self) -> None:
        super().__init__()
        self.history: dict[str, list[float]] = {"val": []}

    def score(self, accuracy: float) -> float:
        self.history["val"].append(accuracy)
        return max(self.history["val"])


class BestBuffer(Judged):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("best", torch.zeros(()))

    def score(self, accuracy: float) -> Tensor:
        return self.best.copy_(torch.maximum(self.best, torch.tensor(accuracy))).clone()


class NeverReset(Judged):
    """Accumulates over all validations, as who forgets to reset the list does."""

    def on_validation_epoch_end(self) -> None:
        self.log("val_score", sum(self.right) / len(self.right))


class BestMeter(Judged):
    def __init__(self) -> None:
        super().__init__()
        self.meter = Meter()

    def score(self, accuracy: float) -> float:
        self.meter.update(accuracy)
        return max(self.meter.history)


class BestTracked(Judged):
    def __init__(self) -> None:
        super().__init__()
        self.tracked = MetricTracker(MeanMetric(), maximize=True)

    def score(self, accuracy: float) -> float:
        self.tracked.increment()
        self.tracked.update(accuracy)
        return float(self.tracked.best_metric())


class BestCallback(pl.Callback):
    """Logs the best value so far, from outside of the module."""

    best = 0.0

    def on_validation_epoch_end(self, trainer: Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, Judged)
        self.best = max(self.best, sum(module.right) / len(module.right))
        module.log("val_best", self.best)


KINDS = [Judged, BestMetric, BestAttribute, BestOfHistory, BestBuffer, NeverReset, BestMeter, BestTracked]


def climb(trainer: MakeTrainer, module: Judged, *callbacks: Any, monitor: str = "val_score", **arguments: Any) -> Any:
    rungs = ("ptq", "min_max", "percentile")
    quantization = QuantizationAwareTraining(
        "w8a8", calibration_samples=64, max_drop=0.01, monitor=monitor, rungs=rungs, mode="max"
    )
    trainer(*callbacks, quantization, **arguments).fit(module, data(), data())
    return quantization.result


@pytest.mark.parametrize("kind", KINDS)
def test_no_rung_lives_on_what_another_one_reached(trainer: MakeTrainer, kind: type[Judged]) -> None:
    module = kind()
    result = climb(trainer, module, max_epochs=0, num_sanity_val_steps=1)
    assert result.float_metric == 1.0
    assert [rung.rung for rung in result.rungs] == ["ptq", "min_max", "percentile"]
    assert all(rung.metric == 0.5 for rung in result.rungs)
    assert not result.satisfied
    untouched = kind()
    for name, value in vars(untouched).items():  # nothing is left of five validations and a sanity check
        if isinstance(value, (int, float, list, dict)) and not name.startswith("_"):
            assert getattr(module, name) == value
    for name, value in untouched.named_buffers():
        assert torch.equal(module.get_buffer(name), value)


@pytest.mark.parametrize("kind", [BestMetric, BestAttribute, BestTracked])
def test_training_is_judged_by_its_own_validations(trainer: MakeTrainer, kind: type[Judged]) -> None:
    result = climb(trainer, kind(), max_epochs=2, num_sanity_val_steps=2)
    assert {rung.rung: rung.metric for rung in result.rungs}["qat"] == 0.5
    assert not result.satisfied


def test_callbacks_that_remember(trainer: MakeTrainer) -> None:
    remembers = BestCallback()
    result = climb(trainer, Judged(), remembers, monitor="val_best", max_epochs=1, num_sanity_val_steps=1)
    assert all(rung.metric == 0.5 for rung in result.rungs)
    assert remembers.best == 0.5  # of the validation that the user asked for


def test_random_numbers_of_a_validation(trainer: MakeTrainer) -> None:
    """A validation that draws gives the same for the same network, and takes nothing from what follows."""

    class Draws(Judged):
        drawn: list[float]

        def score(self, accuracy: float) -> float:
            return accuracy + float(torch.rand(1)) + random.random() + float(np.random.rand())

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.drawn.append(float(torch.rand(1)))

    drawn = []
    for quantizations in ([], [QuantizationAwareTraining("w8a8", max_drop=-9.0, monitor="val_score")]):
        torch.manual_seed(0)
        module = Draws()
        module.drawn = []
        trainer(*quantizations, max_epochs=1, num_sanity_val_steps=0).fit(module, data(), data())
        drawn.append(module.drawn)
    assert drawn[0] == drawn[1]
    result = climb(trainer, Draws(), max_epochs=0)
    assert len({rung.metric for rung in result.rungs}) == 1


def test_device_metric_of_each_candidate_alone(trainer: MakeTrainer, tmp_path: Path) -> None:
    class Small(BestMetric):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)

    export = DeviceExport(tmp_path / "export", target="onnxruntime", samples=16, monitor="val_score", report=False)
    quantization = QuantizationAwareTraining("w8a8", calibration_samples=64)
    one = trainer(quantization, export, max_epochs=1, num_sanity_val_steps=0)
    one.fit(Small(), data(), data())
    (report,) = export.reports
    assert report.metric["float"] == 1.0
    assert report.metric["simulation"] < 0.8
    assert report.metric["device"] < 0.8


SCRIPT = """
import os, sys
import torch
from lightning_quant import QuantizationAwareTraining
from tests.callbacks.test_restored_state import BestMetric, data
from tests.helpers.trainers import quiet_trainer

(out,) = sys.argv[1:]
torch.set_num_threads(1)
quantization = QuantizationAwareTraining("w8a8", max_drop=0.01, monitor="val_score", rungs=("ptq", "percentile"))
trainer = quiet_trainer(out, quantization, devices=2, strategy="ddp", max_epochs=1)
trainer.fit(BestMetric(), data(), data())
torch.save({"rungs": {rung.rung: rung.metric for rung in quantization.result.rungs}},
           f"{out}/rank{trainer.global_rank}.pt")
"""


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    first, second = run_two_ranks(tmp_path, SCRIPT, str(tmp_path))
    assert first == second
    assert first["rungs"] == {"ptq": 0.5, "percentile": 0.5, "qat": 0.5}
