"""What a report shows of every layer, kept next to the results record as ``layers.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_quant.errors import DataError
from lightning_quant.simulation.inputs import NetworkInputs
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.quantized_tensors import QuantizedTensor, quantized_tensors
from lightning_quant.simulation.sensitivity import LayerSensitivity, layer_sensitivity
from lightning_quant.utilities.files import atomic_write
from lightning_quant.utilities.parsing import check, check_version, is_finite, parse_as, read_json

LAYERS_NAME = "layers.json"
_FORMAT_VERSION = 1
_MOST_BITS = 32


@dataclass
class LayerFigures:
    """The inside of a quantized network, layer by layer.

    Args:
        tensors: every weight and activation with its integer grid.
        sensitivity: each layer's weights and activations alone quantized, the most sensitive first.
        drift: how ranges moved in training: for each quantizer, at the steps of :attr:`drift_steps`, the logarithm
            to base 2 of its largest scale relative to calibration; 1 is twice as coarse.
        drift_steps: the training steps at which :attr:`drift` was noted.
        oscillating: share of the weights whose integer turned back and forth, 0 to 1, at the steps of
            :attr:`oscillation_steps`.
        frozen: share of the weights that were frozen for it, likewise.
        oscillation_steps: the training steps at which both were noted; none where they were not.
    """

    tensors: list[QuantizedTensor] = field(default_factory=list)
    sensitivity: list[LayerSensitivity] = field(default_factory=list)
    drift: dict[str, list[float]] = field(default_factory=dict)
    drift_steps: list[int] = field(default_factory=list)
    oscillating: list[float] = field(default_factory=list)
    frozen: list[float] = field(default_factory=list)
    oscillation_steps: list[int] = field(default_factory=list)

    @classmethod
    def of(
        cls, network: QuantizedNetwork, samples: Sequence[NetworkInputs], sensitivity_samples: int = 2
    ) -> LayerFigures:
        """Look into a calibrated network.

        Args:
            network: the quantized network.
            samples: calls of it, of which histograms are made.
            sensitivity_samples: how many of them are run once for every layer and part; 0: no sensitivity.
        """
        tensors = quantized_tensors(network, samples, len(samples))
        found = layer_sensitivity(network, samples, sensitivity_samples) if sensitivity_samples else []
        return cls(tensors, found)

    def write(self, folder: str | Path) -> Path:
        """Write ``layers.json`` into ``folder``, whole or not at all."""
        path = Path(folder) / LAYERS_NAME
        values = asdict(self)
        for one in values["sensitivity"]:  # JSON has no infinity: nothing changed, or nothing was left
            one["sqnr_db"] = one["sqnr_db"] if math.isfinite(one["sqnr_db"]) else str(one["sqnr_db"])
        with atomic_write(path) as partial:
            partial.write_text(json.dumps({"format_version": _FORMAT_VERSION, **values}, allow_nan=False) + "\n")
        return path

    @classmethod
    def read(cls, folder: str | Path) -> LayerFigures:
        """Read ``layers.json`` of a folder.

        Raises:
            DataError: when it is missing, damaged or of another format.
        """
        path = Path(folder) / LAYERS_NAME
        try:
            values = read_json(path)
            check_version(values, _FORMAT_VERSION)
            del values["format_version"]
            for name in ("tensors", "sensitivity"):
                check(name in values, name, None, "the field to be there")
            values["sensitivity"] = [
                {**one, "sqnr_db": float(one["sqnr_db"])} if one.get("sqnr_db") in ("inf", "-inf") else one
                for one in parse_as(values["sensitivity"], list[dict[str, Any]], "sensitivity")
            ]
            figures: LayerFigures = parse_as(values, cls)
            for at, tensor in enumerate(figures.tensors):
                _check_tensor(tensor, f"tensors.{at}")
            for at, layer in enumerate(figures.sensitivity):
                check(
                    layer.part in ("weights", "activations"),
                    f"sensitivity.{at}.part",
                    layer.part,
                    "weights or activations",
                )
                check(not math.isnan(layer.sqnr_db), f"sensitivity.{at}.sqnr_db", layer.sqnr_db, "no NaN")
                check(0 <= layer.share <= 1, f"sensitivity.{at}.share", layer.share, "0 to 1")
                check(0 < layer.bits <= _MOST_BITS, f"sensitivity.{at}.bits", layer.bits, f"1 to {_MOST_BITS}")
            for name, curve in figures.drift.items():
                fits = len(curve) == len(figures.drift_steps) and is_finite(*curve)
                check(fits, f"drift.{name}", curve, "a finite number for each of drift_steps")
            for name, shares in {"oscillating": figures.oscillating, "frozen": figures.frozen}.items():
                fits = len(shares) == len(figures.oscillation_steps) and all(0 <= share <= 1 for share in shares)
                check(fits, name, shares, "a share from 0 to 1 for each of oscillation_steps")
            return figures
        except (OSError, ValueError) as error:
            raise DataError(f"{path} holds no figures of layers: {error}. Run again to write it.") from error


def _check_tensor(one: QuantizedTensor, where: str) -> None:
    check(0 < one.bits <= _MOST_BITS, f"{where}.bits", one.bits, f"1 to {_MOST_BITS}")
    check(one.channels > 0, f"{where}.channels", one.channels, "at least 1")
    wide = -(2**_MOST_BITS) <= one.qmin < one.qmax <= 2**_MOST_BITS
    check(wide, f"{where}.qmin", (one.qmin, one.qmax), "a smaller and a larger integer")
    check(0 < one.scale[0] <= one.scale[1] < math.inf, f"{where}.scale", one.scale, "scales above 0")
    check(one.offset[0] <= one.offset[1], f"{where}.offset", one.offset, "the smallest and the largest")
    check(one.low <= one.high and is_finite(one.low, one.high), f"{where}.low", (one.low, one.high), "a range")
    counted = bool(one.counts) and all(count >= 0 for count in one.counts)
    check(counted, f"{where}.counts", one.counts, "at least one count, each at least 0")
    check(one.bins[0] < one.bins[1] and is_finite(*one.bins), f"{where}.bins", one.bins, "a first and a last edge")
    check(0 <= one.clipped <= 1, f"{where}.clipped", one.clipped, "0 to 1")
    check(one.sqnr_db is None or is_finite(one.sqnr_db), f"{where}.sqnr_db", one.sqnr_db, "a finite number")
