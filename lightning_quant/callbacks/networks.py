"""The network inside a LightningModule, by its dotted attribute."""

from __future__ import annotations

import difflib
from typing import Any

import lightning.pytorch as pl
from torch import nn

from lightning_quant.callbacks.lightning_packages import either
from lightning_quant.errors import ConfigurationError
from lightning_quant.simulation.network import QuantizedNetwork


def find_network(pl_module: pl.LightningModule, name: str) -> nn.Module:
    """Return the float network at the dotted attribute ``name``.

    Raises:
        ConfigurationError: when there is none, or what is there is compiled or a LightningModule.
    """
    owner: Any = pl_module
    for part in name.split("."):
        if not hasattr(owner, part):
            known = [key for key, _ in owner.named_children()] if isinstance(owner, nn.Module) else []
            near = difflib.get_close_matches(part, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigurationError(
                f"network={name!r}: {type(owner).__name__} has no attribute {part!r}; expected one of its modules: "
                f"{', '.join(known) or 'it has none'}.{hint} (It may be made in __init__, setup or configure_model.)"
            )
        owner = getattr(owner, part)
    if not isinstance(owner, nn.Module):
        raise ConfigurationError(
            f"network={name!r} is {type(owner).__name__}: expected an nn.Module. Name the attribute of "
            f"{type(pl_module).__name__} that holds the network."
        )
    if hasattr(owner, "_orig_mod"):
        raise ConfigurationError(
            f"network={name!r} was compiled: expected the plain nn.Module, since quantization changes it. Remove "
            "torch.compile(); QuantizationAwareTraining(compile=True) compiles the quantized network."
        )
    if isinstance(owner, either(pl.LightningModule)):
        raise ConfigurationError(
            f"network={name!r} is a LightningModule: expected the plain nn.Module inside it, without metrics and "
            f"losses, e.g. network='{name}.model'."
        )
    return owner


def quantized_networks(pl_module: pl.LightningModule) -> dict[str, QuantizedNetwork]:
    """Return the quantized networks of a module, by their dotted attributes."""
    return dict(QuantizedNetwork.named_in(pl_module))
