"""Functions that are passed weights: convolutions, linear layers, norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_quant.simulation.callsites.rules.base import Rule


class Weighted(Rule):
    """A function that takes weights: by the layer of torch.nn, which is passed the weights at each call.

    The layer never owns them. They stay parameters of the module that hands them over, or what it computes of its
    parameters: normalized, standardized, pruned. What is computed with is what is rounded.

    Args:
        names: the function's arguments in order.
        build: makes the layer, its parameters on the meta device.
    """

    def __init__(self, names: Sequence[str], build: Callable[[dict[str, Any]], nn.Module | None]) -> None:
        self.names = names
        self.build = build

    def bind(self, args: Any, kwargs: Any) -> dict[str, Any]:
        """Return the arguments by name."""
        return {**dict(zip(self.names, args, strict=False)), **kwargs}

    @override
    def make(self, name: str, func: Any, args: Any, kwargs: Any) -> nn.Module | None:
        bound = self.bind(args, kwargs)
        layer = self.build(bound)
        if layer is not None:
            for part in list(layer._parameters):
                del layer._parameters[part]
                layer.__dict__[part] = None
            layer.__dict__["_takes_weights"] = ()
            layer.__dict__["_settings"] = _settings(bound)
            self._set_weights(layer, bound)
        return layer

    def _fits(self, module: Any, bound: dict[str, Any]) -> bool:
        settings = _settings(bound)
        return settings is not None and settings == module.__dict__["_settings"]

    def _set_weights(self, layer: Any, bound: dict[str, Any]) -> None:
        values = layer.__dict__
        for part in ("weight", "bias"):
            values[part] = bound.get(part)

    @override
    def call(self, module: Any, args: Any, kwargs: Any) -> Any:
        bound = self.bind(args, kwargs)
        return self._compute(module, bound) if self._fits(module, bound) else NotImplemented

    def _compute(self, module: Any, bound: dict[str, Any]) -> Any:
        values = module.__dict__
        if "weight" not in values:  # attached, while AIMET treats it as any layer
            return module(bound["input"])
        passed = bound.get("weight"), bound.get("bias")
        detached = tuple([None if one is None else one.detach() for one in passed])
        if not torch.is_grad_enabled():
            values["weight"], values["bias"] = detached
            return module(bound["input"])
        # without gradients a part of a parameter says that it has one, which hooks of PyTorch's do not take
        # nor as parameters: setting one on a module, as AIMET does for a moment, would register it there
        plain = [one.as_subclass(Tensor) if isinstance(one, nn.Parameter) else one for one in passed]
        values["weight"], values["bias"] = plain
        try:
            return module(bound["input"])
        finally:  # without the graph that computed them
            values["weight"], values["bias"] = detached


def _settings(bound: dict[str, Any]) -> dict[str, Any] | None:
    """Return what a function is called with besides its input and weights; ``None`` if tensors are among it.

    Of the axes that are normalized over, the number alone: in a trace their sizes are tensors, and a layer refuses
    others than its own.
    """
    found: dict[str, Any] = {}
    for name, value in bound.items():
        if name == "normalized_shape":
            found[name] = len(value)
        elif isinstance(value, Tensor) and name not in ("input", "weight", "bias"):
            return None
        elif name not in ("input", "weight", "bias"):
            found[name] = tuple(value) if isinstance(value, list) else value
    return found


def linear(bound: dict[str, Any]) -> nn.Module | None:
    """Make the layer for ``F.linear``; ``None`` if the weight is not a matrix."""
    outputs, inputs = bound["weight"].shape if bound["weight"].dim() == 2 else (0, 0)
    if not outputs:
        return None
    return nn.Linear(inputs, outputs, bound.get("bias") is not None, device="meta")


def convolution(transposed: bool) -> Callable[[dict[str, Any]], nn.Module | None]:
    """Return what makes the layer for a convolution, or ``None`` if the call has no batch axis."""
    plain = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    turned = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

    def build(bound: dict[str, Any]) -> nn.Module | None:
        weight, groups = bound["weight"], bound.get("groups", 1)
        spatial = weight.dim() - 2
        if bound["input"].dim() != weight.dim():  # no batch
            return None
        settings = {key: bound[key] for key in ("stride", "padding", "dilation", "output_padding") if key in bound}
        channels = weight.shape[0], weight.shape[1] * groups
        factory: Any = (turned if transposed else plain)[spatial - 1]
        inputs, outputs = channels if transposed else channels[::-1]
        bias = bound.get("bias") is not None
        made: nn.Module = factory(
            inputs, outputs, tuple(weight.shape[2:]), groups=groups, bias=bias, device="meta", **settings
        )
        return made

    return build


def embedding(bound: dict[str, Any]) -> nn.Module | None:
    """Make the layer for ``F.embedding``; ``None`` if it changes its weights, by ``max_norm``."""
    if bound.get("max_norm") is not None or bound["weight"].dim() != 2:
        return None
    rows, width = bound["weight"].shape
    return nn.Embedding(rows, width, padding_idx=bound.get("padding_idx"), device="meta")


def layer_norm(bound: dict[str, Any]) -> nn.Module | None:
    """Make the layer for ``F.layer_norm``."""
    affine = bound.get("weight") is not None
    bias = bound.get("bias") is not None
    return nn.LayerNorm(
        tuple(bound["normalized_shape"]), bound.get("eps", 1e-5), elementwise_affine=affine, bias=bias, device="meta"
    )


def instance_norm(bound: dict[str, Any]) -> nn.Module | None:
    """Make the layer for ``F.instance_norm``; ``None`` if the call has running statistics."""
    dimensions = bound["input"].dim() - 2
    if bound.get("running_mean") is not None or not 1 <= dimensions <= 3:
        return None
    channels = bound["input"].shape[1]
    factory = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[dimensions - 1]
    return factory(channels, bound.get("eps", 1e-5), affine=True, device="meta")


class InstanceNorm(Weighted):
    """``F.instance_norm``; the NPU computes with integers only where there is a weight and a bias."""

    @override
    def make(self, name: str, func: Any, args: Any, kwargs: Any) -> nn.Module | None:
        layer = super().make(name, func, args, kwargs)
        if layer is not None and super().bind(args, kwargs).get("weight") is None:
            layer.__dict__["_has_default_weights"] = True
        return layer

    @override
    def bind(self, args: Any, kwargs: Any) -> dict[str, Any]:
        bound = super().bind(args, kwargs)
        channels, like = bound["input"].shape[1], {"dtype": bound["input"].dtype, "device": bound["input"].device}
        if bound.get("weight") is None:
            bound["weight"] = torch.ones(channels, **like)
        if bound.get("bias") is None:
            bound["bias"] = torch.zeros(channels, **like)
        return bound


def batch_norm(bound: dict[str, Any]) -> nn.Module | None:
    """Make the layer for ``F.batch_norm``; ``None`` if the call has no statistics, weight or bias."""
    if bound.get("running_mean") is None or bound.get("weight") is None or bound.get("bias") is None:
        return None
    dimensions = bound["input"].dim() - 2
    factory = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}.get(dimensions)
    if factory is None:
        return None
    return factory(bound["weight"].numel(), bound.get("eps", 1e-5), device="meta")


class BatchNorm(Weighted):
    """``F.batch_norm`` with weight and bias; its statistics are passed as well, and updated as the function does."""

    @override
    def make(self, name: str, func: Any, args: Any, kwargs: Any) -> nn.Module | None:
        layer = super().make(name, func, args, kwargs)
        if layer is not None:
            layer._buffers.clear()
            layer.__dict__["num_batches_tracked"] = None
            self._set_statistics(layer, self.bind(args, kwargs))
        return layer

    def _set_statistics(self, layer: Any, bound: dict[str, Any]) -> None:
        values = layer.__dict__
        for part in ("running_mean", "running_var"):
            values[part] = bound.get(part)
        for setting, default in (("training", False), ("momentum", 0.1), ("eps", 1e-5)):
            values[setting] = bound.get(setting, default)

    def _fits(self, module: Any, bound: dict[str, Any]) -> bool:
        return all(isinstance(bound.get(part), Tensor) for part in ("running_mean", "running_var", "weight", "bias"))

    def _compute(self, module: Any, bound: dict[str, Any]) -> Any:
        self._set_statistics(module, bound)
        return super()._compute(module, bound)


def prelu(bound: dict[str, Any]) -> nn.Module | None:
    """Make the layer for ``F.prelu``."""
    return nn.PReLU(bound["weight"].numel(), device="meta")


CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
INSTANCE_NORM = ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
