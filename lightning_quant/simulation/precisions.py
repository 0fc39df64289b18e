"""The precision of single layers, with what the hardware requires of their neighbors."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lightning_quant.errors import ConfigurationError
from lightning_quant.precision import Precision
from lightning_quant.simulation import aimet
from lightning_quant.simulation.conversions import fit_grids, widths

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


def computed_precisions(network: QuantizedNetwork) -> dict[str, Precision]:
    """Return the precision that each layer is computed at: what a neighbor asks for raises its activations too."""
    flow, bits = network.dataflow, widths(network.network, network.dataflow)
    asked = {name: layer_precision(network, name) for name in quantized_layers(network)}
    return {
        name: Precision(one.weight_bits, bits.get(flow.group_of.get(name, -1), one.activation_bits))
        for name, one in asked.items()
    }


def planned_widths(network: QuantizedNetwork, precisions: Mapping[str, Precision]) -> dict[int, int]:
    """Return the bits that :func:`set_precisions` would give the activations of each group of layers.

    Args:
        network: the quantized network; not changed.
        precisions: by the layer's name.
    """
    flow, now = network.dataflow, widths(network.network, network.dataflow)
    asked: dict[int, int] = {}
    for name, precision in precisions.items():
        group = flow.group_of.get(name)
        if group in now and precision.activation_bits != network.recipe.precision.activation_bits:
            asked[group] = max(asked.get(group, 0), precision.activation_bits)
    pinned = {flow.group_of.get(name) for name in _pinned(network)}
    units = {flow.unit_of.get(name) for name in precisions}
    raised: dict[int, int] = {}
    for (taker, _), source in flow.sources.items():
        wanted, group = asked.get(flow.group_of[taker], 0), flow.group_of[source]
        if flow.unit_of[taker] in units and wanted > now[group] and group not in pinned:
            raised[group] = max(raised.get(group, 0), wanted)
    return {**now, **raised, **asked}


def _pinned(network: QuantizedNetwork) -> list[str]:
    """Return the layers to which an override gives the network's own precision; of one without weights, its bits."""
    base, layers = network.recipe.precision, quantized_layers(network)
    return [
        name
        for name, one in matching(network, network.recipe.overrides).items()
        if one == base or (one.activation_bits == base.activation_bits and _weight_quantizer(layers[name]) is None)
    ]


def set_precisions(network: QuantizedNetwork, precisions: Mapping[str, Precision]) -> None:
    """Change the bit widths of layers: their weights, the activations that go into them, and what they return.

    The NPU computes a layer at one bit width. So more bits for what goes into a layer are more for all that computed
    it, and its other takers convert; with fewer bits the layer converts what goes into it. A precision with the
    activation bits of the whole network leaves activations to what the neighbors ask for, but where an override gives a
    layer the network's own precision: what its neighbors ask for does not reach that layer.

    Ranges stay as they are: calibrate afterwards.

    Args:
        network: the quantized network.
        precisions: by the layer's name.
    """
    layers, module = quantized_layers(network), network.network
    for group, bits in planned_widths(network, precisions).items():
        for quantizer in network.dataflow.quantizers[group]:
            module.get_submodule(quantizer).bitwidth = bits  # type: ignore[assignment]
    for name, precision in precisions.items():
        if (weight := _weight_quantizer(layers[name])) is not None:
            weight.bitwidth = precision.weight_bits
    fit_grids(module, network.dataflow)


def _weight_quantizer(layer: aimet.QuantizedLayer) -> aimet.Quantizer | None:
    return dict(layer.param_quantizers).get("weight")
