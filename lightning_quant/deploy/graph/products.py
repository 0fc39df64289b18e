"""Products with a number stay within the scale of their output.

The output of a product with a number has the scale of the other operand times the number. With 16 bits the compiler of
QAIRT 2.51 does not end where the product of the two scales is a rounding error above that of the output, in float32,
nor where it is above that of what a clip makes of the output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lightning_quant.deploy.graph.qdq import QdqGraph, of_integers

if TYPE_CHECKING:
    import onnx

# How far a number may be from what it is, relative: 32 bits hold seven digits.
_ROUNDING = 1e-6
# Operations that let values through within bounds.
_CLIPS = ("Clip", "Max", "Min", "Relu")


def keep_within(model: onnx.ModelProto) -> dict[str, float]:
    """Make the scales of numbers smaller by a rounding error where a product is above the scale of its output by one.

    Args:
        model: a QDQ graph, its constants with grids; changed in place.

    Returns:
        The new scales, by the constants' names.
    """
    graph = QdqGraph(model)
    scales: dict[str, float] = {}
    for product in model.graph.node:
        read = [graph.producers.get(name) for name in product.input]
        takers = [node for node in graph.consumers[product.output[0]] if node.op_type == "QuantizeLinear"]
        if product.op_type != "Mul" or not takers or not all(of_integers(one) for one in read):
            continue
        numbers = [one for one in read if one is not None and _is_number(graph, one)]
        others = [one for one in read if one is not None and one not in numbers]
        grids = [*(one.input[1] for one in others), *_grids_behind(graph, takers[0])]
        if len(numbers) != 1 or not all(name in graph.constants and graph.array(name).size == 1 for name in grids):
            continue
        other, first, *clipped = (np.float32(graph.array(name).item()) for name in grids)
        output = min([first, *(one for one in clipped if one > first * (1 - 10 * _ROUNDING))])
        scale, most = np.float32(graph.array(numbers[0].input[1]).item()), np.float32(output / other)
        while np.float32(most * other) > output:
            most = np.nextafter(most, np.float32(0))
        if most < scale < most * (1 + _ROUNDING):
            numbers[0].input[1] = graph.add(f"{numbers[0].input[1]}_within", np.array(most))
            scales[numbers[0].input[0].removesuffix("_q")] = float(most)
    return scales


def _grids_behind(graph: QdqGraph, rounds: onnx.NodeProto) -> list[str]:
    """Return the scales of what rounds a product, and of what rounds it once more behind clips."""
    read = [one for one in graph.consumers[rounds.output[0]] if one.op_type == "DequantizeLinear"]
    clips = [one for node in read for one in graph.consumers[node.output[0]] if one.op_type in _CLIPS]
    behind = [one for clip in clips for one in graph.consumers[clip.output[0]] if one.op_type == "QuantizeLinear"]
    return [one.input[1] for one in (rounds, *behind)]


def _is_number(graph: QdqGraph, read: onnx.NodeProto) -> bool:
    """Return whether a node reads one constant integer."""
    return all(name in graph.constants and graph.array(name).size == 1 for name in read.input[:2])
