"""Drift of the quantization scales during training."""

from __future__ import annotations

from typing import Any

import torch

from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.precisions import quantized_layers
from lightning_quant.simulation.quantized_tensors import quantizers_of


class RangeDrift:
    """Record ``log2(scale / scale at the start of training)`` per quantizer: 0 is unchanged, 1 is twice as coarse.

    Args:
        network: the quantized network before its first training step.

    Attributes:
        steps: the training steps at which the drift was recorded.
        values: the drift of each quantizer at each of :attr:`steps`; that of the largest scale where they are per
            channel.
    """

    def __init__(self, network: QuantizedNetwork) -> None:
        self._begin = _largest_scales(network)
        self.steps = [0]
        self.values = {name: [0.0] for name in self._begin}

    def note(self, network: QuantizedNetwork, step: int) -> dict[str, float]:
        """Record the drift at ``step``.

        Returns:
            Mean and maximum of the absolute drift of weights and of activations, for loggers; empty if ``step`` is
            recorded already.
        """
        if step <= self.steps[-1]:
            return {}
        now = _largest_scales(network)
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
        """Return what a resumed fit needs."""
        return {"begin": self._begin, "steps": self.steps, "values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._begin, self.steps, self.values = state["begin"], list(state["steps"]), state["values"]


def _largest_scales(network: QuantizedNetwork) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    seen = set()
    for layer_name, layer in quantized_layers(network).items():
        for tensor, quantizer in quantizers_of(layer):
            if quantizer is not None and quantizer not in seen and quantizer.is_initialized():
                seen.add(quantizer)
                found[f"{layer_name} · {tensor}"] = quantizer.get_scale().detach().max().cpu()
    return found
