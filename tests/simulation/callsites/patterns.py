"""Networks as people write them, each with one thing that depends on more than one traced call."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from lightning_quant.simulation.inputs import NetworkInputs


class Pattern(NamedTuple):
    """A network and how it is called.

    Args:
        network: makes it.
        calls: what it is called with, with 3 samples.
        split: whether an operation is decomposed, which reorders sums.
    """

    network: Callable[[], nn.Module]
    calls: Callable[[], list[NetworkInputs]]
    split: bool = False


def image(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*(shape or (3, 3, 8, 8)), generator=torch.Generator().manual_seed(seed))


def one_image() -> list[NetworkInputs]:
    return [NetworkInputs((image(),))]


def sequence() -> list[NetworkInputs]:
    return [NetworkInputs((image(3, 6, 8),))]


def short_sequence() -> list[NetworkInputs]:
    """Three steps, the first, one between and the last: each is operations of its own in a recurrent layer."""
    return [NetworkInputs((image(3, 3, 8),))]


class Of(nn.Module):
    """Two convolutions (or linear layers) and a function between them."""

    def __init__(self, function: Callable[..., Any], linear: bool = False, **parts: nn.Module) -> None:
        super().__init__()
        self.first: nn.Module = nn.Linear(8, 8) if linear else nn.Conv2d(3, 8, 3, padding=1)
        self.last: nn.Module = nn.Linear(8, 4) if linear else nn.Conv2d(8, 4, 1)
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.last(self.function(self, self.first(x), *args, **kwargs))


class TwoModes(nn.Module):
    """Raw maps in training, boxes and scores in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.heads = nn.ModuleList([nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 1)])

    def forward(self, x: Tensor) -> Any:
        a = F.silu(self.stem(x))
        maps = [head(a) for head in self.heads]
        if self.training:
            return maps
        boxes, scores = torch.cat([one.flatten(2) for one in maps], 2).split((4, 2), 1)
        return boxes.sigmoid() * 32, scores.sigmoid()


class OneActivation(nn.Module):
    """One module without weights that stands in every place."""

    def __init__(self) -> None:
        super().__init__()
        act = nn.SiLU()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), act, nn.Conv2d(8, 8, 3), act)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.body(x).mean((2, 3)))  # type: ignore[no-any-return]


class NormAndActivation(nn.BatchNorm2d):
    """A batch norm of a library's own, which calls the function itself."""

    def forward(self, input: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        normed = F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
        )
        return F.relu(normed)


def masked_by_size(m: nn.Module, x: Tensor) -> Tensor:
    """As shifted windows are masked: zeros of the input's size, written to by position."""
    mask = x.new_zeros(x.shape[1:])
    for number, part in enumerate((slice(0, -4), slice(-4, -2), slice(-2, None))):
        mask[:, part] = number
    return x + mask.masked_fill(mask != 0, -2.0)


class LossInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

    def forward(self, x: Tensor, targets: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.body(x)
        if targets is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, targets) + 1e-3 * logits.square().mean(), "logits": logits}


class WithoutGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.backbone(x)
        return self.head(x.mean((2, 3)) + x.detach().amax((2, 3)))


class Reversed(torch.autograd.Function):
    """Gradients are turned around."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return -0.5 * gradient


class Swish(torch.autograd.Function):
    """The memory-saving one of many EfficientNets."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return gradient * (s * (1 + x * (1 - s)))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool, as_function: bool) -> None:
        super().__init__()
        self.reentrant, self.as_function = reentrant, as_function
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.head = nn.Conv2d(8, 4, 1)

    def around(self, x: Tensor) -> Tensor:
        return torch.tanh(self.block(x)) * 0.5 + x

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.as_function:
            x = checkpoint(self.around, x, use_reentrant=self.reentrant)  # type: ignore[assignment]
            x = checkpoint(lambda y: F.relu(self.block(y)) + y, x, use_reentrant=self.reentrant)  # type: ignore[assignment]
        else:
            x = x + checkpoint(self.block, x, use_reentrant=self.reentrant)
        return self.head(x)


class AuxiliaryAttribute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        f = F.relu(self.conv(x)).mean((2, 3))
        g = torch.sigmoid(self.gate(f))
        self.aux = g.mean(1)
        return self.head(f * g)


class Schedule(nn.Module):
    """Reads a counter that it keeps, as warm-ups inside networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
        return self.conv(x) * min(1.0, 0.5 + 0.1 * int(self.steps))


class MovingMean(nn.Module):
    """Keeps a mean of what it saw in a float buffer, in training and in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        self.mean.mul_(0.9).add_(x.detach().mean((0, 2, 3)), alpha=0.1)
        return x - self.mean[:, None, None]


class Memory(nn.Module):
    """Keeps what it saw in rows of a buffer, which it writes as a whole, in parts and through views."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("rows", torch.zeros(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        seen = x.detach().mean((0, 2, 3))
        self.rows[0] = seen
        row = self.rows[1]
        row[:2] = row[2:]
        row[2:] = seen[2:]
        self.rows[2].mul_(0.9).add_(seen, alpha=0.1)
        return x - self.rows.sum(0)[:, None, None] * row.sum()


class KeptChanged(nn.Module):
    """Keeps what it changes in place in attributes; who reads them after the pass sees the change."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.written: Tensor | None = None
        self.others: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x[:, 0] = x[:, 1].sigmoid() * 9
        self.written = x
        y = x + 0.0
        self.others = [y, {"again": y}]
        y.mul_(3.0)
        return y


class ReadsKept(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = KeptChanged()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) * 2  # type: ignore[no-any-return]

    def read(self) -> list[Tensor]:
        assert self.part.written is not None
        return [self.part.written, self.part.others[0], self.part.others[1]["again"]]


class InPlaceSkip(nn.Module):
    """The first ReLU of the block changes what the shortcut passes on."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return x + self.body(x)


class ByShape(nn.Module):
    """Pads to an even size, where that is not so."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if y.shape[-1] % 2:
            y = F.pad(y, (0, 1)) * 2
        return F.avg_pool2d(y, 2)


class ByValue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x)) if float(x.detach().mean()) > -10 else torch.tanh(self.other(x))


class SharedParts(nn.Module):
    """One activation for all, one block twice, one weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.LeakyReLU(0.1))
        self.act = nn.ReLU()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.block(self.block(self.act(self.stem(x))))).mean((2, 3))
        return self.two(self.act(self.one(x)))


class Residual(nn.Sequential):
    """A list of layers with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x) + x)


class Standardized(nn.Conv2d):
    """Weight standardization: what is computed with is not the parameter."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        deviation = self.weight.std((1, 2, 3), keepdim=True) + 1e-5
        return F.conv2d(x, (self.weight - mean) / deviation, self.bias, self.stride, self.padding)


class Functional(nn.Module):
    """Weights as plain parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 3, 3, 3) / 5)
        self.matrix = nn.Parameter(torch.randn(8, 4))
        self.shift = nn.Parameter(torch.randn(4))
        self.scale = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(F.conv2d(x, self.kernel, padding=1)) * self.scale
        return x.mean((2, 3)) @ self.matrix + self.shift


class Attend(nn.Module):
    def __init__(self, causal: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.causal, self.dropout = causal, dropout
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, self.causal and mask is None)
        return self.out(y.transpose(1, 2).flatten(2))


class AttendByHand(nn.Module):
    """As in nanoGPT: a triangle of ones in a buffer, minus infinity filled in."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.drop = nn.Linear(8, 24), nn.Linear(8, 4), nn.Dropout(0.3)
        self.register_buffer("triangle", torch.tril(torch.ones(16, 16)))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        size = x.shape[1]
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(self.triangle[:size, :size] == 0, float("-inf"))
        return self.out(self.drop(F.softmax(scores, dim=-1)) @ v)


class WholeAttention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, weights = self.attention(x, x, x, key_padding_mask=padding)
        return self.norm(x + y), weights


class Recurrent(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.out = nn.LazyLinear(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x)[0])


class Stepwise(nn.Module):
    """A cell in a loop of the user's, with a state that is None at first."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRUCell(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        for step in x.unbind(1):
            state = self.cell(step, state)
        assert state is not None
        return self.out(state), state


class Normed(nn.Module):
    """Root mean square norms, by hand and by PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8) + 0.5)
        self.norm, self.out = nn.RMSNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight
        return self.out(self.norm(x))


class Mixed(nn.Module):
    """Arguments of every kind, some by name, some left out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, batch: dict[str, Any], *more: Tensor, scale: float = 1.0, skip: Tensor | None = None) -> Any:
        x = self.conv(batch["image"])
        for one in more:
            x = x + one
        if skip is not None:
            x = x * torch.sigmoid(skip)
        return OrderedDict(out=x * scale, sizes=batch["sizes"] + 1)


class Features(nn.Module):
    """A hook of the network's own changes what a block returns."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.one.register_forward_hook(_doubled)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


def _doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2 + 1


def padded() -> list[NetworkInputs]:
    mask = torch.zeros(3, 6, dtype=torch.bool)
    mask[1:, 4:] = True
    return [NetworkInputs((image(3, 6, 8), mask)), *sequence()]


def kept() -> list[NetworkInputs]:
    mask = torch.ones(3, 1, 1, 6, dtype=torch.bool)
    mask[1:, ..., 4:] = False
    return [NetworkInputs((image(3, 6, 8), mask)), NetworkInputs((image(3, 6, 8), image(6, 6, seed=1))), *sequence()]


def mixed() -> list[NetworkInputs]:
    batch = {"image": image(), "sizes": torch.arange(3)}
    return [
        NetworkInputs((batch, image(3, 4, 8, 8, seed=1)), {"skip": image(3, 4, 8, 8, seed=2)}),
        NetworkInputs((batch,), {"scale": 2.0}),
    ]


def between(function: Callable[..., Any], split: bool = False, linear: bool = False, **parts: Any) -> Pattern:
    return Pattern(
        lambda: Of(function, linear, **{name: make() for name, make in parts.items()}),
        sequence if linear else one_image,
        split,
    )


def padded_named() -> list[NetworkInputs]:
    mask = torch.zeros(3, 6, dtype=torch.bool)
    mask[1:, 4:] = True
    return [NetworkInputs((image(3, 6, 8),), {"src_key_padding_mask": mask}), *sequence()]


def before_relu(layer: Callable[[], nn.Module]) -> Pattern:
    return Pattern(lambda: nn.Sequential(layer(), nn.ReLU()), one_image)


def pruned() -> nn.Module:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    prune.l1_unstructured(network[0], "weight", 0.5)
    return network


def _added_in_place(module: Any, x: Tensor) -> Tensor:
    y = x
    y += 1
    y = y.mul_(2)
    return x - y.clone().relu_()


def _views_changed(module: Any, x: Tensor) -> Tensor:
    y = x * 1.5
    first, rows = y[:, :4], y.transpose(1, 2)[:, 1:]
    y[:, 2:6].mul_(2).add_(first[:, 0:1])
    rows[..., 1:3].add_(0.5)
    first[:, ::2] *= 0.5
    return y + first.mean()


def _written_without_a_gradient(module: Any, x: Tensor) -> Tensor:
    """What is before it is trained nevertheless."""
    y = x * 1.5
    with torch.no_grad():
        y[:, :1] = 0.5
        y[:, 2:4].mul_(2.0)
        y.clamp_(-1.0, 1.0)
        y[:, 6:7] = y[:, 4:5].sigmoid()
    read = y[:, 6:7] * 2
    y.detach()[:, 4:6].mul_(0.5)
    return y + read


def _complex_and_changed(module: Any, x: Tensor) -> Tensor:
    y = x.flatten(2).unflatten(2, (-1, 2)) * 1.5
    turned = torch.view_as_complex(y)
    y.mul_(2.0)
    return torch.view_as_real(turned).reshape(x.shape)


class ChangedAndCheckpointed(nn.Module):
    """A part that is run again in the backward pass, with what was changed in place before."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.conv, self.last, self.reentrant = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), reentrant

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x) * 1.5
        y[:, :2] = y[:, 2:4].sigmoid() * 9

        def part(given: Tensor) -> Tensor:
            return self.last(given) + given[:, 4:] * 2  # type: ignore[no-any-return]

        output: Tensor = torch.utils.checkpoint.checkpoint(part, y, use_reentrant=self.reentrant)
        return output


def _parts_read(module: Any, x: Tensor) -> Tensor:
    """Parts that come from one side of a write, from both, and such as are written to or see a write later."""
    y = x + 0.5
    y[:, :2] = y[:, 2:4] * 2
    y[:, 1:3] = y[:, 0:2] * 0.5 + y[:, 4:6]
    part, later = y[:, 5:6] * 3, y[:, 6:]
    changed = y.narrow(1, 3, 2)
    changed.mul_(2)
    y[:, 7] = y[:, 1] + y.select(1, 0)
    return y * part + later[:, :1] + changed[:, :1]


class _Scaled(nn.Module):
    def forward(self, x: Tensor) -> None:
        x.mul_(2.0)
        x[:, :1].sigmoid_()


class ChangesItsInput(nn.Module):
    """A part that returns nothing and changes what it is given: a view."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scaled, self.last = nn.Conv2d(3, 8, 3), _Scaled(), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        self.scaled(y[:, 2:5])
        output: Tensor = self.last(y)
        return output


def _filled(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, :4] = x[:, :4] * 2
    y[:, 4:].copy_(x[:, 4:])
    return y


PATTERNS: dict[str, Pattern] = {
    # what depends on the mode
    "functional dropout": between(lambda m, x: F.dropout(x, 0.5, training=m.training)),
    "dropout of channels": between(lambda m, x: F.dropout2d(F.relu(x), 0.5, training=m.training)),
    "dropout modules": between(lambda m, x: m.drop(m.drop(x)), drop=lambda: nn.Dropout(0.3)),
    "alpha dropout": between(lambda m, x: m.drop(F.selu(x)), True, drop=lambda: nn.AlphaDropout(0.3)),
    "stochastic depth": between(lambda m, x: x + m.drop(torch.tanh(x)), drop=lambda: StochasticDepth(0.5, "row")),
    "noise in training": between(lambda m, x: x + 0.1 * torch.randn_like(x) if m.training else x),
    "two modes": Pattern(TwoModes, one_image, split=True),
    "head for training alone": between(lambda m, x: x + m.aux(x) if m.training else x, aux=lambda: nn.Conv2d(8, 8, 1)),
    # layers that are given their tensors by name
    "convolution by name": between(
        lambda m, x: m.act(input=m.norm(input=m.conv(input=x))),
        conv=lambda: nn.Conv2d(8, 8, 3, padding=1), norm=lambda: nn.BatchNorm2d(8), act=nn.ReLU,
    ),
    "linear layer by name": between(
        lambda m, x: m.norm(input=m.layer(input=x)) + m.act(input=x), linear=True,
        layer=lambda: nn.Linear(8, 8), norm=lambda: nn.LayerNorm(8), act=nn.GELU,
    ),
    "sizes by name": between(
        lambda m, x: m.up(input=m.pool(input=x)) + m.soft(input=m.turned(input=m.pool(input=x), output_size=[8, 8])),
        pool=lambda: nn.MaxPool2d(2), up=lambda: nn.Upsample(scale_factor=2.0), soft=lambda: nn.Softmax(1),
        turned=lambda: nn.ConvTranspose2d(8, 8, 2, stride=2),
    ),
    "dropout and flattening by name": between(
        lambda m, x: m.flat(input=m.drop(input=m.same(input=x))).mul(2).view_as(x),
        drop=lambda: nn.Dropout(0.3), flat=nn.Flatten, same=nn.Identity,
    ),
    "size alone by name": between(
        lambda m, x: m.turned(m.pool(x), output_size=[8, 8]),
        pool=lambda: nn.MaxPool2d(2), turned=lambda: nn.ConvTranspose2d(8, 8, 2, stride=2),
    ),
    # what depends on the call
    "loss inside": Pattern(
        LossInside, lambda: [*one_image(), NetworkInputs((image(),), {"targets": torch.arange(3)})]
    ),
    "masks": Pattern(Attend, kept, split=True),
    "padding": Pattern(WholeAttention, padded, split=True),
    "padding, and keys that are learned": Pattern(
        partial(WholeAttention, add_bias_kv=True, add_zero_attn=True), padded, split=True
    ),
    "arguments of every kind": Pattern(Mixed, mixed),
    "sizes": Pattern(ByShape, lambda: [*one_image(), NetworkInputs((image(3, 3, 8, 7),))]),
    "values": Pattern(ByValue, one_image),
    "state that is None at first": Pattern(
        Stepwise, lambda: [NetworkInputs((image(3, 2, 8), image(3, 6))), NetworkInputs((image(3, 2, 8),))], split=True
    ),
    # what autograd sees
    "no gradient": Pattern(WithoutGradient, one_image),
    "gradient reversal": between(lambda m, x: Reversed.apply(x)),
    "custom backward": between(lambda m, x: Swish.apply(x)),
    "detach": between(lambda m, x: x + (torch.round(x) - x).detach()),
    "checkpointed block": Pattern(partial(Checkpointed, False, False), one_image),
    "checkpointed block, reentrant": Pattern(partial(Checkpointed, True, False), one_image),
    "checkpointed functions": Pattern(partial(Checkpointed, False, True), one_image),
    "checkpointed functions, reentrant": Pattern(partial(Checkpointed, True, True), one_image),
    # what a network keeps
    "auxiliary loss in an attribute": Pattern(AuxiliaryAttribute, one_image),
    "counter": Pattern(Schedule, one_image),
    "moving mean": Pattern(MovingMean, one_image),
    "rows of a buffer": Pattern(Memory, one_image),
    # operations in place
    "in place": between(_added_in_place),
    "in place on the shortcut": Pattern(InPlaceSkip, one_image),
    "functional in place": between(lambda m, x: F.relu(x, inplace=True) + x),
    "filled in": between(lambda m, x: _filled(x)),
    "views in place": between(_views_changed),
    "bytes read as other numbers": between(_complex_and_changed),
    "changed in place, then checkpointed": Pattern(partial(ChangedAndCheckpointed, False), one_image),
    "changed in place, then checkpointed, reentrant": Pattern(partial(ChangedAndCheckpointed, True), one_image),
    "views in place, without a gradient": between(_written_without_a_gradient),
    "parts of what is written into": between(_parts_read),
    "views in place, by another module": Pattern(ChangesItsInput, one_image),
    # structure
    "shared parts": Pattern(SharedParts, one_image),
    "list with a forward": Pattern(lambda: nn.Sequential(Residual(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))), one_image),
    "root list with a forward": Pattern(lambda: Residual(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)), one_image),
    "one layer": Pattern(lambda: nn.Conv2d(3, 4, 3), one_image),
    "hooks": Pattern(Features, one_image),
    # weights
    "weights as parameters": Pattern(Functional, one_image),
    "weight norm": before_relu(lambda: parametrizations.weight_norm(nn.Conv2d(3, 4, 3))),
    "weight norm of old": before_relu(lambda: nn.utils.weight_norm(nn.Conv2d(3, 4, 3))),
    "orthogonal": between(
        lambda m, x: m.inner(x), linear=True, inner=lambda: parametrizations.orthogonal(nn.Linear(8, 8))
    ),
    "pruned": Pattern(pruned, one_image),
    "standardized": Pattern(lambda: nn.Sequential(Standardized(3, 4, 3), nn.ReLU()), one_image),
    # functions
    "arithmetic": between(lambda m, x: 2 - (x / 3 + 1) * x.mean((2, 3), keepdim=True) - -x),
    "concatenation": between(lambda m, x: torch.cat([x, x.flip(2)], 1)[:, ::2]),
    "stack": between(lambda m, x: torch.stack((x, x * 2), 1).sum(1)),
    "interpolation": between(lambda m, x: F.interpolate(F.max_pool2d(x, 2), scale_factor=2.0, mode="bilinear")),
    "activations": between(lambda m, x: F.hardswish(x) + F.gelu(x) + F.elu(x, 0.5) + x.clamp(-1, 1) + F.softplus(x)),
    "decomposed activations": between(lambda m, x: F.silu(x) + F.mish(x) + F.glu(torch.cat([x, x], 1), 1), split=True),
    "norms": between(lambda m, x: m.group(x) + m.instance(x) + F.layer_norm(x, x.shape[-1:]), split=True,
                     group=lambda: nn.GroupNorm(2, 8), instance=lambda: nn.InstanceNorm2d(8, affine=True)),
    "root mean square norms": Pattern(Normed, sequence, split=True),
    "normalize": between(lambda m, x: F.normalize(x, dim=1), split=True),
    "powers": between(lambda m, x: x.pow(2) + 0.1 * x**3 - torch.square(x) * 0.5, split=True),
    "root": between(lambda m, x: torch.sqrt(x.abs() + 0.1) + (x * x + 0.1) ** 0.5, split=True),
    "inverse root": between(lambda m, x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6), split=True),
    "inverse": between(lambda m, x: torch.reciprocal(1 + x * x) + (2 + torch.tanh(x)) ** -1, split=True),
    "length": between(lambda m, x: x / (x.norm(dim=1, keepdim=True) + 1e-6), split=True),
    "length of all": between(lambda m, x: x / x.norm(keepdim=True), split=True),
    "length of linalg": between(lambda m, x: x / torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True), split=True),
    "quotient": between(lambda m, x: torch.tanh(x) / (x.abs() + 0.1)),
    "mask made of a size": between(masked_by_size),
    "batch norm of a library": between(lambda m, x: m.norm(torch.tanh(x)), norm=lambda: NormAndActivation(8)),
    "one activation for all": Pattern(OneActivation, one_image, split=True),
    "einsum": between(lambda m, x: x + torch.einsum("bchw,bdhw->bcd", x, x)[..., None], split=True),
    "attention": Pattern(partial(Attend, causal=True, dropout=0.4), sequence, split=True),
    "attention by hand": Pattern(AttendByHand, sequence, split=True),
    "multi-head attention": Pattern(partial(WholeAttention, dropout=0.2), sequence, split=True),
    "transformer": Pattern(
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True), 2),
        padded_named,
        True,
    ),
    "GRU": Pattern(
        lambda: Recurrent(nn.GRU(8, 5, 2, batch_first=True, dropout=0.3, bidirectional=True)), short_sequence, True
    ),
    "LSTM": Pattern(lambda: Recurrent(nn.LSTM(8, 5, 2, batch_first=True, proj_size=3)), short_sequence, True),
    "RNN": Pattern(lambda: Recurrent(nn.RNN(8, 5, nonlinearity="relu", bias=False)), short_sequence, True),
}  # fmt: skip
