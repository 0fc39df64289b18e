"""Training that leaves the finite numbers: noticed before the weights are touched, and traced to a layer."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_quant.simulation.inputs import NetworkInputs, tensors_in
from lightning_quant.simulation.network import QuantizedNetwork

_QUANTIZER = re.compile(r"\.(param|input|output)_quantizers\..*")


def gradients_are_finite(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether no gradient holds NaN or infinity. One pass over them, and one wait for the device."""
    gradients = [p.grad for p in parameters if p.grad is not None and not p.grad.is_sparse]
    return bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients, norm_type=math.inf))) if gradients else True


def origin(network: QuantizedNetwork, calls: Iterable[NetworkInputs]) -> str:
    """Where the first number that is not finite comes from, in words.

    The network is called once more as the step did; its state and the random numbers stay as they are.
    """
    calls = list(calls)
    if not all(_finite(tensor) for tensor in calls[0].tensors):
        return "the batch itself holds NaN or Inf"
    for name, parameter in network.named_parameters():
        if not _finite(parameter):
            return f"parameter {_readable(name)!r} was not finite before the step"
    found: list[str] = []
    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: _note(found, name, output))
        for name, module in network.named_modules()
    ]
    before = network.snapshot()
    try:
        with isolate_rng(), torch.no_grad():
            for call in calls:
                call.call(network.network)
    finally:
        for handle in handles:
            handle.remove()
        network.restore(before)
    if found:  # the innermost module ends first
        return f"the output of layer {_readable(found[0])!r} is the first that is not finite"
    spoilt = [name for name, p in network.named_parameters() if p.grad is not None and not _finite(p.grad)]
    where = f", the last layer with such a gradient is {_readable(spoilt[-1])!r}" if spoilt else ""
    return f"every layer's output is finite, so it comes from the loss or its gradient{where}"


def _note(found: list[str], name: str, output: Any) -> None:
    if not found and not all(_finite(tensor) for tensor in tensors_in(output)):
        found.append(name)


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _readable(name: str) -> str:
    """The name in the user's network: a quantizer counts as its layer."""
    return _QUANTIZER.sub("", name.removeprefix("network."))
