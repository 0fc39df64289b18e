"""Compare a file with its simulation layer by layer, in the names of the user's own modules."""

from __future__ import annotations

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
from lightning_quant.deploy.graph.qdq import QdqGraph, exact_session, hands_on
from lightning_quant.deploy.single_samples import first_samples
from lightning_quant.errors import ConfigurationError, ExportError
from lightning_quant.simulation.inputs import NetworkInputs, tensors_in
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.precisions import quantized_layers
from lightning_quant.simulation.rounded_tensors import RoundedTensor, rounded_tensors
from lightning_quant.utilities.modules import on_cpu_in_eval

if TYPE_CHECKING:
    import onnx

Arrays = dict[str, np.ndarray]
_NO_OPERATION = ("QuantizeLinear", "DequantizeLinear", "Constant")


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
    comparison = _Comparison(network, QdqGraph(model))
    wanted = {value.name for value in model.graph.input}
    for call in calls:
        named = zip(input_names, call.tensors, strict=True)
        comparison.add(call, {name: tensor.numpy() for name, tensor in named if name in wanted})
    return comparison.result()


class _Comparison:
    """Both figures of every tensor, collected sample by sample; the file is cut at the first one."""

    def __init__(self, network: QuantizedNetwork, graph: QdqGraph) -> None:
        self.network, self.graph, self.layers = network, graph, quantized_layers(network)
        self.plain = exact_session(graph.model)
        self.output_names = [value.name for value in graph.model.graph.output]
        self.tensors: list[_Tensor] = []
        self.unmatched: list[str] = []
        self.outputs: list[tuple[list[np.ndarray], list[np.ndarray]]] = []
        self.observed_runs = True

    def add(self, call: NetworkInputs, feeds: Arrays) -> None:
        seen, returned = rounded_tensors(self.network, call)
        if not self.tensors:
            self._cut(seen, feeds)
        plain = _run(self.plain, feeds)
        arrived = {**feeds, **_run(self.watched, feeds)}
        given = {
            name: seen[one.cut.position].values.numpy().reshape(arrived[name].shape)
            for one in self.tensors
            if one.cut is not None and not one.cut.handed_on
            for name in one.cut.values
        }
        computed = {**feeds, **given, **_run(self.pieces, {**feeds, **given})}
        expected = [tensor.detach().numpy() for tensor in tensors_in(returned)]
        references = dict(zip(self.output_names, expected, strict=True))
        for one in self.tensors:
            one.add(seen, computed, arrived, references)
        self.observed_runs &= all(np.array_equal(plain[name], arrived[name]) for name in self.output_names)
        self.outputs.append((expected, [plain[name] for name in self.output_names]))

    def _cut(self, seen: list[RoundedTensor], feeds: Arrays) -> None:
        model = self.graph.model

        def measure(names: Iterable[str]) -> dict[str, int]:
            inner = _run(exact_session(watched(model, names)), feeds)
            return {name: value.size for name, value in inner.items()}

        cuts, self.unmatched = match(self.graph, seen, measure, self.layers)
        if not cuts:
            raise ExportError(
                f"No tensor of the file is one of {self.network.float_class.__name__}'s: expected a bundle that was "
                "exported from this network. Export it again."
            )
        rounded = {name for cut in cuts for name in cut.values}
        for cut in cuts:
            inside = any(node.op_type == "QuantizeLinear" for node in piece_of(self.graph, cut.tensor, cuts))
            self.tensors.append(_Tensor(cut.tensor, cut, seen[cut.position].quantizer, inside))
        self.tensors += [_Tensor(name) for name in self.output_names if name not in rounded]
        self.watched = exact_session(watched(model, rounded))
        self.pieces = exact_session(pieces(model, cuts))

    def result(self) -> Blame:
        cuts = [one.cut for one in self.tensors if one.cut is not None]
        parameters = Parameters(self.network)
        layers = tuple(self._layer(one, cuts, parameters) for one in self.tensors)
        output = parity.compare(self.outputs)
        return Blame(layers, output, len(self.outputs), self.observed_runs, tuple(self.unmatched))

    def _layer(self, one: _Tensor, cuts: list[Cut], parameters: Parameters) -> LayerBlame:
        piece = piece_of(self.graph, one.name, cuts)
        operations = [node for node in piece if node.op_type not in _NO_OPERATION]
        modules = tuple(dict.fromkeys(name for node in operations if (name := layer_of(node, self.layers))))
        weighted = [name for name in modules if getattr(self.layers.get(name), "weight", None) is not None]
        computing = [layer_of(node, self.layers) for node in operations if not hands_on(node)]
        layer = next(filter(None, [*weighted, *computing, *modules, one.name]))
        reasons = [] if one.cut is None else [*of_grid(self.graph, one.cut, one.quantizer)]
        reasons += parameters.differences(self.graph, piece, modules)
        by_itself = one.by_itself.result()
        if by_itself.unexplained and not reasons:
            reasons.append(Reason(Cause.OPERATION))
        return LayerBlame(layer, one.name, modules, by_itself, one.arrived.result(), tuple(reasons))


class _Tensor:
    """One tensor that is compared.

    Args:
        name: its name in the file.
        cut: where it is rounded; ``None`` for an output that is not.
        quantizer: what rounds it in the simulation.
        rounded_before: whether its piece of the file rounds something else on the way, as the simulation does not.
    """

    def __init__(self, name: str, cut: Cut | None = None, quantizer: Any = None, rounded_before: bool = False) -> None:
        self.name, self.cut, self.quantizer, self.rounded_before = name, cut, quantizer, rounded_before
        self.by_itself, self.arrived = Differences(), Differences()

    def add(self, seen: Sequence[RoundedTensor], computed: Arrays, arrived: Arrays, outputs: Arrays) -> None:
        """Add one sample.

        Args:
            seen: the simulation's tensors.
            computed: what the pieces of the file compute from these.
            arrived: what the whole file computes.
            outputs: what the simulation returns.
        """
        if self.cut is None:
            self.by_itself.add(outputs[self.name], computed[self.name])
            self.arrived.add(outputs[self.name], arrived[self.name])
            return
        step = float(self.quantizer.get_scale().reshape(-1)[0])
        before = computed[self.name] if self.cut.quantizer is not None else computed[own(self.name)]
        one = seen[self.cut.position]
        reference, unrounded = one.values.numpy(), one.before.numpy()
        if self.cut.handed_on:
            reference = unrounded = before
        elif self.rounded_before:
            before = unrounded
        name = max(self.cut.values, key=lambda name: _largest(reference, computed[own(name)]))
        self.by_itself.add(reference, computed[own(name)], step, (unrounded, before))
        self.arrived.add(reference, arrived[name], step)


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


def _run(session: Any, feeds: Arrays) -> Arrays:
    names = [value.name for value in session.get_outputs()]
    wanted = {value.name for value in session.get_inputs()}
    computed = session.run(names, {name: value for name, value in feeds.items() if name in wanted})
    return dict(zip(names, computed, strict=True))


def _largest(expected: np.ndarray, actual: np.ndarray) -> float:
    return float(np.nan_to_num(np.abs(expected.reshape(-1) - actual.reshape(-1)), nan=np.inf).max(initial=0.0))
