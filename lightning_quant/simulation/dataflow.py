"""Which quantizer rounds what goes into a layer, and which layers share one bit width: found once, kept by name.

Names outlast what AIMET's graph of a network does not: copies, checkpoints, another device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_quant.simulation.callsites.tied_ranges import (
    Groups,
    input_name,
    inputs_of_one_grid,
    joined_and_read_elsewhere,
    passes_values,
    rounding,
)
from lightning_quant.simulation.second_operands import hexagon_simulated, multiplies_by_int16, second_operands

# A layer and the place of one of its inputs.
Place = tuple[str, int]


def quantizer_at(place: Place) -> str:
    """Return the name that a quantizer in front of an input has."""
    layer, index = place
    return f"{layer}.input_quantizers.{index}"


@dataclass(frozen=True)
class Dataflow:
    """Where values of one bit width go.

    Args:
        sources: the quantizer that rounds an input of a layer before the layer takes it, by the layer's name and the
            place of the input.
        group_of: a number for each layer and each quantizer of activations, by name. Those with the same number have
            one bit width: a layer and its output, what the hardware computes as one, what shares a range.
        quantizers: the quantizers of each group.
        read_elsewhere: what a concatenation takes in its own range and others read too.
        unit_of: a number for each layer. Those with the same number are computed as one, with nothing rounded between
            them: a convolution and the ReLU behind it.
        second_operands: the quantizer that rounds what a product multiplies with, on an NPU.
        multiplies_by_int16: whether that NPU multiplies 16 bits by 16.
    """

    sources: Mapping[Place, str]
    group_of: Mapping[str, int]
    quantizers: Mapping[int, Sequence[str]]
    unit_of: Mapping[str, int]
    read_elsewhere: frozenset[Place]
    second_operands: Mapping[Place, str]
    multiplies_by_int16: bool

    @classmethod
    def of(cls, sim: Any, network: nn.Module) -> Dataflow:
        """Read it from a new simulation, its quantizers complete.

        Args:
            sim: AIMET's simulation.
            network: the network in it, by whose modules it names them.
        """
        names: dict[Any, str] = {module: name for name, module in network.named_modules()}
        groups, units = Groups(), Groups()
        sources: dict[Place, str] = {}
        rounds: set[str] = set()
        layers: set[str] = set()
        for op in sim.connected_graph.ordered_ops:  # one for each layer: a second call has a layer of its own
            module = sim._get_qmodule(op)
            if module not in names or not hasattr(module, "output_quantizers"):
                continue
            layer = names[module]
            layers.add(layer)
            own = [one for one in (*module.input_quantizers, *module.output_quantizers) if one is not None]
            for quantizer in own:
                groups.join(names[quantizer], layer)
                rounds.add(names[quantizer])
            for product in op.inputs:
                if product.producer is None and product.is_model_input:  # one tensor in the file, whoever reads it
                    groups.join(("an input", input_name(product)), layer)
            if not own and passes_values(sim, op):
                continue
            tied = inputs_of_one_grid(sim, op)
            for index, product in enumerate(op.inputs[: len(module.input_quantizers)]):
                if product.is_parm or module.input_quantizers[index] is not None:
                    continue
                quantizer = rounding(sim, product.producer)
                before = _computed_by(sim, product.producer)
                if quantizer is not None and index not in tied:
                    sources[layer, index] = names[quantizer]
                elif quantizer is None and before in names:  # computed as one
                    groups.join(names[before], layer)
                    units.join(names[before], layer)
        group_of, unit_of = _numbers(groups, layers | rounds), _numbers(units, layers)
        quantizers: dict[int, list[str]] = {}
        for name in sorted(rounds):
            quantizers.setdefault(group_of[name], []).append(name)
        elsewhere = {
            (names[module], index)
            for module, index in joined_and_read_elsewhere(sim)
            if module in names and module.input_quantizers[index] is None
        }
        products = {
            (names[module], 1): names[quantizer] for module, quantizer in second_operands(sim) if module in names
        }
        by_int16 = multiplies_by_int16(hexagon_simulated(sim))
        return cls(sources, group_of, quantizers, unit_of, frozenset(elsewhere), products, by_int16)


def _numbers(groups: Groups, names: Iterable[str]) -> dict[str, int]:
    numbers: dict[Any, int] = {}
    return {name: numbers.setdefault(groups.of(name), len(numbers)) for name in sorted(names)}


def _computed_by(sim: Any, op: Any) -> Any:
    """Return the layer that computed what others only passed on, or ``None``."""
    while op is not None and passes_values(sim, op) and op.inputs:
        op = op.inputs[0].producer
    return None if op is None else sim._get_qmodule(op)
