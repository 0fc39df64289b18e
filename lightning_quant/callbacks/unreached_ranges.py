"""Ranges that training does not come to, such as those of a head that decodes in eval mode only.

DDP waits for a gradient of everything that learns, and raises in the second step where one does not come.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lightning_quant.callbacks.data import isolated_seed
from lightning_quant.simulation import aimet
from lightning_quant.simulation.inplace import state_kept
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.precisions import quantized_layers
from lightning_quant.simulation.switched_off import unrounded


def unreached_ranges(network: QuantizedNetwork) -> list[nn.Parameter]:
    """Return the ranges of layers that a pass does not come to, in the modes that the modules are in.

    None where the example calls alone do not run in these modes, as where a detector wants targets then.
    """
    layers: list[Any] = list(quantized_layers(network).values())
    ranges: dict[nn.Module, list[nn.Parameter]] = {layer: list(_ranges_of(layer)) for layer in layers}
    reached: set[nn.Module] = set()
    hooks = [layer.register_forward_hook(lambda layer, *_: reached.add(layer)) for layer in ranges]
    device = next((one.device for one in network.network.parameters()), torch.device("cpu"))
    try:
        # seeded: of what is drawn, every process comes to the same
        with torch.no_grad(), isolated_seed(), state_kept(network.network), unrounded(network):
            for call in (network.inputs, *network.others):
                call.to(device).call(network.network)
    except Exception:  # whatever the user's code raises without what a step gives it
        return []
    finally:
        for hook in hooks:
            hook.remove()
    learned = {end for layer in reached for end in ranges[layer]}
    return list(dict.fromkeys(end for ends in ranges.values() for end in ends if end not in learned))


def _ranges_of(layer: nn.Module) -> Iterator[nn.Parameter]:
    for part in layer.modules():
        if isinstance(part, aimet.QuantizerBase):
            yield from part.parameters()
