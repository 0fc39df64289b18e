"""What a module makes in ``setup`` and ``configure_model`` is there when its steps are run, and made once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant import PostTrainingQuantization, QuantizationAwareTraining
from lightning_quant.errors import CalibrationError
from lightning_quant.simulation.network import QuantizedNetwork
from tests.helpers.small import SmallModule, small_data, small_loader, small_net

MakeTrainer = Callable[..., Trainer]
STAGES = ("fit", "validate", "test", "predict")


def bright() -> tuple[Tensor, Tensor]:
    images, labels = small_data().tensors
    return 100 + 50 * images, labels


class Normalizes(SmallModule):
    """Takes images with or without labels; what to subtract from them is made in ``setup``."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def setup(self, stage: str) -> None:
        self.made.append(stage)
        self.center, self.scale = 100.0, 50.0

    def configure_model(self) -> None:
        self.made.append("model")

    def _loss(self, batch: Any) -> Tensor:
        images = batch[0] if isinstance(batch, (list, tuple)) else batch
        return self.model((images - self.center) / self.scale).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.log("val_loss", self._loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._loss(batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._loss(batch)


def largest_input(network: Any) -> float:
    return float(network.network.stem.input_quantizers[0].max)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("labeled", [True, False])
def test_steps_that_need_what_setup_makes(trainer: MakeTrainer, stage: str, labeled: bool) -> None:
    images, labels = bright()
    data = DataLoader(TensorDataset(images, labels) if labeled else list(images), batch_size=8)  # type: ignore[arg-type]
    module = Normalizes()
    callback = QuantizationAwareTraining() if stage == "fit" else PostTrainingQuantization(calibration_dataloader=data)
    one = trainer(callback, max_epochs=1)
    getattr(one, stage)(module, data)
    assert module.made == [stage, "model"]
    assert largest_input(module.quantized) == pytest.approx(float(small_data().tensors[0].max()), rel=0.05)
    one.validate(module, data, verbose=False)  # quantized already
    assert module.made == [stage, "model", "validate", "model"]
    assert not {"setup", "configure_model"} & vars(module).keys()


def test_images_without_labels_that_the_step_would_have_normalized_are_no_input(trainer: MakeTrainer) -> None:
    class Labeled(Normalizes):
        def _loss(self, batch: Any) -> Tensor:
            images, _ = batch
            return super()._loss(images)

    images, labels = bright()
    callback = PostTrainingQuantization(calibration_dataloader=DataLoader(list(images), batch_size=8))  # type: ignore[arg-type]
    module = Labeled()
    with pytest.raises(CalibrationError, match=r"batch 0 to the network 'model': validation_step raised ValueError"):
        trainer(callback).validate(module, DataLoader(TensorDataset(images, labels), batch_size=8), verbose=False)
    assert not module.quantized.calibrated


def test_images_without_labels_where_no_step_runs_at_all(trainer: MakeTrainer) -> None:
    class Broken(SmallModule):
        def _loss(self, batch: Any) -> Tensor:
            return self.model(batch / self.nowhere)  # type: ignore[operator]

    data = DataLoader(list(bright()[0]), batch_size=8)  # type: ignore[arg-type]
    module = Broken()
    module.predict_step = lambda batch, batch_idx: module._loss(batch)  # type: ignore[method-assign]
    with pytest.raises(CalibrationError, match=r"validation_step raised AttributeError"):
        trainer(PostTrainingQuantization(calibration_dataloader=data)).validate(module, data, verbose=False)


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
@pytest.mark.parametrize("stage", STAGES)
def test_network_made_there(trainer: MakeTrainer, stage: str, hook: str) -> None:
    class Late(SmallModule):
        def __init__(self) -> None:
            super().__init__()
            del self.model
            self.made = 0

        def make(self, stage: str | None = None) -> None:
            self.made += 1
            self.model = small_net()

    setattr(Late, hook, Late.make)
    module = Late()
    callback = QuantizationAwareTraining() if stage == "fit" else PostTrainingQuantization(
        calibration_dataloader=small_loader()
    )  # fmt: skip
    getattr(trainer(callback, max_epochs=1), stage)(module, small_loader())
    assert module.made == 1  # the second one would not be quantized
    assert QuantizedNetwork.of(module.model) is not None
    assert module.model.calibrated


def test_a_run_that_fails_in_between_does_not_cost_the_next_its_setup(trainer: MakeTrainer) -> None:
    class Fails(pl.Callback):
        def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
            raise RuntimeError("in another callback")

    module, data = Normalizes(), DataLoader(TensorDataset(*bright()), batch_size=8)
    with pytest.raises(RuntimeError, match="in another callback"):
        trainer(PostTrainingQuantization(), Fails()).fit(module, data)
    assert module.made == ["fit", "model"]
    assert not {"setup", "configure_model"} & vars(module).keys()
    trainer(PostTrainingQuantization()).fit(module, data)
    assert module.made == ["fit", "model"] * 2


def test_copies_of_the_module_made_in_between(trainer: MakeTrainer) -> None:
    module, data = Normalizes(), DataLoader(TensorDataset(*bright()), batch_size=8)
    average = WeightAveraging()
    trainer(QuantizationAwareTraining(), average, max_epochs=1).fit(module, data)
    assert module.made == ["fit", "model"]
    assert module.quantized.calibrated


def test_setup_for_training_data_leaves_the_stage_as_it_was(trainer: MakeTrainer) -> None:
    """Validation calibrates on training data, which the module makes in ``setup`` for another stage."""

    class Own(Normalizes):
        def setup(self, stage: str) -> None:
            super().setup(stage)
            self.scale = 50.0 if stage == "validate" else 1.0
            self.model = small_net()
            if stage == "fit":
                self.training_data = TensorDataset(*bright())

        def collate(self, samples: list[Any]) -> Any:
            assert self.training_data  # made for training, and needed when its data is read
            return torch.utils.data.default_collate(samples)

        def train_dataloader(self) -> Any:
            return DataLoader(self.training_data, batch_size=8, collate_fn=self.collate)

        def val_dataloader(self) -> Any:
            return DataLoader(TensorDataset(*bright()), batch_size=8)

    module = Own()
    trainer(PostTrainingQuantization()).validate(module, verbose=False)
    assert module.made == ["validate", "model", "fit"]
    assert largest_input(module.quantized) == pytest.approx(float(small_data().tensors[0].max()), rel=0.05)
