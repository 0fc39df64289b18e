"""Blocks whose rounding was learned, kept on disk: a run that was ended goes on with the next one."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_quant.ladder.rungs.soft_weight import SoftWeight
from lightning_quant.simulation.calibration_cache import DataHash, StatisticsCache
from lightning_quant.simulation.inputs import NetworkInputs
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.utilities.files import atomic_write
from lightning_quant.utilities.hashing import add_tensor
from lightning_quant.utilities.parsing import check, read_arrays

log = logging.getLogger(__name__)


class LearnedBlocks:
    """The roundings that were learned from a network, in a folder of the calibration cache.

    Args:
        cache: where.
        network: as it is before the first block is learned.
        calls: what is learned from.
        options: of the rung.
    """

    def __init__(
        self,
        cache: StatisticsCache,
        network: QuantizedNetwork,
        calls: Sequence[NetworkInputs],
        options: Mapping[str, Any],
    ) -> None:
        asked = {"options": options, "manifest": network.manifest().to_dict()}
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True, default=repr).encode())
        for name, tensor in network.network.state_dict().items():
            if isinstance(tensor, torch.Tensor):
                add_tensor(digest, name, tensor)
        data = DataHash()
        for call in calls:
            data.add(call)
        digest.update(str(data).encode())
        self._folder = cache.folder / f"rounding-{digest.hexdigest()[:32]}"

    def recall(self, block: int, weights: Mapping[str, SoftWeight]) -> bool:
        """Round the weights of a block as it was learned before; return whether it was."""
        path = self._path(block)
        if not path.is_file():
            return False
        try:
            stored = read_arrays(path)
            check(stored.keys() == weights.keys(), "layers", list(stored), f"those of the block: {list(weights)}")
            for name, upwards in stored.items():
                shape = tuple(weights[name].logits.shape)
                check(upwards.dtype == np.bool_ and upwards.shape == shape, name, upwards, f"true or false, {shape}")
        except Exception as error:  # truncated, or not one of ours
            log.warning("Learning again: %s cannot be read (%s: %s).", path, type(error).__name__, error)
            return False
        for name, upwards in stored.items():
            weights[name].decide(torch.from_numpy(upwards).to(weights[name].logits.device))
        return True

    def keep(self, block: int, weights: Mapping[str, SoftWeight]) -> None:
        """Write down what was learned."""
        arrays: dict[str, Any] = {name: weight.upwards.cpu().numpy() for name, weight in weights.items()}
        with atomic_write(self._path(block)) as partial:
            np.savez(partial, **arrays)  # uncompressed, as read_arrays wants it

    def _path(self, block: int) -> Path:
        return self._folder / f"{block}.npz"
