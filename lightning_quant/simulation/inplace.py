"""Changing a user's network in place: whole or not at all, and nothing else in it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.simulation.callsites.running import FOLDED, OF_A_LIST, SEEN, SITES


def copied(network: nn.Module) -> nn.Module:
    """A deep copy; tensors that a pass left behind in attributes come along without their graph."""
    memo: dict[int, Any] = {}
    for module in network.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    with torch.inference_mode(False):
        return copy.deepcopy(network, memo)


@contextmanager
def state_kept(network: nn.Module) -> Iterator[None]:
    """Run a network in a block and leave what it keeps from pass to pass as it was: counters, caches, buffers.

    Args:
        network: the network; AIMET's layers in it keep nothing of the user's.
    """
    plain = {module: _shallow(_plain_state(module)) for module in network.modules() if not _is_aimets(module)}
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    try:
        yield
    finally:
        for module, before in plain.items():
            if _is_aimets(module):  # it became one meanwhile
                continue
            own = vars(module)
            for name in _plain_state(module).keys() - before.keys():
                del own[name]
            for name, value in before.items():
                if isinstance(own.get(name), list) and isinstance(value, list):
                    own[name][:] = value
                elif isinstance(own.get(name), (dict, set)) and isinstance(value, (dict, set)):
                    own[name].clear()
                    own[name].update(value)
                else:
                    own[name] = value
        for buffer, values in buffers:
            if not torch.equal(buffer, values):
                buffer.copy_(values)


def _is_aimets(module: nn.Module) -> bool:
    return hasattr(module, "param_quantizers") or "aimet_torch" in type(module).__module__


def _plain_state(module: nn.Module) -> dict[str, Any]:
    """Attributes of the user's own: neither PyTorch's nor this package's."""
    return {name: v for name, v in vars(module).items() if name not in _NOT_THE_USERS and not isinstance(v, nn.Module)}


_NOT_THE_USERS = {*vars(nn.Module()), SITES, SEEN, FOLDED, OF_A_LIST}


@contextmanager
def undone_on_error(network: nn.Module) -> Iterator[None]:
    """Change a network in place, or not at all."""
    modules = [(module, type(module), _shallow(vars(module))) for module in network.modules()]
    values = [(parameter, parameter.data) for parameter in network.parameters()]
    try:
        yield
    except BaseException:
        for module, cls, own in modules:
            module.__class__ = cls
            vars(module).clear()
            vars(module).update(own)
        for parameter, data in values:
            parameter.data = data
        raise


def _shallow(own: dict[str, Any]) -> dict[str, Any]:
    return {name: copy.copy(value) if isinstance(value, (dict, list, set)) else value for name, value in own.items()}
