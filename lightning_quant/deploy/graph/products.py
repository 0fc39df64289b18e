"""Products with a number stay within the scale of their output.

The output of a product with a number has the scale of the other operand times the number. With 16 bits the compiler of
QAIRT 2.51 does not end where the product of the two scales is a rounding error above that of the output, in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lightning_quant.deploy.graph.qdq import QdqGraph, of_integers

if TYPE_CHECKING:
    import onnx

# How far a number may be from what it is, relative: 32 bits hold seven digits.
_ROUNDING = 1e-6


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
        grids = [*(one.input[1] for one in others), takers[0].input[1]]
        if len(numbers) != 1 or not all(name in graph.constants and graph.array(name).size == 1 for name in grids):
            continue
        other, output = (np.float32(graph.array(name).item()) for name in grids)
        scale, most = np.float32(graph.array(numbers[0].input[1]).item()), np.float32(output / other)
        while np.float32(most * other) > output:
            most = np.nextafter(most, np.float32(0))
        if most < scale < most * (1 + _ROUNDING):
            numbers[0].input[1] = graph.add(f"{numbers[0].input[1]}_within", np.array(most))
            scales[numbers[0].input[0].removesuffix("_q")] = float(most)
    return scales


def _is_number(graph: QdqGraph, read: onnx.NodeProto) -> bool:
    """Return whether a node reads one constant integer."""
    return all(name in graph.constants and graph.array(name).size == 1 for name in read.input[:2])
