"""configure_optimizers as it was written for the float network, and ranges that follow whatever schedules it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BaseFinetuning, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from timm.optim import Lookahead
from timm.scheduler import (
    CosineLRScheduler,
    MultiStepLRScheduler,
    PlateauLRScheduler,
    PolyLRScheduler,
    StepLRScheduler,
    TanhLRScheduler,
)
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from lightning_quant import PostTrainingQuantization, QuantizationAwareTraining
from tests.helpers.small import SmallModule, assert_same_tensors, encodings, small_loader, small_net

MakeTrainer = Callable[..., Trainer]


def ranges_of(network: nn.Module) -> list[nn.Parameter]:
    return [value for name, value in network.named_parameters() if "quantizer" in name]


def groups_without_ranges(trainer: Trainer, network: nn.Module) -> list[dict[str, Any]]:
    """The user's groups; every other one holds nothing but ranges and has no decay."""
    ranges = {id(parameter) for parameter in ranges_of(network)}
    given = []
    for group in trainer.optimizers[0].param_groups:
        inside = [id(parameter) in ranges for parameter in group["params"]]
        if not any(inside):
            given.append(group)
        else:
            assert all(inside)
            assert group["weight_decay"] == 0.0
    return given


# Optimizers are made as in float


def sets_that_hold_everything(module: SmallModule) -> Any:
    """Every parameter belongs to exactly one set, sorted by the class of its module."""
    decay, spare = set(), set()
    for path, part in module.model.named_modules():
        for name, _ in part.named_parameters(recurse=False):
            (decay if isinstance(part, nn.Linear | nn.Conv2d) and name == "weight" else spare).add(f"{path}.{name}")
            assert isinstance(part, nn.Linear | nn.Conv2d), f"what is {type(part)}?"
    known = dict(module.model.named_parameters())
    assert known.keys() == decay | spare
    groups = [([known[name] for name in sorted(names)], rate) for names, rate in ((decay, 0.1), (spare, 0.0))]
    return AdamW([{"params": parameters, "weight_decay": rate} for parameters, rate in groups], lr=1e-3)


def leaves_only(module: SmallModule) -> Any:
    """Parameters of modules without children; none may be left over."""
    leaves = [part for part in module.model.modules() if not list(part.children())]
    held = [parameter for part in leaves for parameter in part.parameters()]
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in module.parameters()}
    return SGD(held, lr=1e-3, weight_decay=0.1)


def by_number_of_dimensions(module: SmallModule) -> Any:
    parameters = list(module.parameters())
    assert {parameter.dim() for parameter in parameters} == {1, 2, 4}
    large, small = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() == 1]
    assert len(large) == len(small) == 3
    return AdamW([{"params": large, "weight_decay": 0.1}, {"params": small, "weight_decay": 0.0}], lr=1e-3)


def by_known_names(module: SmallModule) -> Any:
    ends = ("stem.weight", "stem.bias", "branch.weight", "branch.bias", "head.weight", "head.bias")
    for (name, _), end in zip(module.model.named_parameters(), ends, strict=True):  # in the order of the float network
        assert name.endswith(end)
    assert {name for name in module.model.state_dict() if name.endswith(("min", "max"))} == set()
    return SGD([{"params": [p], "name": n} for n, p in module.named_parameters()], lr=1e-3, weight_decay=0.1)


@pytest.mark.parametrize("make", [sets_that_hold_everything, leaves_only, by_number_of_dimensions, by_known_names])
@pytest.mark.parametrize("callback", [PostTrainingQuantization, QuantizationAwareTraining])
def test_optimizers_are_made_without_ranges_in_sight(trainer: MakeTrainer, make: Any, callback: Any) -> None:
    module = SmallModule(optimizers=make)
    one = trainer(callback(), max_epochs=1)
    one.fit(module, small_loader(), small_loader())
    held = [id(parameter) for group in one.optimizers[0].param_groups for parameter in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(parameter) for parameter in module.parameters()}
    assert ranges_of(module.model)
    given = groups_without_ranges(one, module.model)
    assert len(given) == len(make(SmallModule(nn.Sequential(*_three_layers()))).param_groups)


def _three_layers() -> Iterator[nn.Module]:
    for name, layer in (("stem", nn.Conv2d(3, 6, 3)), ("branch", nn.Conv2d(6, 6, 3)), ("head", nn.Linear(6, 4))):
        holder = nn.Module()
        holder.add_module(name, layer)
        yield holder


def test_configure_optimizers_that_raises_leaves_the_ranges_where_they_were(trainer: MakeTrainer) -> None:
    module = SmallModule()
    trainer(PostTrainingQuantization()).fit(module, small_loader())
    names = [name for name, _ in module.named_parameters()]

    def fails(_: SmallModule) -> Any:
        raise KeyError("lr")

    module._optimizers = fails
    one = trainer(QuantizationAwareTraining(), max_epochs=1)
    with pytest.raises(KeyError):
        one.fit(module, small_loader())
    assert [name for name, _ in module.named_parameters()] == names
    assert not {"setup", "setup_optimizers"} & vars(one.strategy).keys()
    module._optimizers = lambda m: SGD(m.parameters(), lr=0.1)
    one.fit(module, small_loader())
    assert len(one.optimizers[0].param_groups) == 2


def test_network_runs_while_optimizers_are_made(trainer: MakeTrainer) -> None:
    module = SmallModule()
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    trainer(PostTrainingQuantization()).fit(module, small_loader())
    expected = module.model(images)

    def optimizers(m: SmallModule) -> Any:
        assert torch.equal(m.model(images), expected)
        return SGD(m.parameters(), lr=0.1)

    module._optimizers = optimizers
    trainer(QuantizationAwareTraining(), max_epochs=1).fit(module, small_loader())


def test_ranges_learn_where_their_layer_does(trainer: MakeTrainer) -> None:
    """With an optimizer for the head alone, nothing before the head moves."""
    module = SmallModule(optimizers=lambda m: SGD(m.model.head.parameters(), lr=0.1, momentum=0.9))
    calibrated: dict[str, Tensor] = {}

    class Start(pl.Callback):
        def on_train_start(self, *_: Any) -> None:
            calibrated.update(encodings(module.quantized))

    trainer(QuantizationAwareTraining("w4a8"), Start(), max_epochs=2).fit(module, small_loader())
    moved = {name for name, value in encodings(module.quantized).items() if not torch.equal(value, calibrated[name])}
    assert moved
    assert all(name.startswith("head.") for name in moved)


class Manual(SmallModule):
    """Steps several optimizers for one network by hand."""

    def __init__(self, optimizers: Callable[[SmallModule], Any], network: nn.Module | None = None) -> None:
        super().__init__(network, optimizers)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        given = self.optimizers()
        optimizers = given if isinstance(given, list) else [given]
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(self._loss(batch))
        for optimizer in optimizers:
            optimizer.step()


def test_parts_of_a_network_in_several_optimizers(trainer: MakeTrainer) -> None:
    def optimizers(module: SmallModule) -> Any:
        head = list(module.model.head.parameters())
        rest = [p for p in module.parameters() if all(p is not h for h in head)]
        return SGD(rest, lr=0.1), AdamW(head, lr=0.01)

    module = Manual(optimizers)
    one = trainer(QuantizationAwareTraining(), max_epochs=1)
    one.fit(module, small_loader())
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found = [[{names[id(p)] for p in group["params"]} for group in o.param_groups] for o in one.optimizers]
    assert [len(groups) for groups in found] == [2, 2]
    assert all("head." in name for name in found[1][1])
    assert not any("head." in name for name in found[0][1])
    assert len(found[0][1] | found[1][1]) == len(ranges_of(module.model))


def test_optimizer_that_knows_one_group(trainer: MakeTrainer) -> None:
    class Closes(SmallModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self._loss(batch)

    module = Closes(optimizers=lambda m: LBFGS(m.parameters(), lr=0.1, max_iter=2))
    start: dict[str, Tensor] = {}

    class Start(pl.Callback):
        def on_train_start(self, *_: Any) -> None:
            start.update(encodings(module.quantized))

    one = trainer(QuantizationAwareTraining("w4a8"), Start(), max_epochs=1)
    one.fit(module, small_loader())
    assert len(one.optimizers[0].param_groups) == 1
    assert sum(not torch.equal(value, start[name]) for name, value in encodings(module.quantized).items()) > 3


def test_optimizer_for_matrices(trainer: MakeTrainer) -> None:
    """Muon takes matrices only: ranges go with the biases, and where there are none it is said."""

    def split(module: SmallModule) -> Any:
        parameters = list(module.parameters())
        matrices = [p for p in parameters if p.dim() == 2]
        return Muon(matrices, lr=1e-3), AdamW([p for p in parameters if p.dim() != 2], lr=1e-3)

    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 8, bias=False), nn.ReLU(), nn.Linear(8, 4))
    module = Manual(split, network)
    one = trainer(QuantizationAwareTraining(), max_epochs=1)
    one.fit(module, small_loader())
    assert [len(optimizer.param_groups) for optimizer in one.optimizers] == [1, 2]
    assert {id(p) for p in one.optimizers[1].param_groups[1]["params"]} == {id(p) for p in ranges_of(module.model)}
    alone = Manual(lambda m: Muon([p for p in m.parameters() if p.dim() == 2], lr=1e-3), network)
    with pytest.warns(UserWarning, match=r"ranges do not learn.*AdamW"):
        trainer(QuantizationAwareTraining(), max_epochs=1).fit(alone, small_loader())


def test_decay_of_all_groups_is_not_for_ranges(trainer: MakeTrainer) -> None:
    class Decays(pl.Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            for group in trainer.optimizers[0].param_groups:
                group["weight_decay"] = 0.5

    seen = []

    class Steps(SGD):
        def step(self, *arguments: Any, **named: Any) -> Any:
            seen.append([group["weight_decay"] for group in self.param_groups])
            return super().step(*arguments, **named)

    module = SmallModule(optimizers=lambda m: Steps(m.parameters(), lr=0.01))
    trainer(Decays(), QuantizationAwareTraining(), Decays(), max_epochs=1).fit(module, small_loader())
    assert seen == [[0.5, 0.0]] * 4


def test_group_made_by_hand_stays_as_it_is(trainer: MakeTrainer) -> None:
    quantization = QuantizationAwareTraining()
    ranges: list[nn.Parameter] = []

    class Finds(pl.Callback):
        def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
            ranges.extend(quantization.quantized_network(pl_module).range_parameters())

    def optimizers(module: SmallModule) -> Any:
        groups = [{"params": list(module.parameters())}, {"params": ranges, "lr": 1e-4, "weight_decay": 0.0}]
        optimizer = SGD(groups, lr=0.01, weight_decay=0.1)
        return [optimizer], [{"scheduler": LambdaLR(optimizer, [lambda t: 1.0, lambda t: 0.5]), "interval": "step"}]

    module = SmallModule(optimizers=optimizers)
    one = trainer(quantization, Finds(), max_epochs=1)
    one.fit(module, small_loader())
    assert [group["lr"] for group in one.optimizers[0].param_groups] == [0.01, 5e-5]


# Schedules


class PerGroup(LRScheduler):
    """Keeps a list of its own for the groups that it saw, as schedulers of users do."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.peaks = [10 * group["lr"] for group in optimizer.param_groups]
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        return [peak / (1 + self.last_epoch) for peak in self.peaks]


class HandMade:
    """A scheduler that knows nothing of PyTorch's."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._opt, self.count = optimizer, 0
        self.rates = {index: group["lr"] for index, group in enumerate(optimizer.param_groups)}

    def step(self, *_: Any) -> None:
        self.count += 1
        assert len(self.rates) == len(self._opt.param_groups)
        for index, group in enumerate(self._opt.param_groups):
            group["lr"] = self.rates[index] * 0.8**self.count
            group["weight_decay"] = 0.01 * self.count  # DINO raises the decay

    @property
    def optimizer(self) -> Optimizer:
        return self._opt

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "cosine": lambda o: CosineLRScheduler(o, t_initial=6, warmup_t=2, warmup_lr_init=1e-6),
    "tanh": lambda o: TanhLRScheduler(o, t_initial=6),
    "step": lambda o: StepLRScheduler(o, decay_t=1, decay_rate=0.5),
    "multistep": lambda o: MultiStepLRScheduler(o, decay_t=[1, 3], decay_rate=0.5),
    "poly": lambda o: PolyLRScheduler(o, t_initial=6),
    "plateau": lambda o: PlateauLRScheduler(o, patience_t=0, decay_rate=0.5, threshold=10.0),
    "a list of its own": PerGroup,
    "a function for each group": lambda o: LambdaLR(o, [lambda t: 0.5**t, lambda t: 0.9**t]),
    "a limit for each group": lambda o: ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=10.0, min_lr=[1e-3, 0]),
    "made by hand": HandMade,
}


class Scheduled(SmallModule):
    """Two groups with different rates, and any scheduler, stepped after each batch."""

    def __init__(self, make: Callable[[Optimizer], Any], handed_over: bool = True) -> None:
        super().__init__()
        self.make, self.handed_over = make, handed_over

    def configure_optimizers(self) -> Any:
        head = list(self.model.head.parameters())
        rest = [p for p in self.parameters() if all(p is not h for h in head)]
        groups = [{"params": rest, "lr": 0.01}, {"params": head, "lr": 0.05}]
        optimizer = SGD(groups, momentum=0.9, weight_decay=0.1)
        if not self.handed_over:
            self.schedule = self.make(optimizer)
            return optimizer
        schedule = {"scheduler": self.make(optimizer), "interval": "step", "monitor": "train_loss"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if isinstance(scheduler, PlateauLRScheduler):
            scheduler.step(self.global_step, 1.0)
        elif isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(1.0)
        elif isinstance(scheduler, LRScheduler | HandMade):
            scheduler.step()
        else:
            scheduler.step(self.global_step)

    def on_train_batch_end(self, *_: Any) -> None:
        if not self.handed_over:
            self.lr_scheduler_step(self.schedule, None)


class Rates(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_before_zero_grad(self, trainer: Trainer, module: pl.LightningModule, optimizer: Optimizer) -> None:
        self.seen.append([group["lr"] for group in optimizer.param_groups])


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("handed_over", [True, False])
def test_ranges_follow_any_schedule(trainer: MakeTrainer, name: str, handed_over: bool) -> None:
    plain, rates = Rates(), Rates()
    trainer(plain, max_epochs=2).fit(Scheduled(SCHEDULES[name], handed_over), small_loader())
    one = trainer(QuantizationAwareTraining(), rates, max_epochs=2)
    module = Scheduled(SCHEDULES[name], handed_over)
    one.fit(module, small_loader())
    assert len({tuple(seen) for seen in plain.seen}) >= 3
    assert [seen[:2] for seen in rates.seen] == plain.seen
    assert [seen[2:] for seen in rates.seen] == plain.seen
    groups_without_ranges(one, module.model)


class Helper:
    """Keeps what a user's own loop needs."""

    def __init__(self, schedule: Any) -> None:
        self.parts = {"schedules": [schedule]}


# How a module keeps a scheduler that it does not hand over.
KEPT: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "a list": (lambda schedule: [schedule], lambda kept: kept[0]),
    "a dict": (lambda schedule: {"of": {"all": schedule}}, lambda kept: kept["of"]["all"]),
    "a helper": (Helper, lambda kept: kept.parts["schedules"][0]),
}


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("name", ["a list of its own", "a function for each group"])
def test_schedules_that_the_module_keeps_in_its_own_way(trainer: MakeTrainer, name: str, kept: str) -> None:
    keep, read = KEPT[kept]

    class Keeps(Scheduled):
        def on_train_batch_end(self, *_: Any) -> None:
            self.lr_scheduler_step(read(self.schedule), None)

    plain, rates = Rates(), Rates()
    for callbacks in ([plain], [QuantizationAwareTraining(), rates]):
        module = Keeps(lambda optimizer: keep(SCHEDULES[name](optimizer)), handed_over=False)
        trainer(*callbacks, max_epochs=2).fit(module, small_loader())
    assert len({tuple(seen) for seen in plain.seen}) >= 3
    assert [seen[:2] for seen in rates.seen] == [seen[2:] for seen in rates.seen] == plain.seen


def test_what_is_written_to_the_last_group_reaches_the_users_last(trainer: MakeTrainer) -> None:
    """As Lightning's own BackboneFinetuning does it."""

    class Raises(pl.Callback):
        def on_train_epoch_start(self, trainer: Trainer, module: pl.LightningModule) -> None:
            trainer.optimizers[0].param_groups[-1]["lr"] = 0.1 * (1 + trainer.current_epoch)

    plain, rates = Rates(), Rates()
    for callbacks in ([plain], [QuantizationAwareTraining(), rates]):
        module = Scheduled(lambda o: LambdaLR(o, lambda t: 1.0))
        module.lr_scheduler_step = lambda *_: None  # type: ignore[method-assign]
        trainer(*callbacks, Raises(), max_epochs=3).fit(module, small_loader())
    assert {round(seen[1], 6) for seen in plain.seen} == {0.1, 0.2, 0.3}
    assert {seen[0] for seen in plain.seen} == {0.01}
    assert [seen[:2] for seen in rates.seen] == [seen[2:] for seen in rates.seen] == plain.seen


@pytest.mark.parametrize("resumed", [False, True])
def test_what_is_written_to_all_groups_stays_as_it_was_written(
    trainer: MakeTrainer, tmp_path: Path, resumed: bool
) -> None:
    """By a loop, or by a checkpoint: the last ranges follow the first group, and the last one has a rate of its own."""

    class Writes(pl.Callback):
        def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
            for group in trainer.optimizers[0].param_groups:
                group["lr"] = group["scale"] / (1 + trainer.global_step)

    def optimizers(module: SmallModule) -> Any:
        biases = [one for name, one in module.named_parameters() if name.endswith("bias")]
        weights = [one for name, one in module.named_parameters() if not name.endswith("bias")]
        return SGD([{"params": weights, "scale": 0.01, "lr": 0.3}, {"params": biases, "scale": 0.05, "lr": 0.4}])

    plain, rates = Rates(), Rates()
    for callbacks in ([], [QuantizationAwareTraining()]):
        seen = rates if callbacks else plain
        one = trainer(*callbacks, Writes(), *([] if resumed else [seen]), max_epochs=1)
        one.fit(SmallModule(optimizers=optimizers), small_loader())
        if resumed:
            one.save_checkpoint(tmp_path / "one.ckpt")
            again = [QuantizationAwareTraining()] if callbacks else []
            module = SmallModule(optimizers=optimizers)
            trainer(*again, seen, max_epochs=2).fit(module, small_loader(), ckpt_path=tmp_path / "one.ckpt")
    assert plain.seen
    assert [seen[:2] for seen in rates.seen] == plain.seen
    assert all(seen[2] == seen[0] for seen in rates.seen)


def test_optimizer_that_wraps_another_one(trainer: MakeTrainer) -> None:
    """One that was not initialized as an optimizer itself."""
    module = SmallModule(optimizers=lambda module: Lookahead(SGD(module.parameters(), lr=0.1, weight_decay=0.1)))
    before: dict[str, Tensor] = {}

    class Keeps(pl.Callback):
        def on_train_start(self, trainer: Trainer, module: Any) -> None:
            before.update({name: value.clone() for name, value in encodings(module.model).items()})

    one = trainer(QuantizationAwareTraining(), Keeps(), max_epochs=1)
    one.fit(module, small_loader())
    groups_without_ranges(one, module.model)
    after = encodings(module.model)
    assert any(not torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("name", ["cosine", "a list of its own", "made by hand"])
def test_schedule_resumes_where_it_was(trainer: MakeTrainer, tmp_path: Path, name: str) -> None:
    def fit(epochs: int, **arguments: Any) -> tuple[Trainer, Scheduled]:
        module = Scheduled(SCHEDULES[name])
        one = trainer(QuantizationAwareTraining("w4a8"), max_epochs=epochs)
        one.fit(module, small_loader(), **arguments)
        return one, module

    whole, expected = fit(3)
    first, _ = fit(2)
    first.save_checkpoint(tmp_path / "two.ckpt")
    resumed, module = fit(3, ckpt_path=tmp_path / "two.ckpt")
    assert_same_tensors(module.state_dict(), expected.state_dict())
    assert_same_tensors(resumed.optimizers[0].state_dict(), whole.optimizers[0].state_dict())


@pytest.mark.parametrize("scheduled", [True, False])
def test_learning_rates_are_logged_by_the_names_of_float(trainer: MakeTrainer, tmp_path: Path, scheduled: bool) -> None:
    def logged(*callbacks: Any) -> dict[str, Any]:
        logger = CSVLogger(tmp_path, name="log")
        one = trainer(*callbacks, LearningRateMonitor(), max_epochs=1, logger=logger, log_every_n_steps=1)
        one.fit(Scheduled(SCHEDULES["cosine"], handed_over=scheduled), small_loader())
        return {name: value for name, value in one.callback_metrics.items() if name.startswith("lr-")}

    found, plain = logged(QuantizationAwareTraining()), logged()
    assert len(plain) == 2
    assert {name: found[name] for name in plain} == plain
    assert len(found) == (2 if scheduled else 4)


# Freezing


class Thaw(BaseFinetuning):
    """Freezes all but the head until the second epoch, as in Lightning's documentation."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze([pl_module.model.stem, pl_module.model.branch])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Optimizer) -> None:
        modules = [pl_module.model.stem, pl_module.model.branch]
        if epoch == 1:
            self.unfreeze_and_add_param_group(modules, optimizer, lr=1e-2)
        elif epoch > 1:  # resumed: Lightning restores the groups, and the module is frozen as at first
            self.make_trainable(modules)


class Epochs(pl.Callback):
    """Keeps weights and ranges as they are after each epoch, and as they were at first."""

    def __init__(self) -> None:
        self.kept: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: Trainer, module: pl.LightningModule) -> None:
        self.kept.append({name: value.detach().clone() for name, value in module.named_parameters()})

    def on_train_epoch_end(self, trainer: Trainer, module: pl.LightningModule) -> None:
        self.on_train_start(trainer, module)

    def moved(self, epoch: int) -> set[str]:
        before, after = self.kept[epoch], self.kept[epoch + 1]
        return {name for name in before if not torch.equal(before[name], after[name])}


def trainable(module: SmallModule) -> Any:
    return AdamW(filter(lambda p: p.requires_grad, module.parameters()), lr=1e-2, weight_decay=0.1)


def test_ranges_of_frozen_layers_are_frozen_before_a_strategy_looks(trainer: MakeTrainer) -> None:
    """DDP looks which parameters get gradients when it wraps the module, in front of the optimizers."""
    seen: dict[str, bool] = {}

    class Looks(pl.Callback):
        def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
            seen.update({name: one.requires_grad for name, one in pl_module.model.named_parameters()})

    module = SmallModule(optimizers=trainable)
    module.model.stem.requires_grad_(False)
    trainer(QuantizationAwareTraining(), Looks(), max_epochs=1).fit(module, small_loader())
    ranges = {name: learns for name, learns in seen.items() if "quantizer" in name}
    assert not any(learns for name, learns in ranges.items() if name.startswith(("stem", "relu")))
    assert any(learns for name, learns in ranges.items() if name.startswith("head"))
    module.model.stem.requires_grad_(True)
    trainer(QuantizationAwareTraining(), Looks(), max_epochs=1).fit(module, small_loader())
    assert any(learns for name, learns in seen.items() if "quantizer" in name and name.startswith("stem"))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("train_ranges", [True, False])
def test_ranges_are_frozen_and_thawed_with_their_layers(trainer: MakeTrainer, first: bool, train_ranges: bool) -> None:
    epochs = Epochs()
    quantization = QuantizationAwareTraining("w4a8", train_ranges=train_ranges)
    order = [Thaw(), quantization] if first else [quantization, Thaw()]
    module = SmallModule(optimizers=trainable)
    one = trainer(*order, epochs, max_epochs=2)
    one.fit(module, small_loader())
    frozen, thawed = epochs.moved(0), epochs.moved(1)
    frozen = {name for name in frozen if not name.endswith("stem.bias")}  # the batch norm's, which was not frozen
    assert all("head" in name for name in frozen)
    assert any(name.endswith("stem.weight") for name in thawed)
    assert any("quantizer" in name for name in frozen) == train_ranges
    for layer in ("stem", "relu", "branch", "add"):  # and what only computes with what they put out
        assert any("quantizer" in name and layer in name for name in thawed) == train_ranges
    pinned = "relu.output_quantizers.0.min"  # to 0, by the hardware config
    assert not any(name.endswith(pinned) for name in thawed)
    groups_without_ranges(one, module.model)


def test_finetuning_resumes(trainer: MakeTrainer, tmp_path: Path) -> None:
    def fit(epochs: int, **arguments: Any) -> tuple[Trainer, SmallModule]:
        module = SmallModule(small_net(), optimizers=trainable)
        one = trainer(QuantizationAwareTraining("w4a8"), Thaw(), max_epochs=epochs)
        one.fit(module, small_loader(), **arguments)
        return one, module

    whole, expected = fit(3)
    first, _ = fit(2)
    first.save_checkpoint(tmp_path / "two.ckpt")
    resumed, module = fit(3, ckpt_path=tmp_path / "two.ckpt")
    assert_same_tensors(module.state_dict(), expected.state_dict())
    assert_same_tensors(resumed.optimizers[0].state_dict(), whole.optimizers[0].state_dict())


@pytest.mark.parametrize("train_ranges", [True, False])
def test_thawing_everything_does_not_thaw_what_is_pinned(trainer: MakeTrainer, train_ranges: bool) -> None:
    class ThawAll(SmallModule):
        def on_train_epoch_start(self) -> None:
            self.model.requires_grad_(True)

    epochs = Epochs()
    module = ThawAll(optimizers=lambda m: SGD(m.parameters(), lr=0.05, momentum=0.9))
    trainer(QuantizationAwareTraining("w4a8", train_ranges=train_ranges), epochs, max_epochs=1).fit(
        module, small_loader()
    )
    moved = {name for name in epochs.moved(0) if "quantizer" in name}
    assert bool(moved) == train_ranges
    assert not any(name.endswith("relu.output_quantizers.0.min") for name in moved)
