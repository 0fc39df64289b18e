"""Compiled networks compute what they compute otherwise, and say where they cannot be compiled."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from lightning_quant.simulation.compiled import MOST_GRAPHS, Compiled, Why
from lightning_quant.simulation.fast import in_graphs
from lightning_quant.simulation.network import QuantizedNetwork
from tests.helpers.networks import Body, calibrated, call

pytestmark = pytest.mark.slow

QUICK = {"backend": "aot_eager"}  # the graph as it is, without the minutes that code for this processor takes


class Attention(nn.Module):
    """Self-attention, LayerNorm, GELU and a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Any:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return {"scores": self.head(nn.functional.gelu(self.norm(x)))}


class LinearAttention(nn.Module):
    """Products whose second operands are not below 0: with 16 bits they are converted."""

    def __init__(self) -> None:
        super().__init__()
        self.all = nn.Linear(12, 36)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.all(x).relu().chunk(3, -1)
        return q @ (k.transpose(1, 2) @ v)


class Normed(nn.Module):
    """A batch norm that cannot be folded, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 4, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(torch.relu(self.conv(torch.relu(self.norm(x)))))


class Residual(nn.Module):
    """Batch norms that are folded, residual connections with and without a convolution in them, a pooling."""

    def __init__(self) -> None:
        super().__init__()
        shortcut = nn.Sequential(nn.Conv2d(4, 8, 1, 2, bias=False), nn.BatchNorm2d(8))
        self.stem = nn.Conv2d(3, 4, 3)
        self.blocks = nn.Sequential(BasicBlock(4, 4), BasicBlock(4, 8, 2, shortcut))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def images(count: int = 2, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "body": (Body, images),
    "residual": (Residual, images),
    "attention": (Attention, lambda count: torch.randn(count, 5, 12, generator=torch.Generator().manual_seed(count))),
    "normed": (Normed, images),
}
TOKENS = NETWORKS["attention"][1]


def made(name: str, precision: str = "w8a8") -> tuple[QuantizedNetwork, Callable[[int], Tensor]]:
    torch.manual_seed(0)
    make, batch = (LinearAttention, TOKENS) if name == "linear attention" else NETWORKS[name]
    return calibrated(make().eval(), call(batch(2)), precision=precision), batch


def result(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else next(iter(output.values()))


def step(network: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients."""
    network.zero_grad()
    torch.manual_seed(1)
    loss = result(network(batch)).float().square().mean()
    loss.backward()
    return loss.detach(), {key: p.grad.clone() for key, p in network.named_parameters() if p.grad is not None}


def assert_alike(ours: Any, theirs: Any) -> None:
    """The same loss and gradients; those of ranges are sums that are added up in another order."""
    assert torch.equal(ours[0], theirs[0])
    assert ours[1].keys() == theirs[1].keys()
    for key, gradient in theirs[1].items():
        near = 2e-2 if key.endswith((".min", ".max")) else 1e-5
        assert (ours[1][key] - gradient).abs().max() <= near * gradient.abs().max() + 1e-5, key


@pytest.mark.parametrize(
    ("name", "learned"), [*((name, True) for name in NETWORKS), ("body", False), ("normed", False)]
)
def test_a_step_is_the_same(name: str, learned: bool) -> None:
    known, batch = made(name)
    known.learn_ranges(learned)
    network = known.network.train()
    twin = copy.deepcopy(network)
    compiled = Compiled(network, QUICK)
    with compiled.active():
        for count in (2, 3):  # the last batch of an epoch is smaller
            assert_alike(step(network, batch(count)), step(twin, batch(count)))
        network.eval(), twin.eval()
        with torch.no_grad():
            assert torch.equal(result(network(batch(2))), result(twin(batch(2))))
        with torch.inference_mode():
            assert torch.equal(result(network(batch(2))), result(twin(batch(2))))
    assert compiled.why_not is None
    for key, buffer in network.named_buffers():
        assert torch.equal(buffer, twin.get_buffer(key)), key
    assert network.state_dict().keys() == twin.state_dict().keys()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("name", "learned"), [("body", True), ("body", False), ("normed", True)])
def test_a_step_that_saves_bytes_is_the_same(
    name: str, learned: bool, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where a byte per value is saved: only the gradients of ranges are rounded."""
    monkeypatch.setattr(in_graphs, "_saves_bytes", lambda x: True)
    known, _ = made(name)
    known.learn_ranges(learned)
    network = known.network.train().to(memory_format=layout)
    twin = copy.deepcopy(network)
    batch = images(2, 12).to(memory_format=layout)
    compiled = Compiled(network, QUICK)
    with compiled.active():
        assert_alike(step(network, batch), step(twin, batch))
    assert compiled.why_not is None


@pytest.mark.parametrize(("name", "precision"), [("body", "w8a16"), ("body", "w4a16"), ("linear attention", "w8a16")])
def test_other_precisions(name: str, precision: str) -> None:
    known, batch = made(name, precision)
    known.learn_ranges(True)
    network = known.network.train()
    twin = copy.deepcopy(network)
    compiled = Compiled(network, QUICK)
    with compiled.active():
        assert_alike(step(network, batch(2)), step(twin, batch(2)))
    assert compiled.why_not is None


def test_autocast_is_the_users() -> None:
    known, batch = made("body")
    network = known.network.train()
    compiled = Compiled(network, QUICK)
    with compiled.active():
        types = []
        for enabled in (True, False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                types.append(network(batch(2)).dtype)
    assert types == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert compiled.why_not is None


def test_training_over_several_steps() -> None:
    """Weights and ranges are inputs of the graph: what an optimizer changes, a state that is loaded, is seen."""
    known, batch = made("body")
    network = known.network.train()
    twin = copy.deepcopy(network)
    compiled = Compiled(network, QUICK)
    optimizers = [torch.optim.SGD(one.parameters(), 0.05) for one in (network, twin)]
    with compiled.active():
        for _ in range(3):
            losses = [step(one, batch(2))[0].item() for one in (network, twin)]
            assert losses[0] == pytest.approx(losses[1], rel=1e-3)
            for optimizer in optimizers:
                optimizer.step()
        network.load_state_dict(twin.state_dict())
        with torch.no_grad():
            assert torch.equal(network(batch(2)), twin(batch(2)))
    assert compiled.why_not is None


def test_frozen_layers_and_ranges_stay_frozen() -> None:
    known, batch = made("body")
    network = known.network.train()
    compiled = Compiled(network, QUICK)
    with compiled.active():
        step(network, batch(2))
        network.conv.weight.requires_grad_(False)
        known.learn_ranges(False)
        _, gradients = step(network, batch(2))
    assert "conv.weight" not in gradients
    assert "head.weight" in gradients
    assert not any(key.endswith(".min") for key in gradients)


def test_hooks_on_the_network_itself_are_called() -> None:
    known, batch = made("body")
    seen: list[Tensor] = []
    known.network.register_forward_hook(lambda _, __, output: seen.append(output))
    compiled = Compiled(known.network, QUICK)
    with compiled.active():
        output = known.network(batch(2))
    assert compiled.why_not is None
    assert seen[0] is output


def test_a_copy_runs_its_own_weights() -> None:
    known, batch = made("body")
    with Compiled(known.network, QUICK).active():
        before = known.network(batch(2))
        twin = copy.deepcopy(known.network)
        with torch.no_grad():
            twin.head.bias -= 1
        assert not torch.equal(twin(batch(2)), before)
        assert torch.equal(known.network(batch(2)), before)


class Sets(Body):
    def forward(self, x: Tensor) -> Tensor:
        self.middle = self.scores(x)
        return self.middle * 2


class Counts(Body):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.scores(x)


class Collects(Body):
    def __init__(self) -> None:
        super().__init__()
        self.losses: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.losses.append(x.mean())
        return self.scores(x)


class Draws(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x) * (2 if random.random() < 0.5 else 1)


class Depends(Body):
    def forward(self, x: Tensor) -> Tensor:
        x = self.scores(x)
        return x * 2 if x.mean() > 0 else x


class Holds(Body):
    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.tensor(2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x) * self.factor


class HoldsInList(Body):
    def __init__(self) -> None:
        super().__init__()
        self.factors = [torch.tensor(2.0)]

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x) * self.factors[0]


class HoldsInObject(Body):
    def __init__(self) -> None:
        super().__init__()
        self.settings = SimpleNamespace(factor=torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x) * self.settings.factor


class Hides(Body):
    """A layer that is in no module; one that learns cannot be quantized at all."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [nn.Conv2d(4, 4, 1).requires_grad_(False)]

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden[0](self.scores(x))


FACTOR = torch.tensor(2.0)


class ReadsGlobal(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x) * FACTOR


class Makes(Body):
    """A tensor made in ``forward`` is a constant in a graph, as it is outside."""

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x) * torch.tensor(2.0) + torch.arange(8.0)


def test_a_tensor_made_in_forward_is_compiled() -> None:
    torch.manual_seed(0)
    network = calibrated(Makes().eval(), call(images(size=8))).network
    twin = copy.deepcopy(network)
    compiled = Compiled(network, QUICK)
    with compiled.active():
        assert_alike(step(network, images(size=8)), step(twin, images(size=8)))
    assert compiled.why_not is None


@pytest.mark.parametrize(
    ("network", "why", "named"),
    [
        (Sets, Why.ATTRIBUTE, "middle"),
        (Counts, Why.ATTRIBUTE, "calls"),
        (Collects, Why.ATTRIBUTE, "losses"),
        (Draws, Why.RANDOM, "Python"),
        (Depends, Why.COMPILER, ""),
        (Holds, Why.TENSOR, "factor"),
        (HoldsInList, Why.FOREIGN_TENSOR, "shape ()"),
        (HoldsInObject, Why.FOREIGN_TENSOR, "shape ()"),
        (Hides, Why.FOREIGN_TENSOR, "shape (4, 4, 1, 1)"),
        (ReadsGlobal, Why.FOREIGN_TENSOR, "shape ()"),
    ],
)
def test_side_effects_are_not_compiled(
    network: type[Body], why: Why, named: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The network runs uncompiled, with one warning, and with the side effects that it has otherwise."""
    torch.manual_seed(0)
    known = calibrated(network().eval(), call(images(size=8)))
    twin = copy.deepcopy(known.network)
    compiled = Compiled(known.network, QUICK)
    with compiled.active():
        for _ in range(2):
            random.seed(0)
            ours = step(known.network, images(size=8))
            random.seed(0)
            assert_alike(ours, step(twin, images(size=8)))
    assert compiled.why_not is not None
    assert compiled.why_not.why is why
    assert named in str(compiled.why_not)
    assert [record for record in caplog.records if "is not compiled" in record.message][1:] == []
    if network is Counts:
        assert known.network.calls == twin.calls
    if network is Collects:
        assert len(known.network.losses) == len(twin.losses)
        assert type(known.network.losses[-1]) is Tensor


def test_hooks_that_are_quantized_stay_quantized() -> None:
    torch.manual_seed(0)
    network = Body().eval()
    network.register_forward_hook(lambda _, __, output: output * 2 + 0.3 * output.abs())
    known = calibrated(network, call(images(size=8)))
    twin = copy.deepcopy(known.network)
    compiled = Compiled(known.network, QUICK)
    with compiled.active(), torch.no_grad():
        assert torch.equal(known.network(images(size=8)), twin(images(size=8)))
    assert compiled.why_not is not None
    assert compiled.why_not.why is Why.QUANTIZED_HOOK


def test_hooks_inside_are_called() -> None:
    known, batch = made("body")
    compiled = Compiled(known.network, QUICK)
    seen: list[Tensor] = []
    with compiled.active():
        known.network(batch(2))
        known.network.branch.register_forward_hook(lambda _, __, output: seen.append(output))
        known.network(batch(2))
    assert compiled.why_not is not None
    assert compiled.why_not.why is Why.HOOK
    assert len(seen) == 1


class Scheduled(Body):
    def __init__(self) -> None:
        super().__init__()
        self.strength = 1.0
        self.shares = {"scores": [1.0]}

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x) * self.strength * self.shares["scores"][0]


def test_numbers_that_others_set_are_read() -> None:
    """A schedule in an attribute, as a callback sets it."""
    torch.manual_seed(0)
    known = calibrated(Scheduled().eval(), call(images(size=8)))
    compiled = Compiled(known.network, QUICK)
    with compiled.active(), torch.no_grad():
        once = known.network(images(size=8))
        known.network.strength = 0.0
        assert known.network(images(size=8)).abs().max() < once.abs().max() / 10
        known.network.strength = 1.0
        known.network.shares["scores"][0] = 0.0
        assert known.network(images(size=8)).abs().max() < once.abs().max() / 10
    assert compiled.why_not is None


@dataclasses.dataclass
class Answer:
    scores: Tensor
    others: dict[str, Any]


class Answers(Body):
    """Answers with what the compiler does not know."""

    def forward(self, x: Tensor, both: bool = False) -> Any:
        y = self.scores(x)
        return Answer(y, {"none": None, "name": "scores", "best": [y.argmax(1)] if both else []})


class Box:
    def __init__(self, scores: Tensor) -> None:
        self.scores = scores


class Boxed(Body):
    def forward(self, x: Tensor) -> Any:
        y = self.scores(x)
        return y, Box(y)


def test_outputs_of_any_structure() -> None:
    torch.manual_seed(0)
    known = calibrated(Answers().eval(), call(images(size=8)))
    twin = copy.deepcopy(known.network)
    compiled = Compiled(known.network, QUICK)
    for both in (False, True, False):
        with compiled.active():
            ours = known.network(images(size=8), both)
        theirs = twin(images(size=8), both)
        assert type(ours) is Answer
        assert torch.equal(ours.scores, theirs.scores)
        assert ours.others.keys() == theirs.others.keys()
        assert ours.others["none"] is None
        assert ours.others["name"] == "scores"
        assert all(torch.equal(*pair) for pair in zip(ours.others["best"], theirs.others["best"], strict=True))
    assert compiled.why_not is None


class Settings:
    def __init__(self) -> None:
        self.strength = 1.0


class Configured(Body):
    """Reads an object, and drops values with a probability that others may set."""

    def __init__(self) -> None:
        super().__init__()
        self.settings = Settings()
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.scores(x)) * self.settings.strength


def test_an_output_of_unknown_content_is_not_compiled() -> None:
    torch.manual_seed(0)
    known = calibrated(Boxed().eval(), call(images(size=8)))
    compiled = Compiled(known.network, QUICK)
    with compiled.active(), torch.no_grad():
        ours = known.network(images(size=8))
    assert type(ours[1].scores) is Tensor
    assert compiled.why_not is not None
    assert compiled.why_not.why is Why.OUTPUT
    assert torch.equal(ours[0], ours[1].scores)


def test_what_others_set_elsewhere_is_read() -> None:
    """In an object that the network holds, in a layer of PyTorch's, in a quantizer."""
    torch.manual_seed(0)
    known = calibrated(Configured().eval(), call(images(size=8)))
    network: Any = known.network.train()
    compiled = Compiled(network, QUICK)
    with compiled.active(), torch.no_grad():
        once = network(images(size=8))
        network.settings.strength = 0.0
        network.settings.strength = 0.0
        assert network(images(size=8)).abs().max() == 0
        network.settings.strength = 1.0
        network.dropout.p = 1.0
        assert network(images(size=8)).abs().max() == 0
        network.dropout.p = 0.0
        assert torch.equal(network(images(size=8)), once)
        for module in network.modules():
            if hasattr(module, "bitwidth"):
                module.bitwidth = 4
        coarse = network(images(size=8))
    assert compiled.why_not is None
    assert not torch.equal(coarse, once)
    with torch.no_grad():
        assert torch.equal(coarse, network(images(size=8)))


class Late(Body):
    """Keeps something, decides by numbers, or neither, by the size of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.scores(x)
        if len(x) == 3:
            self.kept = scores
        return scores * 2 if len(x) == 4 and bool(scores.sum() > -1e9) else scores


@pytest.mark.parametrize(("count", "why"), [(3, Why.ATTRIBUTE), (4, Why.COMPILER)])
def test_a_later_call_without_a_graph_runs_uncompiled(count: int, why: Why) -> None:
    torch.manual_seed(0)
    known = calibrated(Late().eval(), call(images(2, 8)))
    twin = copy.deepcopy(known.network)
    compiled = Compiled(known.network, QUICK)
    with compiled.active():
        for size in (2, count, 2):
            assert_alike(step(known.network, images(size, 8)), step(twin, images(size, 8)))
    assert compiled.why_not is not None
    assert compiled.why_not.why is why
    assert type(getattr(known.network, "kept", torch.empty(0))) is Tensor


def test_batches_of_many_sizes_are_not_an_error() -> None:
    torch.manual_seed(0)
    known = calibrated(Scheduled().eval(), call(images(size=8)))
    twin = copy.deepcopy(known.network)
    compiled = Compiled(known.network, {"backend": "eager"})
    with compiled.active(), torch.no_grad():
        for count in range(1, MOST_GRAPHS + 3):
            assert torch.equal(known.network(images(count, 8)), twin(images(count, 8)))
    assert compiled.why_not is not None
    assert compiled.why_not.why is Why.GRAPHS


def test_the_number_of_graphs_is_limited() -> None:
    torch.manual_seed(0)
    known = calibrated(Scheduled().eval(), call(images(size=8)))
    compiled = Compiled(known.network, {"backend": "eager"})
    with compiled.active(), torch.no_grad():
        for strength in range(MOST_GRAPHS + 2):
            known.network.strength = float(strength)
            known.network(images(size=8))
    assert compiled.why_not is not None
    assert compiled.why_not.why is Why.GRAPHS
