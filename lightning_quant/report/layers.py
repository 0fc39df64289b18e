"""What a report shows of every layer, kept beside the results record as ``layers.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lightning_quant.errors import DataError
from lightning_quant.files import replacing
from lightning_quant.simulation.inputs import NetworkInputs
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.quantized_tensors import QuantizedTensor, quantized_tensors
from lightning_quant.simulation.sensitivity import LayerSensitivity, layer_sensitivity

LAYERS_NAME = "layers.json"
_FORMAT_VERSION = 1


@dataclass
class LayerFigures:
    """The inside of a quantized network, layer by layer.

    Args:
        tensors: every weight and activation with its integer grid.
        sensitivity: each layer's weights and activations alone quantized, the most sensitive first.
        drift: how ranges moved in training: for each quantizer, at the steps of :attr:`drift_steps`, the logarithm
            to base 2 of its largest step length relative to calibration; 1 is twice as coarse.
        drift_steps: the training steps at which :attr:`drift` was noted.
    """

    tensors: list[QuantizedTensor] = field(default_factory=list)
    sensitivity: list[LayerSensitivity] = field(default_factory=list)
    drift: dict[str, list[float]] = field(default_factory=dict)
    drift_steps: list[int] = field(default_factory=list)

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
        with replacing(path) as partial:
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
            values = json.loads(path.read_text())
            version = values.pop("format_version")
            if version != _FORMAT_VERSION:
                raise DataError(f"{path} has format_version={version!r}; this version reads {_FORMAT_VERSION}.")
            tensors = [QuantizedTensor(**one) for one in values.pop("tensors")]
            found = [
                LayerSensitivity(**{**one, "sqnr_db": float(one["sqnr_db"]), "quantizers": tuple(one["quantizers"])})
                for one in values.pop("sensitivity")
            ]
            return cls(tensors, found, **values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} holds no figures of layers: {error!r}. Run again to write it anew.") from error
