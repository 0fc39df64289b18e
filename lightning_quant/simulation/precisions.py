"""The precision of single layers, with what the hardware requires of their neighbors."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lightning_quant.errors import ConfigurationError
from lightning_quant.precision import Precision
from lightning_quant.simulation import aimet
from lightning_quant.simulation.conversions import convert_where_needed, converts, width_of

if TYPE_CHECKING:
    from lightning_quant.simulation.network import QuantizedNetwork


def quantized_layers(network: QuantizedNetwork) -> dict[str, aimet.QuantizedLayer]:
    """Return every layer that AIMET quantizes, by its name in the network."""
    modules = network.network.named_modules()
    return {name: module for name, module in modules if isinstance(module, aimet.BaseQuantizationMixin)}


def matching(network: QuantizedNetwork, overrides: Mapping[str, Precision]) -> dict[str, Precision]:
    """Resolve globs on layer names; the last one that matches a layer wins.

    Raises:
        ConfigurationError: for a glob that matches no layer.
    """
    layers = quantized_layers(network)
    chosen: dict[str, Precision] = {}
    for glob, precision in overrides.items():
        matched = [name for name in layers if fnmatch.fnmatchcase(name, glob)]
        if not matched:
            names = ", ".join(list(layers)[:8])
            raise ConfigurationError(
                f"overrides: {glob!r} matches no layer of the network. Expected a glob on module names such "
                f"as: {names}, …"
            )
        chosen.update(dict.fromkeys(matched, precision))
    return chosen


def layer_precision(network: QuantizedNetwork, layer: str) -> Precision:
    """Return the precision a layer was asked to have: its own, or that of the whole network."""
    overrides = [one for glob, one in network.recipe.overrides.items() if fnmatch.fnmatchcase(layer, glob)]
    return network.promoted.get(layer) or [network.recipe.precision, *overrides][-1]


@contextmanager
def precisions_kept(network: QuantizedNetwork) -> Iterator[None]:
    """Go back to the bit widths of now at the end of a block."""
    before = {one: one.bitwidth for one in network.quantizers() if not converts(one)}
    try:
        yield
    finally:
        for quantizer, bits in before.items():
            quantizer.bitwidth = bits
        convert_where_needed(network.network, network.dataflow)


def set_precisions(network: QuantizedNetwork, precisions: Mapping[str, Precision]) -> None:
    """Change the bit widths of layers: their weights, the activations that go into them, and what they return.

    The NPU computes a layer at one bit width. So more bits for what goes into a layer are more for all that computed
    it, and its other takers convert; with fewer bits the layer converts what goes into it. A precision with the
    activation bits of the whole network leaves activations to what the neighbors ask for.

    Ranges stay as they are: calibrate afterwards.

    Args:
        network: the quantized network.
        precisions: by the layer's name.
    """
    flow, module, layers = network.dataflow, network.network, quantized_layers(network)
    asked: dict[int, int] = {}  # bits by group
    for name, precision in precisions.items():
        group = flow.group_of.get(name)
        if group is not None and precision.activation_bits != network.recipe.precision.activation_bits:
            asked[group] = max(asked.get(group, 0), precision.activation_bits)
    units = {flow.unit_of.get(name) for name in precisions}
    raised: dict[int, int] = {}
    for (taker, _), source in flow.sources.items():
        wanted, group = asked.get(flow.group_of[taker], 0), flow.group_of[source]
        if flow.unit_of[taker] in units and group not in asked and wanted > (width_of(module, flow, source) or wanted):
            raised[group] = max(raised.get(group, 0), wanted)
    for group, bits in {**raised, **asked}.items():
        for quantizer in flow.quantizers.get(group, ()):
            module.get_submodule(quantizer).bitwidth = bits  # type: ignore[assignment]
    for name, precision in precisions.items():
        if (weight := dict(layers[name].param_quantizers).get("weight")) is not None:
            weight.bitwidth = precision.weight_bits
    convert_where_needed(module, flow)
