"""Small networks, each with one thing that quantization has to get right."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.precision import Precision
from lightning_quant.recipe import QuantRecipe
from lightning_quant.simulation.build import quantize
from lightning_quant.simulation.calibrate import calibrate
from lightning_quant.simulation.inputs import NetworkInputs
from lightning_quant.simulation.network import QuantizedNetwork


def images(count: int = 1, seed: int = 0, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, 8, 8, generator=torch.Generator().manual_seed(seed))


def call(*args: Any, **kwargs: Any) -> NetworkInputs:
    return NetworkInputs(args, kwargs)


def quantized(network: nn.Module, inputs: NetworkInputs | None = None, **recipe: Any) -> QuantizedNetwork:
    recipe.setdefault("calibration_samples", 8)
    recipe["precision"] = Precision.parse(recipe.get("precision", "w8a8"))
    with torch.inference_mode(False):  # it is quantized in place, and tests compare with it
        network = copy.deepcopy(network)
    return quantize(network, inputs or call(images()), QuantRecipe(**recipe))


def calibrated(network: nn.Module, inputs: NetworkInputs | None = None, **recipe: Any) -> QuantizedNetwork:
    """Quantized, in eval mode, ranges from 8 images (or from ``inputs``)."""
    made = quantized(network, inputs, **recipe).eval()
    calibrate(made, [inputs or call(images(8))])
    return made


def seeded(network: nn.Module, seed: int = 0) -> nn.Module:
    """Reproducible weights, and batch norm statistics that a fold has to get right."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(parameter[0].numel(), 1) ** 0.5)
        for module in network.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)):
                module.weight.add_(2)
                module.running_mean = torch.randn(module.num_features, generator=generator)
                module.running_var = torch.rand(module.num_features, generator=generator) + 0.5
    return network


class Body(nn.Module):
    """Convolution, batch norm, one ReLU used twice and a functional addition."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.relu = nn.ReLU()
        self.branch = nn.Conv2d(6, 6, 1)
        self.head = nn.Conv2d(6, 4, 1)
        seeded(self)
        self.eval()

    def scores(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv(x)))
        x = self.relu(x + self.branch(x))
        return self.head(x)

    def forward(self, x: Tensor) -> Any:
        return self.scores(x)


class Untraceable(nn.Module):
    """Control flow that depends on tensor values, around a network."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        if float(x.detach().abs().max()) > 1e6:
            return self.inner(x * 0)
        return self.inner(x)


class Chain(nn.Module):
    """Convolution, ReLU, convolution: traceable or not, nothing of it has to stay in float."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.second = nn.Conv2d(4, 4, 1)
        seeded(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.relu(self.first(x)))


class SharedConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        seeded(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x))


class SharedReLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1)
        self.second = nn.Conv2d(3, 3, 1)
        self.relu = nn.ReLU()
        seeded(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.second(self.relu(self.first(x))))


class Functional(nn.Module):
    """Functional forms of operations AIMET can quantize as modules, and of one it cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.second = nn.Conv2d(4, 4, 1)
        seeded(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = F.interpolate(x + 1, scale_factor=2.0)
        return self.second(x.transpose(2, 3))


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


class Options(Body):
    """Optional arguments: a tensor or None, a number and a flag."""

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0, flag: bool = True) -> Tensor:
        if mask is not None:
            x = x * mask
        if flag:
            x = x * scale
        return self.scores(x)


class TwoInputs(Body):
    def forward(self, image: Tensor, other: Tensor) -> Tensor:
        return self.scores(image + other)


class AnyInputs(Body):
    def forward(self, *tensors: Tensor) -> Tensor:
        return self.scores(tensors[0] + tensors[1])


class DictInput(Body):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.scores(batch["image"] + batch["other"])


class Pair(NamedTuple):
    logits: Tensor
    doubled: Tensor


@dataclass
class Answer:
    logits: Tensor
    doubled: Tensor
    note: str = "kept"


class DictOutput(Body):
    def forward(self, x: Tensor) -> Any:
        scores = self.scores(x)
        return {"logits": scores, "doubled": scores * 2}


class OrderedOutput(Body):
    def forward(self, x: Tensor) -> Any:
        scores = self.scores(x)
        answer = OrderedDict()
        answer["logits"] = scores
        answer["doubled"] = scores * 2
        return answer


class TupleOutput(Body):
    def forward(self, x: Tensor) -> Any:
        scores = self.scores(x)
        return scores, [scores * 2]


class NamedOutput(Body):
    def forward(self, x: Tensor) -> Any:
        scores = self.scores(x)
        return Pair(scores, scores * 2)


class DataclassOutput(Body):
    def forward(self, x: Tensor) -> Any:
        scores = self.scores(x)
        return Answer(scores, scores * 2)


class NestedOutput(Body):
    """The same key twice, at different places, and one that is also the input's name."""

    def forward(self, x: Tensor) -> Any:
        scores = self.scores(x)
        return {"main": {"out": scores}, "aux": {"out": scores * 2}, "x": scores * 3}


def attention_free_transformer() -> nn.Module:
    """Linear, GELU, LayerNorm: what a transformer's feed-forward part is made of."""
    return seeded(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4)))
