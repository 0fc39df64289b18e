"""The bundle: what is in it, that it is whole or not there, and that nothing in it computes something else."""

from __future__ import annotations

import errno
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor, nn

from lightning_quant.deploy import export as module
from lightning_quant.deploy.blame.result import BLAME_NAME, read_blames
from lightning_quant.deploy.bundle import Bundle, load_bundle
from lightning_quant.deploy.export import export_bundle
from lightning_quant.deploy.graph.files import name_tensors
from lightning_quant.deploy.graph.qdq import exact_session
from lightning_quant.deploy.targets.htp.target import HtpEmulatorTarget
from lightning_quant.errors import ConfigurationError, ExportError, ParityError
from lightning_quant.precision import Precision
from lightning_quant.simulation import aimet
from lightning_quant.simulation.inputs import NetworkInputs
from tests.helpers.networks import (
    AnyInputs,
    Body,
    Chain,
    DataclassOutput,
    DictInput,
    DictOutput,
    NestedOutput,
    Options,
    OrderedOutput,
    TupleOutput,
    TwoInputs,
    calibrated,
    call,
    images,
    quantized,
    seeded,
)
from tests.helpers.qdq import NO_EMULATOR, tamper

SAMPLES = [call(images(3, seed=9))]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle that tests only read."""
    return export_bundle(calibrated(Body()), tmp_path_factory.mktemp("read") / "net", SAMPLES)


@pytest.fixture
def old(tmp_path: Path) -> Bundle:
    """An earlier bundle at ``tmp_path / "net"``, alone in its folder."""
    return export_bundle(calibrated(Body()), tmp_path / "net", SAMPLES)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_files_of_a_bundle(exported: Bundle) -> None:
    assert sorted(contents(exported.path)) == [
        "host/Host.kt",
        "host/host.cpp",
        "host/host.py",
        "io.json",
        "manifest.json",
        "net.aimet/model.encodings",
        "net.aimet/model.onnx",
        "net.onnx",
    ]
    assert sorted(file.name for file in exported.aimet.iterdir()) == ["model.encodings", "model.onnx"]
    assert list(exported.path.parent.iterdir()) == [exported.path]
    assert exported.path.stat().st_mode & 0o055 == 0o055  # others may read it, as any folder one makes
    onnx.checker.check_model(onnx.load(exported.aimet / "model.onnx"), full_check=True)
    encodings = json.loads((exported.aimet / "model.encodings").read_text())
    assert encodings["version"] == exported.manifest.encodings_version == "1.0.0"


def test_manifest_says_how_it_was_made(exported: Bundle) -> None:
    manifest = json.loads((exported.path / "manifest.json").read_text())
    assert exported.manifest == load_bundle(exported.path).manifest
    assert exported.manifest.to_dict() == manifest
    assert exported.manifest["parity"] == manifest["parity"]
    assert manifest["precision"] == "w8a8"
    assert manifest["hardware"] == "htp_v75"
    assert manifest["calibrated"] is True
    assert manifest["name"] == "net"
    assert {"lightning_quant", "aimet_torch", "torch", "onnx", "onnxruntime"} <= manifest.keys()
    assert manifest["parity"]["tier"] == "onnxruntime"
    assert manifest["parity"]["samples"] == 3
    assert manifest["parity"]["psnr_db"] is None or manifest["parity"]["psnr_db"] >= 35
    assert manifest["bytes"] == {
        "float": (exported.aimet / "model.onnx").stat().st_size,
        "quantized": exported.qdq.stat().st_size,
    }
    assert {name: entry["bytes"] for name, entry in manifest["files"].items()} == {
        name: len(data)
        for name, data in contents(exported.path).items()
        if name != "manifest.json" and not name.startswith("host/")  # to be changed by whoever builds on them
    }


class Wide(nn.Module):
    """Weights enough to outweigh everything else in the file."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 64, 3, padding=1)
        self.second = nn.Conv2d(64, 64, 3, padding=1)
        seeded(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.mark.parametrize(
    ("precision", "weights", "activations", "smaller"),
    [
        ("w8a8", "INT8", "UINT8", 3.3),
        ("w8a16", "INT8", "UINT16", 3.3),
        ("w4a8", "INT4", "UINT8", 5.5),
        ("w4a16", "INT4", "UINT16", 5.5),
    ],
)
def test_weights_are_integers_of_the_right_width(
    tmp_path: Path, precision: str, weights: str, activations: str, smaller: float
) -> None:
    made = calibrated(Wide(), precision=precision)
    bundle = export_bundle(made, tmp_path / "net", SAMPLES)
    model = onnx.load(bundle.qdq)
    types = {i.name: onnx.TensorProto.DataType.Name(i.data_type) for i in model.graph.initializer}
    dequantized = [node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"]
    stored = [name for name in dequantized if name in types]
    assert sorted((name.rpartition(".")[2], types[name]) for name in stored) == [
        ("bias_q", "INT32"),
        ("bias_q", "INT32"),
        ("weight_q", weights),
        ("weight_q", weights),
    ]
    quantize = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    zero_points = {node.input[2] for node in quantize}
    constants = {i.name: i for i in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = node.attribute[0].t
    assert {onnx.TensorProto.DataType.Name(constants[name].data_type) for name in zero_points} == {activations}
    # no float copy of a weight is left: floats are scales and biases
    floats = [i for i in model.graph.initializer if i.data_type == onnx.TensorProto.FLOAT]
    assert max(int(np.prod(i.dims)) for i in floats) <= 64
    assert bundle.manifest.bytes["float"] / bundle.manifest.bytes["quantized"] > smaller
    assert bundle.manifest.bytes["float"] > 4 * sum(value.numel() for value in Wide().state_dict().values())
    # and it computes what the simulation computes, seen from the file alone
    session = exact_session(bundle.qdq)  # the optimized kernels saturate on CPUs without VNNI
    (actual,) = session.run(None, {"x": images(1, seed=4).numpy()})
    expected = made(images(1, seed=4)).detach().numpy()
    assert np.abs(actual - expected).max() < (0.02 if "a8" in precision else 0.002) * np.abs(expected).max()


@pytest.mark.parametrize(
    ("network", "inputs", "names", "outputs"),
    [
        (Body, call(images(2)), ["x"], ["output"]),
        (TwoInputs, call(images(2), images(2, 1)), ["image", "other"], ["output"]),
        (TwoInputs, call(images(2), other=images(2, 1)), ["image", "other"], ["output"]),
        (TwoInputs, call(other=images(2, 1), image=images(2)), ["other", "image"], ["output"]),
        (AnyInputs, call(images(2), images(2, 1)), ["input_0", "input_1"], ["output"]),
        (DictInput, call({"image": images(2), "other": images(2, 1)}), ["image", "other"], ["output"]),
        (Options, call(images(2), mask=images(2, 1, channels=1), flag=False), ["x", "mask"], ["output"]),
        (Options, call(images(2), None, 3.0), ["x"], ["output"]),
        (DictOutput, call(images(2)), ["x"], ["logits", "doubled"]),
        (OrderedOutput, call(images(2)), ["x"], ["logits", "doubled"]),
        (TupleOutput, call(images(2)), ["x"], ["output_0", "output_1_0"]),
        (DataclassOutput, call(images(2)), ["x"], ["output_0", "output_1"]),
        (NestedOutput, call(images(2)), ["x"], ["main_out", "aux_out", "x_1"]),
    ],
)
def test_names_of_inputs_and_outputs(
    tmp_path: Path, network: Any, inputs: NetworkInputs, names: list[str], outputs: list[str]
) -> None:
    bundle = export_bundle(calibrated(network(), inputs), tmp_path / "net", [inputs])
    assert bundle.manifest.input_names == names
    assert bundle.manifest.output_names == outputs
    for file in (bundle.qdq, bundle.aimet / "model.onnx"):
        graph = onnx.load(file).graph
        assert [value.name for value in graph.input] == names
        assert [value.name for value in graph.output] == outputs
    assert bundle.manifest.parity.samples == 2


def test_names_without_a_signature(exported: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a forward that is not written in Python, and of one that somebody put another in the place of."""
    made, inputs = calibrated(Body()), call(images(1))
    output = inputs.call(made)
    monkeypatch.setattr(made.network, "forward", functools.partial(getattr))  # has none to read
    assert name_tensors(made, inputs, output) == (["input_0"], ["output"])
    monkeypatch.setattr(made.network, "forward", lambda picture, flag=None: picture)
    assert name_tensors(made, inputs, output) == (["picture"], ["output"])


def test_outputs_without_samples_or_of_integers(tmp_path: Path) -> None:
    class Several(Body):
        def forward(self, x: Tensor) -> Any:
            scores = self.scores(x)
            return scores.argmax(1), scores.mean()

    bundle = export_bundle(calibrated(Several()), tmp_path / "net", SAMPLES)
    assert bundle.manifest.parity.samples == 3


def test_network_is_left_as_it_was(tmp_path: Path) -> None:
    made = calibrated(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 4, 1))).train()
    made.network.get_submodule("2").eval()  # a frozen part
    modes = {name: part.training for name, part in made.named_modules()}
    state = {name: value.clone() for name, value in made.state_dict().items() if isinstance(value, Tensor)}
    with torch.inference_mode():
        export_bundle(made, tmp_path / "a", SAMPLES)
        assert torch.is_inference_mode_enabled()
    with torch.no_grad():
        export_bundle(made, tmp_path / "b", SAMPLES)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert {name: part.training for name, part in made.named_modules()} == modes
    after = made.state_dict()
    assert all(torch.equal(after[name], value) for name, value in state.items())
    assert not any(value.is_inference() for value in made.parameters())
    made(images(2)).sum().backward()
    assert all(p.grad is not None for name, p in made.named_parameters() if name.endswith("0.weight"))


def test_network_is_left_as_it_was_when_the_export_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = calibrated(Body()).train()
    monkeypatch.setattr(module.audit, "unexplained", lambda *_: ({}, ["made up"]))
    with pytest.raises(ExportError, match=r"e\.g\. made up"):
        export_bundle(made, tmp_path / "net", SAMPLES)
    assert made.training
    assert all(part.training for part in made.modules())
    assert torch.is_grad_enabled()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_network_is_back_on_its_device(tmp_path: Path) -> None:
    made = calibrated(Body()).cuda()
    export_bundle(made, tmp_path / "net", [call(images(2).cuda())])
    assert {value.device.type for value in made.parameters()} == {"cuda"}


def test_the_same_network_gives_the_same_files(exported: Bundle, tmp_path: Path) -> None:
    again = export_bundle(calibrated(Body()), tmp_path / "net", SAMPLES)
    assert contents(again.path) == contents(exported.path)


def test_a_batch_is_a_call_of_the_network(exported: Bundle, tmp_path: Path) -> None:
    for name, samples in {"one": images(2), "listed": [images(2)]}.items():
        made = export_bundle(calibrated(Body()), tmp_path / name, samples)
        assert made.qdq.read_bytes() == exported.qdq.read_bytes()


def test_refusals_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="not calibrated"):
        export_bundle(quantized(Body()), tmp_path / "net", SAMPLES)
    with pytest.raises(ExportError, match="No samples to check the export with"):
        export_bundle(calibrated(Body()), tmp_path / "net", [])
    with pytest.raises(ConfigurationError, match="samples holds a dict: expected tensors, or NetworkInputs"):
        export_bundle(calibrated(Body()), tmp_path / "net", [{"x": images(1)}])  # type: ignore[list-item]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ExportError, match=r"Writing the bundle .* failed"):
        export_bundle(calibrated(Body()), tmp_path / "file" / "net", SAMPLES)


@pytest.mark.parametrize("kind", ["folder", "empty", "file"])
def test_what_is_not_a_bundle_is_never_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "net"
    if kind == "file":
        path.write_text("mine")
    else:
        path.mkdir()
    if kind == "folder":
        (path / "thesis.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"exists and is not a bundle.*Give another folder"):
        export_bundle(calibrated(Body()), path, SAMPLES)
    assert list(tmp_path.iterdir()) == [path]
    assert kind != "folder" or contents(path) == {"thesis.txt": b"mine"}
    assert kind != "file" or path.read_text() == "mine"


def test_previous_bundle_is_replaced_whole(old: Bundle, tmp_path: Path) -> None:
    (old.path / "stale.txt").write_text("of the old one")
    new = export_bundle(calibrated(Body(), precision="w4a16"), old.path, SAMPLES)
    assert load_bundle(old.path).manifest.precision == Precision(4, 16)
    assert "stale.txt" not in contents(new.path)
    assert list(tmp_path.iterdir()) == [new.path]


def test_failing_rename_puts_the_previous_bundle_back(
    old: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, real, calls = contents(old.path), os.replace, []

    def replace(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        real(*args)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(ExportError, match=r"Writing the bundle .* failed.*Nothing was changed there"):
        export_bundle(calibrated(Body(), precision="w4a16"), old.path, SAMPLES)
    assert contents(old.path) == before
    assert list(tmp_path.iterdir()) == [old.path]


@pytest.mark.parametrize("precision", ["w8a8", "w8a16", "w4a16"])
def test_a_file_that_computes_something_else_fails_loudly(
    old: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    real, before = aimet.export, contents(old.path)
    made = calibrated(Body(), precision=precision)

    def export(model: Any, args: Any, file: str, **options: Any) -> None:
        real(model, args, file, **options)
        tamper(Path(file), 1.2)

    monkeypatch.setattr(aimet, "export", export)
    expected = rf"differs from .* at {precision}.*The files are kept in .*net\.failed"
    with pytest.raises(ParityError, match=expected) as caught:
        export_bundle(made, old.path, SAMPLES)
    assert "The first layer that differs is 'conv': " in str(caught.value)
    assert "scale of conv.weight" in str(caught.value)
    assert contents(old.path) == before
    failed = tmp_path / "net.failed"
    assert sorted(tmp_path.iterdir()) == [old.path, failed]
    assert contents(failed).keys() - before.keys() == {BLAME_NAME}
    (found,) = read_blames(failed / BLAME_NAME)
    assert found.first is not None
    assert found.first.layer == "conv"
    with pytest.raises(ExportError, match="in a folder of the name they were exported to"):
        load_bundle(failed)  # no target takes it from there
    with pytest.warns(UserWarning, match=r"differs from the simulation: .* Exported anyway"):
        bundle = export_bundle(made, old.path, SAMPLES, on_parity="warn")
    assert load_bundle(bundle.path).manifest.parity.psnr_db < 60
    assert list(tmp_path.iterdir()) == [old.path]
    monkeypatch.undo()
    export_bundle(made, old.path, SAMPLES)  # the same without tampering passes


class Amplifier(nn.Module):
    """The difference of two channels that are nearly equal: a step of one of them is most of what it outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 2, 5, padding=2, bias=False)
        self.second = nn.Conv2d(2, 2, 1, bias=False)
        seeded(self)
        with torch.no_grad():
            self.first.weight[1] = self.first.weight[0]
            self.first.weight[1, 0, 0, 0] -= self.first.weight[1, 0, 0, 0].sign() * self.first.weight.abs().max() / 7
            self.second.weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]])[..., None, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_an_output_that_ties_alone_change_is_no_reason_to_refuse(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = calibrated(Amplifier(), precision="w4a8")
    first = made.network.first
    step = 8 * first.input_quantizers[0].get_scale() * first.param_quantizers["weight"].get_scale().max()
    with torch.no_grad():  # one sum in eight is in the middle between two integers
        first.output_quantizers[0].min.copy_(-128 * step)
        first.output_quantizers[0].max.copy_(127 * step)
    bundle = export_bundle(made, tmp_path / "net", [call(images(3, seed=9) / 4)])
    assert bundle.manifest.parity.psnr_db < 35
    assert "The files were kept" in caplog.text


def test_samples_of_another_size_are_left_out_of_the_comparison(tmp_path: Path) -> None:
    network = calibrated(Chain(), call(images(2)))
    sizes = [call(images(2)[..., :6]), call(images(3)), call(images(2)[..., :4])]
    bundle = export_bundle(network, tmp_path / "net", sizes)
    assert bundle.manifest.parity.samples == 3


def test_two_exports_to_one_place_at_a_time_are_refused(tmp_path: Path) -> None:
    network = calibrated(Body())
    taken = FileLock(tmp_path / ".net.lock")
    with taken, pytest.raises(ExportError, match="Another process is exporting to"):
        export_bundle(network, tmp_path / "net", [call(images())])
    assert not (tmp_path / "net").exists()
    export_bundle(network, tmp_path / "net", [call(images())])


def test_a_bundle_that_a_kill_left_beside_its_place_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the two renames, and then the next export fails."""
    network = calibrated(Body())
    export_bundle(network, tmp_path / "net", [call(images())])
    (tmp_path / "net").rename(tmp_path / ".net.old")
    (tmp_path / ".net.new").mkdir()
    with pytest.raises(ExportError, match="not calibrated"):
        export_bundle(quantized(Body()), tmp_path / "net", [call(images())])
    monkeypatch.setattr(module, "_write", fails_for_space)
    with pytest.raises(ExportError, match="No space"):
        export_bundle(network, tmp_path / "net", [call(images())])
    assert load_bundle(tmp_path / "net").manifest.precision == Precision(8, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["net"]


def fails_for_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_or_a_full_disk_at_any_moment_leaves_a_whole_bundle_or_none(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.deploy.killed_export", str(tmp_path)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    attempts = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    moments = [attempt for attempt in attempts if attempt["kind"] == "moment"]
    assert len(moments) == 8
    for attempt in moments:
        # the old one, the new one if it was finished, or none (between two renames)
        assert attempt["after"] in {attempt["before"], "w8a16", "nothing"}, attempt
        assert attempt["killed"], attempt

    renames = {attempt["moment"]: attempt for attempt in attempts if attempt["kind"] == "rename"}
    assert {moment: attempt["after"] for moment, attempt in renames.items()} == {
        "before 0": "w8a8",
        "after 0": "nothing",
        "before 1": "nothing",
        "after 1": "w8a16",
    }
    assert all(attempt["killed"] for attempt in renames.values())

    full = [attempt for attempt in attempts if attempt["kind"] == "full"]
    assert len(full) == 9  # without space at all, and for each of 8 files
    for attempt in full[:-1]:
        assert attempt["code"] == 17, attempt  # ExportError: File too large
        assert attempt["after"] == attempt["before"], attempt
        assert attempt["leftovers"] == [], attempt
    for attempt in attempts:
        assert not attempt["after"].startswith("broken"), attempt
        assert all(name in (".net.new", ".net.old", ".net.lock") for name in attempt["leftovers"]), attempt


def test_an_operation_that_onnx_lacks_is_named_in_one_line(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 2), nn.AdaptiveMaxPool2d(2, return_indices=True))  # of 7 by 7
    with pytest.raises(
        ExportError, match=r"^Sequential cannot be written as ONNX: SymbolicValueError: .*adaptive"
    ) as caught:
        export_bundle(calibrated(network), tmp_path / "net", [call(images(1))])
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


class Around(nn.Module):
    """A function between two convolutions."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.before, self.after, self.function = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.function(self.before(x)))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.amin(dim=(2, 3), keepdim=True),
        lambda x: torch.amin(x, 1, keepdim=True).expand_as(x),
        lambda x: x.min(dim=2, keepdim=True).values,
        lambda x: x - x.min(),
        lambda x: F.channel_shuffle(x, 2),
        nn.ChannelShuffle(2),
        lambda x: torch.cat(torch.tensor_split(x, (1, 3), dim=2)[::-1], 2),
        lambda x: torch.cat(x.tensor_split(3, -1)[::-1], -1),
        lambda x: torch.cat(torch.tensor_split(x, indices=(1,), dim=2)[::-1], 2).unsqueeze(1).squeeze(1),
        lambda x: torch.cat([x.hsplit(2)[1], torch.vsplit(x, 1)[0], torch.dsplit(x.tile(2, 1), 2)[1]], 1)[:, :4],
        lambda x: torch.roll(x, (0, 2), (2, 3)),
        lambda x: x.roll((11, -9), (-2, -1)),
        lambda x: x.roll(3) + x.roll(8, 2),
        lambda x: x + shifted_windows(x),
        lambda x: x.unflatten(1, (2, 2)).repeat(1, 1, 1, 1, 1).flatten(1, 2),
        lambda x: x.tile(1).repeat(repeats=(1, 1, 1, 1, 1)).squeeze(0),
        lambda x: x.repeat_interleave(1, 2) + torch.repeat_interleave(x, 2, dim=3)[..., : x.shape[3]],
    ],
    ids=[
        "amin of two axes", "amin of channels", "min of an axis", "min of all", "channel_shuffle", "ChannelShuffle",
        "tensor_split at places", "tensor_split in parts", "tensor_split and squeeze", "hsplit, vsplit, dsplit",
        "roll by none", "roll by more than all", "roll of all values", "written to no place",
        "repeated once", "repeated once, an axis more", "interleaved once",
    ],
)  # fmt: skip
def test_operations_that_onnx_has_in_another_form(function: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    network = calibrated(seeded(Around(function)), call(images()))
    bundle = export_bundle(network, tmp_path / "net", [call(images())])
    assert bundle.manifest.parity.psnr_db > 60
    written = {node.op_type for node in onnx.load(bundle.qdq).graph.node}
    assert written.isdisjoint(("If", "Loop", "SplitToSequence", "SequenceAt"))
    if NO_EMULATOR is None:  # its compiler crashes on a Tile of five axes by ones
        sample = {bundle.manifest.input_names[0]: images(1).numpy()}
        report = HtpEmulatorTarget("SM8650").run(bundle, [sample], tmp_path)[0].report
        assert not report.layers["CPU"]
        assert not report.float_islands


def shifted_windows(x: Tensor) -> Tensor:
    """The mask of Swin's shifted windows, of which one axis is shifted by none."""
    mask = x.new_zeros(x.shape[2:])
    for count, rows in enumerate((slice(0, -4), slice(-4, -0), slice(-0, None))):
        mask[rows, 2:] = count
    return mask


def test_a_layer_that_differs_in_the_last_sample_only_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = aimet.export

    def cut_off(model: Any, args: Any, file: str, **options: Any) -> None:
        """Write a limit into the file that small values do not reach."""
        real(model, args, file, **options)
        written = onnx.load(file)
        (relu,) = (node for node in written.graph.node if node.op_type == "Relu")
        relu.op_type = "Clip"
        for name, value in (("low", 0.0), ("high", 0.5)):
            written.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(value), name))
            relu.input.append(name)
        onnx.save(written, file)

    monkeypatch.setattr(aimet, "export", cut_off)
    around = seeded(Around(nn.ReLU()))
    nn.init.zeros_(around.before.bias)  # of black images nothing is cut off
    network = calibrated(around, call(images() * 3))
    calls = [*[call(torch.zeros(1, 3, *images().shape[2:]))] * 3, call(images(1) * 3)]
    with pytest.raises(ParityError, match="The first layer that differs is 'before'"):
        export_bundle(network, tmp_path / "net", calls)


class Behind(nn.Module):
    """A function of what a convolution computes."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 8, 1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x))


def test_norms_over_several_axes_without_weights(tmp_path: Path) -> None:
    for index, norm in enumerate((lambda x: F.layer_norm(x, x.shape[1:]), nn.LayerNorm([8, 8], bias=False))):
        network = calibrated(Behind(norm).eval())
        bundle = export_bundle(network, tmp_path / str(index), [call(images(1))])
        assert bundle.manifest.parity.psnr_db > 60


def written_as(*operation: Any, **attributes: Any) -> Callable[[Tensor], Tensor]:
    """A copy, and what PyTorch's exporter writes for it."""

    class Copy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def symbolic(g: Any, x: Any) -> Any:
            return g.op(*operation, x, **attributes).setType(x.type())

    return lambda x: Copy.apply(x) * 2.0  # type: ignore[no-any-return, no-untyped-call]


@pytest.mark.parametrize(
    ("function", "failure"),
    [
        (written_as("Flatten", axis_i=9), "does not load the graph that was written: "),
        (written_as("Transpose", perm_i=[1, 0]), "does not run the graph that was written: InvalidArgument"),
    ],
)
def test_a_graph_that_is_written_wrongly_is_refused(
    tmp_path: Path, function: Callable[[Tensor], Tensor], failure: str
) -> None:
    network = calibrated(Behind(function).eval())
    with pytest.raises(ExportError, match=f"{failure}.*Please report"):
        export_bundle(network, tmp_path / "net", [call(images(1))])
    assert not (tmp_path / "net").exists()


def on_the_diagonal(x: Tensor) -> Tensor:
    x.diagonal(dim1=2, dim2=3).zero_()
    return x


def in_windows(x: Tensor) -> Tensor:
    x.unfold(2, 2, 1)[..., 0].sigmoid_()
    return x


@pytest.mark.parametrize("function", [on_the_diagonal, in_windows])
def test_what_the_file_leaves_out_is_not_taken_for_rounding(
    tmp_path: Path, function: Callable[[Tensor], Tensor]
) -> None:
    """A view of places that are not put back: each layer of the file computes what it should, the change is in none."""
    network = calibrated(Behind(function).eval())
    with pytest.raises(ParityError, match="The first layer that differs"):
        export_bundle(network, tmp_path / "net", [call(images(1))])


class SharedHead(nn.Module):
    """One convolution for all scales, a batch norm for each, as detectors have it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scores = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.norms = nn.ModuleList(seeded(nn.BatchNorm2d(8), seed) for seed in range(2))

    def forward(self, x: Tensor) -> list[Tensor]:
        scales = (x, F.avg_pool2d(x, 2))
        return [self.scores(norm(self.conv(one)).relu()) for norm, one in zip(self.norms, scales, strict=True)]


class Decisions(nn.Module):
    """One convolution called three times, of which only choices and comparisons are returned but once."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.conv(x), self.conv(x.flip(-1)).argmax(1), self.conv(x * 0.5) > 0


class Lookups(nn.Module):
    """One table that is read more than once, and one without a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(20, 16, padding_idx=0), nn.Linear(16, 8)
        self.codes = nn.Parameter(torch.randn(20, 16))

    def forward(self, words: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.table(words[:, 0]), self.table(words[:, 1])
        return self.linear(first + second * 0.5), F.embedding(words[:, 1], self.codes) * first


@pytest.mark.parametrize("precision", ["w8a8", "w4a16"])
@pytest.mark.parametrize(
    ("made", "inputs"),
    [
        (SharedHead, images(4)),
        (Decisions, images(4)),
        (Lookups, torch.randint(20, (4, 2, 6), generator=torch.Generator().manual_seed(0))),
    ],
)
def test_layers_that_are_called_more_than_once(
    tmp_path: Path, made: Callable[[], nn.Module], inputs: Tensor, precision: str
) -> None:
    torch.manual_seed(0)
    network = calibrated(made().eval(), call(inputs), precision=precision)
    bundle = export_bundle(network, tmp_path / "net", [call(inputs[:1])])
    assert bundle.manifest.parity.psnr_db > 60
