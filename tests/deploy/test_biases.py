"""Biases in the scale of the hardware, where AIMET loses track of the input's."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

from lightning_quant.deploy import onnx_files as module
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
    monkeypatch.setattr(module.biases, "rescale_biases", lambda model, biases: {})
    plain = onnx.load(export_bundle(padded, tmp_path / "plain", SAMPLES).qdq)
    assert any(not np.allclose(b, i * w, rtol=1e-3) for i, w, b in scales(plain))  # else there is nothing to do here
    for (of_input, of_weight, _), mine, theirs in zip(scales(fixed), biases(fixed), biases(plain), strict=True):
        assert np.abs(mine - theirs).max() <= (of_input * of_weight).max() / 2 * 1.001
    floats = {name: value.detach().numpy() for name, value in padded.sim.model.named_parameters()}
    assert rescale_biases(plain, floats) == {}  # no weight needed another scale
    assert plain.SerializeToString() == fixed.SerializeToString()


@pytest.fixture
def dead() -> QuantizedNetwork:
    """A network with channels of all but zero weights, as training with weight decay leaves them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    with torch.no_grad():
        for channel, bias in ((1, -5.5), (2, 3.0)):
            network[0].weight[channel] = 1e-12
            network[0].bias[channel] = bias
    return calibrated(network, call(images(8)))


@pytest.mark.parametrize("precision", ["w8a8", "w4a16"])
def test_a_bias_that_overflows_gets_room(dead: QuantizedNetwork, tmp_path: Path, precision: str) -> None:
    if precision != "w8a8":
        dead = calibrated(nn.Sequential(*copy.deepcopy(dead.float_network)), call(images(8)), precision=precision)  # type: ignore[arg-type]
    bundle = export_bundle(dead, tmp_path / "net", SAMPLES)
    model = onnx.load(bundle.qdq)
    values = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    (first, *_) = [name for name in values if name.endswith("bias_q")]
    assert np.abs(values[first].astype(np.int64)).max() <= 2**30
    for of_input, of_weight, of_bias in scales(model):
        np.testing.assert_allclose(of_bias, of_input * of_weight, rtol=1e-6)
    (scale, *_) = [values[name] for name in values if name.endswith("weight_scale")]
    encodings = json.loads((bundle.aimet / "model.encodings").read_text())["param_encodings"]
    (entry,) = [entry for entry in encodings if entry["name"] + "_q" == first.replace("bias", "weight")]
    np.testing.assert_allclose(entry["scale"], scale, rtol=1e-6)


@pytest.mark.skipif(_REASON is not None, reason=str(_REASON))
def test_the_npu_does_not_overflow(dead: QuantizedNetwork, tmp_path: Path) -> None:
    bundle = export_bundle(dead, tmp_path / "net", SAMPLES)
    (measured,) = Push("htp_emulator", ["SM8650"], 60, {}).run(bundle, Samples.of(dead, bundle.manifest, SAMPLES))
    assert measured.report.against_simulation is not None
    assert (measured.report.against_simulation["psnr_db"] or 99) > 45


@pytest.mark.skipif(_REASON is not None, reason=str(_REASON))
def test_the_npu_computes_what_the_simulation_does_behind_padding(padded: QuantizedNetwork, tmp_path: Path) -> None:
    bundle = export_bundle(padded, tmp_path / "net", SAMPLES)
    (measured,) = Push("htp_emulator", ["SM8650"], 60, {}).run(bundle, Samples.of(padded, bundle.manifest, SAMPLES))
    assert measured.report.against_simulation is not None
    assert measured.report.against_simulation["psnr_db"] > 45  # with AIMET's scales it is 1
