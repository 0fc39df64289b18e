"""Training on: ranges that learn in groups of their own, schedulers, and resuming bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    LambdaLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from lightning_quant import QuantizationAwareTraining
from tests.helpers.small import (
    CLASSES,
    EpochSampler,
    SmallModule,
    assert_same_tensors,
    encodings,
    small_data,
    small_loader,
    small_net,
)

MakeTrainer = Callable[..., Trainer]
SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: LambdaLR(o, lambda step: 0.8**step),
    "StepLR": lambda o: StepLR(o, 2),
    "OneCycleLR": lambda o: OneCycleLR(o, 0.1, total_steps=13),
    "CyclicLR": lambda o: CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "CosineAnnealingLR": lambda o: CosineAnnealingLR(o, 12),
    "CosineAnnealingWarmRestarts": lambda o: CosineAnnealingWarmRestarts(o, 5),
    "SequentialLR": lambda o: SequentialLR(o, [ConstantLR(o, 0.1, 3), CosineAnnealingLR(o, 9)], [3]),
    "ChainedScheduler": lambda o: ChainedScheduler([ConstantLR(o, 0.1, 3), StepLR(o, 2)]),
    "ReduceLROnPlateau": lambda o: ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=10.0, min_lr=1e-3),
}


def with_scheduler(make: Callable[[Optimizer], LRScheduler]) -> Callable[[SmallModule], Any]:
    def optimizers(module: SmallModule) -> Any:
        optimizer = SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
        scheduler = make(optimizer)
        monitored = isinstance(scheduler, ReduceLROnPlateau)
        config = {"scheduler": scheduler, "interval": "epoch" if monitored else "step", "monitor": "val_loss"}
        return {"optimizer": optimizer, "lr_scheduler": config}

    return optimizers


class Rates(pl.Callback):
    """Writes down the options of every group before each training batch."""

    def __init__(self) -> None:
        self.seen: list[list[dict[str, Any]]] = []

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        groups = trainer.optimizers[0].param_groups
        self.seen.append([{k: v for k, v in group.items() if k != "params"} for group in groups])


# Groups


def test_ranges_have_a_group_without_weight_decay(trainer: MakeTrainer) -> None:
    module = SmallModule(optimizers=lambda m: AdamW(m.parameters(), lr=1e-2, weight_decay=0.3, betas=(0.8, 0.9)))
    one = trainer(QuantizationAwareTraining(), max_epochs=1)
    one.fit(module, small_loader())
    weights, ranges = one.optimizers[0].param_groups
    assert (weights["weight_decay"], ranges["weight_decay"]) == (0.3, 0.0)
    assert ranges["betas"] == (0.8, 0.9)
    assert {id(p) for p in ranges["params"]} == {id(p) for p in module.quantized.range_parameters()}


def test_ranges_are_split_off_every_group(trainer: MakeTrainer) -> None:
    def optimizers(module: SmallModule) -> Any:
        head = list(module.model.head.parameters())
        rest = [p for p in module.parameters() if all(p is not h for h in head)]
        return SGD([{"params": head, "lr": 0.5}, {"params": rest, "lr": 0.25}], lr=1.0, weight_decay=0.1)

    one = trainer(QuantizationAwareTraining(), max_epochs=1)
    module = SmallModule(optimizers=optimizers)
    one.fit(module, small_loader())
    found = [(g["lr"], g["weight_decay"]) for g in one.optimizers[0].param_groups]
    assert found == [(0.5, 0.1), (0.25, 0.1), (0.5, 0.0), (0.25, 0.0)]


def test_named_parameters_keep_their_names(trainer: MakeTrainer) -> None:
    module = SmallModule(optimizers=lambda m: SGD(m.named_parameters(), lr=0.1, weight_decay=0.1))
    one = trainer(QuantizationAwareTraining(), max_epochs=1)
    one.fit(module, small_loader())
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    weights, ranges = one.optimizers[0].param_groups
    for group in (weights, ranges):
        assert group["param_names"] == [names[id(parameter)] for parameter in group["params"]]
    assert all("quantizer" in name for name in ranges["param_names"])


def test_a_second_fit_splits_again(trainer: MakeTrainer) -> None:
    one = trainer(QuantizationAwareTraining(), max_epochs=1)
    module = SmallModule()
    for _ in range(2):
        one.fit_loop.epoch_progress.reset()
        one.fit(module, small_loader())
        assert len(one.optimizers[0].param_groups) == 2


def test_ranges_and_weights_learn(trainer: MakeTrainer) -> None:
    module = SmallModule()
    start: dict[str, Any] = {}

    class Start(pl.Callback):
        def on_train_start(self, *_: Any) -> None:
            start.update(copy.deepcopy(module.model.state_dict()))

    one = trainer(QuantizationAwareTraining("w4a8"), Start(), max_epochs=8)
    (before,) = trainer().validate(SmallModule(), small_loader(), verbose=False)
    one.fit(module, small_loader(), small_loader())
    moved = {name for name, value in module.model.state_dict().items() if "extra" not in name}
    still = {name for name in moved if torch.equal(start[name], module.model.state_dict()[name])}
    # pinned to 0 by the hardware config; inputs, which training does not change
    assert still == {"relu.output_quantizers.0.min", *(f"stem.input_quantizers.0.{end}" for end in ("min", "max"))}
    assert float(one.callback_metrics["val_loss"]) < 0.85 * before["val_loss"]


def test_fixed_ranges_stay_as_calibrated(trainer: MakeTrainer) -> None:
    module = SmallModule()
    calibrated: dict[str, Any] = {}

    class Start(pl.Callback):
        def on_train_start(self, *_: Any) -> None:
            calibrated.update(encodings(module.quantized))

    weight = small_net().head.weight.detach()
    trainer(QuantizationAwareTraining(train_ranges=False), Start(), max_epochs=2).fit(module, small_loader())
    assert_same_tensors(encodings(module.quantized), calibrated)
    assert not torch.equal(module.model.head.weight, weight)


def test_ranges_kept_by_one_training_learn_in_the_next(trainer: MakeTrainer) -> None:
    module = SmallModule()
    trainer(QuantizationAwareTraining(train_ranges=False), max_epochs=1).fit(module, small_loader())
    kept = {name: value.clone() for name, value in encodings(module.quantized).items()}
    pinned = [p for p in module.quantized.range_parameters() if not p.requires_grad]
    trainer(QuantizationAwareTraining(), max_epochs=1).fit(module, small_loader())
    assert any(not torch.equal(value, kept[name]) for name, value in encodings(module.quantized).items())
    still_pinned = [p for p in module.quantized.range_parameters() if not p.requires_grad]
    assert 0 < len(still_pinned) < len(pinned)


# Schedulers


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_drive_the_ranges_as_they_drive_the_weights(trainer: MakeTrainer, name: str) -> None:
    rates, plain = Rates(), Rates()
    optimizers = with_scheduler(SCHEDULERS[name])
    trainer(QuantizationAwareTraining(), rates, max_epochs=3).fit(
        SmallModule(optimizers=optimizers), small_loader(), small_loader()
    )
    trainer(plain, max_epochs=3).fit(SmallModule(optimizers=optimizers), small_loader(), small_loader())
    expected = [group["lr"] for (group,) in plain.seen]
    assert len(set(expected)) >= 3
    assert [weights["lr"] for weights, _ in rates.seen] == expected
    assert [ranges["lr"] for _, ranges in rates.seen] == expected
    if name in ("OneCycleLR", "CyclicLR"):
        momenta = [group["momentum"] for (group,) in plain.seen]
        assert [ranges["momentum"] for _, ranges in rates.seen] == momenta


# Resuming


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "OneCycleLR", "SequentialLR", "ReduceLROnPlateau"])
@pytest.mark.parametrize("train_ranges", [True, False])
def test_resume_is_bit_for_bit(trainer: MakeTrainer, tmp_path: Path, optimizer: str, train_ranges: bool) -> None:
    makers: dict[str, Callable[[SmallModule], Any]] = {
        "SGD": lambda m: SGD(m.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1),
        "AdamW": lambda m: AdamW(m.parameters(), lr=0.01, weight_decay=0.1),
    }
    make = makers.get(optimizer) or with_scheduler(SCHEDULERS[optimizer])

    def fit(epochs: int, **arguments: Any) -> tuple[Trainer, SmallModule]:
        one = trainer(QuantizationAwareTraining("w4a8", train_ranges=train_ranges), max_epochs=epochs)
        module = SmallModule(optimizers=make)
        data = small_data()
        one.fit(module, small_loader(data, sampler=EpochSampler(len(data))), small_loader(), **arguments)
        return one, module

    whole, expected = fit(3)
    first, _ = fit(2)
    first.save_checkpoint(tmp_path / "two.ckpt")
    resumed, module = fit(3, ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    assert len(module.trained_on) == 4
    assert module.trained_on == expected.trained_on[8:]
    assert_same_tensors(module.state_dict(), expected.state_dict())
    assert_same_tensors(resumed.optimizers[0].state_dict(), whole.optimizers[0].state_dict())
    if whole.lr_scheduler_configs:
        states = [one.lr_scheduler_configs[0].scheduler.state_dict() for one in (resumed, whole)]
        for state in states:  # nested and bound objects without a notion of equality
            state.pop("_schedulers", None)
            state.pop("anneal_func", None)
        assert states[0] == states[1]


def test_resume_in_the_same_trainer(trainer: MakeTrainer, tmp_path: Path) -> None:
    one = trainer(QuantizationAwareTraining(), max_epochs=1)
    module = SmallModule()
    one.fit(module, small_loader())
    one.save_checkpoint(tmp_path / "one.ckpt")
    one.fit_loop.max_epochs = 2
    one.fit(module, small_loader(), ckpt_path=tmp_path / "one.ckpt")
    assert one.global_step == 8
    assert len(one.optimizers[0].param_groups) == 2


# Manual optimization


class Gan(pl.LightningModule):
    """Two networks, two optimizers and no step but the training's, as in Lightning's own example."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3 * 8 * 8), nn.Tanh())
        self.discriminator = nn.Sequential(
            nn.Flatten(), nn.Linear(3 * 8 * 8, CLASSES), nn.ReLU(), nn.Linear(CLASSES, 1)
        )

    def training_step(self, batch: Any, batch_idx: int) -> None:
        images = batch[0]
        for_generator, for_discriminator = self.optimizers()
        noise = torch.randn(len(images), 5).type_as(images)
        self.toggle_optimizer(for_generator)
        loss = -self.discriminator(self.generator(noise).view(-1, 3, 8, 8)).mean()
        for_generator.zero_grad()
        self.manual_backward(loss)
        for_generator.step()
        self.untoggle_optimizer(for_generator)
        self.toggle_optimizer(for_discriminator)
        loss = self.discriminator(self.generator(noise).view(-1, 3, 8, 8).detach()).mean()
        loss = loss - self.discriminator(images).mean()
        for_discriminator.zero_grad()
        self.manual_backward(loss)
        for_discriminator.step()
        self.untoggle_optimizer(for_discriminator)

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        return self.generator(noise)

    def configure_optimizers(self) -> Any:
        return SGD(self.generator.parameters(), lr=0.1), SGD(self.discriminator.parameters(), lr=0.1)


@pytest.mark.parametrize("network", ["generator", "discriminator"])
def test_manual_optimization_of_two_networks(trainer: MakeTrainer, network: str) -> None:
    torch.manual_seed(0)
    module = Gan()
    other = module.discriminator if network == "generator" else module.generator
    before = copy.deepcopy(other.state_dict())
    one = trainer(QuantizationAwareTraining(network=network), max_epochs=2)
    one.fit(module, small_loader())
    assert module.get_submodule(network).calibrated
    assert sorted(len(optimizer.param_groups) for optimizer in one.optimizers) == [1, 2]
    # calibration leaves the step inside toggle_optimizer: the other network must learn all the same
    assert all(parameter.requires_grad for name, parameter in module.named_parameters() if "quantizer" not in name)
    name = list(before)[-2]
    assert not torch.equal(other.state_dict()[name], before[name])
