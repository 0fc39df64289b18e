"""The same structure, whatever the weights are; another one, whatever else differs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from lightning_quant.deploy.export import export_bundle
from lightning_quant.deploy.graph.structure import structure_sha256
from lightning_quant.utilities.hashing import file_sha256
from tests.helpers.networks import Body, calibrated, call, images

SAMPLES = [call(images(1, seed=9))]


def test_every_precision_and_any_training_of_a_network(tmp_path: Path) -> None:
    files = []
    for precision, trained in (("w8a8", False), ("w4a16", False), ("w8a16", True)):
        network = calibrated(Body(), precision=precision)
        if trained:
            with torch.no_grad():
                for parameter in network.network.parameters():
                    parameter.mul_(1.01)
        files.append(export_bundle(network, tmp_path / f"{precision}", SAMPLES).aimet / "model.onnx")
    assert len({structure_sha256(file) for file in files}) == 1
    assert len({file_sha256(file) for file in files}) == 3


def small(path: Path, constants: dict[str, Any], scales: tuple[float, ...] = (1.0, 1.0, 2.0, 2.0)) -> Path:
    """A convolution and a resize; constants are nodes, weights initializers."""
    values = {"weight": np.ones((4, 3, 1, 1), np.float32), "factor": np.float32(2), **constants}
    value = numpy_helper.from_array(np.array(scales, np.float32))
    nodes = [
        helper.make_node("Constant", [], ["scales"], value=value),
        helper.make_node("Conv", ["x", "weight"], ["features"]),
        helper.make_node("Mul", ["features", "factor"], ["scaled"]),
        helper.make_node("Resize", ["scaled", "", "scales"], ["y"], mode="nearest"),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda path: small(path, {"weight": np.zeros((4, 3, 1, 1), np.float32)}), True),
        (lambda path: small(path, {"weight": np.ones((5, 3, 1, 1), np.float32)}), False),
        (lambda path: small(path, {"weight": np.ones((4, 3, 1, 1), np.float16)}), False),
        (lambda path: small(path, {"factor": np.float32(3)}), False),
        (lambda path: small(path, {}, (1.0, 1.0, 3.0, 2.0)), False),
    ],
)
def test_what_counts(tmp_path: Path, change: Callable[[Path], Path], same: bool) -> None:
    first = structure_sha256(small(tmp_path / "first.onnx", {}))
    assert (structure_sha256(change(tmp_path / "second.onnx")) == first) is same
