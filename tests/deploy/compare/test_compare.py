"""Two exports compared: every planted regression is named, and nothing else is; equal runs raise nothing."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_quant as lq
from lightning_quant.deploy.compare.bounds import DEFAULTS, Bound, Part
from lightning_quant.deploy.compare.changes import How
from lightning_quant.deploy.compare.result import Changes
from lightning_quant.deploy.compare.snapshot import Snapshot
from lightning_quant.deploy.device_report import DeviceReport
from lightning_quant.deploy.export import export_bundle
from lightning_quant.deploy.parity import Parity
from lightning_quant.deploy.push import Push
from lightning_quant.deploy.samples import Samples
from lightning_quant.errors import ConfigurationError, DataError, ExportError
from lightning_quant.report.baseline import write_baseline
from lightning_quant.simulation.calibrate import calibrate
from tests.deploy.compare import runs
from tests.deploy.compare.runs import (
    STRICT,
    Desk,
    copied,
    edit_device,
    edit_encoding,
    edit_graph,
    edit_manifest,
    edit_record,
)
from tests.helpers.networks import Body, Chain, call, images, quantized

HERE = "a desk, desk"
STEM, BRANCH = "network.stem", "network.branch"
RELU = "/network/relu/Relu_output_0"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a Trainer: its bundle, with the record and the report of a device beside it."""
    made = runs.run(tmp_path_factory.mktemp("run") / "export")
    write_baseline(made.parent / "baseline.json", made)
    return made


def compared(old: Path, new: Path, bounds: Any = STRICT) -> Changes:
    """Compare, and look at all that is printed."""
    found = lq.compare(old, new, bounds=bounds)
    assert str(found)
    json.dumps(found.to_dict(), allow_nan=False)
    return found


def grew(part: Part, factor: float) -> Callable[[Path], None]:
    """Make a figure of the device larger."""

    def edit(bundle: Path) -> None:
        def grown(record: Any) -> Any:
            report = record.device[0]
            values: dict[Part, dict[str, Any]] = {
                Part.LATENCY: {"latency_us": [int(factor * one) + 1 for one in report.latency_us]},
                Part.MEMORY: {"memory_bytes": [int(factor * one) for one in report.memory_bytes]},
                Part.SIZE: {"bytes": {**report.bytes, "compiled": int(factor * report.bytes["compiled"])}},
                Part.METRIC: {"metric": {**report.metric, "device": factor * report.metric["device"]}},
            }
            return replace(record, device=[replace(report, **values[part])])

        edit_record(bundle, grown)

    return edit


def classes(**figures: float) -> Callable[[Path], None]:
    found = {"ptq": {"IoU": figures}}
    return lambda bundle: edit_record(bundle, lambda record: replace(record, class_figures=found))


def device(**values: Any) -> Callable[[Path], None]:
    return lambda bundle: edit_device(bundle, **values)


def manifest(**values: Any) -> Callable[[Path], None]:
    return lambda bundle: edit_manifest(bundle, **values)


def graph(edit: Callable[[Any], None], file: str = "net.onnx") -> Callable[[Path], None]:
    return lambda bundle: edit_graph(bundle, edit, file)


def another_layout(bundle: Path) -> None:
    path = bundle / "io.json"
    contract = json.loads(path.read_text())
    contract["inputs"][0]["layout"] = "nhwc"
    path.write_text(json.dumps(contract))
    edit_manifest(bundle)


def wider(bundle: Path) -> None:
    path = bundle / "net.aimet/model.encodings"
    (entry,) = (one for one in json.loads(path.read_text())["activation_encodings"] if one["name"] == RELU)
    edit_encoding(bundle, RELU, scale=[1.05 * entry["scale"][0]], offset=[entry["offset"][0] + 1])


FLOATS = "net.aimet/model.onnx"
ON_CPU = {"NPU": ["/head/Gemm"], "GPU": [], "CPU": ["/stem/Conv"]}
WORSE = Parity(20.0, 1.0, 1.0, 4)
REGRESSIONS: dict[str, tuple[Callable[[Path], None], Part, str]] = {
    "a bias is dropped": (graph(runs.without_bias), Part.PARAMETERS_LOST, f"{STEM}.bias"),
    "a bias is 0": (graph(runs.zero(f"{BRANCH}.bias_q")), Part.PARAMETERS_LOST, f"{BRANCH}.bias"),
    "a bias is 0 for AI Hub": (graph(runs.zero(f"{BRANCH}.bias"), FLOATS), Part.PARAMETERS_LOST, f"{BRANCH}.bias"),
    "an encoding for AI Hub": (wider, Part.ENCODINGS, RELU),
    "a scale": (graph(runs.scaled(f"{RELU}_scale")), Part.ENCODINGS, RELU),
    "a scale of a channel": (graph(runs.one_more(f"{STEM}.weight_scale")), Part.ENCODINGS, f"{STEM}.weight"),
    "a zero point": (graph(runs.one_more("x_zero_point")), Part.ENCODINGS, "x"),
    "a weight": (graph(runs.one_more(f"{STEM}.weight_q")), Part.WEIGHTS, f"{STEM}.weight"),
    "a weight for AI Hub": (graph(runs.one_more(f"{STEM}.weight"), FLOATS), Part.WEIGHTS, f"{STEM}.weight"),
    "padding": (graph(runs.padded), Part.OPERATIONS, "/network/stem/Conv"),
    "a class": (classes(road=0.9, pole=0.37), Part.CLASS, "IoU of pole"),
    "a class is gone": (classes(road=0.9), Part.CLASS, "IoU of pole"),
    "the metric on the device": (grew(Part.METRIC, 1.02), Part.METRIC, HERE),
    "a layer on the CPU": (device(layers=ON_CPU), Part.LAYERS_CPU, "/stem/Conv"),
    "a layer in float": (device(float_islands=["/head/Gemm"]), Part.LAYERS_FLOAT, "/head/Gemm"),
    "a slower device": (grew(Part.LATENCY, 1.2), Part.LATENCY, HERE),
    "more memory": (grew(Part.MEMORY, 1.2), Part.MEMORY, HERE),
    "a larger file": (graph(runs.larger), Part.SIZE, "quantized ONNX file"),
    "a larger binary": (grew(Part.SIZE, 1.05), Part.SIZE, f"compiled, {HERE}"),
    "another AIMET": (manifest(aimet_torch="2.43.0"), Part.VERSIONS, "aimet-torch"),
    "another compiler": (device(versions={"QAIRT": "2.52.0"}), Part.VERSIONS, f"QAIRT ({HERE})"),
    "another estimator": (manifest(range_estimator="percentile"), Part.RECIPE, "range estimator"),
    "other float weights": (manifest(float_sha256="0" * 64), Part.FLOAT_WEIGHTS, "sha256"),
    "another layout": (another_layout, Part.IO, "x: layout"),
    "the file's agreement": (manifest(parity=WORSE.to_dict()), Part.PARITY, "ONNX file with simulation"),
    "the device's agreement": (device(against_float=WORSE), Part.PSNR, f"{HERE}, with float"),
    "another class": (
        device(against_simulation=replace(WORSE, psnr_db=300.0, argmax_agreement=0.9)),
        Part.AGREEMENT,
        f"{HERE}, with simulation",
    ),
}


@pytest.mark.parametrize("before", ["bundle", "baseline"])
@pytest.mark.parametrize("name", REGRESSIONS)
def test_a_regression_is_named_and_nothing_else(bundle: Path, tmp_path: Path, name: str, before: str) -> None:
    worsen, part, what = REGRESSIONS[name]
    new = copied(bundle, tmp_path / "export")
    worsen(new)
    found = compared(bundle if before == "bundle" else bundle.parent / "baseline.json", new)
    assert [(one.bound.part, one.names) for one in found.exceeded] == [(part, (what,))], str(found)
    assert f"✗ {part.value}" in str(found)
    assert what in str(found)
    if before == "bundle":  # what is better is no regression; what is to stay may not change back either
        rules = (Part.ENCODINGS, Part.WEIGHTS, Part.OPERATIONS, Part.VERSIONS, Part.RECIPE, Part.FLOAT_WEIGHTS, Part.IO)
        assert {one.bound.part for one in compared(new, bundle).exceeded} <= {*rules}


def test_of_classes_there_is_no_psnr(bundle: Path, tmp_path: Path) -> None:
    same = Parity(float("inf"), 1.0, 1.0, 4)
    old, new = copied(bundle, tmp_path / "old"), copied(bundle, tmp_path / "new")
    edit_device(old, against_simulation=same)
    edit_device(new, against_simulation=replace(same, argmax_agreement=0.9))
    (found,) = compared(old, new).exceeded
    assert (found.bound.part, found.names) == (Part.AGREEMENT, (f"{HERE}, with simulation",))
    shown = [one.name for one in compared(old, new).figures if one.part is Part.PSNR]
    assert shown == [f"{HERE}, with float"]


def test_how_far_a_grid_moved_is_known_from_a_baseline(bundle: Path, tmp_path: Path) -> None:
    new = copied(bundle, tmp_path / "export")
    wider(new)
    for old in (bundle, bundle.parent / "baseline.json"):
        (change,) = compared(old, new).encodings
        assert change.ratio == pytest.approx((1.05, 1.05))
        assert (change.offset, change.channels, change.graphs) == ((1, 1), 1, ("aimet",))
    edit_graph(new, runs.scaled(f"{RELU}_scale"))
    edit_encoding(new, RELU, offset=[0])
    (change,) = compared(bundle, new).encodings
    assert change.graphs == ("aimet", "qdq")  # the same in both is one change


def test_how_much_a_weight_changed(bundle: Path, tmp_path: Path) -> None:
    new = copied(bundle, tmp_path / "export")
    edit_graph(new, runs.one_more(f"{STEM}.weight_q"))
    (change,) = compared(bundle, new).weights
    assert (change.share, change.steps) == (1 / (6 * 3 * 3 * 3), 1)
    assert "0.617 % of the values, by up to 1 steps" in str(compared(bundle, new))
    (change,) = compared(bundle.parent / "baseline.json", new).weights
    assert change.share is None
    assert "the mean moved by" in str(compared(bundle.parent / "baseline.json", new))


def test_a_change_that_something_explains_is_shown_and_allowed_by_default(bundle: Path, tmp_path: Path) -> None:
    new = copied(bundle, tmp_path / "export")
    wider(new)
    (found,) = compared(bundle, new, None).exceeded
    assert found.bound == DEFAULTS[Part.ENCODINGS]
    edit_manifest(new, aimet_torch="2.43.0")
    changes = compared(bundle, new, None)
    assert changes.within_bounds
    assert len(changes.encodings) == 1
    said = str(changes)
    assert "can come from other versions, or from other data" in said
    assert said.index("2.43.0") < said.index(RELU)  # versions first
    edit_graph(new, runs.without_bias)  # a lost bias is none of the changes that another version explains
    assert [one.bound.part for one in compared(bundle, new, None).exceeded] == [Part.PARAMETERS_LOST]


def test_a_trained_network_has_other_weights(bundle: Path, tmp_path: Path) -> None:
    new, old = copied(bundle, tmp_path / "new"), copied(bundle, tmp_path / "old")
    edit_graph(new, runs.one_more(f"{STEM}.weight_q"))
    for one in (old, new):
        edit_record(one, lambda record: replace(record, metric={**record.metric, "qat": 1.0}, exported="qat"))
    assert compared(old, new, None).within_bounds
    assert not compared(old, new).within_bounds


def test_versions_and_files_tell_where_a_difference_comes_from(bundle: Path, tmp_path: Path) -> None:
    new = copied(bundle, tmp_path / "export")
    edit_device(new, versions={"QAIRT": "2.52.0"}, latency_us=[10**6])
    found = compared(bundle, new, None)
    assert (found.known.files, found.known.device_versions) == (True, False)
    assert "same to the bit. What differs on a device comes from the device, its tools or its samples" in str(found)
    assert [one.bound.part for one in found.exceeded] == [Part.LATENCY]


def test_what_is_not_measured_any_more_fails(bundle: Path, tmp_path: Path) -> None:
    new = copied(bundle, tmp_path / "export")
    edit_record(new, lambda record: replace(record, device=[]))
    found = compared(bundle, new, {"latency": "+5 %", "size": "+2 %"})
    assert [(one.bound.part, one.missing) for one in found.exceeded] == [(Part.LATENCY, True), (Part.SIZE, True)]
    assert "latency: not measured any more: a desk, desk" in str(found)
    unbounded = compared(bundle, new, {"weights": "unchanged"})
    assert unbounded.within_bounds
    assert "not measured any more" in str(unbounded)
    again = compared(new, new, {"latency": "+5 %"})
    assert (again.within_bounds, again.unchecked) == (True, (Part.LATENCY,))
    assert "Not checked, since neither has a figure: latency" in str(again)


def test_a_device_that_failed_fails(bundle: Path, tmp_path: Path) -> None:
    new = copied(bundle, tmp_path / "export")
    edit_device(new, status="failed", latency_us=[], memory_bytes=None, layers=None, metric={}, error="no such chip")
    found = compared(bundle, new, None)
    assert found.unfinished == {HERE: "failed"}
    assert {one.bound.part for one in found.exceeded} == {Part.METRIC, Part.LATENCY, Part.MEMORY, Part.LAYERS_CPU}


def test_more_of_the_metric_is_better_or_worse_as_the_record_says(bundle: Path, tmp_path: Path) -> None:
    old, new = copied(bundle, tmp_path / "old"), copied(bundle, tmp_path / "new")
    edit_record(new, lambda record: replace(record, metric={**record.metric, "ptq": record.metric["ptq"] + 0.01}))
    assert [one.names for one in compared(bundle, new).exceeded] == [("simulation",)]
    for one in (old, new):
        edit_record(one, lambda record: replace(record, mode="max", ladder=None))
    assert compared(old, new).within_bounds
    assert not compared(new, old).within_bounds
    assert compared(new, old, {"metric": "-1 pt"}).within_bounds  # a bound that is just met
    assert not compared(new, old, {"metric": "-0.0099"}).within_bounds


def test_a_bundle_alone_has_its_devices_beside_it(bundle: Path, tmp_path: Path) -> None:
    new = copied(bundle, tmp_path / "export")
    (new.with_name("net.report") / "results.json").unlink()
    found = compared(bundle, new, {"latency": "+1 %", "metric": "-0.5 pt"})
    assert [(one.bound.part, one.names) for one in found.exceeded] == [(Part.METRIC, ("simulation",))]
    path = new.with_name("net.device") / "desk/report.json"
    report = replace(DeviceReport.read(path), monitor=None, mode=None)  # as earlier versions wrote it
    report.write(path)
    baseline = write_baseline(tmp_path / "alone.json", new)
    for factor in (0.9, 1.1):  # which of them is worse is known from nowhere
        replace(report, metric={"device": factor * report.metric["device"]}).write(path)
        assert [one.names for one in compared(baseline, new, {"metric": "-5 %"}).exceeded] == [(HERE,)]
    edit = new.with_name("net.device") / "request.json"
    request = json.loads(edit.read_text())
    request["bundle"]["net.onnx"]["sha256"] = "0" * 64
    edit.write_text(json.dumps(request))
    with pytest.raises(DataError, match="is of an earlier export of"):
        compared(bundle, new)
    edit.unlink()
    with pytest.raises(DataError, match=r"request\.json cannot be read"):
        compared(bundle, new)


def test_a_record_of_another_export_is_refused(bundle: Path, tmp_path: Path) -> None:
    new = copied(bundle, tmp_path / "export")
    record = (new.with_name("net.report") / "results.json").read_text()
    edit_graph(new, runs.one_more(f"{STEM}.weight_q"))  # sizes and agreement are what they were
    (new.with_name("net.report") / "results.json").write_text(record)
    with pytest.raises(DataError, match="is of another export"):
        compared(bundle, new)


def exported(folder: Path, seed: int) -> Path:
    """Quantize, calibrate with the same images in another order, export and time."""
    network = quantized(Body()).eval()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    calibrate(network, [call(images(8)[part]) for part in order.split([3, 5] if seed % 2 else [8])])
    calls = [call(images(1, seed=9))]
    made = export_bundle(network, folder / "net", calls)
    Push(Desk(), [], 60.0, {}).run(made, Samples.of(network, made.manifest, calls))
    return made.path


@pytest.mark.slow
def test_equal_runs_raise_nothing(bundle: Path, tmp_path: Path) -> None:
    made = [exported(tmp_path / str(seed), seed) for seed in range(5)]
    kept = [write_baseline(tmp_path / f"{number}.json", one) for number, one in enumerate(made)]
    # not latency: the machine that is timed does other work as well
    bounds = {part: most for part, most in STRICT.items() if part != "latency"}
    pairs = [pair for sides in ((made, made), (kept, made), (made, kept)) for pair in itertools.product(*sides)]
    different = [(old, new) for old, new in pairs if old != new]
    assert len(different) > 50
    for old, new in different:
        found = compared(old, new, bounds)
        assert found.within_bounds, str(found)
        assert found.known.files
        assert [*found.stated, *found.layers, *found.operations, *found.encodings, *found.weights] == []
        assert {one.part for one in found.figures if one.old != one.new} <= {Part.LATENCY}
    again = runs.run(tmp_path / "again/export")
    for old in (bundle, bundle.parent / "baseline.json", bundle.parent):
        found = compared(old, again, bounds)
        assert found.within_bounds, str(found)


def test_other_networks_are_refused_by_name(bundle: Path, tmp_path: Path) -> None:
    others: dict[str, tuple[Any, str]] = {
        "body": (Body(), r"the outputs are output \[1, 4\] and output \[1, 4, 8, 8\]"),
        "chain": (Chain(), "the outputs are"),
    }
    made = {}
    for name, (network, why) in others.items():
        one = quantized(network).eval()
        calibrate(one, [call(images(8))])
        made[name] = export_bundle(one, tmp_path / name, [call(images(1))]).path
        with pytest.raises(ConfigurationError, match=rf"net and {name} are different networks: {why}"):
            compared(bundle, made[name])
    with pytest.raises(ConfigurationError, match=r"only one of them has 'network\.conv\.weight'"):
        compared(made["body"], made["chain"])


def test_another_metric_is_refused(bundle: Path, tmp_path: Path) -> None:
    new = copied(bundle, tmp_path / "export")
    edit_record(new, lambda record: replace(record, monitor="val_acc"))
    with pytest.raises(ConfigurationError, match=r"was measured by 'val_loss' \(min\) and net by 'val_acc' \(min\)"):
        compared(bundle, new)


def test_another_metric_of_a_device_is_refused(bundle: Path, tmp_path: Path) -> None:
    new = copied(bundle, tmp_path / "export")
    edit_device(new, monitor="val_acc", mode="max")
    with pytest.raises(ConfigurationError, match=r"was measured by 'val_loss' \(min\) and net by 'val_acc' \(max\)"):
        compared(bundle, new)


@pytest.mark.parametrize("factor", [0.5, 2])
def test_a_device_says_which_metric_is_better_where_no_record_does(bundle: Path, tmp_path: Path, factor: float) -> None:
    old, new = copied(bundle, tmp_path / "old"), copied(bundle, tmp_path / "new")
    for one in (old, new):
        shutil.rmtree(one.with_name("net.report"))
    (path,) = new.parent.rglob("report.json")
    report = DeviceReport.read(path)
    report.metric["device"] *= factor
    report.write(path)
    (figure,) = [one for one in compared(old, new).figures if one.part is Part.METRIC]
    assert figure.worse is not None
    assert (figure.worse > 0) == (factor > 1)


def test_what_is_nothing_to_compare(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="none does not exist"):
        compared(bundle, tmp_path / "none")
    with pytest.raises(ConfigurationError, match="has nothing to compare"):
        compared(bundle, tmp_path)
    copied(bundle, tmp_path / "export")
    copied(bundle, tmp_path / "other")
    (tmp_path / "other/net").rename(tmp_path / "export/second")
    with pytest.raises(ConfigurationError, match="has 2 bundles: net, second"):
        compared(bundle, tmp_path / "export")


def test_a_baseline_is_small_and_comes_back_the_same(bundle: Path, tmp_path: Path) -> None:
    path = bundle.parent / "baseline.json"
    snapshot = Snapshot.read(path)
    assert snapshot.write(tmp_path / "again.json").read_text() == path.read_text()
    assert path.stat().st_size < 2 * (bundle / "net.onnx").stat().st_size
    assert str(bundle.parent) not in path.read_text()
    assert any('"network.stem.weight": {' in line for line in path.read_text().splitlines())  # one line each, for git


def test_a_damaged_baseline_is_refused(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    genuine = json.loads((bundle.parent / "baseline.json").read_text())
    grid = genuine["graphs"]["qdq"]["encodings"]["x"]
    attacks: dict[str, tuple[Any, str]] = {
        "{": ("{", "Expecting"),
        "version": ({**genuine, "format_version": 2}, "format_version=2"),
        "graphs": ({**genuine, "graphs": {}}, "expected aimet and qdq"),
        "name": ({**genuine, "name": 3}, "name is 3, expected text"),
        "more": ({**genuine, "more": 3}, "no such field"),
    }
    for value, why in ((0, "expected 1 to 32"), ("x", "expected a whole number")):
        changed = json.loads(json.dumps(genuine))
        changed["graphs"]["qdq"]["encodings"]["x"] = {**grid, "bits": value}
        attacks[f"bits {value}"] = (changed, why)
    for content, why in attacks.values():
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(DataError, match=rf"baseline\.json is not a baseline: .*{why}"):
            compared(path, bundle)


def test_a_damaged_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    for name in ("net.onnx", "net.aimet/model.onnx", "net.aimet/model.encodings"):
        new = copied(bundle, tmp_path / name.replace("/", "-"))
        (new / name).write_bytes(b"\xff" * 64)
        edit_manifest(new)
        with pytest.raises(ExportError, match="cannot be compared"):
            compared(bundle, new)


@pytest.mark.parametrize("text", ["-0.5 pt", "-2 %", "-0.01"])
def test_a_bound_is_written_as_it_is_read(text: str) -> None:
    assert str(Bound.parse("metric", text)) == text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("metrics: -1 pt", "Unknown bound 'metrics': expected one of versions, recipe"),
        ("metric: +1 pt", r"The bound metric: '\+1 pt' cannot be read: expected '-0.5 pt'"),
        ("metric: 1 pt", "expected '-0.5 pt' or '-5 %' or '-0.01'"),
        ("latency: -5 %", r"expected '\+5 %'"),
        ("latency: +5 ms", r"expected '\+5 %'"),
        ("psnr: -3", "expected '-3 dB'"),
        ("layers_cpu: 0.5", "expected a whole number such as '0'"),
        ("layers_cpu: -1", "expected a whole number"),
        ("encodings: same", "expected 'unchanged' or 'explained'"),
        ("operations: explained", "expected 'unchanged'"),
        ("metric: .nan", "cannot be read"),
        ("metric: -1e999 pt", "cannot be read"),
        ("size: +2 %\nsize: +3 %", "have 'size' twice"),
        ("size: [1]", "it is not a list of names and bounds"),
        ("- size", "it is not a list of names and bounds"),
        ("", "it is empty"),
        ("a: &a [*a]", "it is not a list of names and bounds"),
        ("size: +2 %\n---\nsize: +3 %", "it is not a list of names and bounds"),
        ("size: {", "cannot be read"),
        ("a: " + "[" * 3000, "cannot be read"),
        ("#" * 70_000, "more than 64 kB"),
    ],
)
def test_bounds_are_read_strictly(bundle: Path, tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "bounds.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=why):
        compared(bundle, bundle, path)


def test_a_file_of_bounds_replaces_the_defaults(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "bounds.yaml"
    path.write_text("size: +2 %  # of the files\nlayers_cpu: 0\nmetric: -0.5 pt\n")
    found = compared(bundle, bundle, path)
    assert [str(one) for one in found.bounds] == ["+2 %", "0", "-0.5 pt"]
    with pytest.raises(ConfigurationError, match="there is no such file"):
        compared(bundle, bundle, tmp_path / "none.yaml")
    assert How.LOST.value == "lost"
