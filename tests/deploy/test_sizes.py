"""Further input sizes: what may be asked for, what a network takes, samples of them, one set of encodings."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.deploy.bundle import Bundle, load_bundle
from lightning_quant.deploy.export import export_bundle
from lightning_quant.deploy.graph.files import OnnxFiles
from lightning_quant.deploy.sizes import InputSize, check_same_graph, check_sizes, sized_calls
from lightning_quant.errors import ConfigurationError, ExportError
from tests.helpers.networks import Body, TwoInputs, calibrated, call, images, quantized
from tests.helpers.small import SmallModule, small_loader

SIZES: list[Any] = [[16, 12], [4, 3, 8, 8], [8, 8]]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle that tests only read."""
    folder = tmp_path_factory.mktemp("sizes") / "net"
    return export_bundle(calibrated(Body()), folder, [call(images(3, seed=9))], sizes=SIZES)


def test_a_graph_for_each_size_with_the_same_encodings(bundle: Bundle) -> None:
    assert load_bundle(bundle.path).manifest == bundle.manifest
    assert bundle.manifest.size == "1x3x8x8"  # as many axes as the longest entry; the own size is no further one
    assert {size: graph.inputs for size, graph in bundle.manifest.sizes.items()} == {
        "16x12": {"x": [1, 3, 16, 12]},
        "4x3x8x8": {"x": [4, 3, 8, 8]},
    }
    own = json.loads((bundle.aimet / "model.encodings").read_text())
    for size, graph in bundle.sizes.items():
        assert graph.qdq == bundle.path / f"net.{size}.onnx"
        assert json.loads((graph.aimet / "model.encodings").read_text()) == own
        shape = onnx.load(graph.qdq).graph.input[0].type.tensor_type.shape
        assert [axis.dim_value for axis in shape.dim] == bundle.manifest.sizes[size].inputs["x"]
        assert graph.manifest.parity == bundle.manifest.sizes[size].parity
        assert graph.manifest.parity.equal
        assert graph.manifest.parity.samples > 0
    assert (bundle.manifest.sizes["16x12"].resized, bundle.manifest.sizes["4x3x8x8"].resized) == (True, False)
    assert {str(one.qdq.relative_to(bundle.path)) for one in bundle.sizes.values()} <= bundle.manifest.files.keys()


def test_a_changed_file_of_a_further_size_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    mine = export_bundle(calibrated(Body()), tmp_path / "net", [call(images(1))], sizes=[[16, 12]])
    (mine.path / "net.16x12.aimet" / "more").write_text("")
    with pytest.raises(ExportError, match=r"net\.16x12\.aimet/more.* is none of the files in its manifest"):
        load_bundle(mine.path)
    (mine.path / "net.16x12.aimet" / "more").unlink()
    mine.sizes["16x12"].qdq.write_bytes(b"")
    with pytest.raises(ExportError, match=r"net\.16x12\.onnx' in the bundle .* was changed"):
        load_bundle(mine.path)


@pytest.mark.parametrize("name", ["../net", "", "a/b"])
def test_a_hostile_name_of_a_size(bundle: Bundle, name: str) -> None:
    values = bundle.manifest.to_dict()
    values["sizes"] = {name: values["sizes"]["16x12"]}
    with pytest.raises(ValueError, match="a name in sizes"):
        type(bundle.manifest).from_dict(values)


def test_a_manifest_of_before_there_were_sizes(bundle: Bundle) -> None:
    values = {name: value for name, value in bundle.manifest.to_dict().items() if name not in ("size", "sizes")}
    manifest = type(bundle.manifest).from_dict(values)
    assert (manifest.size, manifest.sizes) == ("", {})


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([[0, 4]], r"\[0, 4\] is no input size: expected a height and a width"),
        ([[True, 4]], "is no input size"),
        ([{}], "is no input size"),
        ([8], "sizes: 8 is no input size: expected a height and a width"),
        ("16x12", "expected a list of them"),
        ([[8, 4], [8, 4]], "sizes has 8x4 twice"),
        ([{"y": [8, 4]}], r"an input 'y': expected the inputs of Body, 'x', such as {x: \[8, 8\]}"),
        ([[1, 4, 3, 8, 4]], r"has 5 axes, expected at most 4"),
    ],
)
def test_what_is_no_size(tmp_path: Path, sizes: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        export_bundle(calibrated(Body()), tmp_path / "net", [call(images(1))], sizes=sizes)
    assert not list(tmp_path.iterdir())


def test_several_inputs_by_name(tmp_path: Path) -> None:
    example = call(images(1), images(1, seed=1))
    network = calibrated(TwoInputs(), example)
    names = export_bundle(network, tmp_path / "own", [example]).manifest.input_names
    size = {name: [16, 12] for name in names}
    mine = export_bundle(network, tmp_path / "net", [example], sizes=[size])
    (graph,) = mine.manifest.sizes.values()
    assert graph.inputs == {name: [1, 3, 16, 12] for name in names}
    assert list(mine.sizes) == ["-".join(f"{name}_16x12" for name in names)]
    with pytest.raises(ConfigurationError, match=r"\[16, 12\] without a name: expected the inputs of TwoInputs"):
        export_bundle(network, tmp_path / "net", [example], sizes=[[16, 12]])


class Head(nn.Module):
    """Takes one size only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(256, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x).flatten(1))


class Positions(nn.Module):
    """Takes one size only, by a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.positions = nn.Parameter(torch.ones(1, 4, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x) + self.positions


@pytest.mark.parametrize(("network", "where"), [(Head, r"its layer 'head \(Linear\)'"), (Positions, "its own forward")])
def test_a_layer_of_one_size(tmp_path: Path, network: type[nn.Module], where: str) -> None:
    made = quantized(network())
    with pytest.raises(
        ConfigurationError, match=rf"cannot compute 16x16.*{where} fails with .*It takes \[1, 3, 8, 8\]"
    ):
        check_sizes(made, InputSize.parse([[16, 16]]))  # before it is calibrated
    check_sizes(made, InputSize.parse([[2, 3, 8, 8]]))
    made = calibrated(network())
    with pytest.raises(ConfigurationError, match="cannot compute 16x16"):
        export_bundle(made, tmp_path / "net", [call(images(1))], sizes=[[16, 16]])
    assert not list(tmp_path.iterdir())


class Branching(nn.Module):
    """Computes something else of large images."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.other = other

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.other(y) if x.shape[-1] > 8 else y


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.MaxPool2d(2), "At the input size 16x16: .* comes to max_pool2d"),
        (nn.Flatten(2), "At the input size 16x16: Branching computes other operations at 16x16"),
    ],
)
def test_a_size_that_changes_the_network(tmp_path: Path, other: nn.Module, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        export_bundle(calibrated(Branching(other)), tmp_path / "net", [call(images(1))], sizes=[[16, 16]])
    assert not (tmp_path / "net").exists()


def test_a_size_that_changes_an_encoding(bundle: Bundle) -> None:
    model, values = (onnx.load(bundle.aimet / "model.onnx"), json.loads((bundle.aimet / "model.encodings").read_text()))
    own = OnnxFiles(model, values, ["x"], ["output"], {})
    check_same_graph(own, own, "16x12", "Body")
    for part in ("activation_encodings", "param_encodings"):
        other = copy.deepcopy(values)
        name = other[part][0]["name"]
        other[part][0]["scale"] = [1.0]
        with pytest.raises(ExportError, match=f"Body has another encoding of '{re.escape(name)}' at 16x12"):
            check_same_graph(own, replace(own, encodings=other), "16x12", "Body")


def test_samples_of_a_size() -> None:
    network = calibrated(Body())
    calls = [call(images(1, seed=seed)) for seed in range(3)]
    sizes = InputSize.parse([[16, 16], [2, 3, 8, 8]])
    sized = sized_calls(network, sizes, calls)
    expected = nn.functional.interpolate(images(1), (16, 16), mode="bilinear")
    torch.testing.assert_close(sized["16x16"].calls[0].tensors[0], expected)
    assert [one.tensors[0].shape[0] for one in sized["2x3x8x8"].calls] == [2, 2]
    torch.testing.assert_close(sized["2x3x8x8"].calls[1].tensors[0], torch.cat([images(1, seed=2), images(1, seed=0)]))
    given = [call(torch.ones(2, 3, 16, 16))]  # data of the size is better than resized data
    sized = sized_calls(network, sizes, calls, [*calls, *given])
    assert not sized["16x16"].resized
    assert all(bool((one.tensors[0] == 1).all()) for one in sized["16x16"].calls)


def test_callback(trainer: Any, tmp_path: Path) -> None:
    export = lq.DeviceExport(
        tmp_path, target="onnxruntime", samples=2, name="net", sizes=[[16, 16]], on_failure="raise"
    )
    module, loader = SmallModule(), small_loader()
    run: Trainer = trainer(lq.PostTrainingQuantization(calibration_samples=4, calibration_dataloader=loader), export)
    run.validate(module, loader, verbose=False)
    assert export.bundle is not None
    assert [report.size for report in export.reports] == [export.bundle.manifest.size, "16x16"]
    assert all(report.against_simulation is not None for report in export.reports)
    page = (tmp_path / "net.report" / "report.html").read_text()
    assert "16x16" in page


def test_callback_refuses_a_size_before_anything_is_calibrated(trainer: Any, tmp_path: Path) -> None:
    export = lq.DeviceExport(tmp_path / "export", target=None, sizes=[[5, 16, 16]])
    loader = small_loader()
    quantization = lq.PostTrainingQuantization(calibration_samples=4, calibration_dataloader=loader)
    with pytest.raises(ConfigurationError, match=r"cannot compute 5x16x16.*layer 'stem \(Conv2d\)' fails"):
        trainer(quantization, export).validate(SmallModule(), loader, verbose=False)
    assert not (tmp_path / "export").exists()
