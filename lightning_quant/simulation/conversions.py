"""Where two bit widths meet: the layer that takes a tensor of another width rounds it to its own first.

The NPU computes layers whose input and output have one bit width. Others run in float between quantized ones, their
weights on the CPU, as the emulator shows. A second rounding in front of a layer is a Convert on the device. It has the
range of the tensor: 65,535 is 257 times 255, so that the 16-bit grid of a range holds the 8-bit one, and converting up
loses nothing. A product converts what it multiplies with where the NPU asks for another grid of it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_quant.simulation.callsites.attributes import ROUNDED_BY
from lightning_quant.simulation.dataflow import Dataflow, Place
from lightning_quant.simulation.fixed_ranges import forget_fixed_range
from lightning_quant.simulation.second_operands import ROOM, SYMMETRIC_BITS, is_free

# Products are by so many bits on an NPU that does not multiply 16 by 16.
_OLDER_BITS = 8
# Of a quantizer that converts what another one has rounded.
_CONVERTS = "_converts"


def widths(network: nn.Module, flow: Dataflow) -> dict[int, int]:
    """Return the bits of the activations of each group that rounds any."""
    return {group: max(_bits(network, one) for one in names) for group, names in flow.quantizers.items()}


def fit_grids(network: nn.Module, flow: Dataflow) -> None:
    """Give each layer what it takes on a grid that it can compute with, after bit widths were set; calibrate then."""
    _make_symmetric(network, flow)
    convert_where_needed(network, flow)


def convert_where_needed(network: nn.Module, flow: Dataflow) -> None:
    """Put a conversion wherever a layer takes a tensor of another bit width or grid, and remove every other."""
    bits = widths(network, flow)
    for place, source in flow.sources.items():
        quantizer: Any = network.get_submodule(source)
        wanted, fits = bits.get(flow.group_of[place[0]]), True
        if wanted == SYMMETRIC_BITS and place in flow.second_operands:
            if flow.multiplies_by_int16:
                fits = quantizer.symmetric
            else:
                wanted = _OLDER_BITS
        if wanted is None or (wanted == quantizer.bitwidth and fits):
            _remove(network, flow, place)
        else:
            _put(network, flow, place, wanted)
    if not flow.multiplies_by_int16:
        for place in flow.second_operands.keys() - flow.sources.keys():  # rounded by the product itself
            own: Any = network.get_submodule(flow.second_operands[place])
            if bits.get(flow.group_of[place[0]]) == SYMMETRIC_BITS and _holders(network, own) == 1:
                own.bitwidth = _OLDER_BITS


def leave_room(network: nn.Module, flow: Dataflow) -> None:
    """Extend calibrated symmetric ranges of second operands by the 0.4 % that the NPU's integers lack.

    Args:
        network: the network in AIMET's simulation, its ranges calibrated.
        flow: of the network.
    """
    found: set[Any] = {network.get_submodule(name) for name in flow.second_operands.values()}
    for quantizer in found:
        if quantizer.bitwidth == SYMMETRIC_BITS and quantizer.symmetric and quantizer.is_initialized():
            quantizer.set_range(quantizer.get_min() * ROOM, quantizer.get_max() * ROOM)


@contextmanager
def converting_at(network: nn.Module, flow: Dataflow, places: Iterable[Place]) -> Iterator[None]:
    """Put conversions in these places and in no others, for a state to set their bits; undone if the block raises."""
    now = {place: _layer(network, place).input_quantizers[place[1]] for place in flow.sources}
    before = {place: int(conversion.bitwidth) for place, conversion in now.items() if conversion is not None}
    _convert_at(network, flow, dict.fromkeys(places, 8))
    try:
        yield
    except BaseException:
        _convert_at(network, flow, before)
        raise


def converts(quantizer: Any) -> bool:
    """Return whether a quantizer converts what another one has rounded: its range is that of the other."""
    return _CONVERTS in vars(quantizer)


@contextmanager
def without_conversions(network: nn.Module, flow: Dataflow) -> Iterator[None]:
    """Remove the conversions for the length of a block, and put in their place what its end asks for."""
    _convert_at(network, flow, {})
    try:
        yield
    finally:
        convert_where_needed(network, flow)


def _make_symmetric(network: nn.Module, flow: Dataflow) -> None:
    """Make grids of second operands symmetric where their products ask for it and both ends are free; undo it else."""
    if not flow.multiplies_by_int16:
        return
    bits = widths(network, flow)
    asked: dict[Any, bool] = {}
    for (layer, _), name in flow.second_operands.items():
        quantizer: Any = network.get_submodule(name)
        is_asked = bits.get(flow.group_of[layer]) == quantizer.bitwidth == SYMMETRIC_BITS and is_free(quantizer)
        asked[quantizer] = asked.get(quantizer, False) or is_asked
    for quantizer, is_symmetric in asked.items():
        quantizer.symmetric = quantizer.signed = is_symmetric


def _convert_at(network: nn.Module, flow: Dataflow, places: Mapping[Place, int]) -> None:
    """Put conversions of so many bits in these places, and none in others."""
    for place in flow.sources:
        if place in places:
            _put(network, flow, place, places[place])
        else:
            _remove(network, flow, place)


def _holders(network: nn.Module, quantizer: Any) -> int:
    """Return how many inputs a quantizer rounds: that of an input of the network, all that it goes to."""
    return sum(one is quantizer for layer in network.modules() for one in getattr(layer, "input_quantizers", ()))


def _bits(network: nn.Module, quantizer: str) -> int:
    bits: Any = network.get_submodule(quantizer).bitwidth
    return int(bits)


def _layer(network: nn.Module, place: Place) -> Any:
    return network.get_submodule(place[0])


def _put(network: nn.Module, flow: Dataflow, place: Place, bits: int) -> None:
    module, index = _layer(network, place), place[1]
    conversion = module.input_quantizers[index]
    source: Any = network.get_submodule(flow.sources[place])
    if conversion is None:
        conversion = copy.deepcopy(source)
        vars(conversion)[_CONVERTS] = True
        forget_fixed_range(conversion)
        # one range, calibrated and learned once
        conversion._parameters.update(source._parameters)
        conversion._initial_parameters = source._initial_parameters
        if place in flow.second_operands:
            from lightning_quant.simulation.fast.short_path import accelerate, is_fast
            from lightning_quant.simulation.symmetric_conversion import SymmetricConversion

            conversion.__class__ = SymmetricConversion
            if is_fast(source):
                accelerate(conversion)
        module.input_quantizers[index] = conversion
        _note_rounding(module, index, conversion)
    conversion.bitwidth = bits
    if place in flow.second_operands:
        conversion.symmetric = conversion.signed = bits == SYMMETRIC_BITS


def _remove(network: nn.Module, flow: Dataflow, place: Place) -> None:
    module, index = _layer(network, place), place[1]
    if module.input_quantizers[index] is not None:
        module.input_quantizers[index] = None
        _note_rounding(module, index, network.get_submodule(flow.sources[place]))


def _note_rounding(module: Any, index: int, quantizer: Any) -> None:
    if index == 0 and module.__dict__.get(ROUNDED_BY) is not None:
        module.__dict__[ROUNDED_BY] = quantizer
