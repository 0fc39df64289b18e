"""Which tensor of a file is which tensor of the simulation, and which of the user's modules computes it."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_quant.deploy.audit import module_of
from lightning_quant.deploy.blame.cuts import Cut, cuts_of, grid_of
from lightning_quant.deploy.graph.qdq import QdqGraph
from lightning_quant.simulation.rounded_tensors import RoundedTensor, Side

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Places:
    """Where file and simulation can be compared.

    Args:
        cuts: tensors of the file, each with the position of the simulation's among all that it rounds in one pass.
        unmatched: tensors that the file rounds and no quantizer of the simulation was found for.
    """

    cuts: list[tuple[Cut, int]]
    unmatched: list[str]


def match(
    graph: QdqGraph, seen: Sequence[RoundedTensor], sizes: Mapping[str, int], layers: Collection[str]
) -> Places:
    """Find the simulation's tensor for each that a file rounds.

    A layer's outputs are matched by the layer's name and their order, everything else with what the layers behind it
    round of their inputs. Where the simulation rounds a layer's output and the file does not, the output is compared
    all the same.

    Args:
        graph: the file.
        seen: what the simulation rounds in one pass.
        sizes: numbers of elements of the file's tensors, by name.
        layers: names of all quantized layers.
    """
    outputs, inputs = _by_layer(seen, Side.OUTPUT), _by_layer(seen, Side.INPUT)
    cuts = cuts_of(graph)
    found: dict[str, int] = {}
    of_layer: dict[str, list[Cut]] = defaultdict(list)
    for cut in cuts:
        of_layer[layer_of(graph.producers.get(cut.tensor), layers)].append(cut)
    added: list[Cut] = []
    for layer, positions in outputs.items():
        mine = of_layer.get(layer, [])
        if len(mine) < len(positions):
            left_out = _unrounded_outputs(graph, layer, layers, {cut.tensor for cut in mine})
            if len(mine) + len(left_out) == len(positions):
                added += left_out
                order = {name: place for place, name in enumerate(graph.producers)}
                mine = sorted([*mine, *left_out], key=lambda cut: order[cut.tensor])
        left = list(positions)
        for cut in mine:
            same_size = [one for one in left if _fits(cut, seen[one], sizes)]
            if same_size and len(mine) <= len(positions):
                found[cut.tensor] = same_size[0]
                left = left[left.index(same_size[0]) + 1 :]
    taken = set(found.values())
    for cut in cuts:
        if cut.tensor in found:
            continue
        behind = {layer_of(taker, layers) for name in cut.values for taker in graph.consumers[name]}
        candidates = [
            position
            for layer in behind
            for position in inputs.get(layer, ())
            if position not in taken and _fits(cut, seen[position], sizes)
        ]
        if candidates:
            found[cut.tensor] = min(candidates, key=lambda one: (_distance(graph, cut, seen[one]), one))
            taken.add(found[cut.tensor])
    order = {name: place for place, name in enumerate(graph.producers)}
    known = sorted((cut for cut in [*cuts, *added] if cut.tensor in found), key=lambda cut: order.get(cut.tensor, -1))
    return Places(
        [(cut, found[cut.tensor]) for cut in known], [cut.tensor for cut in cuts if cut.tensor not in found]
    )


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


def _by_layer(seen: Sequence[RoundedTensor], side: Side) -> dict[str, list[int]]:
    positions: dict[str, list[int]] = defaultdict(list)
    for position, one in enumerate(seen):
        if one.side is side:
            positions[one.layer].append(position)
    return positions


def _unrounded_outputs(graph: QdqGraph, layer: str, layers: Collection[str], rounded: set[str]) -> list[Cut]:
    """Return what leaves a layer without being rounded."""
    found = []
    for node in graph.model.graph.node:
        if layer_of(node, layers) != layer or node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        for name in node.output:
            takers = graph.consumers[name]
            leaves = name in graph.outputs or any(layer_of(taker, layers) != layer for taker in takers)
            if leaves and name not in rounded and not any(taker.op_type == "QuantizeLinear" for taker in takers):
                found.append(Cut(name, None, (name,)))
    return found


def _fits(cut: Cut, seen: RoundedTensor, sizes: Mapping[str, int]) -> bool:
    return sizes.get(cut.values[0]) == seen.values.numel()


def _distance(graph: QdqGraph, cut: Cut, seen: RoundedTensor) -> float:
    """Return how far two scales are apart, as the logarithm of their ratio."""
    if cut.quantizer is None:
        return 0.0
    scale = grid_of(graph, cut.quantizer)[0]
    ratio = float(scale.reshape(-1)[0]) / float(seen.quantizer.get_scale().reshape(-1)[0])
    return abs(math.log(ratio)) if ratio > 0 else math.inf
