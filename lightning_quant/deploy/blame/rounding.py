"""What rounding costs each layer: the simulation compared with the same network in float."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_quant.deploy import parity
from lightning_quant.deploy.blame.differences import Differences
from lightning_quant.deploy.blame.grid_use import GridUse, finite
from lightning_quant.deploy.blame.reasons import Reason
from lightning_quant.deploy.blame.remedies import Remedies
from lightning_quant.deploy.blame.result import Against, Blame, LayerBlame
from lightning_quant.deploy.blame.takers import Takers, fused_with, takers_of
from lightning_quant.simulation import aimet
from lightning_quant.simulation.inputs import NetworkInputs, tensors_in
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.precisions import quantized_layers

# A layer is named where it loses this many times what the median layer loses, this share of all that is lost, and
# enough to matter: below, its output keeps 25 dB.
_TIMES_THE_MEDIAN, _SHARE_OF_ALL, _MATTERS = 4.0, 0.1, 3e-3
# Weights or activations are named where they are this share of what the layer loses.
_SHARE_OF_THE_LAYER = 0.25


def compare_with_float(network: QuantizedNetwork, calls: Iterable[NetworkInputs]) -> Blame:
    """Measure what rounding costs each layer.

    In one pass every layer computes rounded and in float from the float network's tensors, and hands on the float
    ones; in a second pass the simulation runs as it is. The float network is this one without rounding: with the
    weights that training or a rung left.

    Args:
        network: the simulation, calibrated, on the CPU in eval mode.
        calls: of one sample each.
    """
    comparison = _Comparison(network)
    for call in calls:
        comparison.add(call)
    return comparison.result()


class _Comparison:
    """Both figures of every layer that rounds something, collected sample by sample."""

    def __init__(self, network: QuantizedNetwork) -> None:
        self.network = network
        rounding = {name: one for name, one in quantized_layers(network).items() if _rounds(one)}
        self.layers = {name: _Layer(name, one) for name, one in rounding.items()}
        self.order: dict[str, None] = {}
        self.takers: Takers = {}
        self.outputs: list[tuple[list[Any], list[Any]]] = []

    def add(self, call: NetworkInputs) -> None:
        if not self.outputs:
            self.takers = takers_of(self.network, call)
            for name in fused_with(quantized_layers(self.network), self.takers) & self.layers.keys():
                self.layers[name].is_fused = True
        one = _OneSample(self)
        with _hooks(quantized_layers(self.network), one.enter, one.leave):
            reference = call.call(self.network.network)
        with _hooks({name: layer.layer for name, layer in self.layers.items()}, None, one.arrive):
            returned = call.call(self.network.network)
        pairs = [[tensor.detach().numpy() for tensor in tensors_in(output)] for output in (reference, returned)]
        self.outputs.append((pairs[0], pairs[1]))

    def result(self) -> Blame:
        known = [self.layers[name] for name in self.order]
        lost = [layer.noise.share() for layer in known]
        typical, total = median([one for one in lost if one > 0] or [0.0]), sum(lost)
        remedies = Remedies(self.network, self.takers)
        layers = []
        for layer, share in zip(known, lost, strict=True):
            stands_out = share > max(_TIMES_THE_MEDIAN * typical, _SHARE_OF_ALL * total, _MATTERS)
            grids = layer.costly_grids() if stands_out else []
            layers.append(layer.result(tuple(remedies.reason(layer.name, grid) for grid in grids)))
        of_weights = sum(layer.of_weights.share() for layer in known)
        whole = None if any(one.guilty for one in layers) else remedies.of_all(of_weights > total / 2)
        return Blame(
            tuple(layers), parity.compare(self.outputs), len(self.outputs), True, against=Against.FLOAT, whole=whole
        )


class _OneSample:
    """The hooks of one sample: float outputs of the first pass, to compare the second with."""

    def __init__(self, comparison: _Comparison) -> None:
        self.comparison = comparison
        self.given: list[tuple[Any, Any]] = []
        self.outputs: dict[str, list[list[Tensor]]] = {}
        self.inside = False

    def enter(self, name: str, layer: Any, args: Any, kwargs: Any) -> None:
        """Keep what a layer is given: it may change that in place."""
        if not self.inside:
            self.given.append(_copied((args, kwargs)))

    def leave(self, name: str, layer: Any, args: Any, kwargs: Any, output: Any) -> Any:
        """Compute the layer in float as well, compare, and hand on what it computed in float."""
        if self.inside:
            return None
        given = self.given.pop()
        self.inside = True
        try:
            reference, of_weights = self._in_float(layer, given), self._with_rounded_weights(layer, given)
        finally:
            self.inside = False
        expected = tensors_in(reference)
        self.outputs.setdefault(name, []).append(expected)
        if (known := self.comparison.layers.get(name)) is not None:
            self.comparison.order[name] = None
            known.add(given[0], expected, tensors_in(output), of_weights)
        return reference

    def arrive(self, name: str, layer: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Compare what the simulation computes with the float output of the same call."""
        if expected := self.outputs.get(name):
            self.comparison.layers[name].arrive(expected.pop(0), tensors_in(output))

    def _in_float(self, layer: Any, given: tuple[Any, Any]) -> Any:
        args, kwargs = _copied(given)
        with aimet.remove_all_quantizers([layer]):
            return layer(*args, **kwargs)

    def _with_rounded_weights(self, layer: Any, given: tuple[Any, Any]) -> list[Tensor]:
        from lightning_quant.simulation.fast.biases import unrounded_biases  # imports AIMET

        if not any(quantizer is not None for quantizer in layer.param_quantizers.values()):
            return []
        args, kwargs = _copied(given)
        with aimet.remove_activation_quantizers([layer]), unrounded_biases([layer]):
            return tensors_in(layer(*args, **kwargs))


class _Layer:
    """What one layer adds and loses, over all samples."""

    def __init__(self, name: str, layer: Any) -> None:
        self.name, self.layer = name, layer
        self.by_itself, self.arrived = Differences(), Differences()
        self.noise, self.of_weights = _Noise(), _Noise()
        self.is_fused = False
        self.activations: dict[Any, GridUse] = {}
        self.parameters: list[GridUse] = []
        for parameter, quantizer in layer.param_quantizers.items():
            if quantizer is not None and quantizer.is_initialized():
                use = GridUse(quantizer, 0, f"{name}.{parameter}")
                use.add(getattr(layer, parameter))
                self.parameters.append(use)

    def add(
        self, args: Any, expected: Sequence[Tensor], computed: Sequence[Tensor], of_weights: Sequence[Tensor]
    ) -> None:
        """Add a call: what it was given, what it computes of that in float, rounded, and with rounded weights only."""
        expected = self._as_used(expected)
        self._look_at(self.layer.input_quantizers, args)
        if not self.is_fused:  # of the same values the function's own grid says what is wrong
            self._look_at(self.layer.output_quantizers, expected)
        for place, (wanted, made) in enumerate(zip(expected, computed, strict=False)):
            if wanted.is_floating_point():
                self.by_itself.add(_array(wanted), _array(made), self._step(place))
                self.noise.add(wanted, made, self._axis(wanted))
        for wanted, made in zip(expected, of_weights, strict=False):
            if wanted.is_floating_point():
                self.of_weights.add(wanted, self._as_used([made])[0], self._axis(wanted))

    def arrive(self, expected: Sequence[Tensor], computed: Sequence[Tensor]) -> None:
        """Add what the simulation computed in a call."""
        for place, (wanted, made) in enumerate(zip(self._as_used(expected), computed, strict=False)):
            if wanted.is_floating_point() and wanted.shape == made.shape:
                self.arrived.add(_array(wanted), _array(made), self._step(place))

    def costly_grids(self) -> list[GridUse]:
        """Return the grids that cost what the layer loses: that of a weight, or of an activation, or both."""
        lost, of_weights = self.noise.share(), self.of_weights.share()
        worst = [max(uses, key=lambda one: one.noise_share, default=None) for uses in self._uses()]
        parts = zip(worst, (of_weights, lost - of_weights), strict=True)
        costs = [(use, cost) for use, cost in parts if use is not None and cost > _SHARE_OF_THE_LAYER * lost]
        return [use for use, _ in sorted(costs, key=lambda pair: -pair[1])]

    def result(self, reasons: tuple[Reason, ...]) -> LayerBlame:
        bits = [min((use.quantizer.bitwidth for use in uses), default=None) for uses in self._uses()]
        return LayerBlame(
            self.name,
            "",
            (self.name,),
            self.by_itself.result(),
            self.arrived.result(),
            reasons,
            lost=self.noise.share(),
            weight_bits=bits[0],
            activation_bits=bits[1],
        )

    def _uses(self) -> tuple[list[GridUse], list[GridUse]]:
        return self.parameters, list(self.activations.values())

    def _as_used(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return outputs without what the activation function behind them removes."""
        if not self.is_fused:
            return outputs
        (quantizer, *_) = self.layer.output_quantizers
        return [one.clamp(quantizer.get_min(), quantizer.get_max()) for one in outputs]

    def _look_at(self, quantizers: Sequence[Any], tensors: Sequence[Any]) -> None:
        for quantizer, tensor in zip(quantizers, tensors, strict=False):
            if quantizer is not None and isinstance(tensor, Tensor) and tensor.is_floating_point():
                if quantizer not in self.activations:
                    self.activations[quantizer] = GridUse(quantizer, self._axis(tensor))
                self.activations[quantizer].add(tensor)

    def _axis(self, tensor: Tensor) -> int:
        """Return the axis of the channels."""
        second = isinstance(self.layer, nn.modules.conv._ConvNd) or tensor.dim() >= 4
        return 1 if second else max(tensor.dim() - 1, 0)

    def _step(self, place: int) -> float | None:
        quantizers = list(self.layer.output_quantizers)
        known = quantizers[place] if place < len(quantizers) else None
        return None if known is None or known.get_scale().numel() != 1 else known.get_scale().item()


class _Noise:
    """Collects the power of the noise in each channel, as a share of the channel's power."""

    def __init__(self) -> None:
        self._noise: Tensor | float = 0.0
        self._signal: Tensor | float = 0.0

    def add(self, reference: Tensor, actual: Tensor, axis: int) -> None:
        wanted, made = (_by_channel(finite(one.detach().as_subclass(Tensor)), axis) for one in (reference, actual))
        self._noise = self._noise + (made - wanted).square().sum(1, dtype=torch.float64)
        self._signal = self._signal + wanted.square().sum(1, dtype=torch.float64)

    def share(self) -> float:
        """Return the mean over the channels that are not zero."""
        if isinstance(self._noise, float) or isinstance(self._signal, float):
            return 0.0
        used = self._signal > 0
        return float((self._noise[used] / self._signal[used]).clamp(max=1.0).mean()) if bool(used.any()) else 0.0


@contextmanager
def _hooks(layers: dict[str, Any], enter: Any, leave: Any) -> Iterator[None]:
    with ExitStack() as hooks:
        for name, layer in layers.items():
            if enter is not None:
                handle = layer.register_forward_pre_hook(partial(enter, name), prepend=True, with_kwargs=True)
                hooks.callback(handle.remove)
            hooks.callback(layer.register_forward_hook(partial(leave, name), with_kwargs=True).remove)
        yield


def _rounds(layer: Any) -> bool:
    quantizers = [*layer.input_quantizers, *layer.output_quantizers, *layer.param_quantizers.values()]
    return any(one is not None and one.is_initialized() for one in quantizers)


def _copied(given: tuple[Any, Any]) -> tuple[Any, Any]:
    copied: tuple[Any, Any] = apply_to_collection(given, Tensor, torch.clone)
    return copied


def _by_channel(tensor: Tensor, axis: int) -> Tensor:
    return tensor.reshape(1, -1) if tensor.dim() < 2 else tensor.transpose(0, axis).flatten(1)


def _array(tensor: Tensor) -> Any:
    return tensor.detach().as_subclass(Tensor).numpy()
