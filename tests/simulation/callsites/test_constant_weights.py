"""Weights that are no parameters: tensors of a script, and made of numbers in ``forward``, as blurs and edges are.

They are rounded like any weight, whatever is done with them first.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.deploy.graph.qdq import QdqGraph
from tests.helpers.members import in_turn
from tests.helpers.networks import calibrated, call
from tests.helpers.qdq import equal_everywhere

NUMBERS = torch.randn(3, 3, 3, 3, generator=torch.Generator().manual_seed(0))
KERNEL = np.asarray(NUMBERS[0, 0])
MATRIX = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
IMAGES = F.avg_pool2d(torch.rand(4, 3, 20, 20, generator=torch.Generator().manual_seed(2)), 5, 1)


def blur(x: Tensor, kernel: Tensor) -> Tensor:
    return F.conv2d(x, kernel[None, None].repeat(3, 1, 1, 1), groups=3)


WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda x: F.conv2d(x, NUMBERS),
    "a part": lambda x: F.conv2d(x, NUMBERS[:2]),
    "computed": lambda x: F.conv2d(x, NUMBERS * 1.5),
    "a copy": lambda x: F.conv2d(x, NUMBERS.clone()),
    "on the device of the input": lambda x: F.conv2d(x, NUMBERS.to(x)),
    "one dimension": lambda x: F.conv1d(x.flatten(2), NUMBERS[:, :, 0]),
    "from NumPy": lambda x: blur(x, torch.from_numpy(KERNEL)),
    "made of an array": lambda x: blur(x, torch.tensor(KERNEL)),
    "made of numbers": lambda x: blur(x, torch.tensor(KERNEL.tolist()) * 1.3),
    "made like the input": lambda x: blur(x, x.new_tensor(KERNEL.tolist())),
    "a range of numbers": lambda x: blur(x, torch.linspace(0.1, 1, 9).view(3, 3)),
    "a matrix turned": lambda x: F.linear(x.mean(1), MATRIX.t()),
    "a matrix multiplied": lambda x: x.mean(1) @ MATRIX.t(),
}


class Made(nn.Module):
    """A convolution, then a function with weights of its own."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.function = nn.Conv2d(3, 3, 1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.first(x))


@pytest.mark.parametrize(("name", "precision"), in_turn(WEIGHTS, ["w8a8", "w8a16", "w4a8"]))
def test_weights_that_are_no_parameters_are_rounded(name: str, precision: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    known: Any = calibrated(Made(WEIGHTS[name]).eval(), call(IMAGES), precision=precision)
    npu_db = 70 if precision == "w8a16" else 40
    model = equal_everywhere(known, IMAGES[:1], tmp_path, npu_db=npu_db, file_db=50 if precision == "w8a8" else 60)
    graph = QdqGraph(model)
    *_, last = [node for node in model.graph.node if node.op_type in ("Conv", "MatMul", "Gemm")]
    kind = graph.array(_reads_integers(graph, last).input[0]).dtype
    assert str(kind) in ({"int4", "int8"} if precision == "w4a8" else {"int8", "int16", "uint16", "uint8"})


def _reads_integers(graph: QdqGraph, node: onnx.NodeProto) -> onnx.NodeProto:
    source = graph.source(node.input[1])
    assert source is not None
    assert source.op_type == "DequantizeLinear"
    return source
