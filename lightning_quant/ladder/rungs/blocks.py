"""The blocks of a network, and what goes into and comes out of one while the whole network runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.simulation.callsites.attributes import CONTAINERS
from lightning_quant.simulation.callsites.passes import current
from lightning_quant.simulation.callsites.watching import class_before_watch
from lightning_quant.simulation.inputs import NetworkInputs, tensors_in
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.precisions import quantized_layers
from lightning_quant.simulation.quantized_tensors import weight_parameters

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


@dataclass(frozen=True)
class Block:
    """A part of a network that is called once in a pass, and can be called alone.

    Args:
        name: of the module.
        layers: names of the layers in it whose weights are learned together, in the order in which they are called.
        numbers: how many go into its layers, and come out of them, for one sample.
    """

    name: str
    layers: tuple[str, ...]
    numbers: int


def learnable_layers(network: QuantizedNetwork) -> dict[str, str]:
    """Return the names of the layers whose rounded weight is a parameter that nothing else uses, and of these.

    Where the network's own code calls a function, that is the layer at the call site, and a parameter of the module
    which calls it. Not those that share a weight, be it with an embedding, nor weights that are computed.
    """
    layers = quantized_layers(network)
    found = {name: one for name, one in weight_parameters(network).items() if isinstance(layers[name], _LAYERS)}
    owned = Counter(id(one) for module in network.network.modules() for one in module._parameters.values())
    users = Counter(id(network.network.get_parameter(parameter)) for parameter in found.values())
    once = {one for one, count in users.items() if count == owned[one] == 1}
    return {name: one for name, one in found.items() if id(network.network.get_parameter(one)) in once}


def find_blocks(
    network: nn.Module, layers: Mapping[str, str], calls: Sequence[NetworkInputs], most: int
) -> dict[Block, list[NetworkInputs]]:
    """Return the blocks of a network, in the order in which they are called, with the calls that come to all of each.

    A block is the outermost module, no plain sequence or list, with at most ``most`` of the layers and with their
    weights, which computes the same when it is called alone; a layer that is in none is a block of its own. Layers that
    are called several times in a pass are in none.

    Args:
        network: in eval mode.
        layers: names of the layers that count, and of their weights.
        calls: what the network is called with; some may come to other layers than others.
        most: 1 makes each layer a block.
    """
    modules = dict(network.named_modules())
    passes = [_Pass(modules) for _ in calls]
    for call, seen in zip(calls, passes, strict=True):
        with seen.noted(), torch.no_grad():
            call.call(network)
    left = set(layers)
    found = {}
    for call, seen in zip(calls, passes, strict=True):
        once = {name: layers[name] for name in left if seen.count[name] == 1}
        blocks = _blocks(network, modules, once, call, seen, most)
        left.difference_update(*(block.layers for block in blocks))
        for block in blocks:
            parts = (block.name, *block.layers)
            found[block] = [
                one for one, other in zip(calls, passes, strict=True) if all(other.count[part] == 1 for part in parts)
            ]
    return found


def _blocks(
    network: nn.Module,
    modules: Mapping[str, nn.Module],
    once: Mapping[str, str],
    call: NetworkInputs,
    seen: _Pass,
    most: int,
) -> list[Block]:
    """Return the blocks of the layers that are called once in a pass."""
    left = set(once)
    found = []
    for name, module in modules.items() if once else ():  # outer ones before those in them
        start = f"{name}." if name else ""
        inside = tuple(layer for layer in once if layer == name or layer.startswith(start))
        if not inside or not left.issuperset(inside) or not all(once[layer].startswith(start) for layer in inside):
            continue
        if name in once or (
            len(inside) <= most
            and class_before_watch(module) not in CONTAINERS
            and seen.count[name] == 1
            and _computes_alone(network, module, call)
        ):
            inside = tuple(sorted(inside, key=lambda layer: seen.order[layer]))
            numbers = sum(seen.numbers[layer] for layer in inside) // max(call.batch_size, 1)
            found.append(Block(name, inside, numbers))
            left.difference_update(inside)
    return sorted(found, key=lambda block: seen.order[block.name])


class _Pass:
    """How often modules are called in a pass, in which order they end, and how many numbers go in and come out."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules
        self.count: Counter[str] = Counter()
        self.order: dict[str, int] = {}
        self.numbers: Counter[str] = Counter()

    @contextmanager
    def noted(self) -> Iterator[None]:
        handles = [
            module.register_forward_hook(partial(self._note, name), with_kwargs=True)
            for name, module in self.modules.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.count[name] += 1
        self.numbers[name] += sum(tensor.numel() for tensor in tensors_in((args, kwargs, output)))
        self.order.setdefault(name, len(self.order))


class _hooks:
    """Call functions before the forward of modules for the length of a block."""

    def __init__(self, wanted: Iterable[tuple[nn.Module, Any]]) -> None:
        self.handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in wanted]

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()


class _Reached(BaseException):
    """Ends a pass where there is no more to see; not an ``Exception``, which the network's own code may catch."""


def inputs_of(network: nn.Module, module: nn.Module, call: NetworkInputs) -> NetworkInputs:
    """Run the network up to a module; return what it is called with."""
    found: list[NetworkInputs] = []

    def take(module: nn.Module, args: Any, kwargs: Any) -> None:
        found.append(NetworkInputs(current(args), current(kwargs)).map(_kept))
        raise _Reached

    with _hooks([(module, take)]), torch.no_grad(), suppress(_Reached):
        call.call(network)
    return found[0]


def passed_through(network: nn.Module, module: nn.Module, call: NetworkInputs) -> tuple[NetworkInputs, list[Tensor]]:
    """Run the network up to the end of a module; return what it is called with, and the tensors that it returns."""
    found: list[Any] = []

    def take(module: nn.Module, args: Any, kwargs: Any) -> None:
        found.append(NetworkInputs(current(args), current(kwargs)).map(_kept))

    def end(module: nn.Module, args: Any, output: Any) -> None:
        found.append(outputs_in(output))
        raise _Reached

    handle = module.register_forward_hook(end)
    try:
        with _hooks([(module, take)]), torch.no_grad(), suppress(_Reached):
            call.call(network)
    finally:
        handle.remove()
    return found[0], found[1]


def outputs_in(output: Any) -> list[Tensor]:
    """Return the float tensors that a module returned."""
    return [tensor.as_subclass(Tensor) for tensor in tensors_in(current(output)) if tensor.is_floating_point()]


def _computes_alone(network: nn.Module, module: nn.Module, call: NetworkInputs) -> bool:
    """Return whether a module computes from its arguments alone what it computes within the network."""
    given, expected = passed_through(network, module, call)
    try:
        with torch.no_grad():
            alone = outputs_in(given.call(module))
    except Exception:  # whatever it lacks
        return False
    return bool(expected) and _equal(alone, expected)


def _equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(some, others, strict=True)
    )


def _kept(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Tensor).detach().clone()


def pieces(calls: Iterable[NetworkInputs], samples: int) -> Iterator[NetworkInputs]:
    """Yield calls of at most so many samples."""
    for call in calls:
        for start in range(0, max(call.batch_size, 1), samples):
            yield call.samples(start, start + samples)
