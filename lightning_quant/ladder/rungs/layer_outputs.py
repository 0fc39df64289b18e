"""Correct the outputs of layers channel by channel while the calibration data runs through them.

Each correction changes what the layers behind it see. So it is made on the fly, batch by batch, and what is written
into the weights afterwards is the mean over the batches: one pass, like batch norms in training mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.ladder.rung import RungContext
from lightning_quant.ladder.rungs.cle import equalize
from lightning_quant.simulation import aimet
from lightning_quant.simulation.inputs import NetworkInputs


@contextmanager
def hooked(
    layers: Mapping[str, nn.Module | aimet.QuantizedLayer], hook: Callable[[str, Tensor], Tensor | None]
) -> Iterator[None]:
    """Call ``hook(name, output)`` for each output of ``layers``; what it returns replaces the output."""

    def on_forward(name: str) -> Callable[..., Any]:
        return lambda module, args, output: hook(name, output)

    handles = [layer.register_forward_hook(on_forward(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def channel_axis(layer: nn.Module, output: Tensor) -> int:
    """Where the channels of a layer's output lie: last for linear layers, second for convolutions."""
    return output.dim() - 1 if isinstance(layer, nn.Linear) else 1


def per_channel(values: Tensor, axis: int, output: Tensor) -> Tensor:
    """Shape one value per channel so that it combines with ``output``."""
    shape = [1] * output.dim()
    shape[axis] = -1
    return values.reshape(shape)


def statistics(output: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel over everything else, (C,) each."""
    others = [dimension for dimension in range(output.dim()) if dimension != axis]
    variance, mean = torch.var_mean(output.as_subclass(Tensor).float(), dim=others, correction=0)
    return mean, variance


def channel_scales(layers: Iterable[str], context: RungContext) -> dict[str, Tensor]:
    """How much larger equalization makes each channel of the layers' outputs, (C,) each."""
    batch = next(context.samples())
    float_network = context.prepared.network
    before = _deviations(float_network, layers, batch)
    after = _deviations(equalize(context.prepared)[0], layers, batch)
    return {
        name: torch.where((before[name] > 0) & (after[name] > 0), after[name] / before[name], 1.0) for name in before
    }


def _deviations(network: nn.Module, names: Iterable[str], batch: NetworkInputs) -> dict[str, Tensor]:
    """Standard deviation of each channel of the layers' outputs."""
    layers = {name: network.get_submodule(name) for name in names}
    found: dict[str, Tensor] = {}

    def remember(name: str, output: Tensor) -> None:
        found[name] = statistics(output, channel_axis(layers[name], output))[1].sqrt()

    with hooked(layers, remember):
        batch.call(network)
    return found
