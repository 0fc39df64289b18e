"""What distillation compares in networks that return several tensors, change some in place, or skip parts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lightning_quant as lq
from lightning_quant.callbacks.distillation import Distillation
from lightning_quant.callbacks.distillation_loss import DistillationLoss
from lightning_quant.errors import ConfigurationError
from lightning_quant.simulation.network import QuantizedNetwork
from tests.helpers.small import SmallModule, small_loader

MakeTrainer = Callable[..., Trainer]


class Detector(nn.Module):
    """Scores of five classes and boxes, at each position; both have four axes and several channels."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True))
        self.scores = nn.Conv2d(6, 5, 1)
        self.boxes = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.body(x)
        return {"scores": self.scores(y), "boxes": self.boxes(y)}


def pair(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A network and its float network, whose weights differ a little."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        teacher = make().eval()
        student = copy.deepcopy(teacher)
        for parameter in student.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return student, teacher


def image() -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def gradients(network: nn.Module) -> list[Tensor | None]:
    found = [one.grad for one in network.parameters()]
    network.zero_grad()
    return found


def distilled(student: nn.Module, teacher: nn.Module, given: Any, loss: Callable[[nn.Module], Tensor]) -> Any:
    distillation = Distillation(teacher, DistillationLoss.parse(given), lambda: 1.0)
    distillation.attach(student)
    loss(student).backward()
    distillation.detach()
    return gradients(student)


def assert_equal(found: Any, expected: Any) -> None:
    assert len(found) == len(expected)
    assert any(one is not None and bool(one.any()) for one in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def divergence(y: Tensor, t: Tensor) -> Tensor:
    log_y, log_t = y.log_softmax(1), t.log_softmax(1)
    return F.kl_div(log_y, log_t, reduction="none", log_target=True).sum(1).mean()


def relative(y: Tensor, t: Tensor) -> Tensor:
    return (y - t).square().sum() / t.square().sum()


def test_classes_are_those_that_are_named_and_the_rest_is_compared_as_numbers() -> None:
    student, teacher = pair(Detector)
    given = {"kl": 1.0, "classes": "sc*", "mse": 0.5}
    found = distilled(student, teacher, given, lambda net: 0 * sum(one.sum() for one in net(image()).values()))
    y, t = student(image()), {name: one.detach() for name, one in teacher(image()).items()}
    (divergence(y["scores"], t["scores"]) + 0.25 * relative(y["scores"], t["scores"])).backward(retain_graph=True)
    (0.25 * relative(y["boxes"], t["boxes"])).backward()
    assert_equal(found, gradients(student))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kl": 1.0}, r"kl of a network that returns scores, boxes: .* such as classes='scores'"),
        ({"kl": 1.0, "classes": ["scores", "logits"]}, r"classes='logits' names no tensor .* on scores, boxes"),
        ({"kl": 1.0, "classes": "scores", "axis": 4}, r"kl of 'scores', whose shape is \(1, 5, 8, 8\): .* on axis 4"),
    ],
)
def test_unknown_classes_are_refused_before_calibration(trainer: MakeTrainer, given: Any, message: str) -> None:
    class Module(SmallModule):
        def _loss(self, batch: Any) -> Tensor:
            return sum((one.mean() for one in self.model(batch[0]).values()), torch.zeros(()))

    module = Module(Detector())
    with pytest.raises(ConfigurationError, match=message):
        trainer(lq.QuantizationAwareTraining("w8a8", distillation=given)).fit(module, small_loader())
    known = QuantizedNetwork.of(module.model)
    assert known is None or not known.calibrated


def test_a_single_class_is_refused(trainer: MakeTrainer) -> None:
    module = SmallModule(nn.Sequential(nn.Conv2d(3, 1, 1)))
    with pytest.raises(ConfigurationError, match=r"kl of 'output', .*\(1, 1, 8, 8\): expected at least two classes"):
        trainer(lq.QuantizationAwareTraining("w8a8", distillation={"kl": 1.0})).fit(module, small_loader())


class InPlace(nn.Module):
    """Normalizes what it is given in place, and activates in place what the convolution returned."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x -= 0.5
        x /= 0.25
        return self.head(F.relu_(self.conv(x)))  # type: ignore[no-any-return]


def test_tensors_that_are_changed_in_place() -> None:
    """The target is what the float network computed, not what became of it; the user's step may change the output."""
    student, teacher = pair(InPlace)

    def step(net: nn.Module) -> Tensor:
        scores = net(image())
        scores *= 0
        return scores.sum()  # type: ignore[no-any-return]

    found = distilled(student, teacher, {"mse": 1.0, "features": {"conv": 0.5}}, step)
    x = (image() - 0.5) / 0.25
    features = [net.conv(x) for net in (student, teacher)]  # type: ignore[operator]
    outputs = [net.head(F.relu(one)) for net, one in zip((student, teacher), features, strict=True)]  # type: ignore[operator]
    loss = relative(outputs[0], outputs[1].detach()) + 0.5 * relative(features[0], features[1].detach())
    loss.backward()
    assert_equal(found, gradients(student))


class Body(nn.Module):
    def __init__(self, how: str = "plain") -> None:
        super().__init__()
        self.how = how
        self.first = nn.Conv2d(3, 4, 3)
        self.last = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Any:
        if self.how == "no_grad":
            with torch.no_grad():
                y = self.first(x)
        elif self.how == "skipped":
            y = x[:, :1, 2:, 2:].expand(-1, 4, -1, -1) if self.training else self.first(x)
        elif self.how.startswith("checkpoint"):
            y = checkpoint(self.first, x, use_reentrant=self.how == "checkpoint_reentrant")
        else:
            y = self.first(x)
        scores = self.last(y)
        return (scores, y) if self.how == "auxiliary" and self.training else scores


def loss_of(net: nn.Module) -> Tensor:
    given = net.train()(image().requires_grad_())
    return (given[0] if isinstance(given, tuple) else given).square().sum()  # type: ignore[no-any-return]


def test_a_feature_in_a_checkpointed_part() -> None:
    (plain, teacher), (saving, _) = pair(Body), pair(lambda: Body("checkpoint"))
    given = {"features": {"first": 2.0}}
    assert_equal(distilled(saving, teacher, given, loss_of), distilled(plain, teacher, given, loss_of))


def test_a_feature_that_this_pass_skipped_is_not_compared() -> None:
    student, teacher = pair(lambda: Body("skipped"))
    found = distilled(student, teacher, {"features": {"first": 2.0}}, loss_of)
    loss_of(student).backward()
    assert_equal(found, gradients(student))


@pytest.mark.parametrize("how", ["no_grad", "checkpoint_reentrant"])
def test_a_feature_without_gradients_is_refused(how: str) -> None:
    student, teacher = pair(lambda: Body(how))
    with pytest.raises(ConfigurationError, match="features has 'first', which is run without gradients"):
        distilled(student, teacher, {"features": {"first": 1.0}}, loss_of)


def test_another_output_while_training_is_refused() -> None:
    student, teacher = pair(lambda: Body("auxiliary"))
    message = r"the network returns \[\(2, 3, 4, 4\), \(2, 4, 4, 4\)\] while it trains, .* mode, \[\(2, 3, 4, 4\)\]"
    with pytest.raises(ConfigurationError, match=message):
        distilled(student, teacher, {"mse": 1.0}, loss_of)


def test_a_part_that_is_called_after_an_error_is_called_alone() -> None:
    student, teacher = pair(Body)
    distillation = Distillation(teacher, DistillationLoss.parse({"features": {"*": 1.0}}), lambda: 1.0)
    distillation.attach(student)
    student.last.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        student(image())
    student.first(image()).sum().backward()  # type: ignore[operator]
    found = gradients(student)
    distillation.detach()
    student.first(image()).sum().backward()  # type: ignore[operator]
    assert_equal(found, gradients(student))
