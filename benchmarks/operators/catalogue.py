"""The operators, each as a network of its own, written as people write them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SAMPLES = 4

Draw = Callable[[torch.Generator], Tensor]


@dataclass(frozen=True)
class Operator:
    """A network that computes one thing.

    Args:
        family: heading of the page it belongs under.
        name: how people call it.
        build: makes the network, with random weights.
        inputs: draw the inputs of one sample, with its batch axis.
        beside: operations that are only there because the operator alone leaves nothing to quantize.
    """

    family: str
    name: str
    build: Callable[[], nn.Module]
    inputs: tuple[Draw, ...]
    beside: tuple[str, ...] = ()

    def network(self) -> nn.Module:
        """Return the network in eval mode, with the same weights each time; a layer stands in a network around it."""
        torch.manual_seed(0)
        built = self.build()
        return (nn.Sequential(built) if type(built).__module__.startswith("torch.") else built).eval()

    def samples(self) -> list[tuple[Tensor, ...]]:
        """Return :data:`SAMPLES` samples, the same each time."""
        generator = torch.Generator().manual_seed(1)
        return [tuple(draw(generator) for draw in self.inputs) for _ in range(SAMPLES)]

    @property
    def has_weights(self) -> bool:
        """Whether the bits of weights make a difference."""
        return any(True for _ in self.network().parameters())


class Function(nn.Module):
    """A function of tensors in the forward pass of a network."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


class Behind(nn.Module):
    """A function of rounded values: alone, it leaves nothing to quantize."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*(F.relu(x) if x.is_floating_point() else x for x in inputs))


class Masked(nn.Module):
    """Values of one tensor or another, by a mask that belongs to the network."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.rand(1, 8, 8, 8) > 0.5)

    def forward(self, *inputs: Tensor) -> Tensor:
        a, b = inputs
        return torch.where(self.mask, F.relu(a), F.relu(b))


class Filled(Masked):
    """Values of a tensor or a number, by a mask that belongs to the network."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return F.relu(inputs[0]).masked_fill(self.mask, 1.0)


class Classes(nn.Module):
    """The class of the highest score."""

    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(1)


class Recurrent(nn.Module):
    """The sequence that a recurrent layer returns."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class SelfAttention(nn.Module):
    """Attention of a sequence to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Constant(nn.Module):
    """Arithmetic with a tensor that belongs to the network."""

    constant: Tensor

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("constant", torch.rand(1, 8, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.constant)


def normalization(norm: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.InstanceNorm2d) -> nn.Module:
    """Give a norm statistics and weights as training leaves them."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.uniform_(norm.bias)
    return norm


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def normal(*shape: int) -> Draw:
    return lambda generator: torch.randn(shape, generator=generator)


def positive(*shape: int) -> Draw:
    return lambda generator: torch.rand(shape, generator=generator) + 0.25


def indices(count: int, *shape: int) -> Draw:
    return lambda generator: torch.randint(count, shape, generator=generator)


def coordinates(*shape: int) -> Draw:
    return lambda generator: torch.rand(shape, generator=generator) * 2 - 1


MAP = normal(1, 8, 8, 8)
ROWS = normal(1, 8, 12, 20)
POSITIVE = positive(1, 8, 8, 8)
TOKENS = normal(1, 12, 16)
SIGNAL = normal(1, 8, 32)
VOLUME = normal(1, 4, 4, 8, 8)


def _convolutions() -> list[Operator]:
    def of(name: str, build: Callable[[], nn.Module], *inputs: Draw) -> Operator:
        return Operator("Convolutions and products", name, build, inputs or (MAP,))

    return [
        of("Conv2d 3×3", lambda: nn.Conv2d(8, 8, 3, padding=1)),
        of("Conv2d 3×3, no bias", lambda: nn.Conv2d(8, 8, 3, padding=1, bias=False)),
        of("Conv2d 1×1", lambda: nn.Conv2d(8, 16, 1)),
        of("Conv2d 3×3, dilation 2", lambda: nn.Conv2d(8, 8, 3, padding=2, dilation=2)),
        of("Conv2d 3×3, groups 2", lambda: nn.Conv2d(8, 8, 3, padding=1, groups=2)),
        of("Conv2d 3×3, reflect padding", lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")),
        of("Conv2d 3×3, 1 output channel", lambda: nn.Conv2d(8, 1, 3, padding=1)),
        of("Conv2d 3×3, 1 output channel, no bias", lambda: nn.Conv2d(8, 1, 3, padding=1, bias=False)),
        of("Conv2d 1×1, 1 output channel", lambda: nn.Conv2d(8, 1, 1)),
        of("Conv2d depthwise 3×3", lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8)),
        of("Conv2d depthwise 1×1", lambda: nn.Conv2d(8, 8, 1, groups=8)),
        of("Conv2d depthwise 3×3, multiplier 2", lambda: nn.Conv2d(8, 16, 3, padding=1, groups=8)),
        of("ConvTranspose2d 2×2, stride 2", lambda: nn.ConvTranspose2d(8, 8, 2, stride=2)),
        of("ConvTranspose2d 2×2, no bias", lambda: nn.ConvTranspose2d(8, 8, 2, stride=2, bias=False)),
        of("ConvTranspose2d 2×2, groups 2", lambda: nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2)),
        of("ConvTranspose2d depthwise 2×2", lambda: nn.ConvTranspose2d(8, 8, 2, stride=2, groups=8)),
        of("ConvTranspose2d depthwise 2×2, no bias",
           lambda: nn.ConvTranspose2d(8, 8, 2, stride=2, groups=8, bias=False)),
        of("ConvTranspose2d 2×2, 1 output channel", lambda: nn.ConvTranspose2d(8, 1, 2, stride=2)),
        of("Conv1d 3", lambda: nn.Conv1d(8, 8, 3, padding=1), SIGNAL),
        of("Conv1d depthwise 3", lambda: nn.Conv1d(8, 8, 3, padding=1, groups=8), SIGNAL),
        of("ConvTranspose1d 4, stride 2", lambda: nn.ConvTranspose1d(8, 8, 4, stride=2, padding=1), SIGNAL),
        of("Conv3d 3×3×3", lambda: nn.Conv3d(4, 4, 3, padding=1), VOLUME),
        of("Conv3d depthwise 3×3×3", lambda: nn.Conv3d(4, 4, 3, padding=1, groups=4), VOLUME),
        of("ConvTranspose3d 2×2×2", lambda: nn.ConvTranspose3d(4, 4, 2, stride=2), VOLUME),
        of("ConvTranspose3d 2×2×2, groups 2", lambda: nn.ConvTranspose3d(4, 4, 2, stride=2, groups=2), VOLUME),
        of("Linear, one row", lambda: nn.Linear(16, 8), normal(1, 16)),
        of("Linear, tokens", lambda: nn.Linear(16, 8), TOKENS),
        of("matmul of activations", lambda: Function(torch.matmul), normal(1, 2, 12, 8), normal(1, 2, 8, 12)),
        of("einsum bhid,bhjd->bhij", lambda: Function(lambda a, b: torch.einsum("bhid,bhjd->bhij", a, b)),
           normal(1, 2, 12, 8), normal(1, 2, 12, 8)),
        Operator("Convolutions and products", "Embedding and Linear",
                 lambda: nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 8)), (indices(32, 1, 12),), ("Linear",)),
    ]  # fmt: skip


def _arithmetic() -> list[Operator]:
    def of(name: str, function: Callable[..., Tensor], *inputs: Draw) -> Operator:
        return Operator("Arithmetic", name, lambda: Function(function), inputs or (MAP, MAP))

    def constant(name: str, function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
        return Operator("Arithmetic", name, lambda: Constant(function), (MAP,))

    return [
        of("add", lambda a, b: a + b),
        constant("add of a constant tensor", lambda x, c: x + c),
        of("add of a number", lambda x: x + 1.5, MAP),
        Operator(
            "Arithmetic",
            "add of a number behind a convolution",
            lambda: nn.Sequential(nn.Conv2d(8, 8, 1), Function(lambda x: x + 1.0)),
            (MAP,),
            ("Conv2d",),
        ),
        of("sub", lambda a, b: a - b),
        of("number minus tensor", lambda x: 1.0 - x, MAP),
        of("mul", lambda a, b: a * b),
        constant("mul by a constant tensor", lambda x, c: x * c),
        of("mul by a number", lambda x: x * 0.125, MAP),
        of("div", lambda a, b: a / b, MAP, POSITIVE),
        constant("div by a constant tensor", lambda x, c: x / c),
        of("div by a number", lambda x: x / 3.0, MAP),
        of("neg", lambda x: -x, MAP),
        of("abs", torch.abs, MAP),
        of("square", lambda x: x**2, MAP),
        of("pow 3", lambda x: x**3, MAP),
        of("pow 1.5", lambda x: x**1.5, POSITIVE),
        of("pow 0.7", lambda x: x**0.7, POSITIVE),
        of("number to the power of a tensor", lambda x: 2.0**x, MAP),
        of("tensor to the power of a tensor", torch.pow, POSITIVE, MAP),
        of("sqrt", torch.sqrt, POSITIVE),
        of("rsqrt", torch.rsqrt, POSITIVE),
        of("reciprocal", torch.reciprocal, POSITIVE),
        of("exp", torch.exp, MAP),
        of("expm1", torch.expm1, MAP),
        of("log", torch.log, POSITIVE),
        of("log1p", torch.log1p, POSITIVE),
        of("log2", torch.log2, POSITIVE),
        of("logit", lambda x: torch.logit(x, 1e-3), POSITIVE),
        of("sin", torch.sin, MAP),
        of("cos", torch.cos, MAP),
        of("tan", lambda x: torch.tan(x.clamp(-1, 1)), MAP),
        of("atan", torch.atan, MAP),
        of("asin", lambda x: torch.asin(x.clamp(-0.9, 0.9)), MAP),
        of("atan2", torch.atan2, MAP, POSITIVE),
        of("sinh", torch.sinh, MAP),
        of("erf", torch.erf, MAP),
        of("floor", torch.floor, MAP),
        of("round", torch.round, MAP),
        of("sign", torch.sign, MAP),
        of("remainder by a number", lambda x: x % 1.5, MAP),
        of("lerp", lambda a, b: torch.lerp(a, b, 0.3)),
        of("addcmul", lambda a, b: torch.addcmul(a, a, b)),
        of("hypot", torch.hypot, MAP, POSITIVE),
        of("maximum", torch.maximum),
        of("minimum", torch.minimum),
        of("clamp to 0…1", lambda x: x.clamp(0, 1), MAP),
        of("clamp, minimum only", lambda x: x.clamp(min=-0.5), MAP),
        of("cumsum over channels", lambda x: x.cumsum(1), MAP),
        of("cumsum over width", lambda x: x.cumsum(3), MAP),
        of("cumsum over tokens", lambda x: x.cumsum(1), TOKENS),
    ]


def _activations() -> list[Operator]:
    modules: dict[str, Callable[[], nn.Module]] = {
        "ReLU": nn.ReLU, "ReLU6": nn.ReLU6, "LeakyReLU": nn.LeakyReLU, "PReLU": nn.PReLU,
        "PReLU per channel": lambda: nn.PReLU(8), "ELU": nn.ELU, "SELU": nn.SELU, "CELU": nn.CELU,
        "Sigmoid": nn.Sigmoid, "Tanh": nn.Tanh, "Hardsigmoid": nn.Hardsigmoid, "Hardswish": nn.Hardswish,
        "SiLU": nn.SiLU, "GELU": nn.GELU, "GELU, tanh": lambda: nn.GELU(approximate="tanh"), "Mish": nn.Mish,
        "Softplus": nn.Softplus, "LogSigmoid": nn.LogSigmoid, "GLU": lambda: nn.GLU(1), "Softsign": nn.Softsign,
        "Softshrink": nn.Softshrink, "Hardshrink": nn.Hardshrink, "Tanhshrink": nn.Tanhshrink,
        "Threshold": lambda: nn.Threshold(0.1, 0.0), "Softmin": lambda: nn.Softmin(1),
    }  # fmt: skip
    found = [Operator("Activations", name, build, (MAP,)) for name, build in modules.items()]
    for name in ("SiLU", "Mish", "Softplus", "Hardsigmoid", "GELU"):  # the sizes of a map decide how these are compiled
        behind = partial(_behind_a_convolution, modules[name])
        found.append(Operator("Activations", f"{name} behind a convolution, 12 rows", behind, (ROWS,), ("Conv2d",)))
    for dim, axis in {1: "channels", 2: "height", 3: "width"}.items():
        found.append(Operator("Activations", f"softmax over {axis}", partial(nn.Softmax, dim), (MAP,)))
    found.append(Operator("Activations", "log_softmax over channels", lambda: nn.LogSoftmax(1), (MAP,)))
    found.append(Operator("Activations", "softmax over features", lambda: nn.Softmax(-1), (TOKENS,)))
    found.append(Operator("Activations", "softmax over tokens", lambda: nn.Softmax(1), (TOKENS,)))
    return found


def _behind_a_convolution(build: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 8, 1), build())


def _norms() -> list[Operator]:
    def of(name: str, build: Callable[[], nn.Module], *inputs: Draw) -> Operator:
        return Operator("Norms", name, build, inputs or (MAP,))

    return [
        of("BatchNorm2d that is not folded", lambda: normalization(nn.BatchNorm2d(8))),
        of("BatchNorm1d of vectors that is not folded", lambda: normalization(nn.BatchNorm1d(16)), normal(1, 16)),
        of("LayerNorm over features", lambda: nn.LayerNorm(16), TOKENS),
        of("LayerNorm, no weights", lambda: nn.LayerNorm(16, elementwise_affine=False), TOKENS),
        of("LayerNorm over channels, height, width", lambda: nn.LayerNorm((8, 8, 8))),
        of("GroupNorm", lambda: nn.GroupNorm(2, 8)),
        of("InstanceNorm2d", lambda: nn.InstanceNorm2d(8, affine=True)),
        of("InstanceNorm2d, no weights", lambda: nn.InstanceNorm2d(8)),
        of(
            "InstanceNorm2d, running statistics",
            lambda: normalization(nn.InstanceNorm2d(8, affine=True, track_running_stats=True)),
        ),
        of("InstanceNorm3d", lambda: nn.InstanceNorm3d(4, affine=True), VOLUME),
        of("RMSNorm", lambda: nn.RMSNorm(16), TOKENS),
        of("normalize (L2)", lambda: Function(lambda x: F.normalize(x, dim=1))),
    ]


def _pooling() -> list[Operator]:
    def of(name: str, build: Callable[[], nn.Module], *inputs: Draw) -> Operator:
        return Operator("Pooling and resizing", name, build, inputs or (MAP,))

    def resized(**settings: Any) -> Callable[[], nn.Module]:
        return lambda: Function(lambda x: F.interpolate(x, **settings))

    return [
        of("MaxPool2d 2×2", lambda: nn.MaxPool2d(2)),
        of("MaxPool2d 8×8", lambda: nn.MaxPool2d(8), normal(1, 8, 16, 24)),
        of("AvgPool2d 2×2", lambda: nn.AvgPool2d(2)),
        of("AvgPool2d 3×3, stride 2", lambda: nn.AvgPool2d(3, 2)),
        of("AvgPool2d 4×4", lambda: nn.AvgPool2d(4)),
        of("AvgPool2d 2×2, padding 1", lambda: nn.AvgPool2d(2, padding=1)),
        of("AvgPool2d 2×2 of a slice", lambda: Function(lambda x: F.avg_pool2d(x[..., 2:], 2))),
        of("AvgPool2d 2×2 of a padded map", lambda: Function(lambda x: F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 2))),
        of("AdaptiveAvgPool2d to 1×1", lambda: nn.AdaptiveAvgPool2d(1)),
        of("AdaptiveAvgPool2d to 2×2", lambda: nn.AdaptiveAvgPool2d(2)),
        of("AdaptiveAvgPool2d to 3×3", lambda: nn.AdaptiveAvgPool2d(3)),
        of("AdaptiveMaxPool2d to 1×1", lambda: nn.AdaptiveMaxPool2d(1)),
        of("AdaptiveMaxPool2d to 3×3", lambda: nn.AdaptiveMaxPool2d(3)),
        of("MaxPool1d", lambda: nn.MaxPool1d(2), SIGNAL),
        of("max_pool3d, the function", lambda: Function(lambda x: F.max_pool3d(x, 2)), VOLUME),
        of("adaptive_max_pool2d, the function", lambda: Function(lambda x: F.adaptive_max_pool2d(x, 1))),
        of("max_pool1d, the function", lambda: Function(lambda x: F.max_pool1d(x, 2)), SIGNAL),
        of("AvgPool1d", lambda: nn.AvgPool1d(2), SIGNAL),
        of("MaxPool3d", lambda: nn.MaxPool3d(2), VOLUME),
        of("AvgPool3d", lambda: nn.AvgPool3d(2), VOLUME),
        of("nearest ×2", resized(scale_factor=2, mode="nearest")),
        of("bilinear ×2", resized(scale_factor=2, mode="bilinear")),
        of("bilinear ×2, aligned corners", resized(scale_factor=2, mode="bilinear", align_corners=True)),
        of("bilinear ×½", resized(scale_factor=0.5, mode="bilinear")),
        of("bilinear ×½ of 9 rows", resized(scale_factor=0.5, mode="bilinear"), normal(1, 8, 9, 11)),
        of("area ×½", resized(scale_factor=0.5, mode="area")),
        of("bicubic ×2", resized(scale_factor=2, mode="bicubic")),
        of("trilinear ×2", resized(scale_factor=2, mode="trilinear"), VOLUME),
        of("PixelShuffle", lambda: nn.PixelShuffle(2)),
        of("PixelUnshuffle", lambda: nn.PixelUnshuffle(2)),
        of("grid_sample", lambda: Function(lambda x, grid: F.grid_sample(x, grid, align_corners=False)), MAP,
           coordinates(1, 6, 6, 2)),
        of("unfold", lambda: nn.Unfold(2, stride=2)),
        of("unfold 3×3", lambda: nn.Unfold(3, padding=1)),
        of("fold", lambda: nn.Fold((8, 8), 2, stride=2), normal(1, 32, 16)),
    ]  # fmt: skip


def _movement() -> list[Operator]:
    def of(name: str, function: Callable[..., Any], *inputs: Draw) -> Operator:
        return Operator("Moving values", name, lambda: Behind(function), inputs or (MAP,), ("ReLU",))

    return [
        of("cat over channels", lambda a, b: torch.cat([a, b], 1), MAP, MAP),
        of("split", lambda x: x.split(4, 1)),
        of("slice", lambda x: x[:, :, 1:5, ::2]),
        of("one channel", lambda x: x[:, 3]),
        of("gather rows by constant indices", lambda x: x[:, [0, 3, 5]]),
        of("gather", lambda x, i: torch.gather(x, 1, i), TOKENS, indices(12, 1, 4, 16)),
        of("slice, padded where it was cut", lambda x: F.pad(x[..., 2:], (2, 0))),
        of("cat with zeros over width", lambda x: torch.cat([x, torch.zeros(1, 8, 8, 2)], 3)),
        of("six axes, transposed", lambda x: x.reshape(2, 4, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5).reshape(x.shape)),
        of("pad, constant", lambda x: F.pad(x, (1, 1, 2, 0))),
        of("pad with a number over channels", lambda x: F.pad(x, (0, 0, 0, 0, 1, 1), value=1.5)),
        of("cat with ones over features", lambda x: torch.cat([x, torch.ones(1, 12, 1)], 2), TOKENS),
        of("pad, reflect", lambda x: F.pad(x, (1, 1, 1, 1), "reflect")),
        of("pad, replicate", lambda x: F.pad(x, (1, 1, 1, 1), "replicate")),
        of("pad, circular", lambda x: F.pad(x, (1, 1, 1, 1), "circular")),
        of("flip", lambda x: x.flip(3)),
        of("roll", lambda x: x.roll((2, 2), (2, 3))),
        of("permute", lambda x: x.permute(0, 2, 3, 1)),
        of("reshape", lambda x: x.reshape(1, 64, 8)),
        of("flatten", lambda x: x.flatten(1)),
        of("expand", lambda x: x.expand(1, 8, 8, 8), normal(1, 8, 1, 1)),
        of("repeat", lambda x: x.repeat(1, 1, 2, 2)),
        of("channel shuffle", lambda x: x.reshape(1, 2, 4, 8, 8).transpose(1, 2).reshape(1, 8, 8, 8)),
        of("window partition", lambda x: x.reshape(1, 8, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5).reshape(4, 8, 4, 4)),
        of("tril of a matrix", torch.tril, normal(1, 12, 12)),
    ]


def _reductions() -> list[Operator]:
    def of(name: str, function: Callable[..., Any], *inputs: Draw) -> Operator:
        return Operator("Reductions and selections", name, lambda: Function(function), inputs or (MAP,))

    def selected(name: str, function: Callable[..., Any], *inputs: Draw) -> Operator:
        return Operator("Reductions and selections", name, lambda: Behind(function), inputs, ("ReLU",))

    return [
        of("mean over height and width", lambda x: x.mean((2, 3))),
        of("mean over channels", lambda x: x.mean(1, keepdim=True)),
        of("sum over height and width", lambda x: x.sum((2, 3))),
        of("norm over channels", lambda x: x.norm(dim=1)),
        of("standard deviation over width", lambda x: x.std(3)),
        of("max over channels", lambda x: x.amax(1)),
        of("min over channels", lambda x: x.amin(1)),
        of("var", lambda x: x.var((2, 3))),
        of("prod", lambda x: x.prod(1), POSITIVE),
        of("logsumexp", lambda x: x.logsumexp(1)),
        Operator("Reductions and selections", "Conv2d and argmax", lambda: nn.Sequential(nn.Conv2d(8, 8, 1), Classes()),
                 (MAP,), ("Conv2d",)),
        selected("topk", lambda x: x.topk(3, dim=-1)[0], TOKENS),
        selected("sort", lambda x: x.sort(dim=-1)[0], TOKENS),
        Operator("Reductions and selections", "where, by a mask", Masked, (MAP, MAP), ("ReLU",)),
        selected("where, by a comparison", lambda a, b: torch.where(b > 0.5, b, a), MAP, MAP),
        Operator("Reductions and selections", "masked_fill, by a mask", Filled, (MAP,), ("ReLU",)),
        selected("masked_fill, by a comparison", lambda a, b: a.masked_fill(b > 0.5, 1.0), MAP, MAP),
        selected("greater than", lambda a, b: (a > b).float(), MAP, MAP),
    ]  # fmt: skip


def _sequences() -> list[Operator]:
    def of(name: str, build: Callable[[], nn.Module], *inputs: Draw) -> Operator:
        return Operator("Sequences", name, build, inputs or (TOKENS,))

    queries = normal(1, 2, 12, 8)
    return [
        of("LSTM", lambda: Recurrent(nn.LSTM(16, 8, batch_first=True))),
        of("GRU", lambda: Recurrent(nn.GRU(16, 8, batch_first=True))),
        of("scaled_dot_product_attention", lambda: Function(F.scaled_dot_product_attention), queries, queries, queries),
        of("scaled_dot_product_attention, causal", lambda: Function(causal), queries, queries, queries),
        of("MultiheadAttention", SelfAttention),
    ]  # fmt: skip


def catalogue() -> dict[str, Operator]:
    """Return the operators by name, in the order of the page."""
    makers = (_convolutions, _arithmetic, _activations, _norms, _pooling, _movement, _reductions, _sequences)
    found = [operator for maker in makers for operator in maker()]
    named = {operator.name: operator for operator in found}
    assert len(named) == len(found), "two operators of one name"
    return named
