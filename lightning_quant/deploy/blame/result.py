"""What was found: two figures for each layer, and the reasons where they are known."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from lightning_quant.deploy.blame.differences import Difference
from lightning_quant.deploy.parity import LOWEST_PSNR, Parity


class Cause(Enum):
    """Why a layer computes something else than its reference. The value stands in JSON."""

    NOT_ROUNDED = "not_rounded"
    SCALE = "scale"
    ZERO_POINT = "zero_point"
    BITS = "bits"
    WEIGHTS = "weights"
    WEIGHTS_PERMUTED = "weights_permuted"
    BIAS = "bias"
    BIAS_MISSING = "bias_missing"
    OPERATION = "operation"


@dataclass(frozen=True)
class Reason:
    """One cause in one layer, with what was measured of it.

    Args:
        cause: which one.
        parameter: the parameter that it is about; empty for activations.
        expected: the simulation's value: scale, zero point or bits.
        found: the file's value.
        share: share of the parameter's values that are others, 0 to 1.
        channels: the channels that they are in, along the parameter's first axis.
    """

    cause: Cause
    parameter: str = ""
    expected: float | None = None
    found: float | None = None
    share: float | None = None
    channels: tuple[int, ...] = ()

    def __str__(self) -> str:
        """Return it as a clause."""
        share = "" if self.share is None else f"{self.share:.2%}"
        channels = ", ".join(map(str, self.channels[:4])) + (", …" if len(self.channels) > 4 else "")
        where = f" (channel {channels})" if channels else ""
        match self.cause:
            case Cause.NOT_ROUNDED:
                return "its output is not rounded in the file: an encoding is missing"
            case Cause.SCALE:
                of = f" of {self.parameter}" if self.parameter else ""
                return f"scale{of} {self.found:.6g} instead of {self.expected:.6g}{where}"
            case Cause.ZERO_POINT:
                return f"zero point {self.found:.0f} instead of {self.expected:.0f}"
            case Cause.BITS:
                return f"{self.found:.0f} bits instead of {self.expected:.0f}"
            case Cause.WEIGHTS_PERMUTED:
                return f"channels of {self.parameter} in another order{where}"
            case Cause.WEIGHTS | Cause.BIAS:
                return f"{share} of the values of {self.parameter} differ{where}"
            case Cause.BIAS_MISSING:
                return f"{self.parameter} is missing"
            case Cause.OPERATION:
                return "same parameters and grids, other results: another operation, or other attributes of it"


@dataclass(frozen=True)
class LayerBlame:
    """One tensor that is rounded, and what computes it.

    Args:
        layer: the user's module: the one with weights, where several are computed together.
        tensor: name in the ONNX file.
        modules: all modules that are computed together.
        own: the error that the layer adds by itself, its inputs taken from the reference.
        arrived: the error after it in the whole file, with what the layers before it added.
        reasons: why it adds more than rounding explains; empty where it does not.
    """

    layer: str
    tensor: str
    modules: tuple[str, ...]
    own: Difference
    arrived: Difference
    reasons: tuple[Reason, ...] = ()

    @property
    def guilty(self) -> bool:
        """Whether it computes something else than its reference, more than sums in another order explain."""
        return bool(self.reasons)


@dataclass(frozen=True)
class Blame:
    """Where a file computes something else than the simulation that it was exported from.

    Args:
        layers: in the order of computation.
        output: agreement of the outputs.
        samples: how many samples were compared.
        observed_runs: whether the file with added outputs, which was looked at, returns what the file returns, to the
            bit. Where it does not, the figures of single layers are not those of the file.
        unmatched: tensors that are rounded in the file and were not found in the simulation; they are part of the layer
            behind them.
    """

    layers: tuple[LayerBlame, ...]
    output: Parity
    samples: int
    observed_runs: bool
    unmatched: tuple[str, ...] = ()

    @property
    def guilty(self) -> list[LayerBlame]:
        """The layers that compute something else, in the order of computation; none in a file that is right."""
        return [one for one in self.layers if one.guilty]

    @property
    def first(self) -> LayerBlame | None:
        """The first of them."""
        return next(iter(self.guilty), None)

    @property
    def advice(self) -> str:
        """What to do next; empty where every layer is right."""
        causes = {reason.cause for one in self.guilty for reason in one.reasons}
        if not causes:
            return ""
        if causes == {Cause.OPERATION}:
            return "Please report it with the network and the file."
        return (
            'The file is not what this network exports: lq.export_bundle(module.model, "export/net", samples) writes '
            "another. If it was just exported, please report it with the network and the file."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; an infinite PSNR as ``None``."""
        made = asdict(self)
        made["output"] = self.output.to_dict()
        for layer in made["layers"]:
            for figures in (layer["own"], layer["arrived"]):
                figures.update({name: None for name, value in figures.items() if value == math.inf})
                if figures["psnr_db"] is not None:
                    figures["psnr_db"] = max(figures["psnr_db"], LOWEST_PSNR)
            for reason in layer["reasons"]:
                reason["cause"] = reason["cause"].value
        return made

    def __str__(self) -> str:
        """Return a table: one line for each layer, the guilty ones marked."""
        rows = [("", "layer", "adds", "values", "arrived", "why")]
        for one in self.layers:
            why = "; ".join(map(str, one.reasons))
            mark = "→" if one.guilty else ""
            rows.append((mark, one.layer, _decibels(one.own), f"{one.own.differing:.2%}", _decibels(one.arrived), why))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[5]]).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, "", self._verdict()])

    def _verdict(self) -> str:
        said = [f"Output: {self.output} over {self.samples} samples."]
        if not self.guilty:
            said.append("Every layer computes what the simulation computes; what differs is rounding of single values.")
        else:
            names = ", ".join(dict.fromkeys(one.layer for one in self.guilty))
            said.append(f"{len(self.guilty)} of {len(self.layers)} tensors computed differently, in: {names}.")
            said.append(self.advice)
        if not self.observed_runs:
            said.append("The file returns something else when its inner tensors are read: the figures are not its own.")
        return " ".join(said)


def _decibels(difference: Difference) -> str:
    return "equal" if difference.psnr_db == math.inf else f"{difference.psnr_db:.1f} dB"
