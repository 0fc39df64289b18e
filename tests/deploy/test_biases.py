"""Biases in the scale of the hardware, where AIMET loses track of the input's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

from lightning_quant.deploy import bundle as module
from lightning_quant.deploy.biases import rescale_biases
from lightning_quant.deploy.bundle import export_bundle
from lightning_quant.deploy.push import Push
from lightning_quant.deploy.samples import Samples
from lightning_quant.deploy.targets.htp_emulator import HtpEmulatorTarget
from lightning_quant.simulation.network import QuantizedNetwork
from tests.simulation.networks import calibrated, call, images

_REASON = HtpEmulatorTarget("SM8650").unavailable()


class Padded(nn.Module):
    """Pads by a functional operation, as networks ported from TensorFlow do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2)
        self.second = nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.pad(F.relu6(self.first(F.pad(x, (0, 1, 0, 1)))), (1, 1, 1, 1)))


@pytest.fixture
def padded() -> QuantizedNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return calibrated(Padded(), call(images(8)))


SAMPLES = [call(images(1, seed=seed)) for seed in (1, 2, 3)]


def scales(model: onnx.ModelProto) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Scales of input, weight and bias of every convolution."""
    producers = {output: node for node in model.graph.node for output in node.output}
    values = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    return [tuple(values[producers[name].input[1]] for name in node.input) for node in convolutions]  # type: ignore[misc]


def biases(model: onnx.ModelProto) -> list[np.ndarray]:
    values = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and "bias" in node.name]
    return [values[node.input[0]].astype(np.float64) * values[node.input[1]] for node in nodes]


def test_scale_of_a_bias_is_that_of_input_times_weight(
    padded: QuantizedNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = onnx.load(export_bundle(padded, tmp_path / "net", SAMPLES).qdq)
    assert len(scales(fixed)) == 2
    for of_input, of_weight, of_bias in scales(fixed):
        np.testing.assert_allclose(of_bias, of_input * of_weight, rtol=1e-6)
    monkeypatch.setattr(module, "rescale_biases", lambda model: [])
    plain = onnx.load(export_bundle(padded, tmp_path / "plain", SAMPLES).qdq)
    assert any(not np.allclose(b, i * w, rtol=1e-3) for i, w, b in scales(plain))  # else there is nothing to do here
    for (of_input, of_weight, _), mine, theirs in zip(scales(fixed), biases(fixed), biases(plain), strict=True):
        assert np.abs(mine - theirs).max() <= (of_input * of_weight).max() / 2 * 1.001
    assert len(rescale_biases(plain)) == 2
    assert rescale_biases(plain) == []
    assert plain.SerializeToString() == fixed.SerializeToString()


@pytest.mark.skipif(_REASON is not None, reason=str(_REASON))
def test_the_npu_computes_what_the_simulation_does_behind_padding(padded: QuantizedNetwork, tmp_path: Path) -> None:
    bundle = export_bundle(padded, tmp_path / "net", SAMPLES)
    (measured,) = Push("htp_emulator", ["SM8650"], 60, {}).run(bundle, Samples.of(padded, bundle.manifest, SAMPLES))
    assert measured.report.against_simulation is not None
    assert measured.report.against_simulation["psnr_db"] > 45  # with AIMET's scales it is 1
