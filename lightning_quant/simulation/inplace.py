"""Changing a user's network in place: whole or not at all, and nothing else in it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.simulation.callsites.attributes import FOLDED, LIST_SITES, SEEN, SITES


def copied(network: nn.Module) -> nn.Module:
    """Return a deep copy; tensors that a pass left in attributes are copied without their graph."""
    memo: dict[int, Any] = {}
    for module in network.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    with torch.inference_mode(False):
        return copy.deepcopy(network, memo)


def separate_shared_activations(network: nn.Module) -> None:
    """Give each place its own module where several, or several networks, share one without weights.

    Libraries keep one activation for all layers, often as an attribute of the layer's class: what is changed in it
    would change in every network that was built in this process, and its quantizers would be those of a hundred places.

    Args:
        network: changed in place.
    """
    places = [(parent, name, child) for parent in network.modules() for name, child in parent._modules.items()]
    counts = Counter(child for _, _, child in places)
    of_classes = {
        id(value)
        for cls in {cls for module in network.modules() for cls in type(module).__mro__}
        for value in vars(cls).values()
        if isinstance(value, nn.Module)
    }
    for parent, name, child in places:
        if child is None:
            continue
        shared = counts[child] > 1 or id(child) in of_classes
        if shared and next(chain(child.parameters(), child.buffers()), None) is None:
            parent._modules[name] = _separate_copy(child)


def _separate_copy(module: nn.Module) -> nn.Module:
    """Return a module with children of its own that shares the hooks and the state of the other."""
    made = copy.copy(module)
    for part in ("_parameters", "_buffers"):
        made.__dict__[part] = dict(module.__dict__[part])
    made.__dict__["_modules"] = {
        name: None if child is None else _separate_copy(child) for name, child in module._modules.items()
    }
    return made


@contextmanager
def state_kept(network: nn.Module) -> Iterator[None]:
    """Run a network in a block and leave what it keeps from pass to pass as it was: counters, caches, buffers.

    Args:
        network: the network; AIMET's layers in it keep nothing of the user's.
    """
    own_modules = [module for module in network.modules() if not _is_aimets(module)]
    plain = {module: (_shallow(_plain_state(module)), dict(module._buffers)) for module in own_modules}
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    try:
        yield
    finally:
        for module, (before, held) in plain.items():
            if _is_aimets(module):  # it became one meanwhile
                continue
            _filled(module._buffers, held)  # a buffer can be reassigned: self.mean = ...
            own = vars(module)
            for name in _plain_state(module).keys() - before.keys():
                del own[name]
            for name, value in before.items():
                own[name] = _filled(own.get(name), value)
        for buffer, values in buffers:
            if not torch.equal(buffer, values):
                buffer.copy_(values)


def _is_aimets(module: nn.Module) -> bool:
    return hasattr(module, "param_quantizers") or "aimet_torch" in type(module).__module__


def _plain_state(module: nn.Module) -> dict[str, Any]:
    """Return attributes of the user's own: neither PyTorch's nor this package's."""
    return {name: v for name, v in vars(module).items() if name not in _NOT_THE_USERS and not isinstance(v, nn.Module)}


_NOT_THE_USERS = {*vars(nn.Module()), SITES, SEEN, FOLDED, LIST_SITES}


@contextmanager
def undone_on_error(network: nn.Module) -> Iterator[None]:
    """Change a network in place, or not at all."""
    # the collections themselves come back, not copies: handles of hooks remove theirs from the one they know
    modules = [(m, type(m), dict(vars(m)), _shallow(vars(m))) for m in network.modules()]
    values = [(parameter, parameter.data) for parameter in network.parameters()]
    try:
        yield
    except BaseException:
        for module, cls, own, contents in modules:
            module.__class__ = cls
            vars(module).clear()
            vars(module).update({name: _filled(value, contents[name]) for name, value in own.items()})
        for parameter, data in values:
            parameter.data = data
        raise


def _filled(now: Any, before: Any) -> Any:
    """Return the current collection with its former contents, or the former value if it is not a collection."""
    if isinstance(now, list) and isinstance(before, list):
        now[:] = before
        return now
    if isinstance(now, (dict, set)) and isinstance(before, type(now)):
        now.clear()
        now.update(before)
        return now
    return before


def _shallow(own: dict[str, Any]) -> dict[str, Any]:
    return {name: copy.copy(value) if isinstance(value, (dict, list, set)) else value for name, value in own.items()}
