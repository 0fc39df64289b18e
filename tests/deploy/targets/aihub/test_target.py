"""The way to AI Hub: the real client over HTTP, a stand-in at the far end, everything that can go wrong on the way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
from filelock import FileLock
from lightning.pytorch import Trainer

import lightning_quant as lq
from lightning_quant.deploy.bundle import Bundle, load_bundle
from lightning_quant.deploy.device_report import DeviceReport
from lightning_quant.deploy.export import export_bundle
from lightning_quant.deploy.push import Push, check_bounds, device_folder, resume
from lightning_quant.deploy.samples import Samples
from lightning_quant.deploy.targets.aihub.target import RUNTIMES, AiHubTarget
from lightning_quant.deploy.targets.target import Measured
from lightning_quant.errors import (
    ConfigurationError,
    DataError,
    DeviceBoundError,
    DeviceError,
    DeviceTimeoutError,
    DeviceUnavailableError,
    LightningQuantError,
)
from lightning_quant.precision import Precision
from lightning_quant.report.record import RunRecord
from lightning_quant.simulation.calibrate import calibrate
from tests.aihub import faults
from tests.aihub.standin import StandIn
from tests.deploy.targets.aihub.conftest import TOKEN
from tests.helpers.networks import Body, call, images, quantized
from tests.helpers.small import SmallModule, small_loader

pytestmark = pytest.mark.slow

MakeTrainer = Callable[..., Trainer]

S24 = "Samsung Galaxy S24"


def samples_and_bundle(path: Path, precision: str = "w8a8", **recipe: Any) -> tuple[Bundle, Samples]:
    network = quantized(Body(), precision=precision, **recipe).eval()
    calibrate(network, [call(images(8))])
    calls = [call(images(1, seed=seed)) for seed in (1, 2, 3)]
    bundle = export_bundle(network, path, calls)
    return bundle, Samples.of(network, bundle.manifest, calls)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Samples]:
    return samples_and_bundle(tmp_path_factory.mktemp("made") / "net")


@pytest.fixture
def exported(made: tuple[Bundle, Samples], tmp_path: Path) -> tuple[Bundle, Samples]:
    """A bundle of the test's own, as exported."""
    path = tmp_path / "out" / "net"
    shutil.copytree(made[0].path, path)
    return load_bundle(path), made[1]


def push(
    exported: tuple[Bundle, Samples], devices: Any = (S24,), timeout: float = 120, **options: Any
) -> list[Measured]:
    options = {"compare_float": False, "patience": 2.0, "poll_seconds": 0.1, **options}
    return Push("aihub", list(devices), timeout, options).run(*exported)


def journal_of(exported: tuple[Bundle, Samples]) -> dict[str, Any]:
    path = device_folder(exported[0]) / "aihub" / "journal.json"
    return json.loads(path.read_text())["entries"] if path.is_file() else {}


def everything_written(folder: Path) -> bytes:
    files = (file for file in folder.rglob("*") if file.is_file() and "secret" not in file.parts)
    return b"".join(file.read_bytes() for file in files if "hub" not in file.relative_to(folder).parts[:1])


@pytest.mark.parametrize("runtime", list(RUNTIMES))
def test_every_runtime(hub: StandIn, exported: Any, runtime: str) -> None:
    (one,) = push(exported, runtimes=[runtime])
    report = one.report
    assert (report.tier, report.status, report.device, report.runtime) == ("aihub", "finished", S24, runtime)
    assert report.soc == "SM8650"
    assert report.versions["QAIRT"]
    assert report.latency_us == [1865, 509, 482, 415, 417, 412, 416, 413, 412, 416]
    assert report.median_latency_us == 416
    assert report.load_us == {"first": 250311, "warm": 90114}
    assert report.memory_bytes == [12582912, 181403648]
    assert report.layers is not None
    assert (len(report.layers["NPU"]), len(report.layers["CPU"])) == (5, 2)
    assert report.float_islands is None
    compiled = one.folder / report.artifacts["compiled"]
    assert compiled.stat().st_size == report.bytes["compiled"]
    assert report.against_simulation is not None
    assert report.against_simulation.psnr_db > 40
    assert report.against_float is not None
    assert report.against_float.psnr_db > 25
    assert set(report.jobs) == {"compile", "inference"}
    assert DeviceReport.read(one.folder / "report.json") == report
    assert hub.duplicates() == []
    options = [json.dumps(str(job)) for job in hub.jobs("compile")]
    assert len(options) == 1


@pytest.mark.parametrize(("precision", "source"), [("w8a16", "aimet"), ("w4a16", "qdq")])
def test_other_precisions_and_the_qdq_file(hub: StandIn, tmp_path: Path, precision: str, source: str) -> None:
    (one,) = push(samples_and_bundle(tmp_path / "out" / "net", precision), source=source)
    assert one.report.against_simulation is not None
    assert one.report.against_simulation.psnr_db > 60


def test_outputs_in_float_and_in_another_layout(hub: StandIn, exported: Any, tmp_path: Path) -> None:
    bundle, samples = exported
    (name,) = bundle.manifest.output_names
    (given,) = bundle.manifest.input_names
    layout = f"--force_channel_last_output {name} --force_channel_last_input {given}"
    (plain,) = push(exported)
    (moved,) = push(exported, options=layout)
    for a, b in zip(plain.outputs, moved.outputs, strict=True):
        assert a[name].shape == b[name].shape == samples.simulation[0][name].shape
        np.testing.assert_array_equal(a[name], b[name])


def test_quantized_against_float_on_the_device(hub: StandIn, exported: Any) -> None:
    (one,) = push(exported, compare_float=True)
    assert one.report.float_latency_us == one.report.latency_us
    assert one.report.speedup == 1
    assert {"float compile", "float inference"} <= one.report.jobs.keys()
    assert "1.0 times as fast as float" in one.report.sentence()


def test_the_float_network_of_a_sweep_is_uploaded_once(hub: StandIn, tmp_path: Path) -> None:
    """Its weights are others for each precision, which AI Hub does not measure."""
    bundles = [samples_and_bundle(tmp_path / precision / "net", precision) for precision in ("w8a8", "w8a16", "w4a16")]
    floats = {exported[0].manifest.files["net.aimet/model.onnx"].sha256 for exported in bundles}
    assert len(floats) > 1
    with ThreadPoolExecutor(len(bundles)) as pool:  # a process each, at the same time
        found = list(pool.map(lambda exported: push(exported, compare_float=True), bundles))
    assert all(one.report.speedup == 1 for (one,) in found)
    assert len(hub.posts("models")) == len(bundles) + 1
    assert not [what for what in hub.duplicates() if what.startswith("model")]


def test_a_model_that_waits_too_long_for_another_process(
    hub: StandIn, exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.inject(faults.late(3), faults.CREATE_MODEL)
    other = (load_bundle(exported[0].path), exported[1])
    copied = tmp_path / "other" / "net"
    shutil.copytree(other[0].path, copied)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(push, exported)
        while not hub.posts("models"):
            time.sleep(0.05)
        with pytest.raises(DeviceTimeoutError, match="another process was still uploading model-"):
            push((load_bundle(copied), exported[1]), timeout=0.5)
        assert first.result()[0].report.status == "finished"
    assert len(hub.posts("models")) == 1


def test_several_devices_of_which_one_fails(hub: StandIn, exported: Any) -> None:
    hub.inject(faults.fail("No free device."), faults.CREATE_INFERENCE_JOB, times=1)
    first, second = push(exported, devices=[S24, "Samsung Galaxy S23"])
    assert (first.report.status, second.report.status) == ("failed", "finished")
    assert first.report.error is not None
    assert "No free device." in first.report.error
    assert first.report.jobs.keys() == {"compile", "inference"}
    assert first.report.to_dict().keys().isdisjoint({"latency_us", "against_simulation"})
    assert len(hub.posts("models")) == 1
    # run again, only what failed is done again
    before = hub.posts("jobs")
    again, _ = push(exported, devices=[S24, "Samsung Galaxy S23"])
    assert again.report.status == "finished"
    assert len(hub.posts("jobs")) == len(before) + 1
    assert hub.duplicates() == []


def test_a_compile_job_that_fails(hub: StandIn, exported: Any) -> None:
    hub.inject(faults.fail("Layer Foo is not supported."), faults.CREATE_COMPILE_JOB)
    with pytest.raises(
        DeviceError, match=r"the compile job for Samsung Galaxy S24 failed: Layer Foo is not supported\."
    ):
        push(exported)
    assert hub.jobs("inference") == []
    assert push(exported)[0].report.status == "finished"


def test_submit_now_and_fetch_later(hub: StandIn, exported: Any) -> None:
    hub.hold()
    (one,) = push(exported, wait=False)
    assert (one.report.status, one.outputs) == ("pending", [])
    assert "pending" in one.report.sentence()
    hub.release()
    (one,) = resume(exported[0].path)
    assert one.report.status == "finished"
    assert hub.duplicates() == []


def test_the_command_line_fetches_what_was_queued(hub: StandIn, tmp_path: Path) -> None:
    run = tmp_path / "run"
    exported = samples_and_bundle(run / "export" / "net")
    hub.hold()
    push(exported, wait=False)
    record = RunRecord(
        "finished", "net", "scenes", Precision(8, 8), "0", metric={"float": 0.7, "ptq": 0.69}, exported="ptq"
    )
    record.write(run)
    of_callback = run / "export" / "net.report"
    record.write(of_callback)
    hub.release()
    done = subprocess.run(
        [sys.executable, "-m", "lightning_quant", "resume", str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "net: w8a8 on Samsung Galaxy S24 (aihub): 0.42 ms" in done.stdout
    (report,) = RunRecord.read(run / "results.json").device
    assert report.median_latency_us == 416
    assert RunRecord.read(of_callback / "results.json").device == [report]
    assert all("0.42 ms" in (place / "report.html").read_text() for place in (run, of_callback))
    # finished: neither asked for again nor written over; found by the bundle's own folder as well
    record = RunRecord.read(run / "results.json")
    record.device[0].metric = {"device": 0.5}
    record.write(run)
    requests = len(hub.requests())
    bundle_folder = str(run / "export" / "net")
    done = subprocess.run(
        [sys.executable, "-m", "lightning_quant", "resume", bundle_folder], capture_output=True, text=True, check=True
    )
    assert "net: finished already" in done.stdout
    assert len(hub.requests()) == requests
    assert RunRecord.read(run / "results.json").device[0].metric == {"device": 0.5}
    nothing = subprocess.run(
        [sys.executable, "-m", "lightning_quant", "resume", str(hub._store.folder)], capture_output=True, text=True
    )
    assert (nothing.returncode, "was sent to a device" in nothing.stderr) == (1, True)


def test_samples_of_another_export_are_not_compared(hub: StandIn, exported: Any) -> None:
    push(exported)
    bundle = exported[0]
    request = device_folder(bundle) / "request.json"
    values = json.loads(request.read_text())
    values["bundle"][next(iter(values["bundle"]))]["sha256"] = "0" * 64
    request.write_text(json.dumps(values))
    with pytest.raises(DataError, match="was exported again after it was sent to aihub"):
        resume(bundle.path)


@pytest.mark.parametrize("content", [pytest.param(b"", marks=pytest.mark.torture), b"PK\x03\x04 cut"])
def test_one_damaged_bundle_does_not_keep_the_others(hub: StandIn, tmp_path: Path, content: bytes) -> None:
    hub.hold()
    for name in ("a", "b"):
        push(samples_and_bundle(tmp_path / "run" / "export" / name), wait=False)
    (tmp_path / "run/export/a.device/samples.npz").write_bytes(content)
    hub.release()
    done = subprocess.run(
        [sys.executable, "-m", "lightning_quant", "resume", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "samples.npz holds no samples" in done.stderr
    assert "b: w8a8 on Samsung Galaxy S24 (aihub)" in done.stdout


def test_killed_after_every_step_of_the_journal(hub: StandIn, exported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILL_WORKER", "after:1")  # each run gets one step further
    seen: list[dict[str, Any]] = []
    while True:
        known = journal_of(exported)
        try:
            (one,) = push(exported)
            break
        except DeviceError:
            assert journal_of(exported) != known  # killed, a step further
            seen.append(journal_of(exported))
    assert one.report.status == "finished"
    assert len(seen) >= 10
    assert hub.duplicates() == []
    assert len(hub.posts("models")) == len(hub.posts("datasets")) == 1
    assert len(hub.posts("jobs")) == 2


def test_killed_between_what_the_service_made_and_the_journal(
    hub: StandIn, exported: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for what in ("model", "compile", "inputs", "inference"):
        monkeypatch.setenv("KILL_WORKER", f"made:{what}")
        with pytest.raises(DeviceError, match="SIGKILL"):
            push(exported)
        entry = next(entry for key, entry in journal_of(exported).items() if key.startswith(what))
        assert entry["state"] == "asked"
    monkeypatch.delenv("KILL_WORKER")
    assert push(exported)[0].report.status == "finished"
    assert hub.duplicates() == []
    assert (len(hub.posts("models")), len(hub.posts("datasets")), len(hub.posts("jobs"))) == (1, 1, 2)


@pytest.mark.parametrize("where", ["UPLOAD_MODEL", "UPLOAD_DATASET"])
def test_an_upload_that_was_cut_is_finished_not_begun_again(hub: StandIn, exported: Any, where: str) -> None:
    hub.inject(faults.cut(), getattr(faults, where), times=None)
    with pytest.raises(DeviceUnavailableError):
        push(exported)
    hub.clear_faults()
    assert push(exported)[0].report.status == "finished"
    assert hub.duplicates() == []


# Rows of the table of faults: what happens, to which requests, how often, and what becomes of the push.
FINISHED: tuple[type[LightningQuantError], ...] = ()
ROWS: dict[str, tuple[faults.Fault, str, int | None, tuple[type[LightningQuantError], ...]]] = {
    "401": (faults.answer(401), faults.ANY_API, None, (DeviceError,)),
    "401 while waiting": (faults.answer(401), faults.POLL, None, (DeviceError,)),
    "400": (faults.answer(400, "Options are wrong."), faults.CREATE_COMPILE_JOB, None, (DeviceError,)),
    "403": (faults.answer(403), faults.CREATE_MODEL, None, (DeviceError,)),
    "404": (faults.answer(404), faults.POLL, None, (DeviceError,)),
    "413": (faults.answer(413), faults.CREATE_MODEL, None, (DeviceError,)),
    "422": (faults.answer(422), faults.CREATE_COMPILE_JOB, None, (DeviceError,)),
    "426": (faults.answer(426), faults.DEVICES, None, (DeviceError,)),
    "429 of a GET": (faults.answer(429), faults.DEVICES, 1, FINISHED),
    "429 of a job": (faults.answer(429), faults.CREATE_COMPILE_JOB, 2, FINISHED),
    "429 of a run, always": (faults.answer(429), faults.CREATE_INFERENCE_JOB, None, (DeviceUnavailableError,)),
    "500 of a GET": (faults.answer(500), faults.POLL, None, (DeviceUnavailableError,)),
    "503 of a POST": (faults.answer(503), faults.CREATE_COMPILE_JOB, None, (DeviceUnavailableError,)),
    "502 in between": (faults.answer(502), faults.POLL, 2, FINISHED),
    "reply lost, model": (faults.lose_reply(), faults.CREATE_MODEL, 1, FINISHED),
    "reply lost, inputs": (faults.lose_reply(), faults.CREATE_DATASET, 1, FINISHED),
    "reply lost, compile job": (faults.lose_reply(), faults.CREATE_COMPILE_JOB, 1, FINISHED),
    "reply lost, run": (faults.lose_reply(), faults.CREATE_INFERENCE_JOB, 1, FINISHED),
    "reply late": (faults.late(6), faults.CREATE_COMPILE_JOB, 1, FINISHED),
    "hung GET": (faults.hang(), faults.DEVICES, None, (DeviceUnavailableError,)),
    "hung POST": (faults.hang(), faults.CREATE_COMPILE_JOB, None, (DeviceUnavailableError,)),
    "upload cut once": (faults.cut(), faults.UPLOAD_MODEL, 1, FINISHED),
    "upload stalled once": (faults.hang(), faults.UPLOAD_MODEL, 1, FINISHED),
    "storage answers late": (faults.late(2), faults.UPLOAD_MODEL, 1, FINISHED),
    "storage refuses": (faults.answer(403), faults.UPLOAD_MODEL, None, (DeviceError,)),
    "no ETag": (faults.no_etag(), faults.UPLOAD_MODEL, 1, FINISHED),
    "download truncated": (faults.truncate(), faults.DOWNLOAD_MODEL, None, (DeviceUnavailableError,)),
    "garbage": (faults.garbage(), faults.POLL, 1, FINISHED),
    "garbage, always": (faults.garbage(), faults.POLL, None, (DeviceUnavailableError,)),
    "a web page": (faults.html(), faults.DEVICES, None, (DeviceUnavailableError,)),
    "empty answer": (faults.empty(), faults.CREATE_COMPILE_JOB, 1, FINISHED),
    "a status in the answer": (faults.status(), faults.CREATE_MODEL, 1, FINISHED),
    "stuck": (faults.stuck(), faults.CREATE_INFERENCE_JOB, 1, (DeviceTimeoutError,)),
}


# Answered like another row: as an error of the request, an outage that lasts, or one that passes.
ALIKE = {
    "401 while waiting",
    "403",
    "400",
    "404",
    "413",
    "422",
    "429 of a GET",
    "429 of a run, always",
    "502 in between",
    "500 of a GET",
    "storage answers late",
    "garbage, always",
    "429 of a job",
    "reply lost, inputs",
    "reply lost, run",
    "upload cut once",
    "hung GET",
    "empty answer",
}


@pytest.mark.parametrize("row", [pytest.param(row, marks=pytest.mark.torture if row in ALIKE else ()) for row in ROWS])
def test_every_fault_ends_well(
    hub: StandIn, exported: Any, row: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORKER_TIMEOUT", "1")
    fault, where, times, expected = ROWS[row]
    number = hub.inject(fault, where, times)
    began = time.monotonic()
    timeout = 10 if row == "stuck" else 120
    if expected:
        with pytest.raises(expected) as raised:
            push(exported, timeout=timeout)
        assert type(raised.value) in expected
        assert raised.value.__cause__ is None
        assert len(str(raised.value)) > 30
        assert TOKEN not in str(raised.value)
    else:
        # what passes is waited for, however slow this machine is
        assert push(exported, timeout=timeout, patience=30.0)[0].report.status == "finished"
    assert hub.fired(number) >= 1
    assert time.monotonic() - began < 90  # a single call of the client can block for minutes
    hub.clear_faults()
    if row == "stuck":
        (job,) = hub.jobs("inference")
        assert journal_of(exported)[job.name.removeprefix("lq-")]["id"] == job.id
    else:  # and once all is well again, the rest is done
        assert push(exported)[0].report.status == "finished"
    assert hub.duplicates() == []
    assert TOKEN.encode() not in everything_written(tmp_path)


def test_a_service_that_goes_down_and_comes_back(hub: StandIn, exported: Any) -> None:
    hub.inject(faults.die(), faults.POLL)
    with pytest.raises(DeviceUnavailableError, match="run again to resume"):
        push(exported)
    with pytest.raises(DeviceUnavailableError, match="cannot be reached"):
        push(exported)
    hub.start()
    assert push(exported)[0].report.status == "finished"
    assert hub.duplicates() == []


def test_records_that_vanished_are_made_again(hub: StandIn, exported: Any) -> None:
    push(exported)
    hub.expire_datasets()
    (job,) = hub.jobs("inference")
    hub.forget(job.id)
    with pytest.raises(DeviceError, match=r"could not be found.*Run again to upload or submit it again"):
        push(exported)
    assert push(exported)[0].report.status == "finished"
    assert (len(hub.posts("models")), len(hub.posts("datasets")), len(hub.posts("jobs"))) == (1, 2, 3)


def test_outputs_that_expired_are_computed_again(hub: StandIn, exported: Any) -> None:
    """After 30 days; the compiled model is still there, the samples are uploaded once more: they expired too."""
    push(exported)
    hub.expire_datasets()
    with pytest.raises(DeviceError, match=r"expired dataset.*Run again to upload or submit it again"):
        push(exported)
    assert len(hub.posts("datasets")) == 1  # what was computed already needs no samples
    assert push(exported)[0].report.status == "finished"
    assert (len(hub.posts("models")), len(hub.posts("datasets")), len(hub.jobs("compile"))) == (1, 2, 1)


def test_a_model_that_was_deleted_is_uploaded_again(hub: StandIn, exported: Any) -> None:
    """By somebody at the service, or another account's: each thing that is gone costs one more run."""
    push(exported)
    for entry in journal_of(exported).values():
        hub.forget(entry["id"])
    runs = 0
    while not (status := _status_or_error(exported)) and runs < 5:
        runs += 1
    assert status == "finished"
    assert len(hub.posts("models")) == 2


def _status_or_error(exported: Any) -> str:
    """How a push ended; nothing where it has to be run again."""
    try:
        return push(exported)[0].report.status
    except DeviceError as error:
        return "" if "Run again to upload or submit it again" in str(error) else str(error)


@pytest.mark.parametrize(("fault", "status"), [(faults.stuck(), "pending"), (faults.answer(400), "failed")])
def test_what_one_device_is_late_with_or_refuses_does_not_cost_the_others(
    hub: StandIn, exported: Any, fault: Any, status: str
) -> None:
    hub.inject(fault, faults.CREATE_INFERENCE_JOB, times=1)
    first, second = push(exported, devices=["Samsung Galaxy S23", S24], timeout=12)
    assert (first.report.status, second.report.status) == (status, "finished")
    assert second.outputs
    assert first.report.error or "was still" in " ".join(first.report.warnings)


def test_devices_are_checked_before_anything_is_uploaded(hub: StandIn, exported: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no device 'Samsung Galaxy S42'.*Samsung Galaxy S2"):
        push(exported, devices=["Samsung Galaxy S42"])
    fine = samples_and_bundle(tmp_path / "fine" / "net", "w8a16")
    with pytest.raises(ConfigurationError, match=r"w8a16 on Google Pixel 3: expected an NPU with 16-bit activations"):
        push(fine, devices=["Google Pixel 3"], runtimes=["tflite"])
    one_layer = samples_and_bundle(tmp_path / "one layer" / "net", overrides={"head": Precision.parse("w8a16")})
    with pytest.raises(ConfigurationError, match=r"w8a8 with head in w8a16 on Google Pixel 3: expected an NPU"):
        push(one_layer, devices=["Google Pixel 3"], runtimes=["tflite"])
    with pytest.raises(
        ConfigurationError, match=r"runtime='qnn_dlc' on Google Pixel 3: it needs qnn, the device offers tflite"
    ):
        push(exported, devices=["Google Pixel 3"])
    assert hub.posts("models") == hub.posts("jobs") == []


def test_arguments_are_checked_at_once() -> None:
    with pytest.raises(ConfigurationError, match=r"Unknown runtime 'qnn'.*qnn_dlc"):
        AiHubTarget([S24], runtimes=["qnn"])
    with pytest.raises(ConfigurationError, match=r"Unknown source 'onnx'"):
        AiHubTarget([S24], source="onnx")
    with pytest.raises(ConfigurationError, match=r"timeout=0: expected seconds"):
        AiHubTarget([S24], timeout=0)
    with pytest.raises(ConfigurationError, match=r"at least one of each"):
        AiHubTarget([])
    with pytest.raises(ConfigurationError, match=r"only aihub takes several"):
        Push("htp_emulator", [S24, S24], 10, {})


def test_a_bundle_that_was_changed_is_not_uploaded(hub: StandIn, exported: Any) -> None:
    exported[0].qdq.write_bytes(b"")
    with pytest.raises(LightningQuantError, match="was changed since the export"):
        push(exported)
    assert hub.requests() == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"[api]\napi_url = URL\n{TOKEN}\n", "is not a valid configuration"),
        (f"api_url = URL\napi_token = {TOKEN}\n", "is not a valid configuration"),
        (f"[api]\napi_url = URL\napi_token = {TOKEN}\n", "is not a valid configuration"),
        (f"[api]\napi_token = {TOKEN}\n", "has no api_url"),
        (None, "there is no AI Hub token"),
        # an indented line continues the one before it, and requests would quote both
        (f"[api]\napi_token = {TOKEN}\n  verbose = False\napi_url = URL\nweb_url = URL\n", "letters no token has"),
    ],
)
def test_configurations_that_cannot_be_read(hub: StandIn, exported: Any, content: str | None, message: str) -> None:
    path = Path(os.environ["QAIHUB_CLIENT_INI"])
    path.unlink()
    if content is not None:
        path.write_text(content.replace("URL", hub.api_url))
    with pytest.raises(LightningQuantError, match=message) as raised:
        push(exported)
    error: BaseException | None = raised.value
    while error is not None:
        assert TOKEN not in repr(error)
        error = error.__cause__ or error.__context__


def test_a_profile_of_its_own(hub: StandIn, exported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QAIHUB_CLIENT_INI")
    hub.write_ini(Path.home() / ".qai_hub" / "work.ini")
    with pytest.raises(DeviceUnavailableError, match=r"no AI Hub token at .*client\.ini"):
        push(exported)
    assert push(exported, profile="work")[0].report.status == "finished"


def test_two_processes_do_not_send_the_same_bundle(hub: StandIn, exported: Any) -> None:
    path = device_folder(exported[0]) / "aihub" / "journal.json.lock"
    path.parent.mkdir(parents=True)
    with FileLock(path), pytest.raises(DeviceError, match="Another process is sending this bundle"):
        push(exported)


def test_a_whole_fit_ends_on_the_phone(hub: StandIn, trainer: MakeTrainer, tmp_path: Path) -> None:
    export = lq.DeviceExport(tmp_path / "out", target="auto", device=S24, name="net", monitor="val_loss", mode="min")
    one = trainer(lq.QuantizationAwareTraining("w8a8"), export, max_epochs=1)
    one.fit(SmallModule(), small_loader(), small_loader())
    (report,) = export.reports
    assert (report.tier, report.status, export.passed_over) == ("aihub", "finished", {})
    assert report.metric.keys() == {"float", "simulation", "device"}
    assert abs(report.metric["device"] - report.metric["simulation"]) < 0.02
    one.save_checkpoint(tmp_path / "out" / "last.ckpt")
    (tmp_path / "out" / "callback.pickle").write_bytes(cloudpickle.dumps(export))
    assert TOKEN.encode() not in everything_written(tmp_path)
    with pytest.raises(DeviceBoundError, match=r"PSNR .* dB, expected min_psnr=99"):
        check_bounds(export.reports, 99, None)
    with pytest.raises(DeviceBoundError, match=r"the metric drops by"):
        check_bounds(export.reports, None, -10, "min")
    check_bounds(export.reports, -50, 10, "min")


def test_no_training_is_lost_to_a_service_that_is_down(hub: StandIn, trainer: MakeTrainer, tmp_path: Path) -> None:
    hub.stop()
    export = lq.DeviceExport(tmp_path / "out", target="aihub", name="net")
    module = SmallModule()
    with pytest.warns(UserWarning, match="The device was not measured: .*cannot be reached"):
        trainer(lq.QuantizationAwareTraining("w8a8"), export, max_epochs=1).fit(module, small_loader())
    assert export.bundle is not None
    assert export.reports == []
    strict = lq.DeviceExport(tmp_path / "out", target="aihub", name="net", on_failure="raise")
    with pytest.raises(DeviceUnavailableError):
        trainer(lq.PostTrainingQuantization("w8a8"), strict).validate(module, small_loader(), verbose=False)
    hub.start()
    (one,) = resume(export.bundle.path)
    assert one.report.status == "finished"
