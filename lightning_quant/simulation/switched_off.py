"""A quantized network with its quantizers, or those of its activations, switched off for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning_quant.simulation import aimet
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.precisions import quantized_layers


@contextmanager
def weights_only(network: QuantizedNetwork) -> Iterator[None]:
    """Round weights only: activations pass as they are, and biases, which are rounded in units of both."""
    from lightning_quant.simulation.fast.biases import unrounded_biases  # imports AIMET

    layers = list(quantized_layers(network).values())
    with aimet.remove_activation_quantizers(layers), unrounded_biases(layers):
        yield


@contextmanager
def unrounded(network: QuantizedNetwork) -> Iterator[None]:
    """Round nothing: the float network that these weights are."""
    from lightning_quant.simulation.fast.biases import unrounded_biases  # imports AIMET

    layers = list(quantized_layers(network).values())
    with aimet.remove_all_quantizers(layers), unrounded_biases(layers):
        yield
