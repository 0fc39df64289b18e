"""Whoever runs the network, in whatever order callbacks are listed, finds it calibrated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelSummary, RichModelSummary
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.tuner import Tuner
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lightning_quant import PostTrainingQuantization, QuantizationAwareTraining
from tests.helpers.small import SmallModule, assert_same_tensors, encodings, small_loader

pytestmark = pytest.mark.slow

MakeTrainer = Callable[..., Trainer]


class Example(SmallModule):
    """Has an example input, which summaries and loggers run."""

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(2, 3, 8, 8)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


class Runs(pl.Callback):
    """Runs the network at one hook, and counts what it costs there."""

    def __init__(self, hook: str) -> None:
        self.answers: list[Tensor] = []
        setattr(self, hook, self._run)

    def _run(self, trainer: Trainer, module: pl.LightningModule, *_: Any) -> None:
        images = torch.ones(2, 3, 8, 8)
        if torch.is_inference_mode_enabled():  # in which PyTorch's counter fails on parameters handed to a module
            self.answers.append(module(images))
            return
        with FlopCounterMode(display=False) as counter:
            self.answers.append(module(images).detach())
        assert counter.get_total_flops() > 0


@pytest.mark.parametrize("callback", [PostTrainingQuantization, QuantizationAwareTraining])
@pytest.mark.parametrize("summary", [ModelSummary, RichModelSummary])
@pytest.mark.parametrize("first", [True, False])
def test_summaries_in_any_order(trainer: MakeTrainer, callback: Any, summary: Any, first: bool) -> None:
    both = [summary(max_depth=3), callback()] if first else [callback(), summary(max_depth=3)]
    one = trainer(*both, max_epochs=1, enable_model_summary=True)
    one.fit(Example(), small_loader(), small_loader())
    trainer(callback(), max_epochs=1, enable_model_summary=True).fit(Example(), small_loader(), small_loader())


@pytest.mark.parametrize(
    ("stage", "hook"),
    [
        ("fit", "on_fit_start"),
        ("fit", "on_sanity_check_start"),
        ("fit", "on_train_start"),
        ("validate", "on_validation_start"),
        ("test", "on_test_start"),
        ("predict", "on_predict_start"),
    ],
)
def test_callbacks_that_run_the_network_before_ours(trainer: MakeTrainer, stage: str, hook: str) -> None:
    runs, module = Runs(hook), Example()
    quantization = QuantizationAwareTraining(calibration_dataloader=small_loader())
    one = trainer(runs, quantization, max_epochs=1)
    data = (small_loader(), small_loader()) if stage == "fit" else (small_loader(),)
    getattr(one, stage)(module, *data)
    quantized = trainer(PostTrainingQuantization(calibration_dataloader=small_loader()))
    other = Example()
    quantized.validate(other, small_loader(), verbose=False)
    assert torch.equal(runs.answers[0], other.eval()(torch.ones(2, 3, 8, 8)).detach())


def test_modules_that_run_their_network_before_training(trainer: MakeTrainer) -> None:
    class Runner(Example):
        def on_fit_start(self) -> None:
            self.before = self(torch.ones(2, 3, 8, 8)).detach()

    module = Runner()
    trainer(QuantizationAwareTraining(), max_epochs=1).fit(module, small_loader())
    assert module.before.shape == (2, 4)


def test_graph_for_tensorboard(trainer: MakeTrainer, tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, log_graph=True)
    trainer(QuantizationAwareTraining(), max_epochs=1, logger=logger).fit(Example(), small_loader())


# Finders


class Tunable(Example):
    def __init__(self) -> None:
        super().__init__()
        self.lr, self.batch_size = 1e-3, 2

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, weight_decay=0.1)

    def train_dataloader(self) -> Any:
        return small_loader(batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return small_loader()


class Start(pl.Callback):
    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        self.state = {name: value.detach().clone() for name, value in module.named_parameters()}
        self.rates = [group["lr"] for group in trainer.optimizers[0].param_groups]


FINDERS: dict[str, Callable[[], pl.Callback]] = {
    "lr": lambda: LearningRateFinder(num_training_steps=30, max_lr=0.1, early_stop_threshold=None),
    "batch_size": lambda: BatchSizeFinder(max_trials=2, init_val=2),
}


@pytest.mark.parametrize("name", FINDERS)
@pytest.mark.parametrize("after_ptq", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_finders(trainer: MakeTrainer, name: str, after_ptq: bool, first: bool) -> None:
    module, start = Tunable(), Start()
    if after_ptq:
        trainer(PostTrainingQuantization()).fit(module)
    callbacks = [QuantizationAwareTraining(), FINDERS[name]()]
    one = trainer(*(reversed(callbacks) if first else callbacks), start, max_epochs=2)
    one.fit(module)
    assert getattr(module, name) != {"lr": 1e-3, "batch_size": 2}[name]
    assert start.rates == [module.lr, module.lr]
    # the finder's own steps are undone: training starts from the calibrated network
    plain, other = Start(), Tunable()
    trainer(QuantizationAwareTraining(), plain, max_epochs=1).fit(other)
    assert_same_tensors(start.state, plain.state)
    assert encodings(module.quantized).keys() == encodings(other.quantized).keys()


def test_finders_with_a_ladder(trainer: MakeTrainer) -> None:
    module = Tunable()
    quantization = QuantizationAwareTraining("w4a8", max_drop=0.0, monitor="val_loss", mode="min", rungs=("ptq",))
    trainer(quantization, FINDERS["lr"](), max_epochs=1).fit(module)
    assert module.lr != 1e-3
    assert quantization.result.rungs[0].rung == "ptq"


def test_tuner(trainer: MakeTrainer) -> None:
    module = Tunable()
    one = trainer(QuantizationAwareTraining(), max_epochs=2)
    found = Tuner(one).lr_find(module, num_training=30, max_lr=0.1, early_stop_threshold=None)
    assert found is not None
    assert module.lr == found.suggestion()
    one.fit(module)
    assert module.quantized.calibrated


@pytest.mark.parametrize(
    ("callback", "ladder"),
    [(PostTrainingQuantization, False), (QuantizationAwareTraining, False), (QuantizationAwareTraining, True)],
)
def test_fast_dev_run(trainer: MakeTrainer, callback: Any, ladder: bool) -> None:
    arguments = {"max_drop": 0.1, "monitor": "val_loss", "mode": "min"} if ladder else {}
    module = Example()
    one = trainer(callback(**arguments), fast_dev_run=True, enable_model_summary=True)
    one.fit(module, small_loader(), small_loader())
    assert module.quantized.calibrated
    for stage in ("validate", "test", "predict"):
        getattr(trainer(callback(calibration_dataloader=small_loader()), fast_dev_run=True), stage)(
            Example(), small_loader()
        )
