"""How far the ranges of a network move while it trains."""

from __future__ import annotations

from typing import Any

import torch

from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.precisions import quantized_layers
from lightning_quant.simulation.quantized_tensors import quantizers_of


class RangeDrift:
    """The step length of every quantizer, relative to when it began: 0 is unchanged, 1 twice as coarse (log2).

    Args:
        network: the quantized network as training finds it.

    Attributes:
        steps: the training steps at which it was noted.
        values: by quantizer, the logarithm at each of :attr:`steps`; of the coarsest channel, if there are several.
    """

    def __init__(self, network: QuantizedNetwork) -> None:
        self._begin = _step_lengths(network)
        self.steps = [0]
        self.values = {name: [0.0] for name in self._begin}

    def note(self, network: QuantizedNetwork, step: int) -> dict[str, float]:
        """Note the ranges as they are now; mean and largest drift of weights and of activations, for loggers."""
        if step <= self.steps[-1]:
            return {}
        now = _step_lengths(network)
        self.steps.append(step)
        found: dict[str, list[float]] = {}
        for name, begin in self._begin.items():
            moved = round(float(torch.log2(now[name] / begin)), 5)
            self.values[name].append(moved)
            kind = "weights" if name.endswith("weight") else "activations"
            found.setdefault(kind, []).append(abs(moved))
        scalars: dict[str, float] = {}
        for kind, values in found.items():
            scalars |= {f"drift/{kind}_mean": sum(values) / len(values), f"drift/{kind}_max": max(values)}
        return scalars

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on after a restart."""
        return {"begin": self._begin, "steps": self.steps, "values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._begin, self.steps, self.values = state["begin"], list(state["steps"]), state["values"]


def _step_lengths(network: QuantizedNetwork) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    seen = set()
    for layer_name, layer in quantized_layers(network).items():
        for tensor, quantizer in quantizers_of(layer):
            if quantizer is not None and quantizer not in seen and quantizer.is_initialized():
                seen.add(quantizer)
                found[f"{layer_name} · {tensor}"] = quantizer.get_scale().detach().max().cpu()
    return found
