"""Everything that the stand-in can let go wrong, and what the real client makes of it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import qai_hub
import requests
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from qai_hub import Client, public_rest_api
from qai_hub.client import APIException, InternalError, RateLimitedError, UserError

from lightning_quant.deploy.bundle import Bundle
from tests.aihub import faults
from tests.aihub.driving import S24, compiled, failure, images, outputs
from tests.aihub.speed import speed_up
from tests.aihub.standin import StandIn

pytestmark = pytest.mark.slow

DETAIL = "Something about it"


def gets(hub: StandIn) -> int:
    return len([request for request in hub.requests() if request.kind == "devices"])


@pytest.mark.parametrize(
    ("status", "error", "message", "tries"),
    [
        (401, UserError, "Failed to authenticate", 1),
        (400, UserError, DETAIL, 1),
        (403, UserError, DETAIL, 1),
        (404, UserError, DETAIL, 1),
        (413, UserError, DETAIL, 1),
        (422, UserError, "status code 422", 1),
        (426, UserError, DETAIL, 1),
        (429, InternalError, "reported errors", 7),
        (500, InternalError, "reported errors", 7),
        (503, InternalError, "unavailable", 7),
    ],
)
def test_error_statuses(
    hub: StandIn, client: Client, status: int, error: type[Exception], message: str, tries: int
) -> None:
    hub.inject(faults.answer(status, DETAIL), faults.ANY_GET, times=None)

    with pytest.raises(error, match=message):
        client.get_devices()
    assert gets(hub) == tries
    hub.clear_faults()
    assert client.get_devices()


@pytest.mark.parametrize("fault", [faults.answer(502), faults.cut(), faults.lose_reply()])
def test_what_a_get_survives(hub: StandIn, client: Client, fault: faults.Fault) -> None:
    number = hub.inject(fault, faults.DEVICES, times=3)

    assert client.get_devices()
    assert (hub.fired(number), gets(hub)) == (3, 4)


def test_retry_after_is_obeyed(hub: StandIn, client: Client) -> None:
    hub.inject(faults.answer(429, retry_after=1), faults.DEVICES)
    begin = time.monotonic()

    assert client.get_devices()
    assert time.monotonic() - begin >= 1


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (faults.garbage(), DecodeError, "Error parsing"),
        (faults.html(), APIException, "status code 200"),
    ],
)
def test_answers_that_are_none(
    hub: StandIn, client: Client, fault: faults.Fault, error: type[Exception], message: str
) -> None:
    hub.inject(fault, faults.DEVICES)

    with pytest.raises(error, match=message):
        client.get_devices()


def test_another_token_is_refused(hub: StandIn) -> None:
    config = hub.config()
    config.api_token = "guessed"

    with pytest.raises(UserError, match="Failed to authenticate"):
        Client(config).get_devices()
    hub.token = "guessed"
    assert Client(config).get_devices()


def test_a_token_can_expire_while_waiting(hub: StandIn, client: Client, bundles: dict[str, Bundle]) -> None:
    hub.hold()
    job = client.submit_compile_job(bundles["w8a8"].aimet, S24)
    hub.inject(faults.answer(401), faults.POLL, times=None, after=2)

    assert [job.get_status().code for _ in range(2)] == ["CREATED"] * 2
    with pytest.raises(UserError, match="Failed to authenticate"):
        job.wait(20)


def test_a_device_can_vanish(hub: StandIn, client: Client, bundles: dict[str, Bundle]) -> None:
    hub.inject(faults.empty(), faults.DEVICES)

    with pytest.raises(UserError, match="is not available"):
        client.submit_compile_job(bundles["w8a8"].aimet, S24)


@pytest.mark.parametrize("creates", ["model", "dataset", "compile job", "inference job"])
def test_a_lost_reply_makes_a_second_record(
    hub: StandIn, client: Client, bundles: dict[str, Bundle], creates: str
) -> None:
    model = client.upload_model(bundles["w8a8"].qdq, name="first")
    where, create = {
        "model": (faults.CREATE_MODEL, lambda: client.upload_model(bundles["w8a8"].aimet, name="twice")),
        "dataset": (faults.CREATE_DATASET, lambda: client.upload_dataset({"x": images(1)}, name="twice")),
        "compile job": (faults.CREATE_COMPILE_JOB, lambda: client.submit_compile_job(model, S24, name="twice")),
        "inference job": (faults.CREATE_INFERENCE_JOB, lambda: client.submit_inference_job(model, S24, name="twice")),
    }[creates]
    assert hub.duplicates() == []
    hub.inject(faults.lose_reply(), where)

    create()

    (duplicate,) = hub.duplicates()
    assert duplicate.startswith(f"{creates} twice")
    kind = creates.split()[-1] + "s"
    assert hub.posts(kind).count("twice") == 2


def test_a_reply_that_comes_too_late_makes_a_second_record(tmp_path: Path, bundles: dict[str, Bundle]) -> None:
    with speed_up(timeout=0.4), StandIn(tmp_path / "hub", "t0ken") as hub:
        hub.inject(faults.late(0.8), faults.CREATE_MODEL)
        Client(hub.config()).upload_model(bundles["w8a8"].aimet, name="late")

        assert hub.duplicates() == ["model late"]


@pytest.mark.parametrize("where", [faults.COMPLETE_MODEL, faults.COMPLETE_DATASET])
def test_completing_an_upload_can_be_repeated(
    hub: StandIn, client: Client, bundles: dict[str, Bundle], where: str
) -> None:
    number = hub.inject(faults.lose_reply(), where)
    model = client.upload_model(bundles["w8a8"].qdq)
    data = client.upload_dataset({"x": images(1)})

    assert hub.fired(number) == 1
    assert len(outputs(client, model, data)["output"]) == 1
    assert hub.duplicates() == []


@pytest.mark.parametrize("status", [500, 503])
def test_a_post_gives_up_after_seven_tries(
    hub: StandIn, client: Client, bundles: dict[str, Bundle], status: int
) -> None:
    hub.inject(faults.answer(status), faults.CREATE_MODEL, times=None)

    with pytest.raises(InternalError):
        client.upload_model(bundles["w8a8"].aimet, name="model")
    assert hub.posts("models") == ["model"] * 7
    assert hub.models() == []


def test_rate_limits_on_jobs(hub: StandIn, client: Client, bundles: dict[str, Bundle]) -> None:
    model = client.upload_model(bundles["w8a8"].qdq)
    hub.inject(faults.answer(429, DETAIL), faults.CREATE_COMPILE_JOB, times=None)
    hub.inject(faults.answer(429, DETAIL), faults.CREATE_INFERENCE_JOB, times=9)

    with pytest.raises(RateLimitedError, match=DETAIL):
        client.submit_compile_job(model, S24)
    with pytest.raises(RateLimitedError, match=DETAIL):
        client.submit_inference_job(model, S24, retry=False)
    assert client.submit_inference_job(model, S24).wait(20).success
    assert [job.type for job in hub.jobs()] == ["inference"]


def test_creation_without_an_id(hub: StandIn, client: Client, bundles: dict[str, Bundle]) -> None:
    hub.inject(faults.empty(), faults.CREATE_MODEL)

    with pytest.raises(ValueError, match="Failed to create model"):
        client.upload_model(bundles["w8a8"].aimet)


def test_creation_with_a_status_skips_the_upload(hub: StandIn, client: Client, bundles: dict[str, Bundle]) -> None:
    hub.inject(faults.status(), faults.CREATE_MODEL)
    model = client.upload_model(bundles["w8a8"].aimet)

    assert not [request for request in hub.requests() if request.kind == "blobs"]
    assert not public_rest_api.get_model(client.config, model.model_id).file_upload_complete
    assert "never uploaded" in failure(client.submit_compile_job(model, S24))


@pytest.mark.parametrize("fault", [faults.cut(), faults.lose_reply(), faults.answer(500)])
@pytest.mark.parametrize("where", [faults.UPLOAD_MODEL, faults.UPLOAD_DATASET])
def test_an_upload_survives_one_fault(
    hub: StandIn, client: Client, bundles: dict[str, Bundle], fault: faults.Fault, where: str
) -> None:
    number = hub.inject(fault, where)
    target = compiled(client, bundles["w8a8"].aimet)

    assert outputs(client, target, {"x": images(1)})["output"]
    assert hub.fired(number) == 1
    assert hub.duplicates() == []


@pytest.mark.parametrize("fault", [faults.hang(), faults.late(0.8)])
def test_an_upload_survives_silence(tmp_path: Path, bundles: dict[str, Bundle], fault: faults.Fault) -> None:
    with speed_up(timeout=0.4), StandIn(tmp_path / "hub", "t0ken") as hub:
        hub.inject(fault, faults.UPLOAD_MODEL)
        client = Client(hub.config())
        model = client.upload_model(bundles["w8a8"].aimet)

        assert len([request for request in hub.requests() if request.method == "PUT"]) >= 2
        assert public_rest_api.get_model(client.config, model.model_id).file_upload_complete


def test_uploads_that_cannot_succeed(hub: StandIn, client: Client, bundles: dict[str, Bundle]) -> None:
    def upload() -> None:
        client.upload_model(bundles["w8a8"].aimet)

    hub.inject(faults.cut(), faults.UPLOAD, times=7)
    with pytest.raises(InternalError, match=r"Could not connect to 127\.0\.0\.1"):
        upload()
    hub.inject(faults.answer(403, "Request has expired"), faults.UPLOAD)
    with pytest.raises(InternalError, match=r"(?s)Failed to upload the file\. AccessDenied:.*expired"):
        upload()
    hub.inject(faults.no_etag(), faults.UPLOAD)
    with pytest.raises(AssertionError, match="ETag not received"):
        upload()
    upload()


def test_downloads(hub: StandIn, client: Client, bundles: dict[str, Bundle], tmp_path: Path) -> None:
    target = compiled(client, bundles["w8a8"].aimet)
    once = hub.inject(faults.truncate(), faults.DOWNLOAD_MODEL)
    whole = Path(target.download(str(tmp_path / "whole.dlc")))
    assert hub.fired(once) == 1
    assert whole.read_bytes() == hub.blob(target.model_id)

    always = hub.inject(faults.truncate(), faults.DOWNLOAD, times=None)
    with pytest.raises(InternalError):
        target.download(str(tmp_path / "half.dlc"))
    assert hub.fired(always) == 7
    assert not (tmp_path / "half.dlc").exists()


def test_logs_that_cannot_be_had(hub: StandIn, client: Client, bundles: dict[str, Bundle], tmp_path: Path) -> None:
    job = client.submit_compile_job(bundles["w8a8"].aimet, S24)
    hub.inject(faults.answer(404, DETAIL), faults.LOGS)
    with pytest.raises(APIException, match=DETAIL):
        job.download_job_logs(str(tmp_path))
    hub.inject(faults.answer(404), faults.DOWNLOAD)
    with pytest.raises(APIException, match="Failed to download"):
        job.download_job_logs(str(tmp_path))
    hub.inject(faults.answer(500), faults.LOGS, times=None)
    with pytest.raises(requests.exceptions.RetryError):  # not wrapped by the client
        job.download_job_logs(str(tmp_path))


@pytest.mark.parametrize("kind", ["compile", "inference"])
def test_jobs_that_fail(hub: StandIn, client: Client, bundles: dict[str, Bundle], kind: str) -> None:
    hub.inject(faults.fail("It burnt down."), f"POST jobs {kind}")
    compile_job = client.submit_compile_job(bundles["w8a8"].aimet, S24)
    job: qai_hub.Job = compile_job
    if kind == "inference":
        job = client.submit_inference_job(compile_job.get_target_model(), S24, inputs={"x": images(1)})

    assert failure(job) == "It burnt down."
    assert compile_job.wait(20).success == (kind == "inference")
    assert client.submit_compile_job(bundles["w8a8"].aimet, S24).wait(20).success


def test_jobs_that_never_end(hub: StandIn, client: Client, bundles: dict[str, Bundle]) -> None:
    hub.inject(faults.stuck(), faults.CREATE_JOB)
    job = client.submit_compile_job(bundles["w8a8"].aimet, S24)

    with pytest.raises(TimeoutError):
        job.wait(1)
    assert job.get_status().code == "OPTIMIZING_MODEL"


@pytest.mark.parametrize("post", [False, True])
def test_hanging_is_ended_by_a_stop(tmp_path: Path, bundles: dict[str, Bundle], post: bool) -> None:
    with speed_up(timeout=0.3, retries=1), StandIn(tmp_path / "hub", "t0ken") as hub:
        number = hub.inject(faults.hang(), faults.ANY_API, times=None)
        client = Client(hub.config())
        with pytest.raises(InternalError):
            client.upload_model(bundles["w8a8"].qdq) if post else client.get_devices()
        assert hub.fired(number) == 2
        begin = time.monotonic()
        hub.stop()
        assert time.monotonic() - begin < 3
        assert hub.models() == [], "a request that hangs does nothing"


def test_it_can_die_while_a_client_waits(hub: StandIn, client: Client, bundles: dict[str, Bundle]) -> None:
    hub.hold()
    job = client.submit_compile_job(bundles["w8a8"].aimet, S24)
    hub.inject(faults.die(), faults.POLL, after=1)

    with pytest.raises(InternalError, match="Could not connect"):
        job.wait(20)
    assert not hub.running
    with pytest.raises(InternalError, match="Could not connect"):
        client.upload_model(bundles["w8a8"].aimet)
    hub.start()
    hub.release()
    assert job.wait(20).success
    assert hub.duplicates() == []


def test_faults_have_to_fit(hub: StandIn) -> None:
    with pytest.raises(ValueError, match="'fail' happens to 'POST jobs' only"):
        hub.inject(faults.fail(), faults.DEVICES)
