"""The precision of single layers, with what the hardware requires of their neighbors."""

from __future__ import annotations

import fnmatch
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lightning_quant.errors import ConfigurationError
from lightning_quant.precision import Precision
from lightning_quant.simulation import aimet

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


def set_precisions(network: QuantizedNetwork, precisions: Mapping[str, Precision]) -> None:
    """Change the bit widths of layers: their weights, and the activations that go into them.

    Ranges stay as they are: calibrate afterwards. The precision of a layer's output changes only if all layers after it
    use the same one.

    Args:
        network: the quantized network, not a copy of one (copies lack AIMET's graph of the network).
        precisions: by the layer's name.

    Raises:
        ConfigurationError: when AIMET does not find the activations that go into a layer, and for a copy.
    """
    if not precisions:
        return
    if (graph := network.sim.connected_graph) is None:
        raise ConfigurationError(
            "This quantized network is a copy, which lacks AIMET's graph of the network: expected the one "
            "that quantize() or the callback made, to give layers another precision."
        )
    layers = quantized_layers(network)
    modules = network.network.modules()
    observers = {module: module.encoding_analyzer for module in modules if hasattr(module, "encoding_analyzer")}
    with aimet.quiet(), _one_place_per_input(graph, layers):
        configurator = aimet.MixedPrecisionConfigurator(network.sim)
        for name, precision in precisions.items():
            configurator.set_precision(layers[name], activation=f"int{precision.activation_bits}")
        try:
            configurator.apply(log_file=io.StringIO(), strict=False)
        except (AttributeError, IndexError, KeyError, RuntimeError) as error:  # AIMET lost its way in the graph
            raise ConfigurationError(
                f"AIMET cannot give {', '.join(precisions)} another precision: {type(error).__name__}: {error}. "
                "Expected layers whose inputs it can trace back; leave out those around resizing and concatenation."
            ) from error
    for name, precision in precisions.items():  # not by AIMET: a request for a neighbor would undo it
        if (weight := dict(layers[name].param_quantizers).get("weight")) is not None:
            weight.bitwidth = precision.weight_bits
    for quantizer, observer in observers.items():  # AIMET replaces the one for percentile by that for tf_enhanced
        quantizer.encoding_analyzer = observer


@contextmanager
def _one_place_per_input(graph: aimet.Graph, layers: Mapping[str, aimet.QuantizedLayer]) -> Iterator[None]:
    """Give concatenations a place for a quantizer at each input: AIMET looks there, and they have but one."""
    added = []
    for operation in graph.get_all_ops().values():
        module = operation.get_module()
        if module in layers.values() and operation.type == "Concat":
            # without a shape it is a number, the axis
            tensors = [one for one in operation.inputs if one.shape is not None and not one.is_parm]
            missing = len(tensors) - len(module.input_quantizers)
            for _ in range(missing):
                module.input_quantizers.append(None)
                added.append(module.input_quantizers)
    try:
        yield
    finally:
        for places in added:
            del places[-1]
