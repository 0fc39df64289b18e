"""How closely two computations of the same thing agree."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from lightning_quant.errors import ParityError
from lightning_quant.precision import Precision
from lightning_quant.utilities.parsing import check, parse_as

# What stands for NaN and minus infinity where a PSNR is written down: noise beyond any measure.
LOWEST_PSNR = -200.0
# PSNR in dB that an export must reach against its simulation; and one that a coarse grid explains: where 8-bit values
# on the border between two integers are rounded either way, as sums are added in another order.
BAR, COARSE_BAR = 60.0, 35.0


@dataclass(frozen=True)
class Parity:
    """Agreement of an implementation with its reference over some samples.

    Args:
        psnr_db: peak signal-to-noise ratio in dB, ``20 log10(max|reference| / rmse)``, the lowest over the
            outputs; infinite when equal. Above 30 dB is typically considered good.
        argmax_agreement: share of positions whose highest score along axis 1 is the same class, over all
            outputs that have at least two classes, and of equal values in integer outputs; ``None`` if there
            is no such output.
        decided_agreement: the same over the positions where the reference is decided: its best score leads
            by more than twice the noise of :data:`COARSE_BAR`, 3.6 % of the highest score (both scores move).
            At the others the order in which a sum is rounded picks the winner, in a hardly trained network at
            many of them.
        samples: how many samples were compared.
    """

    psnr_db: float
    argmax_agreement: float | None = None
    decided_agreement: float | None = None
    samples: int = 0

    @property
    def equal(self) -> bool:
        """Whether every float output is the same number."""
        return self.psnr_db == math.inf

    def rounded(self) -> Parity:
        """Return it as files hold it: dB with two digits, :data:`LOWEST_PSNR` for NaN or Inf in the outputs."""
        if self.equal:
            return self
        return replace(self, psnr_db=round(self.psnr_db, 2) if self.psnr_db > LOWEST_PSNR else LOWEST_PSNR)

    def to_dict(self) -> dict[str, float | int | None]:
        """Return JSON values: those of :meth:`rounded`, an infinite PSNR as ``None``."""
        return {**asdict(self.rounded()), **({"psnr_db": None} if self.equal else {})}

    @classmethod
    def from_json(cls, value: Any, where: str = "") -> Parity:
        """Read what :meth:`to_dict` returned. Other entries are ignored.

        Raises:
            FieldError: naming the entry that is missing or cannot be.
        """
        values = parse_as(value, dict[str, Any], where)
        for name in ("psnr_db", "argmax_agreement"):
            check(name in values, f"{where}.{name}", None, "the field to be there")
        psnr, agreement, decided = (
            parse_as(values.get(name), float | None, f"{where}.{name}")
            for name in ("psnr_db", "argmax_agreement", "decided_agreement")
        )
        samples = parse_as(values.get("samples", 0), int, f"{where}.samples")
        return cls(math.inf if psnr is None else psnr, agreement, decided, samples)

    def __str__(self) -> str:
        """Return the PSNR in a few characters, or for outputs that are classes the share of equal ones."""
        if self.psnr_db == LOWEST_PSNR:
            return "not comparable"
        if not self.equal:
            return f"{self.psnr_db:.1f} dB"
        share = self.argmax_agreement
        return "equal" if share in (None, 1.0) else f"{100 * share:.1f} % same"


def of_export(parity: Parity) -> dict[str, Any]:
    """Return the JSON values of an export's agreement: its file, run by ONNX Runtime, with the simulation."""
    return {"tier": "onnxruntime", "reference": "simulation", **parity.to_dict()}


def compare(
    pairs: Iterable[tuple[Sequence[np.ndarray], Sequence[np.ndarray]]],
) -> Parity:
    """Compare outputs sample by sample, without keeping them.

    Args:
        pairs: for each batch the reference's outputs and the implementation's, arrays of equal shapes with
            samples along axis 0.
    """
    peaks: dict[int, float] = {}
    squares: dict[int, float] = {}
    counts: dict[int, int] = {}
    same = positions = same_decided = decided = samples = 0
    for reference, actual in pairs:
        for index, (expected, got) in enumerate(zip(reference, actual, strict=True)):
            if not np.issubdtype(expected.dtype, np.floating):  # classes already: nothing a dB could measure
                same, positions = same + int((expected == got).sum()), positions + expected.size
                continue
            a, b = expected.astype(np.float64), got.astype(np.float64)
            peaks[index] = max(peaks.get(index, 0.0), float(np.abs(a).max(initial=0.0)))
            squares[index] = squares.get(index, 0.0) + float(((a - b) ** 2).sum())
            counts[index] = counts.get(index, 0) + a.size
            if a.ndim >= 2 and a.shape[1] >= 2:
                equal = a.argmax(1) == b.argmax(1)
                peak = np.abs(a).max(initial=0.0)
                best = np.partition(a, -2, axis=1)
                leads = best.take(-1, 1) - best.take(-2, 1) > 2 * peak * 10 ** (-COARSE_BAR / 20)
                same, positions = same + int(equal.sum()), positions + equal.size
                same_decided, decided = same_decided + int(equal[leads].sum()), decided + int(leads.sum())
        samples += reference[0].shape[0] if reference[0].ndim else 1
    ratios = [_psnr(peaks[i], squares[i] / max(counts[i], 1)) for i in peaks]
    agreement = same / positions if positions else None
    decided_agreement = same_decided / decided if decided else agreement
    return Parity(min(ratios, default=math.inf), agreement, decided_agreement, samples)


def _psnr(peak: float, mean_square: float) -> float:
    if mean_square == 0:
        return math.inf
    return 20 * math.log10(peak / math.sqrt(mean_square)) if peak and math.isfinite(mean_square) else -math.inf


def check_parity(parity: Parity, precision: Precision) -> None:
    """Raise if an export agrees less with its simulation than rounding in another order explains.

    The bar is 60 dB, and for 8-bit activations the same class at 99 % of the decided positions.

    Raises:
        ParityError: with the figures and the bar.
    """
    agreement = parity.decided_agreement
    if not agrees(parity, precision):
        share = "" if agreement is None else f" and the same class at {agreement:.2%} of the decided positions"
        raise ParityError(
            f"The exported model differs from the simulation: {parity.psnr_db:.1f} dB{share} over "
            f"{parity.samples} samples at {precision}; expected at least {BAR:.0f} dB"
            f"{'' if precision.activation_bits >= 16 else ' and 99 %'}."
        )


def agrees(parity: Parity, precision: Precision) -> bool:
    """Return whether an export reaches the bar that :func:`check_parity` sets."""
    agreement = parity.decided_agreement
    low_agreement = precision.activation_bits < 16 and agreement is not None and agreement < 0.99
    return parity.psnr_db >= BAR and not low_agreement  # NaN is not an agreement either


def is_explained_by_ties(parity: Parity, precision: Precision) -> bool:
    """Return whether single 8-bit values that are rounded either way make as much of a difference."""
    agreement = parity.decided_agreement
    return precision.activation_bits < 16 and parity.psnr_db >= COARSE_BAR and (agreement is None or agreement >= 0.99)
