"""The pieces that a file is cut into."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from lightning_quant.deploy.blame.cuts import own, pieces, rounded_in
from lightning_quant.deploy.graph.qdq import QdqGraph


def rounding(name: str, scale: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("QuantizeLinear", [name, scale, "zero"], [f"{name}_q"]),
        helper.make_node("DequantizeLinear", [f"{name}_q", scale, "zero"], [f"{name}_qdq"]),
    ]


def test_what_is_handed_on_may_be_rounded_behind_what_is_handed_on() -> None:
    """As a part of a split is, on its own grid, and then on that of the concatenation behind it."""
    nodes = [*rounding("x", "fine"), helper.make_node("Neg", ["x_qdq"], ["y"]), *rounding("y", "fine")]
    nodes += [*rounding("y_qdq", "coarse"), helper.make_node("Neg", ["y_qdq_qdq"], ["z"])]
    constants = [
        helper.make_tensor("fine", TensorProto.FLOAT, [], [0.5]),
        helper.make_tensor("coarse", TensorProto.FLOAT, [], [2.0]),
        helper.make_tensor("zero", TensorProto.INT8, [], [0]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in ("x", "z")]
    graph = helper.make_graph(nodes, "handed on", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    first, *others = rounded_in(QdqGraph(model))
    cut = pieces(model, [first, *(replace(one, handed_on=True) for one in others)])
    session = onnxruntime.InferenceSession(cut.SerializeToString())
    given = np.array([1.0, 2.5, -3.0], np.float32)
    names = ["y_qdq", own("y_qdq_qdq"), "z"]
    before, rounded, output = session.run(names, {"x": given, "x_qdq": given})
    assert before.tolist() == [-1.0, -2.5, 3.0]
    assert rounded.tolist() == [-0.0, -2.0, 4.0]
    assert output.tolist() == [1.0, 2.5, -3.0]  # of what is handed on, as it was
