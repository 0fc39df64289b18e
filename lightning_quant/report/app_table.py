"""What an app hands to the exported network and gets from it, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_quant.deploy.edges.contract import Contract, IoTensor

_HEADER = ["name", "is", "shape", "type", "layout", "holds", "scale", "zero point", "range", "normalized on the device"]


def app_table(contract: Contract) -> tuple[list[str], list[list[str]]]:
    """Return the header and one row for each input and output."""
    return list(_HEADER), [
        *(_row(one, "input") for one in contract.inputs),
        *(_row(one, "output") for one in contract.outputs),
    ]


def _row(one: IoTensor, what: str) -> list[str]:
    ends = one.range
    return [
        one.name,
        what,
        " × ".join(map(str, one.shape)),
        one.type,
        " ".join(filter(None, (one.layout and one.layout.upper(), one.color and one.color.upper()))),
        one.holds if one.axis is None else f"{one.holds}, along axis {one.axis}",
        "" if one.scale is None else f"{one.scale:.4g}",
        "" if one.zero_point is None else str(one.zero_point),
        "" if ends is None else f"{ends[0]:.4g} … {ends[1]:.4g}",
        "" if one.mean is None else f"mean {_listed(one.mean)}, std {_listed(one.std or ())}",
    ]


def _listed(numbers: Sequence[float]) -> str:
    return " ".join(f"{one:.4g}" for one in numbers)
