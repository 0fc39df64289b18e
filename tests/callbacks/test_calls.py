"""Steps that call the network several times: every call calibrates, with the states that the network itself makes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics import MeanMetric

from lightning_quant import PostTrainingQuantization, QuantizationAwareTraining
from lightning_quant.callbacks.calls import InputCatcher
from lightning_quant.simulation.inputs import NetworkInputs
from tests.helpers.small import SmallModule, small_loader, small_net

MakeTrainer = Callable[..., Trainer]

# What steps did, where nobody can put it back.
happened: list[Any] = []


@pytest.fixture(autouse=True)
def _nothing_happened() -> None:
    happened.clear()


class Frames(Dataset[Tensor]):
    """Sequences of six frames; notes which were read."""

    def __init__(self, count: int = 16) -> None:
        self.frames = torch.randn(count, 6, 4, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> Tensor:
        happened.append(index)
        return self.frames[index]


class Cell(nn.Module):
    """Elman's cell, its recurrent weights large: the state is what matters."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.inward, self.around, self.out = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 1)
        with torch.no_grad():
            self.around.weight.mul_(3)

    def forward(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        around = 0 if state is None else self.around(state)
        state = torch.tanh(self.inward(x) + around)
        return self.out(state), state


def answer(network: nn.Module, frames: Tensor) -> Tensor:
    state = torch.zeros(len(frames), 8)
    for frame in frames.unbind(1):
        score, state = network(frame, state)
    return score


def error(network: nn.Module, reference: nn.Module, run: Callable[[nn.Module], Tensor]) -> float:
    with torch.no_grad():
        expected, got = run(reference), run(network.eval())
    return float((got - expected).norm() / expected.norm())


class Recurrent(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = Cell()

    def validation_step(self, frames: Tensor, batch_idx: int) -> None:
        self.log("val_loss", answer(self.model, frames).square().mean())


def test_states_of_later_calls_calibrate(trainer: MakeTrainer) -> None:
    module, data = Recurrent(), Frames()
    plain = copy.deepcopy(module.model)
    loader = DataLoader(data, batch_size=4)
    callback = PostTrainingQuantization("w8a16", calibration_dataloader=loader, calibration_samples=16)
    trainer(callback).validate(module, loader, verbose=False)
    assert error(module.model, plain, lambda network: answer(network, data.frames)) < 0.05


def test_the_calls_of_a_step_count_as_the_same_samples(trainer: MakeTrainer, caplog: pytest.LogCaptureFixture) -> None:
    given = Frames()
    given.frames[10:] *= 10  # read, as a batch is read whole, but not to be seen
    callback = PostTrainingQuantization(calibration_dataloader=DataLoader(given, batch_size=4), calibration_samples=10)
    module = Recurrent()
    with caplog.at_level(logging.INFO):
        one = trainer(callback, limit_val_batches=1)
        one.validate(module, DataLoader(Frames().frames, batch_size=4), verbose=False)
    assert max(happened) == 11  # three batches of four, of which ten samples count
    assert "Calibrated model with 10 samples" in caplog.text
    frames = given.frames[:10]
    quantizer = module.model.network.inward.input_quantizers[0]
    assert float(quantizer.max) == pytest.approx(float(frames.max()), rel=0.02)


class Siamese(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = small_net()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        weak, strong = self.model(batch[0]), self.model(batch[0] * 5 + 1)
        happened.append("loss")
        return F.kl_div(strong.log_softmax(1), weak.detach().softmax(1), reduction="batchmean")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-9)


def test_both_branches_of_a_siamese_step_calibrate(trainer: MakeTrainer) -> None:
    module = Siamese()
    plain = copy.deepcopy(module.model).eval()
    callback = QuantizationAwareTraining("w8a16", calibration_samples=32, train_ranges=False)
    trainer(callback, max_epochs=1).fit(module, small_loader())
    images = small_loader().dataset[:][0] * 5 + 1
    assert error(module.model, plain, lambda network: network(images)) < 0.01


class Gan(pl.LightningModule):
    """Optimizes by hand: the discriminator sees noise that the generator shaped, and real images of another scale."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(8, 192), nn.Unflatten(1, (3, 8, 8)))
        self.critic = small_net()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        images = batch[0] * 10
        one, other = self.optimizers()
        self.toggle_optimizer(other)
        loss = self.critic(self.generator(torch.randn(len(images), 8)).detach()).mean() - self.critic(images).mean()
        other.zero_grad()
        self.manual_backward(loss)
        other.step()
        self.untoggle_optimizer(other)
        self.toggle_optimizer(one)
        loss = -self.critic(self.generator(torch.randn(len(images), 8))).mean()
        one.zero_grad()
        loss.backward()
        one.step()
        self.untoggle_optimizer(one)
        self.lr_schedulers().step()
        happened.append("trained")

    def configure_optimizers(self) -> Any:
        one = torch.optim.SGD(self.generator.parameters(), lr=1e-3)
        other = torch.optim.SGD(self.critic.parameters(), lr=1e-3)
        return [one, other], [torch.optim.lr_scheduler.StepLR(one, 1)]


@pytest.mark.parametrize("name", ["critic", "generator"])
def test_networks_of_a_gan(trainer: MakeTrainer, name: str) -> None:
    found: dict[str, Any] = {}

    class Qat(QuantizationAwareTraining):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            super().on_train_start(trainer, pl_module)
            found.update(
                {key: value.clone() for key, value in pl_module.state_dict().items() if torch.is_tensor(value)}
            )

    module = Gan()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    callback = Qat("w8a8", network=name, calibration_samples=32)
    one = trainer(callback, max_epochs=1)
    one.fit(module, small_loader())
    if name == "critic":  # the second of its calls is the one with the large images
        largest = float(small_loader().dataset[:][0].max()) * 10
        assert float(found["critic.stem.input_quantizers.0.max"]) == pytest.approx(largest, rel=0.02)
    untrained = {key: value for key, value in before.items() if not key.startswith(name)}
    assert untrained
    assert all(torch.equal(found[key], value) for key, value in untrained.items())  # calibration trained nothing
    assert one.global_step == 8
    assert one.lr_scheduler_configs[0].scheduler.last_epoch == 4
    # for the batch axes, for the example, for each batch of calibration, and training itself
    assert happened.count("trained") == 2 + 1 + 4 + 4


def test_a_step_with_one_call_is_left_there_after_the_first_batch(trainer: MakeTrainer) -> None:
    class Noted(SmallModule):
        def validation_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            self.model(batch[0])
            happened.append(batch_idx)

    module = Noted()
    callback = PostTrainingQuantization(calibration_dataloader=small_loader())
    trainer(callback, limit_val_batches=1).validate(module, small_loader(), verbose=False)
    # twice for the batch axes, for the example, for the first of four batches, and validation itself
    assert happened == [0] * 5


def test_what_fails_after_the_call_does_not_matter(trainer: MakeTrainer) -> None:
    class Loss(SmallModule):
        def validation_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            scores = self.model(batch["image"])
            self.log("val_loss", F.cross_entropy(scores, batch["label"]))

    images, labels = small_loader().dataset[:]
    unlabeled = DataLoader([{"image": image} for image in images], batch_size=8)
    labeled = [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)]
    module = Loss()
    trainer(PostTrainingQuantization(calibration_dataloader=unlabeled)).validate(
        module, DataLoader(labeled, batch_size=8), verbose=False
    )
    assert module.quantized.calibrated


class Caught(pl.Callback):
    """What the catcher gives for the first batch."""

    def __init__(self) -> None:
        self.calls: list[NetworkInputs] = []
        self.examples: list[NetworkInputs] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        batch = next(iter(trainer.validate_loop._data_source.dataloader()))
        self.calls = InputCatcher(trainer, pl_module, "model").catch(batch, 0)
        self.examples = PostTrainingQuantization()._examples(trainer, pl_module)


@pytest.mark.parametrize("kept_in", ["metric", "buffer", "list", "dict"])
def test_what_an_earlier_validation_made_is_updated_between_calls(trainer: MakeTrainer, kept_in: str) -> None:
    """Lightning validates in inference mode, and outside of it nothing updates what was made there."""

    class Measured(SmallModule):
        def __init__(self) -> None:
            super().__init__()
            self.metric = MeanMetric()
            self.register_buffer("seen", torch.zeros(()))
            self.counts, self.sums = [torch.zeros(())], {"all": torch.zeros(())}

        def validation_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            for images in (batch[0], batch[0] * 5 + 1):
                self.update(self.model(images).mean())

        def update(self, value: Tensor) -> None:
            if kept_in == "metric":
                self.metric.update(value)
            else:
                self.state().add_(value)

        def state(self) -> Tensor:
            states = {"metric": self.metric.mean_value, "buffer": self.seen}
            return {**states, "list": self.counts[0], "dict": self.sums["all"]}[kept_in]

        def on_validation_epoch_end(self) -> None:
            self.metric.reset()
            self.seen, self.counts[0], self.sums["all"] = torch.zeros(()), torch.zeros(()), torch.zeros(())

    module, caught = Measured(), Caught()
    trainer().validate(module, small_loader(), verbose=False)
    state = module.state()
    assert state.is_inference()
    catcher = InputCatcher(trainer(), module, "model")
    assert len(catcher.catch(next(iter(small_loader())), 0)) == 2
    assert module.state() is state
    assert state.item() == 0
    trainer(caught).validate(module, small_loader(), verbose=False)
    assert len(caught.calls) == 2


def test_a_state_that_is_none_at_first(trainer: MakeTrainer) -> None:
    class FromNone(Recurrent):
        def validation_step(self, frames: Tensor, batch_idx: int) -> None:
            state = None
            for frame in frames.unbind(1):
                _, state = self.model(frame, state)

    frames, module, caught = Frames().frames, FromNone(), Caught()
    trainer(caught).validate(module, DataLoader(frames, batch_size=4), verbose=False)
    assert [call.last for call in caught.calls] == [False] * 5 + [True]
    assert [call.args[1] is None for call in caught.calls] == [True] + [False] * 5
    state = None
    with torch.no_grad():  # each call as the network's own states make it
        for call, frame in zip(caught.calls, frames[:4].unbind(1), strict=True):
            assert torch.equal(call.args[0], frame)
            assert (call.args[1] is None) if state is None else torch.equal(call.args[1], state)
            _, state = module.model(frame, state)
    # the network is built with the call that has the state, and learns of the other
    assert [len(example.tensors) for example in caught.examples] == [2, 1]
    assert all(example.last and example.batch_size == 1 for example in caught.examples)


def test_states_are_those_of_the_float_network(trainer: MakeTrainer) -> None:
    class Ptq(PostTrainingQuantization):
        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            super().on_validation_end(trainer, pl_module)
            network = self.quantized_network(pl_module)
            self.calls = InputCatcher(trainer, pl_module, "model", network).catch(Frames().frames[:4], 0)

    module, loader = Recurrent(), DataLoader(Frames(), batch_size=4)
    plain = copy.deepcopy(module.model)
    callback = Ptq("w4a8", calibration_dataloader=loader)
    trainer(callback).validate(module, loader, verbose=False)
    state = torch.zeros(4, 8)
    with torch.no_grad():
        for call in callback.calls:
            assert torch.allclose(call.args[1], state, atol=1e-6)
            _, state = plain(call.args[0], state)


def test_arguments_are_kept_as_they_were_at_the_call(trainer: MakeTrainer) -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.sub_(1))

    class Reuses(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = InPlace()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            images = batch[0].mul_(2)
            self.model(images)
            self.model(images)

    data = TensorDataset(torch.ones(8, 4))
    caught = Caught()
    trainer(caught).validate(Reuses(), DataLoader(data, batch_size=8), verbose=False)
    assert [float(call.args[0][0, 0]) for call in caught.calls] == [2, 1]
