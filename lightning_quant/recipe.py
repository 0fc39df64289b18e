"""How a network is to be quantized, as plain values that YAML, Hydra and LightningCLI can hold."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_quant.errors import ConfigurationError
from lightning_quant.precision import Precision, int16_activations
from lightning_quant.simulation.range_estimators import MinMax, RangeEstimator
from lightning_quant.utilities.hashing import file_sha256
from lightning_quant.utilities.parsing import parse_as, read_json

# AIMET's own aliases, spelled out so that a typo is caught without the seconds that importing AIMET takes.
HARDWARE_CONFIGS = (
    "default",
    "enpu_v6",
    "enpu_v7",
    "htp_v66",
    "htp_v68",
    "htp_v69",
    "htp_v73",
    "htp_v75",
    "htp_v79",
    "htp_v81",
    "htp_v85",
)


@dataclass(frozen=True)
class QuantRecipe:
    """Everything that decides what the integers look like.

    Args:
        precision: bit widths of the whole network, e.g. ``"w8a8"``.
        hardware: AIMET hardware config that says which tensors the device quantizes and how: one of
            :data:`HARDWARE_CONFIGS` or the path of a JSON file in AIMET's format.
        calibration_samples: how many samples (images, not batches) the activation ranges are taken from.
        range_estimator: how a range follows from what was seen. ``"min_max"`` takes the extremes, ``"tf_enhanced"``
            the range with the highest signal-to-quantization-noise ratio, ``"percentile"`` cuts off the outermost
            0.01 % of the values on each side; another share with ``{"percentile": {"percentile": 99.9}}``. Or a
            :class:`RangeEstimator` of your own: an instance, or the dotted path of the class.
        overrides: precision of single layers, as glob on the network's module names → precision, e.g.
            ``{"head.*": "w8a16"}``. The last glob that matches a module wins.
        strict: make every finding of the preflight an error instead of a warning.

    Raises:
        ConfigurationError: for anything unknown or out of range, before AIMET is even imported.
    """

    precision: Precision = field(default_factory=lambda: Precision(8, 8))
    hardware: str = "htp_v75"
    calibration_samples: int = 256
    range_estimator: RangeEstimator = field(default_factory=MinMax)
    overrides: Mapping[str, Precision] = field(default_factory=dict)
    strict: bool = False

    def __post_init__(self) -> None:
        # Frozen, so parsed values go in through object.__setattr__.
        object.__setattr__(self, "precision", Precision.parse(self.precision))
        overrides = {str(glob): Precision.parse(value) for glob, value in dict(self.overrides or {}).items()}
        object.__setattr__(self, "overrides", overrides)
        _check_hardware(self.hardware)
        object.__setattr__(self, "range_estimator", RangeEstimator.parse(self.range_estimator))
        if not isinstance(self.calibration_samples, int) or self.calibration_samples < 1:
            raise ConfigurationError(
                f"calibration_samples={self.calibration_samples!r}: expected a whole number of samples of "
                "at least 1 (100 to 500 images are usual)."
            )

    @property
    def has_fine_grids(self) -> bool:
        """Whether it gives some layer activations with more than 8 bits."""
        return any(one.activation_bits > 8 for one in (self.precision, *self.overrides.values()))

    @property
    def int16_activations(self) -> str | None:
        """The part of the network with 16-bit activations; ``None`` without any."""
        return int16_activations(self.precision, self.overrides)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on to be the same quantized network, as JSON values."""
        hardware = self.hardware
        if hardware not in HARDWARE_CONFIGS:  # a file: its content counts, not where it lies
            file = Path(hardware)
            hardware = f"{file.name} (sha256 {file_sha256(file)[:12]})"
        return {
            "precision": str(self.precision),
            "hardware": hardware,
            "overrides": {glob: str(precision) for glob, precision in self.overrides.items()},
        }


def _check_hardware(hardware: str) -> None:
    if hardware in HARDWARE_CONFIGS:
        return
    if str(hardware).endswith(".json") and Path(hardware).is_file():
        try:
            parse_as(read_json(Path(hardware)), dict[str, Any])
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"The hardware config {str(hardware)!r} cannot be read: {error}. Expected a JSON file in AIMET's "
                "quantsim format."
            ) from error
        return
    near = difflib.get_close_matches(str(hardware), HARDWARE_CONFIGS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigurationError(
        f"Unknown hardware config {hardware!r}: expected one of {', '.join(HARDWARE_CONFIGS)}, or the path "
        f"of an existing JSON file in AIMET's quantsim format.{hint}"
    )
