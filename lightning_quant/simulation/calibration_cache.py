"""What a calibration pass saw, kept on disk: one pass serves every precision with the same width of weights.

While ranges are calibrated, activations pass through the quantizers unrounded, so what they see depends on the network,
its quantized weights and the data; not on the width of the activations. W8A8 and W8A16 come to exactly the ranges that
a pass of their own would give them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from lightning_quant.simulation import aimet
from lightning_quant.simulation.fixed_ranges import fixed_range
from lightning_quant.simulation.inputs import NetworkInputs
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.precisions import quantized_layers
from lightning_quant.simulation.unlike_ranges import Ends
from lightning_quant.utilities.files import atomic_write
from lightning_quant.utilities.hashing import add_tensor
from lightning_quant.utilities.parsing import check, read_arrays

log = logging.getLogger(__name__)

_FIELDS = ("histogram", "bin_edges", "min", "max")
_JOINED = "joined"


@dataclass
class Statistics:
    """What the quantizers of a network saw of some data.

    Attributes:
        data: hash of the data.
        samples: how many samples it held.
        seen: for each quantizer that saw something, its observer's statistics by name.
        joined: what concatenations join, by the name of the layer.
    """

    data: str
    samples: int
    seen: dict[str, dict[str, np.ndarray]]
    joined: dict[str, Ends]

    @classmethod
    def of(cls, network: QuantizedNetwork, data: str, samples: int, joined: dict[str, Ends]) -> Statistics:
        """Copy what the observers of a network hold."""
        seen = {}
        for name, observer in _observers(network).items():
            stats = observer.stats if isinstance(observer.stats, list) else [observer.stats]
            arrays = {
                field: torch.stack([getattr(one, field) for one in stats]).numpy()
                for field in _FIELDS
                if getattr(stats[0], field, None) is not None
            }
            if arrays:
                seen[name] = arrays
        return cls(data, samples, seen, joined)

    def fits(self, network: QuantizedNetwork) -> bool:
        """Return whether the observers of a network are those that saw this, by their number of ranges and of bins."""
        if not self.joined.keys() <= quantized_layers(network).keys():
            return False
        observers = _observers(network)
        for name, arrays in self.seen.items():
            if name not in observers:
                return False
            stats, bins = observers[name].stats, getattr(observers[name], "num_bins", None)
            rows = len(stats) if isinstance(stats, list) else 1
            shape = arrays["histogram"].shape if "histogram" in arrays else None
            range_shape = (rows,) if isinstance(stats, list) else (rows, *observers[name].shape)
            if arrays["min"].shape != range_shape or shape != (None if bins is None else (rows, bins)):
                return False
        return True

    def give(self, network: QuantizedNetwork) -> None:
        """Replace what the observers of a network hold with this."""
        for name, observer in _observers(network).items():
            observer.reset_stats()
            if name not in self.seen:
                continue
            tensors = {field: torch.from_numpy(array) for field, array in self.seen[name].items()}
            rows: Iterable[dict[str, Tensor]] = (
                dict(zip(tensors, row, strict=True)) for row in zip(*tensors.values(), strict=True)
            )
            if isinstance(observer.stats, list):
                observer.stats = [aimet._Histogram(**row) for row in rows]
            else:
                (observer.stats,) = (aimet._MinMaxRange(**row) for row in rows)


class StatisticsCache:
    """A folder of :class:`Statistics`, safe to share between processes.

    Args:
        folder: made when it is needed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    @contextmanager
    def locked(self, network: QuantizedNetwork) -> Iterator[Path]:
        """Lock the file of a network whose weights have their ranges already; other processes wait meanwhile."""
        path = self.folder / f"{_key(network)}.npz"
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            yield path


def read(path: Path) -> Statistics | None:
    """Return the statistics in a file; ``None`` when there are none, or they are damaged."""
    if not path.is_file():
        return None
    try:
        stored = read_arrays(path)
        data, samples = stored.pop("data"), stored.pop("samples")
        check(data.shape == () and data.dtype.kind == "U", "data", data, "a hash")
        check(samples.shape == () and samples.dtype.kind == "i" and int(samples) > 0, "samples", samples, "at least 1")
        seen: dict[str, dict[str, np.ndarray]] = {}
        joined: dict[str, Ends] = {}
        for key, array in stored.items():
            name, _, field = key.partition("|")
            if field == _JOINED:
                check(array.dtype.kind == "f" and array.shape[1:] == (2,), key, array, "two ends for each tensor")
                joined[name] = [(low, high) for low, high in array.tolist()]
                continue
            check(field in _FIELDS, key, array, f"one of {', '.join((*_FIELDS, _JOINED))}")
            seen.setdefault(name, {})[field] = array
        for name, arrays in seen.items():
            _check_arrays(name, arrays)
        return Statistics(str(data), int(samples), seen, joined)
    except Exception as error:  # truncated, or not one of ours: calibration writes it again
        log.warning("Calibrating again: %s cannot be read (%s: %s).", path, type(error).__name__, error)
        return None


def _check_arrays(name: str, arrays: dict[str, np.ndarray]) -> None:
    check(arrays.keys() in ({"min", "max"}, set(_FIELDS)), name, list(arrays), "a range, with a histogram or without")
    for field, array in arrays.items():
        check(array.dtype.kind == "f" and bool(np.isfinite(array).all()), f"{name}|{field}", array, "finite numbers")
    low, high = arrays["min"], arrays["max"]
    check(low.shape == high.shape and bool((low <= high).all()), f"{name}|min", low, "no more than max")
    if "histogram" in arrays:
        counts, edges = arrays["histogram"], arrays["bin_edges"]
        shapes = (
            counts.ndim == 2 and edges.shape == (counts.shape[0], counts.shape[1] + 1) and low.shape == edges.shape[:1]
        )
        check(shapes and bool((counts >= 0).all()), f"{name}|histogram", counts, "a row of counts for each range")
        check(bool((np.diff(edges) >= 0).all()), f"{name}|bin_edges", edges, "rising edges")


def write(path: Path, statistics: Statistics) -> None:
    """Write statistics to a file, whole or not at all."""
    arrays = {f"{name}|{field}": array for name, fields in statistics.seen.items() for field, array in fields.items()}
    arrays |= {f"{name}|{_JOINED}": np.array(ends).reshape(-1, 2) for name, ends in statistics.joined.items()}
    with atomic_write(path) as partial:
        np.savez(partial, data=statistics.data, samples=statistics.samples, **arrays)  # type: ignore[arg-type]


class DataHash:
    """Hash of calls of a network, one after the other."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, call: NetworkInputs) -> None:
        """Add the tensors of one call."""
        for tensor in call.tensors:
            add_tensor(self._digest, "", tensor)

    def __str__(self) -> str:
        return self._digest.hexdigest()


def _observers(network: QuantizedNetwork) -> dict[str, Any]:
    """Return the observers of all activations, by the name of their quantizer."""
    modules: Any = network.network.named_modules()
    return {
        name: module.encoding_analyzer.observer
        for name, module in modules
        if hasattr(module, "encoding_analyzer") and ".param_quantizers." not in f".{name}"
    }


def _key(network: QuantizedNetwork) -> str:
    """Identify what the activations depend on: the network, its weights and their grids, and what observes."""
    digest = hashlib.sha256()
    for package in ("lightning-quant", "aimet-torch", "torch"):
        digest.update(f"{package} {importlib.metadata.version(package)} ".encode())
    observers = _observers(network)
    for name, module in network.network.named_modules():
        if name in observers:
            observer, is_fixed = observers[name], fixed_range(module) is not None
            bins = getattr(observer, "num_bins", "min and max")
            digest.update(f"{name} {observer.shape} {bins} {'fixed' if is_fixed else ''} ".encode())
            continue
        kind = type(module)
        digest.update(f"{name} {kind.__name__} {module.extra_repr()} {getattr(module, 'code', '')} ".encode())
        for own, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            add_tensor(digest, f"{name}.{own}", tensor)
    return digest.hexdigest()[:32]
