"""Why a layer of a file computes something else than the simulation: encodings and parameters, compared directly."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lightning_quant.deploy.blame.cuts import Cut, grid_of
from lightning_quant.deploy.blame.reasons import Cause, Reason
from lightning_quant.deploy.graph.lowering import lowered
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
    expected = quantizer.get_scale().reshape(-1)[0].item()
    offset = -quantizer.get_offset().reshape(-1)[0].item() - quantizer.qmin
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
    """Weights and biases as the simulation computes with them, and where a file holds them.

    Args:
        network: the quantized network, in eval mode.
        graph: the file.
    """

    def __init__(self, network: QuantizedNetwork, graph: QdqGraph) -> None:
        self._graph = graph
        self._written = {_name(node) for node in graph.model.graph.node if of_integers(node)}
        self._values: dict[str, np.ndarray] = {}
        self._steps: dict[str, np.ndarray] = {}
        self._of_layer: dict[str, list[str]] = {}
        with lowered(network.network), torch.no_grad():  # as the file has them
            self._read(network)

    def _read(self, network: QuantizedNetwork) -> None:
        from lightning_quant.simulation.fast.biases import rounded_bias  # imports AIMET

        names = {id(value): [] for value in network.sim.model.parameters()}  # type: ignore[var-annotated]
        for name, value in network.sim.model.named_parameters(remove_duplicate=False):
            names[id(value)].append(name)
        for layer, module in quantized_layers(network).items():
            own: Any = module
            for parameter, value in own.named_parameters(recurse=False):
                quantizer = dict(own.param_quantizers.items()).get(parameter)
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

    def differences(self, piece: Sequence[onnx.NodeProto], layers: Sequence[str]) -> Iterator[Reason]:
        """Yield the parameters of a piece that have other values in the file.

        Args:
            piece: nodes of one piece.
            layers: the layers in it.
        """
        mine = [name for layer in layers for name in self._of_layer.get(layer, ())]
        used: set[str] = set()
        for node in piece:
            integers = self._graph.known(node.input[0]) if of_integers(node) else None
            name = None if integers is None else self._held(_name(node), integers.shape, mine)
            if integers is not None and name is not None:
                used.add(name)
                yield from self._compared(integers, node, name)
        for name in mine:
            missing = name.endswith(".bias") and name not in used and name not in self._graph.constants
            weight_used = f"{name.removesuffix('bias')}weight" in used
            if missing and weight_used and np.abs(self._values[name]).max(initial=0.0) > 0:
                yield Reason(Cause.BIAS_MISSING, name.partition(".")[2])

    def _held(self, name: str, shape: tuple[int, ...], mine: Sequence[str]) -> str | None:
        """Return which parameter a constant holds, ``None`` for none: the one of its name, where it is of this piece.

        Of parameters with equal values the exporter writes the first only: there it is one that the file does not name.
        """
        if name in mine or name not in self._values:
            return name if name in mine else None
        kind = name.rpartition(".")[2]
        unnamed = (one for one in mine if one not in self._written and one.rpartition(".")[2] == kind)
        return next((one for one in unnamed if self._values[one].shape == shape), name)

    def _compared(self, integers: np.ndarray, node: onnx.NodeProto, name: str) -> Iterator[Reason]:
        scale, zero_point = grid_of(self._graph, node)
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


def _name(node: onnx.NodeProto) -> str:
    """Return the name of the constant that a DequantizeLinear reads, as it was before its copies were numbered."""
    return _COPY.sub("", node.input[0].removesuffix("_q"))


def _integers(steps: np.ndarray) -> np.ndarray:
    """Return the integers of a weight, one row for each channel."""
    return np.ascontiguousarray(np.rint(steps).astype(np.int64).reshape(len(steps), -1))
