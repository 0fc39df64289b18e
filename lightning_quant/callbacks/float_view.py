"""A quantized network seen as the float one, for code that goes through its modules and parameters."""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from lightning_quant.simulation import aimet
from lightning_quant.simulation.callsites.attributes import is_at_call_site

_CONTAINERS = ("input_quantizers", "output_quantizers", "param_quantizers")


@contextmanager
def without_quantizers(network: nn.Module) -> Iterator[dict[nn.Module, list[nn.Module]]]:
    """Hide the quantizers from the tree of modules for the length of a block.

    ``modules()``, ``children()``, ``parameters()`` and ``state_dict()`` then list the float network alone, names and
    order included. Access to a quantizer by name still works, so the network runs as before.

    Yields:
        The hidden quantizers, by the module that they belong to, in the order of the network's modules.
    """
    hidden_quantizers: dict[nn.Module, list[nn.Module]] = {}
    inside: set[nn.Module] = set()
    for module in list(network.modules()):
        if module not in inside and (names := _quantizers_of(module)):
            hidden_quantizers[module] = [module._modules[name] for name in names]  # type: ignore[misc]
            inside.update(part for quantizer in hidden_quantizers[module] for part in quantizer.modules())
    hidden = {module: {*_quantizers_of(module)} for module in hidden_quantizers}
    for module in network.modules():
        if sites := _sites_of(module):
            hidden.setdefault(module, set()).update(sites)
    whole = {module: module._modules for module in hidden}
    try:
        for module, children in whole.items():
            module.__dict__["_modules"] = _WithoutQuantizers(children, hidden[module])
        yield hidden_quantizers
    finally:
        for module, children in whole.items():
            now: Any = module._modules
            module.__dict__["_modules"] = children
            children.clear()
            children.update(dict.items(now))  # with whatever the block added


@contextmanager
def computing_float(network: nn.Module) -> Iterator[None]:
    """Let a network compute without its quantizers for the length of a block."""
    with ExitStack() as off:
        for module in network.modules():
            if isinstance(module, aimet.BaseQuantizationMixin):
                off.enter_context(module._remove_all_quantizers())
        yield


def _quantizers_of(module: nn.Module) -> list[str]:
    """Return the names of a module's children that quantization added, in their order.

    Ranges enter optimizers in it, which a checkpoint holds by their places: it may not differ between processes.
    """
    names = _CONTAINERS if isinstance(module, aimet.BaseQuantizationMixin) else ()
    children = module._modules.items()
    return [
        name
        for name, child in children
        if child is not None and (name in names or isinstance(child, aimet.QuantizerBase))
    ]


def _sites_of(module: nn.Module) -> list[str]:
    """Return the names of a module's children that compute its functional operations."""
    children = module._modules.items()
    return [name for name, child in children if child is not None and is_at_call_site(child)]


class _WithoutQuantizers(dict[str, Any]):
    """The children of a module, some of which are found by name only."""

    def __init__(self, children: dict[str, Any], hidden: Set[str]) -> None:
        super().__init__(children)
        self._hidden = hidden

    def _shown(self) -> dict[str, Any]:
        return {name: child for name, child in super().items() if name not in self._hidden}

    def __iter__(self) -> Iterator[str]:
        return iter(self._shown())

    def __len__(self) -> int:
        return len(self._shown())

    def keys(self) -> Any:
        return self._shown().keys()

    def values(self) -> Any:
        return self._shown().values()

    def items(self) -> Any:
        return self._shown().items()
