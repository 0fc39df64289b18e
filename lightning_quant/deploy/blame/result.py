"""What was found: two figures for each layer, the reasons where they are known, and what helps."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from lightning_quant.deploy.blame.differences import Difference
from lightning_quant.deploy.blame.reasons import Change, Reason, Remedy, merged
from lightning_quant.deploy.parity import LOWEST_PSNR, Parity
from lightning_quant.errors import DataError
from lightning_quant.utilities.files import atomic_write
from lightning_quant.utilities.parsing import check, check_version, is_finite, parse_as, parse_fields, read_json

BLAME_NAME = "blame.json"
_FORMAT_VERSION = 1


class Against(Enum):
    """What the simulation is compared with. The value stands in JSON, and is the argument ``against``."""

    FLOAT = "float"
    FILE = "file"
    EMULATOR = "htp_emulator"


_NAMES = {Against.FLOAT: "float", Against.FILE: "the file", Against.EMULATOR: "the NPU's emulator"}


@dataclass(frozen=True)
class LayerBlame:
    """One tensor that is rounded, and what computes it.

    Args:
        layer: the user's module: the one with weights, where several are computed together.
        tensor: name in the ONNX file; empty where no file is compared.
        modules: all modules that are computed together.
        own: the error that the layer adds by itself, its inputs taken from the reference.
        arrived: the error after it in the whole network, with what the layers before it added.
        reasons: why it adds more than rounding explains; against float, why it loses more than most. Else empty.
        lost: against float: power of the layer's own error as a share of the power of its output, mean over channels.
        weight_bits: against float: bits of its weights, where they are rounded.
        activation_bits: against float: the fewest bits of activations that it rounds.
    """

    layer: str
    tensor: str
    modules: tuple[str, ...]
    own: Difference
    arrived: Difference
    reasons: tuple[Reason, ...] = ()
    lost: float | None = None
    weight_bits: int | None = None
    activation_bits: int | None = None

    @property
    def guilty(self) -> bool:
        """Whether it computes something else than its reference, more than sums in another order explain.

        Against float: whether it stands out among the layers by what it loses.
        """
        return bool(self.reasons)


@dataclass(frozen=True)
class Blame:
    """Where two computations of one network differ: the simulation, and what it is compared with.

    Args:
        layers: in the order of computation.
        output: agreement of the outputs.
        samples: how many samples were compared.
        observed_runs: whether the file with added outputs, which was looked at, returns what the file returns, to the
            bit. Where it does not, the figures of single layers are not those of the file.
        unmatched: tensors that are rounded in the file and were not found in the simulation; they are part of the layer
            behind them.
        against: what the simulation was compared with. The reference is the float network, or else the simulation.
        whole: what helps where no layer stands out; ``None`` where nothing is known to help.
    """

    layers: tuple[LayerBlame, ...]
    output: Parity
    samples: int
    observed_runs: bool
    unmatched: tuple[str, ...] = ()
    against: Against = Against.FILE
    whole: Remedy | None = None

    @property
    def guilty(self) -> list[LayerBlame]:
        """The layers that compute something else, in the order of computation; none in a file that is right.

        Against float, those that lose most.
        """
        return [one for one in self.layers if one.guilty]

    @property
    def first(self) -> LayerBlame | None:
        """The first of them."""
        return next(iter(self.guilty), None)

    @property
    def remedies(self) -> list[Remedy]:
        """What helps, each change once, the overrides of all layers in one."""
        found = [reason.remedy for one in self.guilty for reason in one.reasons if reason.remedy is not None]
        return merged(found or ([] if self.whole is None else [self.whole]))

    @property
    def advice(self) -> str:
        """What to do next; empty where nothing is known to help."""
        changes = {one.change for one in self.remedies}
        if not changes:
            return ""
        if changes == {Change.REPORT}:
            return "Please report it with the network and the file."
        if Change.EXPORT in changes:
            return (
                f"The file is not what this network exports: {Remedy(Change.EXPORT)} writes another. If it was just "
                "exported, please report it with the network and the file."
            )
        lines, others = ([str(one) for one in self.remedies if bool(one.line) is known] for known in (True, False))
        said = [f"Try {', '.join(lines)}."] if lines else []
        return " ".join([*said, *(f"Take {one}." for one in others)])

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; an infinite PSNR as ``None``, and what to paste as ``lines``."""
        made = {**vars(self), "layers": [asdict(replace(one, reasons=())) for one in self.layers]}
        made["against"] = self.against.value
        made["output"] = self.output.to_dict()
        made["whole"] = None if self.whole is None else self.whole.to_dict()
        for layer, known in zip(made["layers"], self.layers, strict=True):
            for figures in (layer["own"], layer["arrived"]):
                figures.update({name: None for name, value in figures.items() if value == math.inf})
                if figures["psnr_db"] is not None:
                    figures["psnr_db"] = max(figures["psnr_db"], LOWEST_PSNR)
            layer["reasons"] = [reason.to_dict() for reason in known.reasons]
        return {**made, "lines": [one.line for one in self.remedies if one.line]}

    @classmethod
    def from_json(cls, value: Any, where: str = "") -> Blame:
        """Read what :meth:`to_dict` returned.

        Raises:
            FieldError: naming the entry that is missing or cannot be.
        """
        values = parse_as(value, dict[str, Any], where)
        made: Blame = parse_fields({name: one for name, one in values.items() if name != "lines"}, cls, where)
        for at, layer in enumerate(made.layers):
            shares = {"lost": layer.lost, "own.differing": layer.own.differing}
            shares["arrived.differing"] = layer.arrived.differing
            for name, share in shares.items():
                is_share = share is None or (is_finite(share) and share >= 0)
                missing = name == "lost" and share is None and made.against is Against.FLOAT
                check(is_share and not missing, f"{where}.layers.{at}.{name}", share, "a share of at least 0")
        return made

    @property
    def header(self) -> list[str]:
        """What :meth:`row` says of a layer."""
        if self.against is Against.FLOAT:
            return ["layer", "bits", "adds", "loses", "arrived", "why", "what helps"]
        return ["layer", "adds", "values", "arrived", "why"] + ["what helps"] * (self.against is Against.EMULATOR)

    def row(self, one: LayerBlame) -> list[str]:
        """Return the cells of one layer for a table."""
        why = "; ".join(map(str, one.reasons))
        helps = ", ".join(str(remedy) for remedy in dict.fromkeys(reason.remedy for reason in one.reasons) if remedy)
        if self.against is Against.FLOAT:
            bits = {"w": one.weight_bits, "a": one.activation_bits}
            named = "".join(f"{part}{count}" for part, count in bits.items() if count is not None)
            return [one.layer, named, _decibels(one.own), f"{one.lost:.3%}", _decibels(one.arrived), why, helps]
        cells = [one.layer, _decibels(one.own), f"{one.own.differing:.2%}", _decibels(one.arrived), why]
        return cells + [helps] * (self.against is Against.EMULATOR)

    def __str__(self) -> str:
        """Return a table: one line for each layer, the guilty ones marked."""
        rows = [["", *self.header], *(["→" if one.guilty else "", *self.row(one)] for one in self.layers)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, "", self.verdict()])

    def verdict(self) -> str:
        """Return what was found, and what to do next, in a few sentences."""
        count = f"{self.samples} sample" if self.samples == 1 else f"{self.samples} samples"
        said = [f"Output: {self.output} over {count}."]
        names = ", ".join(dict.fromkeys(one.layer for one in self.guilty))
        match self.against, bool(self.guilty):
            case Against.FLOAT, True:
                said.append(f"Of {len(self.layers)} layers these lose most: {names}.")
            case Against.FLOAT, False:
                said.append(f"None of {len(self.layers)} layers stands out by what it loses.")
            case _, True:
                said.append(f"{len(self.guilty)} of {len(self.layers)} tensors computed differently, in: {names}.")
            case Against.EMULATOR, False:
                said.append("Every layer runs in integers on the NPU, and differs by the NPU's rounding only.")
            case _, False:
                said.append(
                    "Every layer computes what the simulation computes; what differs is rounding of single values."
                )
        said += [self.advice] if self.advice else []
        if not self.observed_runs:
            said.append("The file returns something else when its inner tensors are read: the figures are not its own.")
        return " ".join(said)


def explanations(found: Iterable[Blame]) -> list[str]:
    """Return the verdicts on those comparisons in which layers are marked; if there are none, on that with float."""
    known = list(found)
    shown = [one for one in known if one.guilty] or [one for one in known if one.against is Against.FLOAT]
    return [f"Compared with {_NAMES[one.against]}: {one.verdict()}" for one in shown]


def write_blames(path: Path, found: Iterable[Blame]) -> Path:
    """Write what was found as JSON by what the simulation was compared with, whole or not at all."""
    values = {one.against.value: one.to_dict() for one in found}
    with atomic_write(path) as partial:
        partial.write_text(json.dumps({"format_version": _FORMAT_VERSION, **values}, indent=2, allow_nan=False) + "\n")
    return path


def read_blames(path: Path) -> list[Blame]:
    """Read what :func:`write_blames` wrote.

    Raises:
        DataError: when it is missing, damaged or of another format.
    """
    try:
        values = read_json(path)
        check_version(values, _FORMAT_VERSION)
        del values["format_version"]
        return list(parse_as(values, dict[str, Blame]).values())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} holds no comparison of layers: {error}. Run again to write it.") from error


def _decibels(difference: Difference) -> str:
    return "equal" if difference.psnr_db == math.inf else f"{difference.psnr_db:.1f} dB"
