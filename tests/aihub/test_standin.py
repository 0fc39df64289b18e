"""The stand-in, driven by the real client over HTTP: what the deploy tests build on must itself be right."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import qai_hub
import requests
from qai_hub import Client, api_utils, public_rest_api
from qai_hub.client import APIException, InternalError, JobType, SourceModelType, UserError
from qai_hub.util import session

from lightning_quant.deploy.bundle import Bundle
from tests.aihub import faults, jobs
from tests.aihub.driving import S24, compiled, failure, images, outputs
from tests.aihub.service import etag
from tests.aihub.speed import speed_up
from tests.aihub.standin import StandIn

pytestmark = pytest.mark.slow

TOKEN = "t0ken"


def test_from_upload_to_download(tmp_path: Path, bundles: dict[str, Bundle]) -> None:
    with speed_up(), StandIn(tmp_path / "hub", TOKEN, part_size=600) as hub:
        client = Client(hub.config())
        model = client.upload_model(bundles["w8a8"].aimet, name="model")
        options = "--target_runtime qnn_dlc --quantize_io --output_names scores"
        compile_job = client.submit_compile_job(model, S24, name="compile", options=options)
        target = compile_job.get_target_model()
        assert target is not None, "a target model belongs to the very first answer"
        assert compile_job.wait(20).success

        assert target.model_type == SourceModelType.QNN_DLC
        assert [spec.name for spec in target.output_spec[None]] == ["scores"]
        assert compile_job.get_target_shapes() == {"x": ((1, 3, 8, 8), "uint8")}
        file = Path(target.download(str(tmp_path)))
        assert file.suffix == ".dlc"
        assert file.stat().st_size > 1000

        data = client.upload_dataset({"x": images()}, name="data")
        job = client.submit_inference_job(target, S24, inputs=data, name="inference", profile=True)
        assert job.wait(20).success
        assert [value.shape for value in job.download_output_data()["scores"]] == [(1, 4)] * 4
        profile = json.loads((Path(__file__).parent / "profile.json").read_text())
        assert json.loads(json.dumps(job.download_profile())) == profile
        logs = [*compile_job.download_job_logs(str(tmp_path)), *job.download_job_logs(str(tmp_path))]
        assert [Path(log).name for log in logs] == ["j000001-hub.log", "j000002-device.log", "j000002-hub.log"]

        assert len([request for request in hub.requests() if request.method == "PUT"]) > 3
        assert (hub.posts("models"), hub.posts("datasets")) == (["model"], ["data"])
        assert hub.posts("jobs") == ["compile", "inference"]
        assert hub.duplicates() == []


def test_an_upload_has_to_be_whole(hub: StandIn, client: Client, bundles: dict[str, Bundle]) -> None:
    config, content = client.config, bundles["w8a8"].qdq.read_bytes()
    (model_id, other) = (public_rest_api._create_model(config, qai_hub.client.api_pb.Model(name=n)).id for n in "ab")
    for each in (model_id, other):
        upload = public_rest_api._get_model_multipart_upload_urls(config, each, len(content), use_acceleration=False)
        requests.put(upload.urls[0], data=content[:-1] if each == model_id else content, timeout=5)
    tag = etag(content[:-1])

    complete = public_rest_api._complete_model_multipart_upload
    with pytest.raises(APIException, match="bytes were uploaded"):
        complete(config, model_id, f"upload-{model_id}", [tag])
    with pytest.raises(APIException, match="not those of this upload"):
        complete(config, other, f"upload-{other}", [tag])
    with pytest.raises(APIException, match="part of the upload is missing"):
        complete(config, other, f"upload-{other}", [tag, tag])
    assert not public_rest_api.get_model(config, model_id).file_upload_complete
    with pytest.raises(UserError, match="has no file"):
        client.get_model(model_id).download("nowhere.onnx")


def test_storage_takes_no_token(hub: StandIn) -> None:
    reply = requests.get(f"{hub.blob_url}/download/m000001", headers={"Authorization": f"token {hub.token}"}, timeout=5)

    assert reply.status_code == 400
    assert "Only one way" in reply.text


def test_devices_are_found_by_name_version_and_attributes(client: Client) -> None:
    def names(**wanted: Any) -> list[str]:
        return [device.name for device in client.get_devices(**wanted)]

    assert len(names()) == 7
    assert names(name="Samsung Galaxy S24") == ["Samsung Galaxy S24"]
    assert names(name="Samsung Galaxy S24", os="13") == []
    assert names(os="[10,13)", attributes="os:android") == ["Samsung Galaxy S21", "Google Pixel 3"]
    assert names(attributes=["hexagon:v73", "vendor:qualcomm"]) == ["Snapdragon X Elite CRD"]
    assert "htp-supports-fp16:true" in client.get_device_attributes()
    assert [framework.api_tags for framework in client.get_frameworks()] == [["default"], ["latest"]]


def test_devices_that_cannot_run_a_model(client: Client, bundles: dict[str, Bundle]) -> None:
    model, pixel = client.upload_model(bundles["w8a8"].aimet), qai_hub.Device("Google Pixel 3")

    with pytest.raises(UserError, match="is not available"):
        client.submit_compile_job(model, qai_hub.Device("Nope 9000"))
    assert "cannot run qnn_dlc models" in failure(client.submit_compile_job(model, pixel))
    with pytest.raises(UserError, match="does not support QNN model input"):
        client.submit_inference_job(compiled(client, model), pixel)
    assert client.submit_compile_job(model, pixel, options="--target_runtime tflite").wait(20).success


@pytest.mark.parametrize("single_compile", [True, False])
def test_several_devices(hub: StandIn, client: Client, bundles: dict[str, Bundle], single_compile: bool) -> None:
    devices = [S24, qai_hub.Device("Samsung Galaxy S23")]
    made = client.submit_compile_job(bundles["w8a8"].aimet, devices, single_compile=single_compile)
    jobs = [made] if single_compile else list(made)

    assert all(job.wait(20).success for job in jobs)
    assert [job.device.name for job in jobs] == [device.name for device in devices][: len(jobs)]
    assert len(jobs[0].compatible_devices) == (2 if single_compile else 1)
    for job in client.submit_inference_job(jobs[0].get_target_model(), devices, inputs={"x": images()}):
        assert job.wait(20).success
    assert hub.duplicates() == []


def test_states_of_jobs(
    hub: StandIn, client: Client, bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=time.time())
    monkeypatch.setattr(jobs, "time", SimpleNamespace(time=lambda: clock.now))

    def seen(job: qai_hub.Job) -> list[str]:
        codes = []
        while not job.get_status().finished:
            codes.append(job.get_status().code)
            while not next(record for record in hub.jobs() if record.id == job.job_id).worked:
                time.sleep(0.01)
            clock.now += 0.021
        return codes

    job = client.submit_compile_job(bundles["w8a8"].aimet, S24)
    assert seen(job) == ["CREATED", "OPTIMIZING_MODEL"]
    target, inputs = job.get_target_model(), {"x": images(1)}
    profiling = client.submit_inference_job(target, S24, inputs, profile=True)
    assert seen(profiling) == ["CREATED", "PROVISIONING_DEVICE", "MEASURING_PERFORMANCE"]
    plain = client.submit_inference_job(target, S24, inputs, profile=False)
    assert seen(plain) == ["CREATED", "PROVISIONING_DEVICE", "RUNNING_INFERENCE"]
    hub.hold()
    held = client.submit_compile_job(bundles["w8a8"].aimet, S24)
    clock.now += 60
    assert held.get_status().code == "CREATED"
    hub.release()
    assert seen(held) == ["CREATED", "OPTIMIZING_MODEL"], "the clock began when it was released"


def test_a_verbose_client_gets_along_with_the_states(
    hub: StandIn, bundles: dict[str, Bundle], capsys: pytest.CaptureFixture[str]
) -> None:
    config = hub.config()
    config.verbose = True
    client = Client(config)
    job = client.submit_compile_job(bundles["w8a8"].aimet, S24)

    assert job.wait(20).success
    assert client.submit_inference_job(job.get_target_model(), S24, {"x": images(1)}).wait(20).success
    assert "Scheduled inference job" in capsys.readouterr().out


def test_jobs_can_be_held(hub: StandIn, client: Client, bundles: dict[str, Bundle]) -> None:
    model = client.upload_model(bundles["w8a8"].aimet)
    before = client.submit_compile_job(model, S24, name="before")
    assert before.wait(20).success
    hub.hold("compile")
    held = client.submit_compile_job(model, S24, name="held")
    waits = client.submit_inference_job(held.get_target_model(), S24, inputs={"x": images(1)})

    with pytest.raises(TimeoutError):
        held.wait(1)
    assert client.get_job(before.job_id).get_status().success
    assert held.get_status().code == "CREATED"
    assert waits.get_status().running, "the model is not there yet"
    target = public_rest_api.get_model(client.config, held.get_target_model().model_id)
    assert not target.file_upload_complete
    assert not target.HasField("output_spec")
    hub.release()
    assert held.wait(20).success
    assert waits.wait(20).success


def test_without_inputs_there_is_only_a_profile(client: Client, bundles: dict[str, Bundle]) -> None:
    target = compiled(client, bundles["w8a8"].aimet)
    job = client.submit_inference_job(target, S24)

    assert job.download_profile()["execution_detail"]
    assert job.download_output_data() is None
    plain = client.submit_inference_job(target, S24, inputs={"x": images(1)}, profile=False)
    assert plain.download_profile()["execution_detail"] == []


def test_profile_figures_can_be_replaced(tmp_path: Path, bundles: dict[str, Bundle]) -> None:
    figures = json.loads((Path(__file__).parent / "profile.json").read_text())
    figures["execution_summary"].update(estimated_inference_time=77, inference_memory_peak_range=None)
    figures["execution_summary"]["inference_memory_increase_range"] = None
    del figures["execution_detail"][2:]
    (tmp_path / "figures.json").write_text(json.dumps(figures))

    with speed_up(), StandIn(tmp_path / "hub", TOKEN, profile=tmp_path / "figures.json") as hub:
        client = Client(hub.config())
        job = client.submit_inference_job(compiled(client, bundles["w8a8"].aimet), S24)
        assert json.loads(json.dumps(job.download_profile())) == figures


def test_lists_are_filtered_and_paged(client: Client, bundles: dict[str, Bundle]) -> None:
    models = [client.upload_model(bundles["w8a8"].aimet, name=name) for name in ("a", "b")]
    good = client.submit_compile_job(models[0], S24, name="good")
    bad = client.submit_compile_job(models[1], S24, name="bad", options="--output_names a,b")
    run = client.submit_inference_job(good.get_target_model(), S24, {"x": images(1)}, name="run")
    assert [job.wait(20).code for job in (good, bad, run)] == ["SUCCESS", "FAILED", "SUCCESS"]

    def names(**wanted: Any) -> list[str]:
        return [summary.name for summary in client.get_job_summaries(**wanted)]

    states = qai_hub.JobStatus.State
    assert names() == ["run", "bad", "good"]
    assert names(offset=1, limit=1) == ["bad"]
    assert names(type=JobType.COMPILE, state=states.SUCCESS) == ["good"]
    assert names(state=[states.FAILED, states.SUCCESS], type=JobType.INFERENCE) == ["run"]
    assert names(creator="somebody@else.com") == []
    (summary,) = client.get_job_summaries(type=JobType.INFERENCE)
    assert (summary.estimated_inference_time, summary.device_name) == (412, S24.name)
    good.set_name("better")
    assert names(type=JobType.COMPILE) == ["bad", "better"]
    assert [model.name for model in client.get_models()][::-1][:2] == ["a", "b"]
    assert [model.name for model in client.get_models(limit=1, offset=3)] == ["a"]
    assert [dataset.name for dataset in client.get_datasets()] == ["run-output", "h5-dataset"]


def test_a_failed_compile_job_still_has_a_target_model(client: Client, bundles: dict[str, Bundle]) -> None:
    job = client.submit_compile_job(bundles["w8a8"].aimet, S24, options="--output_names a,b")
    failure(job)
    target = job.get_target_model()

    assert target is not None
    assert f"job {job.job_id} failed" in failure(client.submit_inference_job(target, S24, {"x": images(1)}))
    assert [Path(log).name for log in job.download_job_logs(os.environ["HOME"])] == [f"{job.job_id}-hub.log"]


def test_datasets_expire_and_records_can_be_forgotten(hub: StandIn, client: Client, bundles: dict[str, Bundle]) -> None:
    target = compiled(client, bundles["w8a8"].aimet)
    data = client.upload_dataset({"x": images(1)})
    assert not client.get_dataset(data.dataset_id).is_expired()
    hub.expire_datasets()

    assert client.get_dataset(data.dataset_id).is_expired()
    with pytest.raises(UserError, match="expired"):
        client.submit_inference_job(target, S24, inputs=data)  # the client believes its own copy
    hub.forget(target.model_id)
    with pytest.raises(UserError, match="could not be found"):
        client.get_model(target.model_id)


def test_it_continues_after_a_restart(tmp_path: Path, bundles: dict[str, Bundle]) -> None:
    with speed_up():
        with StandIn(tmp_path / "hub", TOKEN) as first:
            client = Client(first.config())
            first.hold("compile")
            held = client.submit_compile_job(bundles["w8a8"].aimet, S24, name="held")
            waits = client.submit_inference_job(held.get_target_model(), S24, inputs={"x": images()})
            first.inject(faults.answer(500), faults.DEVICES, times=2)
            requests_before = first.requests()
        with pytest.raises(InternalError, match="Could not connect"):
            client.get_devices()

        with StandIn(tmp_path / "hub", TOKEN, ports=first.ports) as second:
            assert second.requests() == requests_before
            assert len(client.get_devices()) == 7
            assert second.fired(0) == 2, "what was to go wrong was forgotten"
            assert held.get_status().code == "CREATED"
            second.release()
            assert held.wait(20).success
            assert waits.wait(20).success, "the work that was interrupted is done"
            assert len(waits.download_output_data()["output"]) == 4
            assert client.submit_compile_job(bundles["w8a8"].aimet, S24).job_id == "j000003"


def test_the_same_object_starts_again_on_its_ports(hub: StandIn, client: Client) -> None:
    ports = hub.ports
    hub.stop()
    assert not hub.running
    hub.start()

    assert hub.ports == ports
    assert client.get_devices()


def test_speed_up_restores_everything() -> None:
    def settings() -> tuple[Any, ...]:
        names = ("MAX_RETRIES", "BACKOFF_FACTOR", "MAX_WAIT", "REQUEST_TIMEOUT_SECONDS")
        wrapped = (api_utils._try_upload_asset, api_utils._download_to_verified_path)
        numbers = (getattr(session, name) for name in names)
        job = (session.create_session.__defaults__, qai_hub.Job._polling_interval, qai_hub.client.time)
        return (*numbers, *wrapped, *job, dict(os.environ))

    before = settings()
    with speed_up(retries=1):
        assert all(ours != theirs for ours, theirs in zip(settings(), before, strict=True))
    assert settings() == before


def test_the_users_settings_do_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundles: dict[str, Bundle]
) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("QAIHUB_CLIENT_INI", "nowhere.ini")
    with speed_up(retries=1), StandIn(tmp_path / "hub", TOKEN) as hub:
        assert len(Client(hub.config()).get_devices()) == 7
        with pytest.raises(UserError, match="not found"):
            Client().get_devices()
        hub.write_ini(Path.home() / ".qai_hub" / "client.ini")
        hub.write_ini(Path.home() / ".qai_hub" / "mine.ini")
        assert len(Client().get_devices()) == 7
        assert Client(profile="mine").config == hub.config()


def test_a_projects_records_are_found(hub: StandIn, bundles: dict[str, Bundle]) -> None:
    config = hub.config()
    config.default_project = "p123"
    client = Client(config)

    assert outputs(client, compiled(client, bundles["w8a8"].aimet), {"x": images(1)})["output"]
    assert "/api/v1/projects/p123/models/" in [request.path for request in hub.requests()]
    assert len(hub.posts("jobs")) == 2
    assert [model.name for model in client.get_models(project="p123")][-1] == "small.aimet"
