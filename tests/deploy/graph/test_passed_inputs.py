"""An input that is an output, and a tensor that is two outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from lightning_quant.deploy.bundle import Bundle
from lightning_quant.deploy.export import export_bundle
from lightning_quant.deploy.push import Push
from lightning_quant.deploy.samples import Samples
from tests.helpers.networks import calibrated, call, images, seeded
from tests.helpers.qdq import NO_EMULATOR, operations, values


class Encoder(nn.Module):
    """Features of every level, the image first and the last one twice, as decoders take them."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
        seeded(self)

    def forward(self, x: Tensor) -> Any:
        a = self.one(x)
        b = self.two(a)
        return [x, a, b, b]


class Moved(Encoder):
    """The image in other forms."""

    def forward(self, x: Tensor) -> Any:
        return {"flat": x.flatten(1), "out": self.one(x), "last": x.permute(0, 2, 3, 1).flatten(1), "x": x}


class Untaken(Encoder):
    """An input that nothing computes with."""

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        return self.one(x), mask


class Focus(nn.Module):
    """The first layer of some detectors: every second pixel is a channel of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(12, 6, 3)
        seeded(self)

    def forward(self, x: Tensor) -> Any:
        parts = x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]
        return self.conv(torch.cat(parts, 1))


class TwoEncoders(nn.Module):
    """Colors and depth, or two frames, in one tensor; at w8a8 their parts had ranges of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(1, 6, 3, padding=1)
        seeded(self)

    def forward(self, x: Tensor) -> Any:
        return self.first(x[:, :2]) + self.second(x[:, 2:]).relu()


class PartsAndWhole(TwoEncoders):
    """A part in another form, one that is only joined with what was computed, and the whole."""

    def forward(self, x: Tensor) -> Any:
        of_rows = self.first(x.transpose(2, 3).reshape(x.shape)[:, :2]) * x.mean((1, 2, 3), keepdim=True)
        return torch.cat([of_rows, x[:, 1:]], 1), self.second(x.flip(1)[:, :1])


class Unbound(TwoEncoders):
    def forward(self, x: Tensor) -> Any:
        red, green, blue = x.unbind(1)
        return self.second((red * 0.3 + green * 0.6 + blue * 0.1)[:, None])


class Everything(TwoEncoders):
    """Indexed with an ellipsis: an alias in a trace, at which AIMET's files had a node that no NPU takes."""

    def forward(self, x: Tensor) -> Any:
        features = self.second((x[...] * 2 + x)[:, :1])
        return features[...].relu() + features


class Changed(TwoEncoders):
    """A copy of the input, written into."""

    def forward(self, x: Tensor) -> Any:
        own = x.clone()
        own[:, 0] = own[:, 0].sigmoid() * 3.0
        own[:, 1:] *= 0.3719  # no multiple of a step lies between two
        return self.first(own[:, :2]) + self.second(own[:, 2:])


class Skip(nn.Module):
    """The image once more beside features, of other sizes, as networks for details have it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(9, 4, 1)
        seeded(self)

    def forward(self, x: Tensor) -> Any:
        return self.last(torch.cat([x, self.first(x).relu() * 50.0], 1))


class SkipOfParts(Skip):
    def forward(self, x: Tensor) -> Any:
        features = self.first(x).relu() * 50.0
        return self.last(torch.cat([x[:, 1:].flip(1), features, x[:, :1]], 1))


CALLS = [call(images(1, seed=seed)) for seed in (1, 2)]
IN_PARTS = [Focus, TwoEncoders, PartsAndWhole, Unbound, Everything, Changed, Skip, SkipOfParts]


def exported(network: nn.Module, path: Path, precision: str = "w8a16") -> tuple[Bundle, Samples]:
    made = calibrated(network, call(images(8)), precision=precision)
    bundle = export_bundle(made, path, CALLS)
    return bundle, Samples.of(made, bundle.manifest, CALLS)


@pytest.mark.parametrize(
    ("network", "names"),
    [(Encoder, ["output_0", "output_1", "output_2", "output_3"]), (Moved, ["flat", "out", "last", "x_1"])],
)
def test_outputs_in_order_and_encoded(tmp_path: Path, network: type[nn.Module], names: list[str]) -> None:
    bundle, samples = exported(network(), tmp_path / "net")
    assert bundle.manifest.output_names == names
    assert bundle.manifest.parity.psnr_db > 60  # beyond the range of calibration too
    assert [list(tensors) for tensors in samples.simulation] == [names] * 2
    sizes = [list(tensor.shape) for tensor in samples.simulation[0].values()]
    for file in (bundle.qdq, bundle.aimet / "model.onnx"):
        graph = onnx.load(file).graph
        assert [value.name for value in graph.output] == names
        assert [[axis.dim_value for axis in v.type.tensor_type.shape.dim] for v in graph.output] == sizes
    encodings = json.loads((bundle.aimet / "model.encodings").read_text())["activation_encodings"]
    by_name = {entry["name"]: entry for entry in encodings}
    assert len(by_name) == len(encodings)
    of_input = [name for name in ("x", "output_0", "flat", "last", "x_1") if name in ["x", *names]]
    assert {str({**by_name[name], "name": ""}) for name in of_input} == {str({**by_name["x"], "name": ""})}
    assert not {name for name in by_name if "_dup_" in name}


def test_an_input_is_rounded_once_and_its_outputs_are_what_the_device_was_given(tmp_path: Path) -> None:
    for network in (Encoder(), Moved()):
        bundle, _ = exported(network, tmp_path / type(network).__name__, "w8a8")
        model = onnx.load(bundle.qdq)
        onnx.checker.check_model(model, full_check=True)
        assert [node.input[0] for node in operations(model, "QuantizeLinear")].count("x") == 1
        assert operations(model, "Identity") == []
        constants = values(model)
        for value in model.graph.output:
            (last,) = [node for node in model.graph.node if value.name in node.output]
            assert last.op_type == "DequantizeLinear"
            assert constants[last.input[2]].dtype == np.uint8


def test_one_tensor_that_is_two_outputs_is_quantized_once(tmp_path: Path) -> None:
    bundle, _ = exported(Encoder(), tmp_path / "net")
    quantizers = operations(onnx.load(bundle.qdq), "QuantizeLinear")
    assert len(quantizers) == len({node.input[0] for node in quantizers}) == 3


def test_an_input_that_nothing_takes_is_explained(tmp_path: Path) -> None:
    inputs = call(images(4), torch.rand(4, 5))
    made = calibrated(Untaken(), inputs)
    bundle = export_bundle(made, tmp_path / "net", [inputs])
    assert bundle.manifest.without_encoding["mask"] == "no operation takes it"
    assert bundle.manifest.without_encoding["output_1"] == "the input mask as it is"


@pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))
@pytest.mark.parametrize("network", [Encoder, Moved])
def test_the_npu_hands_its_input_back(tmp_path: Path, network: type[nn.Module]) -> None:
    bundle, samples = exported(network(), tmp_path / "net", "w8a8")
    (measured,) = Push("htp_emulator", ["SM8650"], 60, {}).run(bundle, samples)
    assert (measured.report.float_islands, measured.report.fallen_back) == ([], {})
    assert measured.report.against_simulation is not None
    assert measured.report.against_simulation.psnr_db > 45


@pytest.mark.parametrize("precision", ["w8a8", "w8a16"])
@pytest.mark.parametrize("network", IN_PARTS)
def test_an_input_that_is_read_in_parts_has_one_range(tmp_path: Path, network: type[nn.Module], precision: str) -> None:
    bundle, samples = exported(network(), tmp_path / "net", precision)
    assert bundle.manifest.parity.psnr_db > 90
    model = onnx.load(bundle.qdq)
    onnx.checker.check_model(model, full_check=True)
    of_input = {node.output[0] for node in operations(model, "QuantizeLinear") if node.input[0] == "x"}
    takers = [node.op_type for node in model.graph.node if "x" in node.input or of_input & {*node.input}]
    assert takers.count("QuantizeLinear") == 1
    assert {*takers} == {"QuantizeLinear", "DequantizeLinear"}
    encodings = json.loads((bundle.aimet / "model.encodings").read_text())["activation_encodings"]
    assert "x" in {entry["name"] for entry in encodings}
    if NO_EMULATOR is None:
        (measured,) = Push("htp_emulator", ["SM8650"], 60, {}).run(bundle, samples)
        assert (measured.report.float_islands, measured.report.fallen_back) == ([], {})
        assert measured.report.against_simulation is not None
        assert measured.report.against_simulation.psnr_db > (45 if precision == "w8a8" else 70)


@pytest.mark.parametrize("network", [Skip, SkipOfParts])
def test_an_input_that_is_joined_with_features_keeps_its_range(network: type[nn.Module]) -> None:
    inputs = call(images(8))
    made = calibrated(network(), inputs)
    of_image: Any = made.network.get_submodule("first.input_quantizers.0")
    (image,) = inputs.tensors
    assert float(of_image.max) == pytest.approx(float(image.max()), abs=0.05)
    of_features: Any = made.network.get_submodule("cat.output_quantizers.0")
    assert float(of_features.max) > 5 * float(of_image.max)
