"""What the state of a quantized network says about itself: how it was quantized, and whether it is calibrated."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_quant.errors import CheckpointError
from lightning_quant.precision import Precision
from lightning_quant.utilities.parsing import check, parse_as, short_repr
from lightning_quant.utilities.registry import Spec

FORMAT_VERSION = 1
MANIFEST_KEY = "lightning_quant"

_KINDS: dict[str, Any] = {
    "lightning_quant": str,
    "aimet_torch": str,
    "torch": str,
    "precision": Precision,
    "hardware": str,
    "overrides": dict[str, Precision],
    "calibrated": bool,
    "float_sha256": str | None,
    "equalized": bool,
    "raised": dict[str, Precision],
    "inputs": dict[str, Any] | None,
    "other_inputs": list[dict[str, Any]],
}
# What a file may lack.
_OPTIONAL: dict[str, Any] = {
    "calibrated": False,
    "float_sha256": None,
    "equalized": False,
    "raised": {},
    "inputs": None,
    "other_inputs": [],
}


@dataclass(frozen=True)
class Manifest:
    """How a network was quantized: part of its state, so of every checkpoint, and of exported bundles.

    Args:
        lightning_quant: version of this package that wrote it.
        aimet_torch: version of AIMET.
        torch: version of PyTorch.
        precision: bit widths of the whole network.
        hardware: AIMET hardware config: its alias, or name and hash of a file.
        overrides: precision of single layers, as glob on module names → precision.
        range_estimator: how ranges are calibrated: a name, or a name with options.
        calibrated: whether the ranges of the activations are known.
        float_sha256: hash of the weights of the float network.
        equalized: whether scale was shifted between channels.
        promoted: layers that were given a finer precision than the recipe says, to win accuracy back.
        inputs: structure, shapes and types of an example call, as
            :meth:`~lightning_quant.simulation.inputs.NetworkInputs.describe` returns them; ``None`` in
            files that lack it.
        other_inputs: the same of calls of other structure.
    """

    lightning_quant: str
    aimet_torch: str
    torch: str
    precision: Precision
    hardware: str
    overrides: Mapping[str, Precision]
    range_estimator: Spec
    calibrated: bool
    float_sha256: str | None
    equalized: bool
    promoted: Mapping[str, Precision]
    inputs: dict[str, Any] | None
    other_inputs: list[dict[str, Any]]

    @staticmethod
    def versions() -> dict[str, str]:
        """Return the versions that are installed, as arguments of a new manifest."""
        packages = ("lightning-quant", "aimet-torch", "torch")
        return {package.replace("-", "_"): importlib.metadata.version(package) for package in packages}

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            MANIFEST_KEY: self.lightning_quant,
            "format_version": FORMAT_VERSION,
            "aimet_torch": self.aimet_torch,
            "torch": self.torch,
            "precision": str(self.precision),
            "hardware": self.hardware,
            "overrides": _as_text(self.overrides),
            "range_estimator": self.range_estimator,
            "calibrated": self.calibrated,
            "float_sha256": self.float_sha256,
            "equalized": self.equalized,
            "raised": _as_text(self.promoted),
            "inputs": self.inputs,
            "other_inputs": self.other_inputs,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Manifest:
        """Read what :meth:`to_dict` returned. Other entries are ignored: a bundle's manifest has more.

        Raises:
            FieldError: naming the first entry that is missing or cannot be.
        """
        found: dict[str, Any] = {}
        for name, kind in _KINDS.items():
            check(name in values or name in _OPTIONAL, name, None, "the entry to be there")
            found[name] = parse_as(values[name], kind, name) if name in values else _OPTIONAL[name]
        found["promoted"] = found.pop("raised")
        estimator = values.get("range_estimator", "min_max")
        parse_as(estimator, str if isinstance(estimator, str) else dict[str, dict[str, Any]], "range_estimator")
        check(isinstance(estimator, str) or len(estimator) == 1, "range_estimator", estimator, "one name")
        return cls(**found, range_estimator=estimator)

    @classmethod
    def of_checkpoint(cls, state: Any) -> Manifest:
        """Read the state of a quantized network.

        Raises:
            CheckpointError: when it is not one, is damaged, or was written by a later format.
        """
        if not isinstance(state, dict) or MANIFEST_KEY not in state:
            raise CheckpointError(
                f"Expected the manifest of a quantized network, got {type(state).__name__}: the checkpoint "
                "was not written by lightning_quant."
            )
        version = state.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise CheckpointError(
                f"The checkpoint has format_version={short_repr(version)} (written by lightning_quant "
                f"{short_repr(state[MANIFEST_KEY])}), this version reads {FORMAT_VERSION}. Install a version that fits."
            )
        try:
            parse_as(state, dict[str, Any])
            return cls.from_dict(state)
        except ValueError as error:
            raise CheckpointError(
                f"The manifest in the checkpoint is damaged: {error}. Expected what lightning_quant wrote; use another "
                "checkpoint, or quantize again."
            ) from error


def _as_text(precisions: Mapping[str, Precision]) -> dict[str, str]:
    return {name: str(precision) for name, precision in precisions.items()}
