"""Modules of the user's own behind the network, in ONNX Runtime and in the NPU's emulator."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.testing import assert_array_equal
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.deploy.bundle import Bundle, load_bundle
from lightning_quant.deploy.edges import own_module
from lightning_quant.deploy.edges.app import check_edges, plan_of
from lightning_quant.deploy.edges.contract import Contract
from lightning_quant.deploy.edges.host import fed
from lightning_quant.deploy.edges.plan import plan_edges
from lightning_quant.deploy.edges.spec import Edges, OutputEdge, OwnModule
from lightning_quant.deploy.export import export_bundle
from lightning_quant.deploy.graph.passed_inputs import grids_of
from lightning_quant.deploy.graph.qdq import QdqGraph, exact_session
from lightning_quant.deploy.targets.htp.target import HtpEmulatorTarget
from lightning_quant.errors import ConfigurationError, ParityError
from tests.helpers.networks import Body, calibrated, call, images
from tests.helpers.qdq import NO_EMULATOR
from tests.helpers.small import SmallModule, small_loader
from tests.helpers.trainers import quiet_trainer

HERE = "tests.deploy.edges.test_own_module"
PLACES = 64


class Boxes(nn.Module):
    """Decodes the four numbers of each place into corners of a box, and says which is the largest."""

    def __init__(self) -> None:
        super().__init__()
        ys, xs = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
        self.register_buffer("centers", torch.stack([xs, ys]).reshape(1, 2, PLACES))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = x.flatten(2)
        centers = (x[:, :2].sigmoid() + self.centers) * 8
        sizes = x[:, 2:].exp() * 4
        return {"boxes": torch.cat([centers - sizes / 2, centers + sizes / 2], 1), "largest": sizes.argmax(1)}


class Scaled(nn.Module):
    """One output; a cache that its first call fills is no change of state."""

    factor: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.factor is None:
            self.factor = torch.arange(1.0, 1 + x.shape[1]).reshape(1, -1, 1, 1)
        return x.softmax(1) * self.factor


class Two(nn.Module):
    """A layer with a bias, whose unit is that of the network's output; the best of the values as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(4, 3, 1)
        with torch.no_grad():
            self.mix.weight.copy_(torch.tensor([[1.0, -1, 0, 1], [0, 1, 1, -1], [-1, 0, 1, 0]])[..., None, None])
            self.mix.bias.copy_(torch.tensor([0.1, -0.2, 0.3]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.mix(x), x.argmax(1)


class Joined(nn.Module):
    """Joins the network's values with larger ones, for which they are rounded more coarsely."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :2], x[:, 2:].exp()], 1)


@pytest.fixture(scope="module")
def networks() -> dict[str, Any]:
    return {precision: calibrated(Body(), precision=precision) for precision in ("w8a8", "w8a16")}


def exported(network: Any, path: Path, outputs: Any, **more: Any) -> Bundle:
    return export_bundle(network, path / "net", [call(images(4, seed=9))], outputs=outputs, **more)


def run(file: Path, sample: Tensor) -> dict[str, np.ndarray]:
    session = exact_session(file)
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(None, {"x": sample.numpy()}), strict=True))


def app_of(bundle: Bundle) -> Bundle:
    assert bundle.app is not None
    return bundle.app


def float_answer(module: nn.Module, bundle: Bundle, sample: Tensor) -> list[np.ndarray]:
    """What the module makes in float of what the network's own graph returns."""
    given = torch.from_numpy(run(bundle.qdq, sample)["output"])
    with torch.no_grad():
        found = module(given)
    parts = found.values() if isinstance(found, dict) else found if isinstance(found, tuple) else [found]
    return [one.numpy() for one in parts]


@pytest.mark.parametrize("precision", ["w8a8", "w8a16"])
@pytest.mark.parametrize("kind", [Boxes, Scaled, Two, Joined])
def test_a_module_behind_the_network(
    networks: dict[str, Any], tmp_path: Path, kind: type[nn.Module], precision: str
) -> None:
    module = kind()
    bundle = exported(networks[precision], tmp_path, module)
    names = {Boxes: ["output_boxes", "output_largest"], Two: ["output_0", "output_1"]}.get(kind, ["output"])
    sample = images(1, seed=21)
    got = run(app_of(bundle).qdq, sample)
    assert list(got) == names
    contract = Contract.read(bundle.path)
    assert [one.name for one in contract.outputs] == names
    for actual, expected, entry in zip(
        got.values(), float_answer(kind(), bundle, sample), contract.outputs, strict=True
    ):
        assert entry.shape == actual.shape == expected.shape
        if expected.dtype != np.float32:
            assert entry.scale is None
            # boxes of one size within a step of each other
            assert (actual == expected).mean() > (0.95 if kind is Boxes else 0.999)
            continue
        assert entry.scale is not None
        integers = actual / entry.scale
        assert abs(integers - np.rint(integers)).max() < 1e-2
        # samples outside of the calibrated range are cut off
        inside = (expected > entry.range[0]) & (expected < entry.range[1])
        assert abs(actual - expected)[inside].max() < 6 * entry.scale * (1 if precision == "w8a8" else 2)
    app = bundle.manifest.app
    assert app is not None
    assert app.equal > 0.99
    # the network's integers go in as they are
    model = onnx.load(app_of(bundle).qdq)
    known = QdqGraph(model)
    takers = known.consumers["output_of_the_network"]
    takers += [one for node in takers if node.op_type == "Identity" for one in known.consumers[node.output[0]]]
    again = [node.name for node in takers if node.op_type == "QuantizeLinear"]
    assert not again


def test_integers_a_path_and_one_for_each_output(networks: dict[str, Any], tmp_path: Path) -> None:
    plain = exported(networks["w8a8"], tmp_path / "a", f"{HERE}.Two")
    mine = exported(networks["w8a8"], tmp_path / "b", [{"module": f"{HERE}.Two", "quantized": True}])
    sample = images(1, seed=21)
    floats, integers = (run(app_of(one).qdq, sample) for one in (plain, mine))
    entry = Contract.read(mine.path).outputs[0]
    assert (integers["output_0"].dtype, entry.type, entry.bits) == (np.uint8, "uint8", 8)
    real = (integers["output_0"].astype(np.float32) - entry.zero_point) * np.float32(entry.scale)
    assert_array_equal(real, floats["output_0"])
    assert_array_equal(integers["output_1"], floats["output_1"])
    read = load_bundle(mine.path)
    assert read == mine
    plan = plan_of(app_of(read))
    assert plan is not None
    assert plan.outputs[0].names == ["output_0", "output_1"]


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))
def test_no_layer_on_the_cpu_of_a_phone(networks: dict[str, Any], tmp_path: Path, quantized: bool) -> None:
    outputs = {"module": Boxes(), "quantized": quantized}
    bundle = exported(networks["w8a8"], tmp_path, [OutputEdge.from_json(outputs)], inputs="quantized")
    app = app_of(bundle)
    plan = plan_of(app)
    assert plan is not None
    given = {"x": fed(plan.inputs[0], images(1, seed=21).numpy())}
    (measured,) = HtpEmulatorTarget("SM8650", timeout=120).run(app, [given], tmp_path / "device")
    report = measured.report
    assert report.layers is not None
    assert report.layers["CPU"] == []
    assert (report.float_islands, report.fallen_back) == ([], {})
    assert measured.outputs is not None
    expected = exact_session(app.qdq).run(None, given)
    for one, other, entry in zip(
        measured.outputs[0].values(), expected, Contract.read(bundle.path).outputs, strict=True
    ):
        step = 1 if entry.scale is None or quantized else entry.scale
        assert one.dtype == other.dtype
        # the NPU computes exp and sigmoid from tables of its own: one step of theirs is up to two of the box
        assert abs(one.astype(np.float64) - other).max() <= (0 if entry.scale is None else 2.01 * step)


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.max() > 0.5 else x


class Kept(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0]


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(x.mean((0, 2, 3)))
        return x - self.mean.reshape(1, 4, 1, 1)


class Remembers(nn.Module):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.sigmoid()


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return {"scores": x.sigmoid(), "classes": 4}


class Takes(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()


class Gathers(nn.Module):
    """Places that are the module's own, by a mask and by number, are as fixed as any."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([True, False, True, True]))
        self.register_buffer("first", torch.tensor(1))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.mask][:, int(self.first) :].sigmoid()


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Branches(), r"Branches behind the output 'output' decides by values"),
        (Kept(), r"Kept behind the output 'output' returns as many values as it finds \(index\)"),
        (Counts(), r"Counts .* changes its state from one call to the next \(mean\)"),
        (Remembers(), r"Remembers .* changes its state .* \(calls\)"),
        (Noisy(), r"Noisy .* draws random numbers \(rand_like\)"),
        (nn.Linear(5, 2), r"torch\.nn\.modules\.linear\.Linear .* fails with RuntimeError: mat1 .*\[1, 4, 8, 8\]"),
        (Nothing(), r"Nothing .* returns dict of torch.float32 \[1, 4, 8, 8\], int: expected a tensor"),
        (f"{HERE}.Takes", r"Takes' cannot be made: TypeError: .*missing 1 required.*without arguments"),
        (f"{HERE}.PLACES", r"PLACES' is no class of torch\.nn\.Module"),
        (f"{HERE}.Absent", r"Absent' cannot be imported"),
        ("not there.x", r"cannot be imported"),
        ({"module": f"{HERE}.Two", "function": "argmax"}, r"outputs\[0\]\.module .*no function and no resize"),
        ({"module": 3}, r"outputs\[0\]\.module is 3, expected a torch\.nn\.Module or the dotted path"),
    ],
)
def test_what_no_device_can_compute(networks: dict[str, Any], tmp_path: Path, module: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        check_edges(networks["w8a8"], Edges.of(None, module))
    with pytest.raises(ConfigurationError, match=message):
        exported(networks["w8a8"], tmp_path, module)
    assert not (tmp_path / "net").exists()


def test_two_outputs_of_one_name() -> None:
    edges = Edges((), (OutputEdge(module=OwnModule("a.B", ("0", "1"))), None))
    shapes = {"output": (1, 4), "output_0": (1, 4)}
    with pytest.raises(ConfigurationError, match="has 'output_0' twice"):
        plan_edges(edges, {"x": (1, 3)}, shapes, {})


def test_what_is_fixed_in_a_module_is_none_of_that(networks: dict[str, Any]) -> None:
    check_edges(networks["w8a8"], Edges.of(None, Gathers()))


def test_network_and_module_stay_as_they_are(networks: dict[str, Any], tmp_path: Path) -> None:
    network, module = networks["w8a8"], Two().train()
    hooks = []
    module.register_forward_hook(lambda *_: hooks.append(1))
    before = [copy.deepcopy(one.state_dict()) for one in (network.network, module)]
    random = torch.get_rng_state()
    check_edges(network, Edges.of(None, module))
    exported(network, tmp_path, module)
    assert_array_equal(torch.get_rng_state(), random)
    for one, known in zip((network.network, module), before, strict=True):
        for name, value in one.state_dict().items():
            assert not isinstance(value, Tensor) or torch.equal(value, known[name])
    assert module.training
    assert type(module) is Two
    assert not network.network.training


def test_a_fault_in_its_graph_is_found(
    networks: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = own_module._written

    def faulty(*given: Any) -> Any:
        module = written(*given)
        (node,) = (one for one in module.model.graph.node if one.op_type == "ArgMax")
        node.op_type = "ArgMin"
        return module

    monkeypatch.setattr(own_module, "_written", faulty)
    with pytest.raises(ParityError, match=r"of its integers are others"):
        exported(networks["w8a8"], tmp_path, Two())


def test_the_range_at_its_input_is_the_networks(networks: dict[str, Any], tmp_path: Path) -> None:
    bundle = exported(networks["w8a16"], tmp_path, Two(), sizes=[[16, 12]])
    app = bundle.manifest.app
    assert app is not None
    edge = app.edges.outputs[0]
    assert edge is not None
    assert edge.module is not None
    (quantizer,) = (edge.module.simulation.network.mix.input_quantizers[0],)
    grid = grids_of(onnx.load(bundle.qdq), ["output"])["output"]
    assert np.float32(quantizer.get_scale().item()) == np.float32(grid.scale)
    assert int(-quantizer.get_offset().item()) == int(grid.zero_point)
    assert quantizer.bitwidth == 16
    # the same integers at every size
    other = run(bundle.graphs["16x12.app"].qdq, torch.zeros(1, 3, 16, 12))
    assert other["output_0"].shape == (1, 3, 16, 12)
    scales = [
        [one for one in onnx.load(graph.qdq).graph.initializer if "scale" in one.name]
        for graph in bundle.graphs.values()
        if graph.edged
    ]
    assert [one.raw_data for one in scales[0]] == [one.raw_data for one in scales[1]]


def test_in_a_trainer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    export = lq.DeviceExport(tmp_path, outputs=Branches(), target="onnxruntime", report=False)
    quantization = lq.PostTrainingQuantization(calibration_samples=4)
    trainer = quiet_trainer(tmp_path, quantization, export)
    with pytest.raises(ConfigurationError, match=r"Branches .* decides by values"):
        trainer.validate(SmallModule(), small_loader(), verbose=False)
    assert not list(tmp_path.glob("*/manifest.json"))
    export = lq.DeviceExport(
        tmp_path,
        outputs="tests.deploy.edges.test_own_module.Chances",
        target="onnxruntime",
        report=False,
        monitor="val_loss",
        samples=4,
    )
    trainer = quiet_trainer(
        tmp_path, lq.PostTrainingQuantization(calibration_samples=4, calibration_dataloader=small_loader()), export
    )
    trainer.validate(SmallModule(), small_loader(), verbose=False)
    own, app = export.reports
    assert own.metric
    assert (app.edged, app.metric) == (True, {})
    assert app.against_simulation is not None
    assert app.against_simulation.psnr_db >= 60
    assert app.against_float is not None
    assert 20 < app.against_float.psnr_db < 60  # of the module in float
    assert caplog.text.count("No metric of the graph with edges") == 1


class Chances(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * 3).softmax(1)
