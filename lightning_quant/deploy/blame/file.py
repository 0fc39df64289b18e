"""A file compared with the simulation: what both compute of each tensor that is rounded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_quant.deploy import parity
from lightning_quant.deploy.blame.causes import Parameters, of_grid
from lightning_quant.deploy.blame.cuts import Cut, own, piece_of, pieces, watched
from lightning_quant.deploy.blame.differences import Differences
from lightning_quant.deploy.blame.places import match, modules_in
from lightning_quant.deploy.blame.reasons import Cause, Change, Reason, Remedy
from lightning_quant.deploy.blame.result import Blame, LayerBlame
from lightning_quant.deploy.graph.qdq import QdqGraph, exact_session, of_integers
from lightning_quant.errors import ExportError
from lightning_quant.simulation.inputs import NetworkInputs, tensors_in
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.precisions import quantized_layers
from lightning_quant.simulation.rounded_tensors import RoundedTensor, rounded_tensors

if TYPE_CHECKING:
    import onnx

Arrays = dict[str, np.ndarray]


def compare_file(
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


def cuts_of(
    network: QuantizedNetwork, graph: QdqGraph, seen: Sequence[RoundedTensor], feeds: Arrays
) -> tuple[list[Cut], list[str]]:
    """Cut a file at the tensors that it rounds and the simulation as well, see :func:`places.match`.

    Args:
        network: the simulation.
        graph: the file.
        seen: what the simulation rounds in one pass.
        feeds: inputs of the file.

    Raises:
        ExportError: when the file is that of another network.
    """

    def measure(names: Iterable[str]) -> dict[str, int]:
        inner = _run(exact_session(watched(graph.model, names)), feeds)
        return {name: value.size for name, value in inner.items()}

    cuts, unmatched = match(graph, seen, measure, quantized_layers(network))
    if not cuts:
        raise ExportError(
            f"No tensor of the file is one of {network.float_class.__name__}'s: expected a bundle that was "
            "exported from this network. Export it again."
        )
    return cuts, unmatched


class _Comparison:
    """Both figures of every tensor, collected sample by sample; the file is cut at the first one."""

    def __init__(self, network: QuantizedNetwork, graph: QdqGraph) -> None:
        self.network, self.graph, self.layers = network, graph, quantized_layers(network)
        self.plain = exact_session(graph.model)
        self.output_names = [value.name for value in graph.model.graph.output]
        self.tensors: list[_Tensor] = []
        self.unmatched: list[str] = []
        self.outputs: list[tuple[list[np.ndarray], list[np.ndarray]]] = []
        self.returned: dict[str, _Tensor] = {}  # outputs that are not what was rounded: changed in place afterwards
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
        for name, reference in references.items():
            computed.setdefault(name, arrived[name])  # moved behind the last piece
            if self._is_changed(name, reference, seen, computed):
                self.returned.setdefault(name, _Tensor(name)).add(seen, computed, arrived, references)
        self.observed_runs &= all(np.array_equal(plain[name], arrived[name]) for name in self.output_names)
        self.outputs.append((expected, [plain[name] for name in self.output_names]))

    def _cut(self, seen: list[RoundedTensor], feeds: Arrays) -> None:
        model = self.graph.model
        cuts, self.unmatched = cuts_of(self.network, self.graph, seen, feeds)
        rounded = {name for cut in cuts for name in cut.values}
        for cut in cuts:
            inside = any(node.op_type == "QuantizeLinear" for node in piece_of(self.graph, cut.tensor, cuts))
            self.tensors.append(_Tensor(cut.tensor, cut, seen[cut.position].quantizer, inside))
        self.tensors += [_Tensor(name) for name in self.output_names if name not in rounded]
        self.watched = exact_session(watched(model, rounded))
        self.pieces = exact_session(pieces(model, cuts))

    def _is_changed(self, output: str, returned: np.ndarray, seen: Sequence[RoundedTensor], computed: Arrays) -> bool:
        """Return whether the simulation returns other values than those that it rounded for an output of the file."""
        reader = self.graph.producers.get(output)
        step = self.graph.number(reader.input[1]) if reader is not None and of_integers(reader) else None
        cut = next((one.cut for one in self.tensors if one.cut is not None and output in one.cut.values), None)
        if step is None or cut is None:
            return False
        rounded = seen[cut.position].values.numpy() if cut.handed_on else computed[output]
        if rounded.size != returned.size:  # a part is handed on
            return False
        if cut.handed_on:  # in another order
            return _largest(np.sort(returned, None), np.sort(rounded, None)) > step / 2
        return _largest(returned, rounded) > 1.5 * step

    def result(self) -> Blame:
        cuts = [one.cut for one in self.tensors if one.cut is not None]
        parameters = Parameters(self.network, self.graph)
        known = {one.name for one in self.tensors if one.cut is None}
        others = [one for name, one in self.returned.items() if name not in known]
        layers = tuple(self._layer(one, cuts, parameters) for one in (*self.tensors, *others))
        output = parity.compare(self.outputs)
        return Blame(layers, output, len(self.outputs), self.observed_runs, tuple(self.unmatched))

    def _layer(self, one: _Tensor, cuts: list[Cut], parameters: Parameters) -> LayerBlame:
        piece = piece_of(self.graph, one.name, cuts)
        layer, modules = modules_in(self.graph, one.name, cuts, self.layers)
        reasons = [] if one.cut is None else [*of_grid(self.graph, one.cut, one.quantizer)]
        reasons += parameters.differences(piece, modules)
        by_itself = one.by_itself.result()
        helps = Remedy(Change.EXPORT)
        if by_itself.unexplained and not reasons:
            reasons, helps = [Reason(Cause.OPERATION)], Remedy(Change.REPORT)
        known = tuple(replace(reason, remedy=helps) for reason in reasons)
        return LayerBlame(layer, one.name, modules, by_itself, one.arrived.result(), known)


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
        step = float(self.quantizer.get_scale().detach().reshape(-1)[0])
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


def _run(session: Any, feeds: Arrays) -> Arrays:
    names = [value.name for value in session.get_outputs()]
    wanted = {value.name for value in session.get_inputs()}
    computed = session.run(names, {name: value for name, value in feeds.items() if name in wanted})
    return dict(zip(names, computed, strict=True))


def _largest(expected: np.ndarray, actual: np.ndarray) -> float:
    return float(np.nan_to_num(np.abs(expected.reshape(-1) - actual.reshape(-1)), nan=np.inf).max(initial=0.0))
