"""Which tensor of a file is which tensor of the simulation, and which of the user's modules computes it."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning_quant.deploy.audit import module_of
from lightning_quant.deploy.blame.cuts import Cut, grid_of, piece_of, rounded_in
from lightning_quant.deploy.graph.qdq import QdqGraph, hands_on
from lightning_quant.simulation.rounded_tensors import RoundedTensor, Side

if TYPE_CHECKING:
    import onnx

# Ratio of two scales that are one range, tied by the hardware and off in their last digits; as a logarithm.
_ONE_RANGE = 1e-3
# Operations that output values of their input, or zeros.
_ON_ITS_GRID = ("MaxPool", "Pad")
# Operations whose inputs come in the order of the call that they are written for.
_IN_ORDER = ("Add", "Sub", "Mul", "Div", "MatMul", "Concat")
# Operations that hand values on in their order, in whole or in parts.
_PARTS_AND_JOINS = ("Concat", "Flatten", "Reshape", "Slice")
_NO_OPERATION = ("QuantizeLinear", "DequantizeLinear", "Constant")
Sizes = Mapping[str, int]


def match(
    graph: QdqGraph,
    seen: Sequence[RoundedTensor],
    measure: Callable[[Iterable[str]], Sizes],
    layers: Collection[str],
) -> tuple[list[Cut], list[str]]:
    """Find the simulation's tensor for each that a file rounds.

    A layer's outputs are matched by the layer's name and their order, everything else with what the layers behind it
    round of their inputs. Where the simulation rounds a tensor and the file does not, it is compared all the same.

    Args:
        graph: the file.
        seen: what the simulation rounds in one pass.
        measure: returns the numbers of elements of tensors of the file.
        layers: names of all quantized layers.

    Returns:
        The tensors with the simulation's position, in the order of computation, and the names of those that the file
        rounds and no quantizer of the simulation was found for.
    """
    return _Match(graph, seen, measure, layers).run()


class _Match:
    def __init__(
        self,
        graph: QdqGraph,
        seen: Sequence[RoundedTensor],
        measure: Callable[[Iterable[str]], Sizes],
        layers: Collection[str],
    ) -> None:
        self.graph, self.seen, self.layers = graph, seen, layers
        self.nodes: dict[str, list[onnx.NodeProto]] = defaultdict(list)  # by layer
        for node in graph.model.graph.node:
            if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
                self.nodes[layer_of(node, layers)].append(node)
        self.order = {name: place for place, name in enumerate(graph.producers)}
        self.cuts = rounded_in(graph)
        self.unrounded = self._unrounded()
        self.sizes = measure([cut.values[0] for cut in [*self.cuts, *self.unrounded]])
        self.found: dict[str, Cut] = {}
        self.free = set(range(len(seen)))

    def run(self) -> tuple[list[Cut], list[str]]:
        self._by_outputs()
        # those on the grid of an input first: they are not left the input of another
        for within in (_ONE_RANGE, math.inf):
            for cut in self.cuts:
                if cut.tensor not in self.found:
                    self._by_inputs(cut, within)
        self._missing_inputs()
        ordered = sorted(self.found.values(), key=lambda cut: self.order.get(cut.tensor, -1))
        unknown = [cut for cut in self.cuts if cut.tensor not in self.found and not self._rounded_again(cut)]
        return ordered, [cut.tensor for cut in unknown]

    def _by_outputs(self) -> None:
        of_layer: dict[str, list[Cut]] = defaultdict(list)
        behind: dict[str, list[Cut]] = defaultdict(list)  # nodes that belong to no layer stand between
        for cut in self.cuts:
            producer = self.graph.producers.get(cut.tensor)
            (of_layer if layer_of(producer, self.layers) in self.layers else behind)[self._origin(producer)].append(cut)
        for layer, positions in self._positions(Side.OUTPUT).items():
            mine = of_layer.get(layer, [])
            for others in (behind.get(layer, []), [one for one in self.unrounded if self._leaves(one, layer)]):
                if len(mine) < len(positions) and len(mine) + len(others) == len(positions):
                    mine = sorted([*mine, *others], key=lambda cut: self.order[cut.tensor])
            if len(mine) > len(positions):  # the exported form of the layer parts, joins or reshapes it as well
                mine = [cut for cut in mine if self.graph.producers[cut.tensor].op_type not in _PARTS_AND_JOINS]
            if len(mine) > len(positions):
                continue
            for cut in mine:
                fitting = [one for one in positions if one in self.free and self._fits(cut, one)]
                if fitting:
                    self._take(cut, fitting[0])
                    positions = positions[positions.index(fitting[0]) + 1 :]

    def _by_inputs(self, cut: Cut, within: float) -> None:
        takers = [taker for name in cut.values for taker in self._takers(name)]
        inputs = self._positions(Side.INPUT)
        candidates = {
            position
            for taker, place in takers
            for position in inputs.get(layer_of(taker, self.layers), ())
            if position in self.free and self._fits(cut, position)
            if taker.op_type not in _IN_ORDER or place == self.seen[position].place
        }
        best = min(candidates, key=lambda one: (self._distance(cut, one), one), default=None)
        origin = self._handed_on_from(cut)
        if best is not None and self._distance(cut, best) < (within if origin is None else _ONE_RANGE):
            self._take(cut, best)
        elif origin is not None and within == math.inf:
            self.found[cut.tensor] = replace(cut, position=origin.position, handed_on=True)

    def _missing_inputs(self) -> None:
        """Find what layers round of their inputs in the simulation, and take unrounded in the file."""
        for layer, positions in self._positions(Side.INPUT).items():
            taken = {name for node in self.nodes.get(layer, ()) for name in node.input}
            for cut in self.unrounded:
                fitting = [one for one in positions if one in self.free and self._fits(cut, one)]
                if cut.tensor in taken and not self._leaves(cut, layer) and fitting and cut.tensor not in self.found:
                    self._take(cut, fitting[0])

    def _take(self, cut: Cut, position: int) -> None:
        self.found[cut.tensor] = replace(cut, position=position)
        self.free.discard(position)

    def _positions(self, side: Side) -> dict[str, list[int]]:
        positions: dict[str, list[int]] = defaultdict(list)
        for position, one in enumerate(self.seen):
            if one.side is side:
                positions[one.layer].append(position)
        return positions

    def _origin(self, node: onnx.NodeProto | None) -> str:
        """Return the layer whose output comes to a node through nodes that belong to none."""
        while node is not None and node.op_type != "DequantizeLinear" and node.input:
            if (layer := layer_of(node, self.layers)) in self.layers:
                return layer
            node = self.graph.producers.get(node.input[0])
        return ""

    def _unrounded(self) -> list[Cut]:
        """Return what goes from one layer into another without being rounded."""
        rounded = {cut.tensor for cut in self.cuts}
        found = []
        for layer, nodes in self.nodes.items():
            for name in (name for node in nodes if layer in self.layers for name in node.output):
                takers = self.graph.consumers[name]
                elsewhere = any(layer_of(taker, self.layers) != layer for taker in takers)
                if (elsewhere or name in self.graph.outputs) and name not in rounded:
                    found.append(Cut(name, None, (name,)))
        return found

    def _leaves(self, cut: Cut, layer: str) -> bool:
        return layer_of(self.graph.producers.get(cut.tensor), self.layers) == layer

    def _handed_on_from(self, cut: Cut) -> Cut | None:
        node = self.graph.producers.get(cut.tensor)
        while node is not None and (hands_on(node) or node.op_type in _ON_ITS_GRID):
            of = next((one for one in self.found.values() if node.input[0] in one.values), None)
            if of is not None:
                return of
            node = self.graph.producers.get(node.input[0])
        return None

    def _rounded_again(self, cut: Cut) -> bool:
        """Return whether a tensor is rounded to the grid of the activation function behind it, which changes nothing.

        The files do so where the hardware computes both as one; the simulation rounds behind the function.
        """
        takers = [taker for name in cut.values for taker in self.graph.consumers[name]]
        behind = [one for taker in takers for name in taker.output for one in self.graph.consumers[name]]
        grids = [
            tuple(float(part.reshape(-1)[0]) for part in grid_of(self.graph, one))
            for one in (cut.quantizer, *behind)
            if one is not None and one.op_type == "QuantizeLinear"
        ]
        return all(taker.op_type in ("Relu", "Clip") for taker in takers) and len(set(grids)) == 1 < len(grids)

    def _takers(self, name: str) -> list[tuple[onnx.NodeProto, int]]:
        """Return what takes a tensor, and as which input, behind nodes that hand it on as it is."""
        found = []
        for taker in self.graph.consumers[name]:
            if layer_of(taker, self.layers) in self.layers or not hands_on(taker):
                found += [(taker, place) for place, one in enumerate(taker.input) if one == name]
            else:
                found += self._takers(taker.output[0])
        return found

    def _fits(self, cut: Cut, position: int) -> bool:
        return self.sizes.get(cut.values[0]) == self.seen[position].values.numel()

    def _distance(self, cut: Cut, position: int) -> float:
        """Return how far the scales of both are apart, as the logarithm of their ratio."""
        if cut.quantizer is None:
            return 0.0
        scale = float(grid_of(self.graph, cut.quantizer)[0].reshape(-1)[0])
        ratio = scale / self.seen[position].quantizer.get_scale().reshape(-1)[0].item()
        return abs(math.log(ratio)) if ratio > 0 else math.inf


def modules_in(
    graph: QdqGraph, tensor: str, cuts: Iterable[Cut], layers: Mapping[str, Any]
) -> tuple[str, tuple[str, ...]]:
    """Return the layer that computes a tensor from the cuts before it, and all modules of that piece.

    Of several modules it is the one with weights, or else the first that does not only hand values on.
    """
    operations = [node for node in piece_of(graph, tensor, cuts) if node.op_type not in _NO_OPERATION]
    modules = tuple(dict.fromkeys(name for node in operations if (name := layer_of(node, layers))))
    weighted = [name for name in modules if getattr(layers.get(name), "weight", None) is not None]
    computing = [layer_of(node, layers) for node in operations if not hands_on(node)]
    return next(filter(None, [*weighted, *computing, *modules, tensor])), modules


def layer_of(node: onnx.NodeProto | None, layers: Collection[str]) -> str:
    """Return the layer that a node belongs to; of a second call, which the exporter numbers, that of the first.

    Where none of ``layers`` has it, the module as the exporter names it.
    """
    if node is None:
        return ""
    name = module_of(node)
    if name in layers:
        return name
    parts = name.split(".")
    for index in range(len(parts)):
        numbered = [re.sub(r"_\d+$", "", part) if place >= index else part for place, part in enumerate(parts)]
        if ".".join(numbered) in layers:
            return ".".join(numbered)
    return name
