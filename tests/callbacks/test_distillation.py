"""Distillation from the float network: the sum of two losses, without a change to the user's code."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import SGD

import lightning_quant as lq
from lightning_quant.callbacks.distillation import Distillation
from lightning_quant.callbacks.distillation_loss import DistillationLoss, kl_gradient
from lightning_quant.errors import ConfigurationError
from lightning_quant.simulation.network import QuantizedNetwork
from tests.helpers.small import SmallModule, assert_same_tensors, small_data, small_loader, small_net

MakeTrainer = Callable[..., Trainer]
WEIGHT = 0.7


class Gradients(pl.Callback):
    """Keep the gradients of the first optimizer step, and the weights they belong to."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}
        self.state: dict[str, Any] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: SmallModule, *_: Any) -> None:
        if not self.state:
            self.state = pl_module.quantized.snapshot()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: SmallModule, *_: Any) -> None:
        if not self.found:
            named = pl_module.quantized.named_parameters()
            self.found = {name: p.grad.clone() for name, p in named if p.grad is not None}


def sgd(module: SmallModule) -> Any:
    return SGD(module.parameters(), lr=0.01)


def fit(trainer: MakeTrainer, module: SmallModule, *callbacks: Any, **arguments: Any) -> Trainer:
    one = trainer(*callbacks, **{"max_epochs": 1, **arguments})
    one.fit(module, small_loader())
    return one


def distillation_loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum() / target.square().sum()


@pytest.mark.parametrize("batches", [1, 2])
def test_the_gradient_is_that_of_the_sum_of_both_losses(trainer: MakeTrainer, batches: int) -> None:
    network = small_net()
    module, gradients = SmallModule(copy.deepcopy(network), sgd), Gradients()
    callback = lq.QuantizationAwareTraining("w4a8", distillation=WEIGHT)
    fit(trainer, module, callback, gradients, accumulate_grad_batches=batches)

    student, teacher = module.quantized, network.eval()
    student.restore(gradients.state)
    student.zero_grad()
    images, labels = small_data().tensors
    for index in range(batches):
        part = slice(8 * index, 8 * index + 8)
        answer = student(images[part])
        with torch.no_grad():
            target = teacher(images[part])
        loss = F.cross_entropy(answer, labels[part]) + WEIGHT * distillation_loss(answer, target)
        (loss / batches).backward()
    expected = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert gradients.found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients.found[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_the_users_loss_is_unchanged(trainer: MakeTrainer) -> None:
    losses = []
    for weight in (0.0, WEIGHT):
        module = SmallModule(small_net(), sgd)
        one = fit(trainer, module, lq.QuantizationAwareTraining("w4a8", distillation=weight), limit_train_batches=1)
        losses.append(float(one.callback_metrics["train_loss"]))
    assert losses[0] == losses[1]  # the first batch: the forward pass is the same


def test_the_student_approaches_its_teacher(trainer: MakeTrainer) -> None:
    images, _ = small_data().tensors
    network = small_net().eval()
    with torch.no_grad():
        target = network(images)
    distances = []
    for weight in (0.0, 20.0):
        module = SmallModule(copy.deepcopy(network), sgd)
        fit(trainer, module, lq.QuantizationAwareTraining("w4a8", distillation=weight), max_epochs=3)
        with torch.no_grad():
            distances.append(float(distillation_loss(module.eval().model(images), target)))
    assert distances[1] < distances[0] / 2


def test_the_teacher_is_unchanged_and_not_in_the_state_dict(trainer: MakeTrainer) -> None:
    network = small_net()
    before = copy.deepcopy(network.state_dict())
    module = SmallModule(network, sgd)
    callback = lq.QuantizationAwareTraining("w4a8", distillation=WEIGHT)
    fit(trainer, module, callback)
    teacher = module.quantized.float_network
    assert teacher is not None
    assert_same_tensors(teacher.state_dict(), before)
    assert not module.quantized._forward_hooks
    assert {name.partition(".")[0] for name in module.state_dict()} == {"model"}


def test_several_outputs_share_the_weight() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"a": 2 * x, "b": x.flatten(1)}

    class Student(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"a": 1.5 * x, "b": 0.5 * x.flatten(1)}

    x = torch.randn(3, 4, requires_grad=True)
    distillation = Distillation(Two(), DistillationLoss.parse(WEIGHT), lambda: 3.0)
    student = Student()
    distillation.attach(student)
    distilled = student(x)
    assert distilled.keys() == {"a", "b"}
    (distilled["a"].sum() + distilled["b"].sum()).backward()
    reference = x.detach().clone().requires_grad_()
    a, b = 1.5 * reference, 0.5 * reference
    targets = 2 * x.detach(), x.detach()
    both = (distillation_loss(a, targets[0]) + distillation_loss(b, targets[1])) / 2
    (a.sum() + b.sum() + 3.0 * WEIGHT * both).backward()
    torch.testing.assert_close(x.grad, reference.grad)


@pytest.mark.parametrize("given", [WEIGHT, {"features": {"stem": 0.7}}])
def test_a_step_that_does_not_call_the_network_is_refused(trainer: MakeTrainer, given: Any) -> None:
    class Around(SmallModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.model.head(self.model.stem(batch[0]).mean((2, 3))).sum()

    with pytest.raises(ConfigurationError, match=r"distillation=.*0.7.*: training_step did not call self.model itself"):
        fit(trainer, Around(small_net(), sgd), lq.QuantizationAwareTraining("w4a8", distillation=given))


def test_a_step_may_skip_its_first_batch(trainer: MakeTrainer) -> None:
    class Skips(SmallModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            return None if batch_idx == 0 else super().training_step(batch, batch_idx)

    one = fit(trainer, Skips(small_net(), sgd), lq.QuantizationAwareTraining("w4a8", distillation=WEIGHT))
    assert one.current_epoch == 1


def test_a_resumed_fit_has_the_same_teacher(trainer: MakeTrainer, tmp_path: Path) -> None:
    whole = SmallModule(small_net(), sgd)
    fit(trainer, whole, lq.QuantizationAwareTraining("w4a8", distillation=WEIGHT), max_epochs=2)

    first = fit(trainer, SmallModule(small_net(), sgd), lq.QuantizationAwareTraining("w4a8", distillation=WEIGHT))
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = SmallModule(small_net(9), sgd)  # other float weights: teacher and student come from the checkpoint
    one = trainer(lq.QuantizationAwareTraining("w4a8", distillation=WEIGHT), max_epochs=2)
    one.fit(resumed, small_loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert_same_tensors(resumed.state_dict(), whole.state_dict())


@pytest.mark.parametrize("precision", ["bf16-mixed"])
def test_mixed_precision(trainer: MakeTrainer, precision: str) -> None:
    module = SmallModule(small_net(), sgd)
    fit(trainer, module, lq.QuantizationAwareTraining("w4a8", distillation=WEIGHT), precision=precision)
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())


@pytest.mark.parametrize("shape", [(5, 7), (3, 6, 4, 5), (2, 9, 6)])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_divergence_is_that_of_the_classes(shape: tuple[int, ...], temperature: float) -> None:
    axis = 2 if len(shape) == 3 else 1
    generator = torch.Generator().manual_seed(0)
    y, t = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    y.requires_grad_()
    log_y, log_t = ((one / temperature).log_softmax(axis) for one in (y, t))
    # PyTorch's own, over positions
    loss = temperature**2 * F.kl_div(log_y, log_t, reduction="none", log_target=True).sum(axis).mean()
    (expected,) = torch.autograd.grad(loss, y)
    torch.testing.assert_close(kl_gradient(y.detach(), t, temperature, None), expected)
    moved = kl_gradient(y.detach().movedim(axis, 0), t.movedim(axis, 0), temperature, 0)
    torch.testing.assert_close(moved.movedim(0, axis), expected)


@pytest.mark.parametrize("batches", [1, 2])
def test_features_and_divergence_add_up(trainer: MakeTrainer, batches: int) -> None:
    """Of a module in the network that is called once, and of the scores."""
    network = small_net()
    module, gradients = SmallModule(copy.deepcopy(network), sgd), Gradients()
    given = {"mse": 0.3, "kl": 0.5, "temperature": 2.0, "features": {"bran*": 0.7}}
    callback = lq.QuantizationAwareTraining("w4a8", distillation=given)
    fit(trainer, module, callback, gradients, accumulate_grad_batches=batches)

    student, teacher = module.quantized, network.eval()
    student.restore(gradients.state)
    student.zero_grad()
    seen: list[Tensor] = []
    for one in (student.network, teacher):
        one.branch.register_forward_hook(lambda module, args, output: seen.append(output))  # type: ignore[union-attr]
    images, labels = small_data().tensors
    for index in range(batches):
        part = slice(8 * index, 8 * index + 8)
        seen.clear()
        answer = student(images[part])
        with torch.no_grad():
            target = teacher(images[part])
        log_y, log_t = ((score / 2).log_softmax(1) for score in (answer, target))
        loss = F.cross_entropy(answer, labels[part]) + 0.3 * distillation_loss(answer, target)
        loss = loss + 0.5 * 4 * F.kl_div(log_y, log_t, reduction="batchmean", log_target=True)
        (loss + 0.7 * distillation_loss(*seen)).div(batches).backward()
    expected = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert gradients.found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients.found[name], gradient, rtol=1e-4, atol=1e-7, msg=name)
    assert not module.model.branch._forward_hooks.keys() - {max(module.model.branch._forward_hooks)}


def test_a_part_that_is_called_alone_is_not_compared(trainer: MakeTrainer) -> None:
    class Twice(SmallModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + self.model.branch(torch.ones(1, 6, 8, 8)).mean()

    module = Twice(small_net(), sgd)
    fit(trainer, module, lq.QuantizationAwareTraining("w4a8", distillation={"features": {"branch": 1.0}}))
    assert all(bool(one.isfinite().all()) for one in module.parameters())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kl": -1.0}, r"kl=-1.0: expected a weight of at least 0"),
        ({"cosine": 1.0}, r"'cosine': expected mse, kl, temperature, classes, axis, features"),
        ({"kl": 1.0, "temperature": 0}, r"temperature=0: expected a number above 0"),
        ({"temperature": 2.0}, "expected a weight above 0 for mse, kl or features"),
        ({"features": {"branch": float("nan")}}, r"branch=nan: expected a weight"),
        ({"features": "branch"}, r"features='branch': expected a weight"),
        ({"kl": 1.0, "classes": [0]}, r"classes=\[0\]: expected names of tensors"),
        ({"kl": 1.0, "axis": "last"}, "axis='last': expected the axis"),
        (float("inf"), r"distillation=inf: expected a weight of at least 0"),
    ],
)
def test_what_cannot_be_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        lq.QuantizationAwareTraining("w4a8", distillation=given)


def test_features_that_are_not_there_are_refused(trainer: MakeTrainer) -> None:
    callback = lq.QuantizationAwareTraining("w4a8", distillation={"features": {"layer4": 1.0}})
    module = SmallModule(small_net(), sgd)
    with pytest.raises(ConfigurationError, match=r"features='layer4' names no module .* branch, head"):
        fit(trainer, module, callback)
    assert QuantizedNetwork.of(module.model) is None, "before anything was quantized"
    with pytest.raises(ConfigurationError, match="features with compile"):
        lq.QuantizationAwareTraining("w4a8", compile=True, distillation={"features": {"branch": 1.0}})
