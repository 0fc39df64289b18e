"""Modes and places of modules: which parts train, which are in eval mode, and on which device they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def preserve_modes(module: nn.Module) -> Iterator[None]:
    """Restore afterwards whether a module and each of its parts were in training mode before a block.

    Args:
        module: the module. Parts that are added in the block keep the mode they have at its end.
    """
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def preserve_parameters(module: nn.Module) -> Iterator[None]:
    """Restore afterwards which objects the parameters of a module are: frozen ones, and those that layers share.

    AIMET puts new ones in their place when it exports.
    """
    held = [(part, dict(part._parameters)) for part in module.modules()]
    try:
        yield
    finally:
        for part, parameters in held:
            part._parameters.clear()
            part._parameters.update(parameters)


@contextmanager
def on_cpu_in_eval(module: nn.Module) -> Iterator[None]:
    """Hold a module on the CPU in eval mode, without gradients, for the length of a block; then restore it."""
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    with preserve_modes(module):
        try:
            module.cpu().eval()
            with torch.inference_mode(False), torch.no_grad():
                yield
        finally:
            module.to(device)
