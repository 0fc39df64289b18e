"""Why a layer of a file computes something else than the simulation: encodings and parameters, compared directly."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lightning_quant.deploy.blame.cuts import Cut, grid_of
from lightning_quant.deploy.blame.reasons import Cause, Reason
from lightning_quant.deploy.graph.qdq import QdqGraph, axis_of, of_integers
from lightning_quant.simulation.aimet import Quantizer
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.precisions import quantized_layers

if TYPE_CHECKING:
    import onnx

# Ranges that the hardware ties are one in the file and may differ in their last digits in the simulation.
_SAME_SCALE = 1e-4
# What AIMET and the export add to the name of a constant that several operations take.
_COPY = re.compile(r"(_own_\d+|_dup_\d+)+$")


def of_grid(graph: QdqGraph, cut: Cut, quantizer: Quantizer) -> Iterator[Reason]:
    """Yield what is different about the grid that an activation is rounded to."""
    if cut.quantizer is None:
        yield Reason(Cause.NOT_ROUNDED)
        return
    takers = [taker for taker in graph.consumers[cut.quantizer.output[0]] if taker.op_type == "DequantizeLinear"]
    expected = float(quantizer.get_scale().reshape(-1)[0])
    offset = -float(quantizer.get_offset().reshape(-1)[0]) - quantizer.qmin
    given: set[Reason] = set()
    for node in (cut.quantizer, *takers):
        scale, zero_point = grid_of(graph, node)
        kind = np.iinfo(zero_point.dtype) if zero_point.dtype.kind in "iu" else None
        found = float(scale.reshape(-1)[0])
        if not abs(found - expected) <= _SAME_SCALE * expected or scale.size > 1:
            given.add(Reason(Cause.SCALE, expected=expected, found=found))
        if kind is not None and kind.bits != quantizer.bitwidth:
            given.add(Reason(Cause.BITS, expected=quantizer.bitwidth, found=kind.bits))
        elif kind is not None and float(zero_point.reshape(-1)[0]) - kind.min != offset:
            found_zero = float(zero_point.reshape(-1)[0]) - kind.min
            given.add(Reason(Cause.ZERO_POINT, expected=offset, found=found_zero))
    yield from sorted(given, key=lambda reason: reason.cause.value)


class Parameters:
    """Weights and biases as the simulation computes with them, by their names in the file.

    Args:
        network: the quantized network, in eval mode.
    """

    def __init__(self, network: QuantizedNetwork) -> None:
        from lightning_quant.simulation.fast.biases import rounded_bias  # imports AIMET

        self._values: dict[str, np.ndarray] = {}
        self._steps: dict[str, np.ndarray] = {}
        self._of_layer: dict[str, list[str]] = {}
        names = {id(value): [] for value in network.sim.model.parameters()}  # type: ignore[var-annotated]
        for name, value in network.sim.model.named_parameters(remove_duplicate=False):
            names[id(value)].append(name)
        for layer, module in quantized_layers(network).items():
            own: Any = module
            for parameter, value in own.named_parameters(recurse=False):
                quantizer = dict(own.param_quantizers.items()).get(parameter)
                with torch.no_grad():
                    if quantizer is not None and quantizer.is_initialized():
                        made, step = quantizer(value), quantizer.get_scale()
                    elif parameter == "bias" and hasattr(own, "weight"):
                        made, step = rounded_bias(own), torch.zeros(())
                    else:
                        made, step = value, torch.zeros(())
                for name in names.get(id(value), ()):
                    self._values[name] = made.detach().as_subclass(torch.Tensor).double().numpy()
                    self._steps[name] = step.detach().as_subclass(torch.Tensor).double().numpy()
                    self._of_layer.setdefault(layer, []).append(name)

    def differences(self, graph: QdqGraph, piece: Sequence[onnx.NodeProto], layers: Sequence[str]) -> Iterator[Reason]:
        """Yield the parameters of a piece that have other values in the file.

        Args:
            graph: the file.
            piece: nodes of one piece.
            layers: the layers in it.
        """
        used: set[str] = set()
        for node in piece:
            name = _COPY.sub("", node.input[0].removesuffix("_q")) if node.input else ""
            if of_integers(node) and name in self._values and graph.known(node.input[0]) is not None:
                used.add(name)
                yield from self._compared(graph, node, name)
        for layer in layers:
            for name in self._of_layer.get(layer, ()):
                missing = name.endswith(".bias") and name not in used and name not in graph.constants
                weight_used = f"{name.removesuffix('bias')}weight" in used
                if missing and weight_used and np.abs(self._values[name]).max(initial=0.0) > 0:
                    yield Reason(Cause.BIAS_MISSING, name.partition(".")[2])

    def _compared(self, graph: QdqGraph, node: onnx.NodeProto, name: str) -> Iterator[Reason]:
        integers = graph.known(node.input[0])
        scale, zero_point = grid_of(graph, node)
        assert integers is not None
        expected = self._values[name]
        axis = axis_of(node) % max(integers.ndim, 1)
        along = [-1 if place == axis else 1 for place in range(integers.ndim)]
        if scale.size > 1:
            scale = scale.reshape(along)
            zero_point = zero_point.reshape(along if zero_point.size > 1 else [])
        found = (integers.astype(np.float64) - zero_point.astype(np.float64)) * scale.astype(np.float64)
        if found.shape != expected.shape:
            return
        step = np.abs(scale.astype(np.float64)) + self._steps[name]  # one of them may be coarser
        is_bias = name.endswith("bias")
        other = np.abs(found - expected) > (0.75 * step if is_bias else 0.25 * step) + 1e-6 * np.abs(expected)
        if not other.any():
            return
        parameter = name.partition(".")[2]
        first = other.reshape(other.shape[0], -1).any(1) if other.ndim else other.reshape(1)
        channels = tuple(int(one) for one in np.flatnonzero(first))
        if is_bias and not found.any():
            yield Reason(Cause.BIAS_MISSING, parameter)
            return
        if is_bias:
            yield Reason(Cause.BIAS, parameter, share=float(other.mean()), channels=channels)
            return
        steps = np.where(self._steps[name] > 0, self._steps[name], 1.0)
        rows, wanted = (_integers(one)[first] for one in (found / scale, expected / steps))
        if np.array_equal(rows, wanted):
            wished, written = (float(np.broadcast_to(one, found.shape)[other][0]) for one in (steps, scale))
            yield Reason(Cause.SCALE, parameter, wished, written, channels=channels)
            return
        permuted = sorted(map(bytes, rows)) == sorted(map(bytes, wanted))
        cause = Cause.WEIGHTS_PERMUTED if permuted else Cause.WEIGHTS
        yield Reason(cause, parameter, share=float(other.mean()), channels=channels)


def _integers(steps: np.ndarray) -> np.ndarray:
    """Return the integers of a weight, one row for each channel."""
    return np.ascontiguousarray(np.rint(steps).astype(np.int64).reshape(len(steps), -1))
