"""The graph with edges against what an app would compute with the usual libraries around the network's own graph."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from numpy.testing import assert_array_equal
from torch import Tensor, nn
from torchvision.transforms.v2.functional import normalize

from lightning_quant.deploy.bundle import Bundle, load_bundle
from lightning_quant.deploy.edges import attach
from lightning_quant.deploy.edges.app import fit_edges, plan_of
from lightning_quant.deploy.edges.attach import attach_edges
from lightning_quant.deploy.edges.host import fed, network_outputs
from lightning_quant.deploy.edges.proof import prove_edges
from lightning_quant.deploy.edges.spec import Edges, ImageInput, OutputEdge
from lightning_quant.deploy.export import export_bundle
from lightning_quant.deploy.graph.qdq import exact_session
from lightning_quant.errors import ConfigurationError, ParityError
from lightning_quant.simulation.inputs import NetworkInputs
from tests.helpers.networks import calibrated, seeded

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
IMAGE = {"mean": MEAN, "std": STD}
SIZE, CLASSES = (24, 40), 7


class Scenes(nn.Module):
    """A class for each fourth pixel; its border sees the zeros of the first convolution."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, CLASSES, 1)
        )
        seeded(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)  # type: ignore[no-any-return]


class Steep(Scenes):
    """Scores so far apart that a step of them is many steps of a probability."""

    def __init__(self) -> None:
        super().__init__()
        self.body[4].weight.data *= 60


class Detector(Scenes):
    """Boxes and a score for each class of each."""

    def __init__(self) -> None:
        super().__init__()
        self.boxes = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Any:
        features = self.body[:4](x)
        return {"boxes": self.boxes(features).flatten(2), "scores": self.body[4](features).flatten(2)}


def photos(count: int, channels: int = 3, seed: int = 0) -> Tensor:
    """Pixels with every value, uint8 (N, C, H, W)."""
    pixels = torch.randint(0, 256, (count, channels, *SIZE), generator=torch.Generator().manual_seed(seed))
    return pixels.to(torch.uint8)


def seen(pixels: Tensor, mean: list[float] = MEAN, std: list[float] = STD) -> Tensor:
    """What training shows the network of pixels."""
    return normalize(pixels.float() / 255, mean, std)


@functools.cache
def network(precision: str, kind: type[nn.Module] = Scenes) -> Any:
    return calibrated(kind(), NetworkInputs((seen(photos(8)),)), precision=precision)


def run(file: Path, given: np.ndarray) -> list[np.ndarray]:
    session = exact_session(file)
    return session.run(None, {session.get_inputs()[0].name: given})  # type: ignore[no-any-return]


def app_of(bundle: Bundle) -> Bundle:
    assert bundle.app is not None
    return bundle.app


def device_file(bundle: Bundle) -> Path:
    return app_of(bundle).qdq


def exported(path: Path, precision: str = "w8a8", **edges: Any) -> Bundle:
    return export_bundle(network(precision), path / "net", [NetworkInputs((seen(photos(2, seed=1)),))], **edges)


@pytest.mark.parametrize("precision", ["w8a8", "w4a16"])
@pytest.mark.parametrize(("layout", "color"), [("nhwc", "rgb"), ("nchw", "bgr")])
def test_pixels_in_classes_out(tmp_path: Path, precision: str, layout: str, color: str) -> None:
    bundle = exported(tmp_path, precision, inputs={**IMAGE, "layout": layout, "color": color}, outputs="argmax")
    pixels = photos(1, seed=5)
    (scores,) = run(bundle.qdq, seen(pixels).numpy())
    given = pixels.flip(1) if color == "bgr" else pixels
    (classes,) = run(device_file(bundle), (given.permute(0, 2, 3, 1) if layout == "nhwc" else given).numpy())
    assert classes.dtype == np.uint8
    assert_array_equal(classes, torch.from_numpy(scores).argmax(1).numpy())
    app = bundle.manifest.app
    assert app is not None
    # of 16 bits a step is as fine as the last digits of float32
    assert app.pixels_apart <= (0 if precision == "w8a8" else 3)
    assert app.equal == 1
    assert app.samples == 2
    read = load_bundle(bundle.path)
    assert read == bundle


@pytest.mark.parametrize("precision", ["w8a8", "w8a16"])
@pytest.mark.parametrize(
    ("mean", "std"), [(MEAN, STD), ([0.2868, 0.325, 0.2839], [0.176, 0.181, 0.1777]), ([0.5], [0.5])]
)
def test_every_pixel_is_rounded_as_on_a_host(precision: str, mean: list[float], std: list[float]) -> None:
    made = calibrated(Scenes(), NetworkInputs((seen(photos(8), mean, std),)), precision=precision)
    quantizer = made.sim.model.network.body[0].input_quantizers[0]
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    floats = normalize(pixels.float() / 255, mean * (3 // len(mean)), std * (3 // len(std)))
    wanted = (quantizer(floats) / quantizer.get_scale()).round().detach().numpy()
    zero_point = np.array(-quantizer.get_offset().item(), f"uint{quantizer.bitwidth}")
    grid = attach.Grid(float(quantizer.get_scale()), zero_point)
    image = ImageInput(tuple(mean), tuple(std))
    weights, bias = attach._weights(image, 3, grid)
    scale = {8: 1 / 255, 16: 1 / 65535}[quantizer.bitwidth]
    values = np.arange(256)[None] * (1 / 255) * weights.integers.diagonal()[0, 0, :, None] * weights.scales[:, None]
    values = values + (bias.integers * weights.scales * scale)[:, None]
    apart = np.rint(values / grid.scale) - wanted.reshape(3, 256)
    if mean != [0.5]:  # of that every pixel is half way between two integers
        assert (apart != 0).sum() <= (0 if precision == "w8a8" else 8)
    assert abs(apart).max() <= 1


def test_pixels_that_are_the_networks_integers_cost_nothing(tmp_path: Path) -> None:
    whole = torch.zeros(1, 3, *SIZE, dtype=torch.uint8)
    whole[..., ::2] = 255
    made = calibrated(Scenes(), NetworkInputs((whole.float() / 255,)))
    samples = [NetworkInputs((photos(2).float() / 255,))]
    bundle = export_bundle(made, tmp_path / "net", samples, inputs="image", outputs=None)
    operations = [node.op_type for node in onnx.load(device_file(bundle)).graph.node]
    assert operations.count("Conv") == 3
    assert "QuantizeLinear" not in operations[: operations.index("Conv")]
    pixels = photos(1, seed=5)
    for mine, own in zip(
        run(device_file(bundle), pixels.permute(0, 2, 3, 1).numpy()),
        run(bundle.qdq, pixels.float().numpy() / 255),
        strict=True,
    ):
        assert_array_equal(mine, own)


def test_grey(tmp_path: Path) -> None:
    floats = seen(photos(8, 1), [0.3], [0.2])
    made = calibrated(Scenes(1), NetworkInputs((floats,)))
    edges = {"inputs": {"mean": 0.3, "std": 0.2}, "outputs": "argmax"}
    bundle = export_bundle(made, tmp_path / "net", [NetworkInputs((floats[:1],))], **edges)
    pixels = photos(1, 1, seed=5)
    (scores,) = run(bundle.qdq, seen(pixels, [0.3], [0.2]).numpy())
    assert_array_equal(run(device_file(bundle), pixels.permute(0, 2, 3, 1).numpy())[0], scores.argmax(1))


@pytest.mark.parametrize("precision", ["w8a8", "w8a16"])
@pytest.mark.parametrize("edge", ["softmax", "sigmoid", "top_k", "quantized", "before", "after", "softmax after"])
def test_outputs(tmp_path: Path, precision: str, edge: str) -> None:
    bits = 8 if precision == "w8a8" else 16
    function, _, resize = edge.rpartition(" ")
    spec: Any = edge
    if edge in ("before", "after", "softmax after"):
        spec = {"function": function or "argmax", "resize": resize}
    if edge == "top_k":
        spec = {"function": "top_k", "k": 3}
    bundle = exported(tmp_path, precision, inputs=None, outputs=spec)
    floats = seen(photos(1, seed=5))
    (scores,) = (torch.from_numpy(one) for one in run(bundle.qdq, floats.numpy()))
    got = run(device_file(bundle), floats.numpy())
    plan = plan_of(app_of(bundle))
    assert plan is not None
    grid = plan.outputs[0].grid
    assert grid is not None
    if edge == "softmax":
        assert abs(got[0] - scores.softmax(1).numpy()).max() <= 1.01 / (2**bits - 1)
    elif edge == "sigmoid":
        assert abs(got[0] - scores.sigmoid().numpy()).max() <= 1.01 / (2**bits - 1)
    elif edge == "top_k":
        highest = torch.sort(scores, dim=1, descending=True, stable=True)
        assert_array_equal(got[0], highest.values[:, :3].numpy())
        assert_array_equal(got[1], highest.indices[:, :3].numpy())
    elif edge == "quantized":
        assert got[0].dtype == grid.zero_point.dtype
        assert_array_equal(grid.reals(got[0]), scores.numpy())
    elif edge == "after":
        expected = F.interpolate(scores.argmax(1, keepdim=True).float(), SIZE, mode="nearest-exact")[:, 0]
        assert_array_equal(got[0], expected.numpy())
    elif edge == "softmax after":
        expected = F.interpolate(scores.softmax(1), SIZE, mode="nearest-exact")
        assert abs(got[0] - expected.numpy()).max() <= 1.01 / (2**bits - 1)
    else:
        large = F.interpolate(scores, SIZE, mode="bilinear", align_corners=False)
        of_chosen = large.gather(1, torch.from_numpy(got[0].astype(np.int64))[:, None])
        assert (large.amax(1, keepdim=True) - of_chosen).max() <= 2.01 * grid.scale
        assert (large.argmax(1).numpy() == got[0]).mean() > 0.95


@pytest.mark.parametrize("edge", ["softmax", "sigmoid", "argmax", "top_k"])
def test_scores_that_resizing_rounds_either_way_are_no_fault(tmp_path: Path, edge: str) -> None:
    samples = [NetworkInputs((seen(photos(4, seed=1)),))]
    outputs = {"function": edge, "resize": "before", "k": 2}
    bundle = export_bundle(network("w8a8", Steep), tmp_path / "net", samples, inputs=IMAGE, outputs=outputs)
    app = bundle.manifest.app
    assert app is not None
    assert app.equal > 0.9
    if edge != "argmax":  # of which few scores are as close
        assert app.equal < 1


def test_outputs_each_with_its_own(tmp_path: Path) -> None:
    samples = [NetworkInputs((seen(photos(2, seed=1)),))]
    bundle = export_bundle(
        network("w8a8", Detector), tmp_path / "net", samples, inputs=IMAGE, outputs=[None, OutputEdge("argmax")]
    )
    pixels = photos(1, seed=5)
    boxes, scores = run(bundle.qdq, seen(pixels).numpy())
    mine, classes = run(device_file(bundle), pixels.permute(0, 2, 3, 1).numpy())
    assert_array_equal(mine, boxes)
    assert_array_equal(classes, scores.argmax(1))


def test_none_leaves_every_output_as_it_is(tmp_path: Path) -> None:
    samples = [NetworkInputs((seen(photos(2, seed=1)),))]
    bundle = export_bundle(network("w8a8", Detector), tmp_path / "net", samples, inputs=IMAGE, outputs=None)
    pixels = photos(1, seed=5)
    expected = run(bundle.qdq, seen(pixels).numpy())
    for mine, other in zip(run(device_file(bundle), pixels.permute(0, 2, 3, 1).numpy()), expected, strict=True):
        assert_array_equal(mine, other)


@pytest.mark.parametrize("edge", ["argmax", "softmax", "sigmoid", "quantized", {"function": "top_k", "k": 2}])
def test_a_metric_of_classes_is_that_of_what_the_app_gets(edge: Any) -> None:
    model = onnx.load(exported_once().qdq)
    plan = fit_edges(Edges.of(None, edge) or Edges(), model)
    floats = seen(photos(1, seed=5)).numpy()
    (scores,) = exact_session(model).run(None, {"x": floats})
    outputs = exact_session(attach_edges(model, plan.inputs, plan.outputs).model).run(None, {"x": floats})
    restored = network_outputs(plan, dict(zip(plan.outputs[0].names, outputs, strict=True)))["output"]
    assert restored.shape == scores.shape
    chosen = np.take_along_axis(scores, restored.argmax(1)[:, None], 1)
    equal = restored.argmax(1) == scores.argmax(1)
    if edge in ("softmax", "sigmoid"):  # scores a few steps apart are one probability
        assert (scores.max(1, keepdims=True) - chosen).max() < 0.1
    else:
        assert equal.all()


@functools.cache
def exported_once() -> Bundle:
    import tempfile

    return exported(Path(tempfile.mkdtemp()), inputs=IMAGE, outputs="argmax")


@pytest.mark.parametrize("fault", ["weight", "class", "offset"])
def test_faults_are_found(fault: str) -> None:
    model = onnx.load(exported_once().qdq)
    plan = fit_edges(Edges.of(IMAGE, "argmax") or Edges(), model)
    app = attach_edges(model, plan.inputs, plan.outputs)
    sample = {"x": seen(photos(1, seed=7)).numpy()}
    prove_edges(model, app, plan.inputs, plan.outputs, [sample])
    for one in app.model.graph.initializer:
        if fault == "weight" and one.name == "x_weight_q":
            one.raw_data = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(one)[::-1].copy()).raw_data
        if fault == "offset" and one.name == "x_bias_q":
            one.raw_data = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(one) + 400).raw_data
    if fault == "class":
        (node,) = (one for one in app.model.graph.node if one.op_type == "ArgMax")
        node.op_type = "ArgMin"
    with pytest.raises(ParityError, match="classes are others" if fault == "class" else "integers up to"):
        prove_edges(model, app, plan.inputs, plan.outputs, [sample])


BAD = [
    ({"mean": [0.1, 0.2, 0.3, 0.4]}, None, "has 4 numbers"),
    (["image", None], None, "inputs has 2 entries.*network's 1, 'x'"),
    (None, {"function": "argmax", "axis": 4}, "over axis 4.*shape"),
    (None, {"function": "top_k", "k": 9}, "at least 9 classes.*has 7"),
    (None, {"function": "argmax", "axis": 0}, "needs at least 2 classes, and axis 0"),
    ({"mean": 0.5, "std": 0}, None, "inputs\\[0\\].std"),
    ({"layout": "hwc"}, None, "nhwc or nchw"),
    (None, "argmin", "none or argmax"),
    (None, {"function": "argmax", "quantized": True}, "argmax gives integers"),
    ("picture", None, "image, quantized"),
    ({"mean": [float("nan")]}, None, "inputs\\[0\\].mean"),
    (3, None, "expected one for a network with one"),
]


@pytest.mark.parametrize(("inputs", "outputs", "message"), BAD)
def test_edges_that_do_not_fit(inputs: Any, outputs: Any, message: str) -> None:
    model = onnx.load(exported_once().qdq)
    with pytest.raises(ConfigurationError, match=message):
        fit_edges(Edges.of(inputs, outputs) or Edges(), model)


def test_an_input_that_is_no_image(tmp_path: Path) -> None:
    vectors = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    made = calibrated(nn.Sequential(nn.Linear(6, 3)), NetworkInputs((vectors,)))
    with pytest.raises(ConfigurationError, match=r"shape \[1, 6\]: expected \(N, C, H, W\)"):
        export_bundle(made, tmp_path / "net", [NetworkInputs((vectors[:1],))], inputs="image")
    assert not (tmp_path / "net").exists()


def test_mean_and_std_that_are_not_those_of_the_data(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"pixels from -.* to .*expected 0 to 255"):
        exported(tmp_path, inputs={"mean": 0.0, "std": 1.0})
    assert not (tmp_path / "net").exists()


@pytest.mark.parametrize("other", [{"mean": MEAN, "std": [0.225] * 3}, {"mean": [0.47] * 3, "std": STD}])
def test_mean_and_std_of_other_data_whose_pixels_are_in_range(tmp_path: Path, other: dict[str, Any]) -> None:
    pale = seen(photos(2, seed=1) // 2 + 40)
    with pytest.warns(UserWarning, match=r"'x' are no whole pixels by mean=.* and std="):
        export_bundle(network("w8a8"), tmp_path / "net", [NetworkInputs((pale,))], inputs=other)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        export_bundle(network("w8a8"), tmp_path / "net", [NetworkInputs((pale,))], inputs=IMAGE)


def test_what_an_app_gives_is_what_the_network_saw() -> None:
    plan = plan_of(app_of(exported_once()))
    assert plan is not None
    pixels = photos(1, seed=3)
    assert_array_equal(fed(plan.inputs[0], seen(pixels).numpy()), pixels.permute(0, 2, 3, 1).numpy())
