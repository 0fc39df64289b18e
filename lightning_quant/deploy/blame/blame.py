"""Compare a file with its simulation layer by layer, in the names of the user's own modules."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_quant.deploy import parity
from lightning_quant.deploy.blame.causes import Parameters, of_grid
from lightning_quant.deploy.blame.cuts import Cut, own, piece_of, pieces, watched
from lightning_quant.deploy.blame.differences import Differences
from lightning_quant.deploy.blame.places import layer_of, match
from lightning_quant.deploy.blame.result import Blame, Cause, LayerBlame, Reason
from lightning_quant.deploy.bundle import Bundle, load_bundle
from lightning_quant.deploy.graph.files import write_onnx
from lightning_quant.deploy.graph.qdq import QdqGraph, exact_session, hands_on, sizes_of
from lightning_quant.deploy.single_samples import first_samples
from lightning_quant.errors import ConfigurationError, ExportError
from lightning_quant.simulation.inputs import NetworkInputs, tensors_in
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.precisions import quantized_layers
from lightning_quant.simulation.rounded_tensors import RoundedTensor, rounded_tensors
from lightning_quant.utilities.modules import on_cpu_in_eval

if TYPE_CHECKING:
    import onnx


def blame(
    module: nn.Module | QuantizedNetwork,
    samples: Tensor | NetworkInputs | Iterable[NetworkInputs],
    bundle: Bundle | str | Path | None = None,
    *,
    count: int = 2,
) -> Blame:
    """Find the layers of an exported file that compute something else than the simulation.

    Every layer is run on the simulation's own tensors, so that a layer which only passes an error on is told apart from
    the one that adds it. The file is cut at the tensors that it rounds, and all pieces run at once: one pass of the
    simulation, two of the file for each sample.

    Examples:
        >>> print(lq.blame(module, images))  # doctest: +SKIP

    Args:
        module: a calibrated network, or a LightningModule that holds one.
        samples: what it is run on: a batch, or calls of the network.
        bundle: the file to look at. Default: what an export of the network writes, whether or not it agrees.
        count: how many samples are compared.

    Raises:
        ConfigurationError: when the module holds no calibrated network, or several.
        ExportError: when the network cannot be written as ONNX, or the bundle is not of this network.
    """
    network = _network(module)
    if isinstance(samples, Tensor):
        samples = NetworkInputs((samples,))
    given = [samples] if isinstance(samples, NetworkInputs) else samples
    with on_cpu_in_eval(network.network):
        calls = [call.to(torch.device("cpu")).batched_like(network.inputs) for call in given]
        if not calls:
            raise ConfigurationError("No samples to compare file and simulation on: expected at least one.")
        calls = first_samples(calls, count, network.inputs)
        if bundle is not None:
            known = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
            return compare_layers(network, _read(known.qdq), known.manifest.input_names, calls)
        with tempfile.TemporaryDirectory() as folder:
            qdq = Path(folder) / "model_qdq.onnx"
            written = write_onnx(network, calls[0], Path(folder) / "model.onnx", qdq)
            return compare_layers(network, _read(qdq), written.input_names, calls)


def compare_layers(
    network: QuantizedNetwork, model: onnx.ModelProto, input_names: Sequence[str], calls: Sequence[NetworkInputs]
) -> Blame:
    """Compare a file with integer weights with the simulation.

    Args:
        network: the simulation, calibrated, on the CPU in eval mode.
        model: the file.
        input_names: its inputs, in the order of the tensors of a call.
        calls: of one sample each, of the file's sizes.
    """
    graph = QdqGraph(model)
    layers = quantized_layers(network)
    comparison = _Comparison(network, graph, layers)
    wanted = {value.name for value in model.graph.input}
    for call in calls:
        named = zip(input_names, call.tensors, strict=True)
        comparison.add(call, {name: tensor.numpy() for name, tensor in named if name in wanted})
    return comparison.result()


class _Comparison:
    def __init__(self, network: QuantizedNetwork, graph: QdqGraph, layers: Any) -> None:
        self.network, self.graph, self.layers = network, graph, layers
        self.outputs = [value.name for value in graph.model.graph.output]
        self.plain = exact_session(graph.model)
        self.cuts: list[tuple[Cut, int]] = []
        self.unmatched: list[str] = []
        self.quantizers: list[Any] = []
        self.differences: list[tuple[Differences, Differences]] = []
        self.of_outputs: dict[str, tuple[Differences, Differences]] = {}
        self.pairs: list[tuple[list[np.ndarray], list[np.ndarray]]] = []
        self.observed_runs = True

    def add(self, call: NetworkInputs, feeds: dict[str, np.ndarray]) -> None:
        seen, returned = rounded_tensors(self.network, call)
        expected = [tensor.detach().numpy() for tensor in tensors_in(returned)]
        if not self.cuts:
            self._cut(seen)
        arrived = dict(zip(self.watched_names, self.watched.run(self.watched_names, feeds), strict=True))
        plain = self.plain.run(self.outputs, feeds)
        self.observed_runs &= all(
            np.array_equal(one, arrived[name], equal_nan=one.dtype.kind == "f")
            for name, one in zip(self.outputs, plain, strict=True)
        )
        self.pairs.append((expected, plain))
        tensors = [seen[position].values.numpy() for _, position in self.cuts]
        given = {
            name: tensor.reshape(arrived[name].shape)
            for (cut, _), tensor in zip(self.cuts, tensors, strict=True)
            for name in cut.values
        }
        session_inputs = {value.name for value in self.pieces.get_inputs()}
        computed = dict(
            zip(
                self.piece_names,
                self.pieces.run(
                    self.piece_names, {n: v for n, v in {**feeds, **given}.items() if n in session_inputs}
                ),
                strict=True,
            )
        )
        for (cut, _), tensor, quantizer, (by_itself, so_far) in zip(
            self.cuts, tensors, self.quantizers, self.differences, strict=True
        ):
            step = float(quantizer.get_scale().reshape(-1)[0])
            before = computed.get(cut.tensor, given.get(cut.tensor, feeds.get(cut.tensor)))
            unrounded = before if cut.quantizer is not None else None
            worst = max(cut.values, key=lambda name: _distance(tensor, computed[own(name)]))
            by_itself.add(tensor, computed[own(worst)], step, unrounded)
            so_far.add(tensor, arrived[worst], step)
        for name, reference, whole in zip(self.outputs, expected, plain, strict=True):
            if name in self.of_outputs:
                by_itself, so_far = self.of_outputs[name]
                by_itself.add(reference, computed[name])
                so_far.add(reference, whole)

    def _cut(self, seen: list[RoundedTensor]) -> None:
        graph, model = self.graph, self.graph.model
        sizes = {name: math.prod(size) for name, size in sizes_of(model).items()}
        places = match(graph, seen, sizes, self.layers)
        self.cuts, self.unmatched = places.cuts, places.unmatched
        if not self.cuts:
            raise ExportError(
                f"No tensor of the file is one of {self.network.float_class.__name__}'s: expected a bundle that was "
                "exported from this network. Export it again."
            )
        self.quantizers = [seen[position].quantizer for _, position in self.cuts]
        self.differences = [(Differences(), Differences()) for _ in self.cuts]
        cuts = [cut for cut, _ in self.cuts]
        taken = {name for cut in cuts for name in cut.values}
        self.of_outputs = {n: (Differences(), Differences()) for n in self.outputs if n not in taken}
        self.watched = exact_session(watched(model, cuts))
        self.watched_names = [value.name for value in self.watched.get_outputs()]
        self.pieces = exact_session(pieces(model, cuts))
        self.piece_names = [value.name for value in self.pieces.get_outputs()]

    def result(self) -> Blame:
        graph, cuts = self.graph, [cut for cut, _ in self.cuts]
        parameters = Parameters(self.network)
        found = []
        for (cut, _), quantizer, (by_itself, so_far) in zip(
            self.cuts, self.quantizers, self.differences, strict=True
        ):
            reasons = list(of_grid(graph, cut, quantizer))
            found.append(self._layer(cut.tensor, cuts, parameters, by_itself, so_far, reasons))
        for name, (by_itself, so_far) in self.of_outputs.items():
            found.append(self._layer(name, cuts, parameters, by_itself, so_far, []))
        return Blame(
            tuple(found), parity.compare(self.pairs), len(self.pairs), self.observed_runs, tuple(self.unmatched)
        )

    def _layer(
        self,
        tensor: str,
        cuts: list[Cut],
        parameters: Parameters,
        by_itself: Differences,
        so_far: Differences,
        reasons: list[Reason],
    ) -> LayerBlame:
        graph = self.graph
        piece = piece_of(graph, tensor, cuts)
        computing = [node for node in piece if node.op_type not in ("QuantizeLinear", "DequantizeLinear", "Constant")]
        modules = tuple(dict.fromkeys(name for node in computing if (name := layer_of(node, self.layers))))
        weighted = [name for name in modules if getattr(self.layers.get(name), "weight", None) is not None]
        computed = [layer_of(node, self.layers) for node in computing if not hands_on(node)]
        layer = next(filter(None, [*weighted, *computed, *modules, tensor]))
        reasons += parameters.differences(graph, piece, modules)
        own_error = by_itself.result()
        if own_error.unexplained and not reasons:
            reasons.append(Reason(Cause.OPERATION))
        return LayerBlame(layer, tensor, modules, own_error, so_far.result(), tuple(reasons))


def _network(module: nn.Module | QuantizedNetwork) -> QuantizedNetwork:
    known = QuantizedNetwork.of(module)
    if known is None and isinstance(module, nn.Module):
        found = dict(QuantizedNetwork.named_in(module))
        if len(found) > 1:
            raise ConfigurationError(
                f"The module holds {len(found)} quantized networks: {', '.join(found)}. Expected one: pass the one to "
                "look at."
            )
        known = next(iter(found.values()), None)
    if known is None or not known.calibrated:
        raise ConfigurationError(
            "The module holds no calibrated network: expected one that was run by a callback's fit, validate, test or "
            "predict, or that load_quantized() returned."
        )
    return known


def _read(file: Path) -> onnx.ModelProto:
    import onnx

    return onnx.load(file)


def _distance(expected: np.ndarray, actual: np.ndarray) -> float:
    distance = float(np.abs(expected.reshape(-1) - actual.reshape(-1)).max(initial=0.0))
    return distance if distance == distance else float("inf")
