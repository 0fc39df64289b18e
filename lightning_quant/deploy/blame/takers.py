"""Which layers take the output of which, from watching one pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import nn

from lightning_quant.simulation.inputs import NetworkInputs, tensors_in
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.precisions import quantized_layers

Takers = Mapping[str, Sequence[str]]
# What the hardware computes together with the layer before it.
_ACTIVATIONS = (nn.ReLU, nn.ReLU6)


def takers_of(network: QuantizedNetwork, call: NetworkInputs) -> Takers:
    """Run a network once and return the layers that take the output of each layer, by name.

    Args:
        network: the quantized network, in eval mode.
        call: what it is run on.
    """
    watched = _Watched()
    with ExitStack() as hooks:
        for name, layer in quantized_layers(network).items():
            module: Any = layer
            hooks.callback(
                module.register_forward_pre_hook(partial(watched.enter, name), prepend=True, with_kwargs=True).remove
            )
            hooks.callback(module.register_forward_hook(partial(watched.leave, name)).remove)
        call.call(network.network)
    return {name: list(takers) for name, takers in watched.takers.items()}


def fused_with(layers: Mapping[str, Any], takers: Takers) -> set[str]:
    """Return the layers whose output is rounded to the grid of the activation function behind them.

    What that grid clips, the function removes: the hardware computes both as one.
    """
    return {
        name
        for name, behind in takers.items()
        if behind and all(_is_on_one_grid(layers[name], layers[taker]) for taker in behind)
    }


class _Watched:
    def __init__(self) -> None:
        self.takers: dict[str, dict[str, None]] = defaultdict(dict)
        self._origins: dict[int, str] = {}
        self._kept: list[Any] = []  # a storage that is freed is used again

    def enter(self, name: str, layer: Any, args: Any, kwargs: Any) -> None:
        for tensor in tensors_in((args, kwargs)):
            if (origin := self._origins.get(tensor.untyped_storage().data_ptr())) is not None:
                self.takers[origin][name] = None

    def leave(self, name: str, layer: Any, args: Any, output: Any) -> None:
        self._kept.append(output)
        self._origins.update({tensor.untyped_storage().data_ptr(): name for tensor in tensors_in(output)})


def _is_on_one_grid(layer: Any, activation: Any) -> bool:
    before, behind = (next(iter(one.output_quantizers), None) for one in (layer, activation))
    if not isinstance(activation, _ACTIVATIONS) or before is None or behind is None:
        return False
    return bool((before.get_min() == behind.get_min()).all() and (before.get_max() == behind.get_max()).all())
