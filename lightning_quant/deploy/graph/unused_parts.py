"""Parts of a split that nothing uses: the NPU's compiler computes such a split in float."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lightning_quant.deploy.graph.qdq import QdqGraph, axis_of, sizes_of

if TYPE_CHECKING:
    import onnx


def slice_used_parts(model: onnx.ModelProto) -> set[str]:
    """Write a slice for each part that is used of a split with parts that are not, in place.

    Returns:
        The names of the parts that are no longer in the graph.
    """
    from onnx import helper

    graph, sizes = QdqGraph(model), sizes_of(model)
    nodes: list[onnx.NodeProto] = []
    gone: set[str] = set()
    for node in model.graph.node:
        unused = {name for name in node.output if name not in graph.outputs and not graph.consumers[name]}
        if node.op_type != "Split" or not unused or any(name not in sizes for name in node.output):
            nodes.append(node)
            continue
        gone |= unused
        axis, start = axis_of(node, 0) % len(sizes[node.output[0]]), 0
        for name in node.output:
            end = start + sizes[name][axis]
            if name not in unused:
                places = [
                    graph.add(f"{name}_{part}", np.array([value], np.int64))
                    for part, value in (("start", start), ("end", end), ("axis", axis))
                ]
                nodes.append(helper.make_node("Slice", [node.input[0], *places], [name], f"{node.name}_{len(nodes)}"))
            start = end
    if gone:
        graph.replace_nodes(nodes)
    return gone
