"""Layers of another bit width than the rest: the NPU converts at the border, and computes none of them in float."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from lightning_quant.deploy.graph.files import write_onnx
from lightning_quant.simulation import aimet
from lightning_quant.simulation.precisions import quantized_layers
from tests.helpers.networks import Body, calibrated, call, images
from tests.helpers.qdq import NO_EMULATOR, computed, emulated, operations, psnr
from tests.simulation.test_conversions import Attention, Pyramid
from tests.simulation.test_precisions import CatLater

aimet.load()
needs_emulator = pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))
CASES = [
    (Body, "branch"), (Body, "relu.relu_1"), (CatLater, "b"), (CatLater, "*cat*"), (Pyramid, "depth"),
    (Pyramid, "gate"), (Pyramid, "last"), (Attention, "norm"), (Attention, "add_1"), (Attention, "softmax"),
    (Attention, "wide"),
]  # fmt: skip


def files_of(
    make: Callable[[], nn.Module], layer: str, precision: str, folder: Path
) -> tuple[onnx.ModelProto, dict[str, np.ndarray], float]:
    """The file of a network with an override, its input, and how close it comes to the simulation in dB."""
    plain = calibrated(make(), precision=precision)
    assert fnmatch.filter(quantized_layers(plain), layer), list(quantized_layers(plain))
    other = "w8a8" if precision == "w8a16" else "w8a16"
    network = calibrated(make(), precision=precision, overrides={layer: other})
    write_onnx(network, call(images(1)), folder / "float.onnx", folder / "qdq.onnx")
    model = onnx.load(folder / "qdq.onnx")
    with torch.no_grad():
        expected = network(images(1, seed=10)).numpy()
    given = {model.graph.input[0].name: images(1, seed=10).numpy()}
    return model, given, psnr(expected, computed(model, folder, **given)[0])


@pytest.mark.parametrize(("make", "layer"), CASES)
@pytest.mark.parametrize("precision", ["w8a8", "w8a16"])
def test_the_file_computes_what_the_simulation_does(
    tmp_path: Path, make: Callable[[], nn.Module], layer: str, precision: str
) -> None:
    model, _, closeness = files_of(make, layer, precision, tmp_path)
    assert closeness > 100
    grids = {
        tensor.data_type
        for node in operations(model, "QuantizeLinear")
        for tensor in model.graph.initializer
        if tensor.name == node.input[2]
    }
    assert grids >= {onnx.TensorProto.UINT8, onnx.TensorProto.UINT16}


@needs_emulator
@pytest.mark.parametrize(("make", "layer"), CASES)
@pytest.mark.parametrize("precision", ["w8a8", "w8a16"])
def test_nothing_leaves_the_npu_or_its_integers(
    tmp_path: Path, make: Callable[[], nn.Module], layer: str, precision: str
) -> None:
    model, given, _ = files_of(make, layer, precision, tmp_path)
    report, (output,) = emulated(model, tmp_path / "npu", **given)
    assert not report.float_islands
    assert not report.layers["CPU"]
    assert psnr(computed(model, tmp_path, **given)[0], output) > 30
