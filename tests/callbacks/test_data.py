"""From batches to the network's inputs: which data, in which form, on whose step."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_quant import PostTrainingQuantization, QuantizationAwareTraining
from lightning_quant.callbacks.data import isolated_seed
from lightning_quant.errors import CalibrationError
from tests.helpers.small import (
    SmallModule,
    SmallNet,
    assert_same_tensors,
    encodings,
    small_data,
    small_loader,
    small_net,
)

MakeTrainer = Callable[..., Trainer]


def scaled(factor: float, count: int = 32) -> TensorDataset:
    images, labels = small_data(count).tensors
    return TensorDataset(factor * images, labels)


def input_range(module: SmallModule) -> float:
    """Upper end of the range of the network's input: 8-bit grids put it at the largest value seen, or nearly."""
    return float(encodings(module.quantized)["stem.input_quantizers.0.max"])


def largest(data: TensorDataset) -> pytest.approx:
    return pytest.approx(float(data.tensors[0].max()), rel=0.01)


class Data(pl.LightningDataModule):
    """Makes its data in ``setup``, for the stage it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.stages: list[str] = []

    def setup(self, stage: str) -> None:
        self.stages.append(stage)
        if stage == "fit":
            self.training = scaled(2)
        self.validation = scaled(1)

    def train_dataloader(self) -> DataLoader[Any]:
        return small_loader(self.training, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return small_loader(self.validation)

    def test_dataloader(self) -> DataLoader[Any]:
        return small_loader(self.validation)

    def predict_dataloader(self) -> DataLoader[Any]:
        return small_loader(self.validation)


class WithCalibration(Data):
    def calibration_dataloader(self) -> DataLoader[Any]:
        return small_loader(scaled(3))


# Which data


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_training_data_of_the_data_module(trainer: MakeTrainer, stage: str) -> None:
    module = SmallModule()
    getattr(trainer(PostTrainingQuantization()), stage)(module, datamodule=Data())
    assert input_range(module) == largest(scaled(2))


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_calibration_data_of_the_data_module_goes_first(trainer: MakeTrainer, stage: str) -> None:
    module = SmallModule()
    getattr(trainer(PostTrainingQuantization()), stage)(module, datamodule=WithCalibration())
    assert input_range(module) == largest(scaled(3))


@pytest.mark.parametrize("lazily", [False, True])
def test_data_given_to_the_callback_goes_before_all(trainer: MakeTrainer, lazily: bool) -> None:
    loader = small_loader(scaled(4))
    module = SmallModule()
    callback = PostTrainingQuantization(calibration_dataloader=(lambda: loader) if lazily else loader)
    trainer(callback).validate(module, datamodule=WithCalibration(), verbose=False)
    assert input_range(module) == largest(scaled(4))


def test_data_of_the_module_itself(trainer: MakeTrainer) -> None:
    class Own(SmallModule):
        def train_dataloader(self) -> DataLoader[Any]:
            return small_loader(scaled(2))

        def val_dataloader(self) -> DataLoader[Any]:
            return small_loader()

    module = Own()
    trainer(PostTrainingQuantization()).validate(module, verbose=False)
    assert input_range(module) == largest(scaled(2))


def test_data_that_the_module_makes_in_setup(trainer: MakeTrainer) -> None:
    """Lightning calls the module's setup after the callbacks'."""

    class Own(SmallModule):
        def setup(self, stage: str) -> None:
            self.data = scaled(2)

        def train_dataloader(self) -> DataLoader[Any]:
            return small_loader(self.data)

        def val_dataloader(self) -> DataLoader[Any]:
            return small_loader(self.data)

    for stage in ("fit", "validate"):
        module = Own()
        getattr(trainer(QuantizationAwareTraining(), max_epochs=1), stage)(module)
        assert module.quantized.calibrated


# In which form


def test_several_validation_loaders(trainer: MakeTrainer) -> None:
    module = SmallModule()
    callback = PostTrainingQuantization(calibration_dataloader=small_loader())
    trainer(callback).validate(module, [small_loader(), small_loader()], verbose=False)
    assert module.quantized.calibrated
    assert module.called == ["validation"] * 8


class TwoSources(SmallModule):
    """Trains on two loaders at once, validates on one."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        first = batch["first"] if isinstance(batch, dict) else batch[0]
        return super().training_step(first, batch_idx)


@pytest.mark.parametrize("collect", [dict, list])
@pytest.mark.parametrize("combined", [False, True])
def test_several_training_loaders(trainer: MakeTrainer, collect: Any, combined: bool) -> None:
    loaders: Any = {"first": small_loader(scaled(2)), "second": small_loader(scaled(1))}
    loaders = loaders if collect is dict else list(loaders.values())
    module = TwoSources()
    train = CombinedLoader(loaders, "min_size") if combined else loaders
    trainer(QuantizationAwareTraining(), max_epochs=1).fit(module, train, small_loader())
    assert module.called.count("training") == 4
    assert module.quantized.calibrated


def test_data_without_length_and_without_end(trainer: MakeTrainer) -> None:
    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            images, labels = small_data().tensors
            while True:
                yield from zip(images, labels, strict=True)

    module = SmallModule()
    one = trainer(QuantizationAwareTraining(calibration_samples=20), max_steps=2)
    one.fit(module, DataLoader(Endless(), batch_size=8))
    assert input_range(module) == pytest.approx(float(small_data().tensors[0][:20].max()), rel=0.05)


def test_worker_processes(trainer: MakeTrainer) -> None:
    module, reference = SmallModule(), SmallModule()
    data = small_loader(num_workers=1, persistent_workers=True, multiprocessing_context="fork")
    trainer(QuantizationAwareTraining(), max_epochs=2).fit(module, data)
    trainer(QuantizationAwareTraining(), max_epochs=2).fit(reference, small_loader())
    assert_same_tensors(module.state_dict(), reference.state_dict())


def test_unlabeled_images(trainer: MakeTrainer) -> None:
    class Images(Dataset[Tensor]):
        def __len__(self) -> int:
            return 16

        def __getitem__(self, index: int) -> Tensor:
            return small_data().tensors[0][index]

    module = SmallModule()  # its steps expect labels
    callback = PostTrainingQuantization(calibration_dataloader=DataLoader(Images(), batch_size=8))
    trainer(callback).validate(module, small_loader(), verbose=False)
    assert input_range(module) == pytest.approx(float(small_data().tensors[0][:16].max()), rel=0.01)


def test_single_loader_of_a_batch_without_calls(trainer: MakeTrainer) -> None:
    module = SmallModule()
    callback = PostTrainingQuantization(calibration_dataloader=DataLoader([{"a": 1, "b": 2.0}] * 4))
    with pytest.raises(
        CalibrationError,
        match=r"from batch 0 to the network 'model': validation_step called it with shapes \[\].*self.model",
    ):
        trainer(callback).validate(module, small_loader())
    assert module.called == []


# On whose step


class Normalizes(pl.LightningModule):
    """Prepares its images in the step and in transfer hooks: the ranges must be those of what arrives."""

    def __init__(self) -> None:
        super().__init__()
        self.model = small_net()
        self.counted = 0

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] * 5, batch[1]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] * 2, batch[1]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        loss = F.cross_entropy(self.model((images - 5) / 2), labels)
        self.counted += len(images)
        self.log("loss", loss)


def test_what_the_step_does_to_the_images_is_part_of_it(trainer: MakeTrainer) -> None:
    module = Normalizes()
    trainer(PostTrainingQuantization(calibration_dataloader=small_loader())).validate(
        module, small_loader(), verbose=False
    )
    images = (small_data().tensors[0] * 10 - 5) / 2
    found = encodings(module.model)
    assert float(found["stem.input_quantizers.0.max"]) == pytest.approx(float(images.max()), rel=0.02)
    assert module.counted == 32  # nothing after the call happened during calibration


class Scaled(pl.LightningDataModule):
    """Scales its images in hooks of its own, before and after they go to the device."""

    def train_dataloader(self) -> Any:
        return small_loader()

    val_dataloader = train_dataloader

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] * 5, batch[1]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] * 2, batch[1]


def test_hooks_of_the_data_module_apply_to_calibration(trainer: MakeTrainer) -> None:
    module = SmallModule()
    trainer(PostTrainingQuantization(), max_epochs=1).fit(module, datamodule=Scaled())
    images = small_data().tensors[0] * 10
    found = encodings(module.model)
    assert float(found["stem.input_quantizers.0.max"]) == pytest.approx(float(images.max()), rel=0.02)


def test_a_step_that_logs_and_catches_exceptions_before_the_call(trainer: MakeTrainer) -> None:
    class Careful(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = small_net()
            self.called: list[str] = []

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("size", float(len(batch[0])))
            self.log_dict({"index": float(batch_idx)})
            try:
                self.model(batch[0])
                self.called.append("validation")
            except Exception:
                self.called.append("swallowed")

    module = Careful()
    callback = PostTrainingQuantization(calibration_dataloader=small_loader())
    (metrics,) = trainer(callback).validate(module, small_loader(small_data(24)), verbose=False)
    assert module.called.count("swallowed") == 0
    assert module.model.calibrated
    assert metrics == {"size": 8.0, "index": 1.0}  # without what calibration would have logged


def test_a_network_the_steps_do_not_call(trainer: MakeTrainer) -> None:
    module = SmallModule()
    module.unused = small_net()
    with pytest.raises(
        CalibrationError, match=r"network 'unused': validation_step did not call it.*self\.unused\(\.\.\.\)"
    ):
        trainer(PostTrainingQuantization(network="unused")).fit(module, small_loader())
    assert type(module.unused) is SmallNet


def test_random_numbers_are_restored() -> None:
    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    expected = torch.rand(1).item(), np.random.rand(), random.random()
    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    draws = []
    for _ in range(2):
        with isolated_seed():
            draws.append((torch.rand(1).item(), np.random.rand(), random.random()))
    assert draws[0] == draws[1]
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == expected


def _drawing() -> Iterator[float]:
    with isolated_seed():
        while True:
            yield torch.rand(1).item() + np.random.rand() + random.random()


def test_random_numbers_are_restored_however_it_ends() -> None:
    """Lightning's own isolation does not do so, which gave every fit the random numbers of calibration."""
    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    expected = torch.rand(1).item(), np.random.rand(), random.random()
    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    next(_drawing())  # not read to its end
    with suppress(ZeroDivisionError), isolated_seed():
        torch.rand(1), np.random.rand(), random.random()
        raise ZeroDivisionError
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == expected
