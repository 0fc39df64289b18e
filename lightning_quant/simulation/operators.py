"""Which operations the NPU computes in integers: a table measured with its compiler, and what it says of a network.

The table, ``operators.json`` next to this file, is made by ``make operators``: single operators, compiled for one chip
of each version of the NPU. Of what is not in it nothing is claimed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_quant.precision import Precision
from lightning_quant.simulation import aimet
from lightning_quant.simulation.aimet import QuantizedLayer
from lightning_quant.simulation.callsites.attributes import MASK_IS_COMPUTED
from lightning_quant.simulation.precisions import computed_precisions, quantized_layers
from lightning_quant.simulation.preflight import Finding, FindingKind
from lightning_quant.simulation.second_operands import hexagon_simulated, multiplies_by_int16
from lightning_quant.utilities.parsing import parse_as, read_json

if TYPE_CHECKING:
    from lightning_quant.simulation.network import QuantizedNetwork

PATH = Path(__file__).with_name("operators.json")


class Placement(Enum):
    """What the NPU's compiler does with an operation; ``NPU`` is integers on the NPU."""

    NPU = "npu"
    FLOAT = "float"
    CPU = "cpu"
    REFUSED = "refused"
    CRASHED = "crashed"
    WRONG = "wrong"


# For people, and what kind of finding it is.
_PROBLEMS = {
    Placement.FLOAT: (FindingKind.FLOAT_ON_NPU, "is computed in float on the NPU"),
    Placement.CPU: (FindingKind.ON_CPU, "is left to the CPU"),
    Placement.REFUSED: (FindingKind.REFUSED, "is refused by the NPU's compiler"),
    Placement.CRASHED: (FindingKind.REFUSED, "makes the NPU's compiler crash"),
    Placement.WRONG: (FindingKind.WRONG_ON_NPU, "computes something else on the NPU's emulator"),
}

# What is on the NPU and computes the same, or nearly so, by operation.
REMEDIES = {
    "Erf": "use nn.GELU if it is part of one, or tanh",
}


@dataclass(frozen=True)
class OperatorTable:
    """What the NPU's compiler does with single operations.

    Args:
        versions: of the packages it was measured with, the compiler's (``QAIRT``) among them.
        chips: the chip that was compiled for, by the version of its NPU.
        operations: by operation (see :func:`operation_of`) and precision, the versions of the NPU with each placement.
    """

    versions: dict[str, str]
    chips: dict[str, str]
    operations: dict[str, dict[str, dict[str, list[int]]]]

    def placement(self, operation: str, precision: Precision, hexagon: int) -> Placement | None:
        """Return what is known of an operation on a version of the NPU; ``None`` if nothing is."""
        found = self.operations.get(operation, {}).get(str(precision), {})
        return next((Placement(name) for name, versions in found.items() if hexagon in versions), None)


@functools.cache
def operator_table() -> OperatorTable:
    """Return the table of this version of the package."""
    table: OperatorTable = parse_as(read_json(PATH), OperatorTable)
    return table


def operation_of(layer: QuantizedLayer) -> str:
    """Return what a quantized layer computes, as the table names it: its float class, and what else decides."""
    kind: Any = aimet.QuantizationMixin.qcls_to_cls.get(type(layer), type(layer))
    parts = [kind.__name__]
    if isinstance(layer, nn.modules.conv._ConvNd):
        if layer.groups == layer.in_channels > 1:
            parts.append("depthwise 1x1" if set(layer.kernel_size) == {1} else "depthwise")
        elif layer.groups > 1:
            parts.append("grouped")
        if layer.out_channels == 1:
            parts.append("to one channel")
        if layer.bias is None and (layer.transposed or layer.out_channels == 1):
            parts.append("without bias")
    if isinstance(layer, nn.AvgPool2d) and layer.kernel_size == layer.stride:
        size = layer.kernel_size
        parts.append("x".join(map(str, size if isinstance(size, tuple) else (size, size))))
    if isinstance(layer, nn.modules.instancenorm._InstanceNorm):
        if layer.track_running_stats:
            parts.append("with running statistics")
        if layer.weight is None:
            parts.append("without weights")
    if vars(layer).get(MASK_IS_COMPUTED):
        parts.append("by a computed mask")
    return " ".join(parts)


def off_the_npu(network: QuantizedNetwork, hexagon: int | None) -> list[Finding]:
    """Find the layers of a quantized network that the NPU does not compute in integers.

    Args:
        network: quantized; it need not be calibrated.
        hexagon: version of the NPU, e.g. 75; ``None`` for a device of which nothing is known.
    """
    if hexagon is None:
        return []
    layers, precisions = quantized_layers(network), computed_precisions(network)
    findings, table = [], operator_table()
    for name, layer in layers.items():
        operation, precision = operation_of(layer), _measured_as(layer, precisions[name])
        placement = table.placement(operation, precision, hexagon)
        by_int16 = isinstance(layer, aimet.custom.MatMul) and precision.activation_bits == 16
        if by_int16 and not multiplies_by_int16(hexagon) and multiplies_by_int16(hexagon_simulated(network.sim)):
            problem = f"{operation} by 16 bits is left to the CPU (Hexagon v{hexagon}, {precision})"
            remedy = f'quantize for this NPU, which multiplies by 8 bits: hardware="htp_v{hexagon}"'
            findings.append(Finding(name, problem, remedy, kind=FindingKind.ON_CPU))
            continue
        if by_int16 and not multiplies_by_int16(hexagon) and _multiplies_by_16_bits(network, name):
            problem = f"{operation} by an input of the network is by 8 bits (Hexagon v{hexagon}), and simulated by 16"
            remedy = f'give it 8 bits: overrides={{"{name}": "{Precision(precision.weight_bits, 8)}"}}'
            findings.append(Finding(name, problem, remedy, kind=FindingKind.WRONG_ON_NPU))
            continue
        if placement is None or placement is Placement.NPU:
            continue
        kind, what = _PROBLEMS[placement]
        problem = f"{operation} {what} (Hexagon v{hexagon}, {precision})"
        findings.append(Finding(name, problem, _remedy(table, name, operation, precision, hexagon), kind=kind))
    return findings


def _multiplies_by_16_bits(network: QuantizedNetwork, product: str) -> bool:
    place, flow = (product, 1), network.dataflow
    if place in flow.sources or place not in flow.second_operands:
        return False
    return bool(network.network.get_submodule(flow.second_operands[place]).bitwidth == 16)


def _measured_as(layer: QuantizedLayer, precision: Precision) -> Precision:
    """Return the precision that the table has: operations without weights are measured once."""
    return precision if len(layer.param_quantizers) else Precision(8, precision.activation_bits)


def _remedy(table: OperatorTable, name: str, operation: str, precision: Precision, hexagon: int) -> str:
    others = [Precision(8, precision.activation_bits), Precision(precision.weight_bits, 8), Precision(8, 8)]
    for other in others:
        if table.placement(operation, other, hexagon) is Placement.NPU:
            return f'give it another precision: overrides={{"{name}": "{other}"}}'
    return REMEDIES.get(operation, "compute it of other operations, or outside of the network")
