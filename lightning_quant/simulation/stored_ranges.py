"""Ranges in a checkpoint, for the quantizers of this version: which tensors are rounded changes between versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lightning_quant.errors import CheckpointError
from lightning_quant.simulation.callsites.attributes import QUANTIZERS, is_range
from lightning_quant.utilities.parsing import short_repr


def check_stored_ranges(network: nn.Module, state: Mapping[str, Any], prefix: str) -> None:
    """Refuse the ranges of a simulation that rounds other tensors than a network does.

    Args:
        network: the quantized network.
        state: what is about to be loaded into it, or into a module that holds it. Of one with the weights of another
            network PyTorch lists the keys.
        prefix: of the network's keys there.

    Raises:
        CheckpointError: for a range too many or too few, and for two ranges that are one in this network.
    """
    stored = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    mine = network.state_dict(keep_vars=True)
    if _without_quantizers(stored) != _without_quantizers(mine):
        return
    old, new = (set(filter(is_range, names)) for names in (stored, mine))
    if old != new:
        name = min(old ^ new)
        which = "rounded there and not here" if name in old else "rounded here and not there"
        raise _refusal(stored, f"{name.rpartition('.')[0]!r} is {which}")
    first: dict[int, str] = {}
    for name in sorted(new):
        like = first.setdefault(id(mine[name]), name)
        if not torch.equal(stored[name], stored[like]):
            raise _refusal(stored, f"{like!r} and {name!r} are one range here and two there")


def _without_quantizers(names: Mapping[str, Any]) -> set[str]:
    return {name for name in names if not any(f"{part}." in name for part in QUANTIZERS)}


def _refusal(stored: Mapping[str, Any], difference: str) -> CheckpointError:
    manifest = stored.get("_extra_state")
    version = manifest.get("lightning_quant") if isinstance(manifest, Mapping) else None
    return CheckpointError(
        f"The checkpoint was written by lightning_quant {short_repr(version)}, whose simulation rounds other tensors: "
        f"{difference}. Load it with that version, or quantize the float network again."
    )
