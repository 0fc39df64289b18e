"""Every activation that a simulation rounds in one pass, by the layer that rounds it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_quant.simulation.aimet import Quantizer
from lightning_quant.simulation.inputs import NetworkInputs
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.precisions import quantized_layers


class Side(Enum):
    """On which side of a layer a tensor is rounded."""

    INPUT = "input"
    OUTPUT = "output"


@dataclass(frozen=True)
class RoundedTensor:
    """What one quantizer of activations returned in one call.

    Args:
        layer: name of the layer.
        side: whether it is an input or an output of the layer.
        before: what was rounded, in units of the tensor.
        values: after rounding.
        quantizer: what rounded it.
        place: of an input among those of the layer; 0 for an output.
    """

    layer: str
    side: Side
    before: Tensor
    values: Tensor
    quantizer: Quantizer
    place: int


def rounded_tensors(network: QuantizedNetwork, call: NetworkInputs) -> tuple[list[RoundedTensor], Any]:
    """Run the network once and return every rounded activation, in the order of computation, and its output.

    Args:
        network: the quantized network, calibrated, in eval mode.
        call: what it is run on.
    """
    recorder = _Recorder()
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as hooks:
        for name, layer in quantized_layers(network).items():
            module: Any = layer
            hooks.callback(module.register_forward_pre_hook(partial(recorder.enter, name)).remove)
            hooks.callback(module.register_forward_hook(recorder.leave, always_call=True).remove)
            for quantizer in {*layer.input_quantizers, *layer.output_quantizers} - {None} - recorder.watched:
                recorder.watched.add(quantizer)
                hooks.callback(quantizer.register_forward_hook(recorder.see).remove)  # type: ignore[union-attr]
        output = call.call(network.network)
    return recorder.seen, output


class _Recorder:
    def __init__(self) -> None:
        self.seen: list[RoundedTensor] = []
        self.watched: set[Any] = set()
        self._running: list[tuple[str, list[tuple[int, Any]]]] = []

    def enter(self, name: str, layer: Any, args: Any) -> None:
        self._running.append((name, [(at, one) for at, one in enumerate(layer.input_quantizers) if one is not None]))

    def leave(self, layer: Any, args: Any, output: Any) -> None:
        self._running.pop()

    def see(self, quantizer: Any, args: Any, output: Any) -> None:
        if not self._running or not isinstance(output, Tensor):
            return
        name, awaited = self._running[-1]
        place = next((at for at, one in awaited if one is quantizer), None)
        if place is not None:  # layers tied to each other have one quantizer on both sides: the inputs come first
            awaited.remove((place, quantizer))
        side = Side.OUTPUT if place is None else Side.INPUT
        before, values = (tensor.detach().as_subclass(Tensor).clone() for tensor in (args[0], output))
        self.seen.append(RoundedTensor(name, side, before, values, quantizer, place or 0))
