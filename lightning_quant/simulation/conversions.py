"""Where two bit widths meet: the layer that takes a tensor of another width rounds it to its own first.

The NPU computes layers whose input and output have one bit width. Others run in float between quantized ones, their
weights on the CPU, as the emulator shows. A second rounding in front of a layer is a Convert on the device. It has the
range of the tensor: 65,535 is 257 times 255, so that the 16-bit grid of a range holds the 8-bit one, and converting up
loses nothing.
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

# Of a quantizer that converts what another one has rounded.
_CONVERTS = "_converts"


def widths(network: nn.Module, flow: Dataflow) -> dict[int, int]:
    """Return the bits of the activations of each group that rounds any."""
    return {group: max(_bits(network, one) for one in names) for group, names in flow.quantizers.items()}


def convert_where_needed(network: nn.Module, flow: Dataflow) -> None:
    """Put a conversion wherever a layer takes a tensor of another bit width, and remove every other."""
    bits = widths(network, flow)
    for place, source in flow.sources.items():
        wanted = bits.get(flow.group_of[place[0]])
        if wanted is None or wanted == _bits(network, source):
            _remove(network, flow, place)
        else:
            _put(network, flow, place, wanted)


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


def _convert_at(network: nn.Module, flow: Dataflow, places: Mapping[Place, int]) -> None:
    """Put conversions of so many bits in these places, and none in others."""
    for place in flow.sources:
        if place in places:
            _put(network, flow, place, places[place])
        else:
            _remove(network, flow, place)


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
        module.input_quantizers[index] = conversion
        _note_rounding(module, index, conversion)
    conversion.bitwidth = bits


def _remove(network: nn.Module, flow: Dataflow, place: Place) -> None:
    module, index = _layer(network, place), place[1]
    if module.input_quantizers[index] is not None:
        module.input_quantizers[index] = None
        _note_rounding(module, index, network.get_submodule(flow.sources[place]))


def _note_rounding(module: Any, index: int, quantizer: Any) -> None:
    if index == 0 and module.__dict__.get(ROUNDED_BY) is not None:
        module.__dict__[ROUNDED_BY] = quantizer
