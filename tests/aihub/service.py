"""What AI Hub's REST interface answers, apart from HTTP: a call in, a protobuf message out."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs, quote, urlsplit

from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]
from packaging.version import Version
from qai_hub import public_api_pb2 as pb

from tests.aihub import compiler, messages
from tests.aihub.faults import Fault
from tests.aihub.jobs import DAY, DONE, FAILED, TYPES, Jobs, State
from tests.aihub.store import Dataset, Job, Model, R, Request, Store

M = TypeVar("M", bound=Message)


class Refusal(Exception):
    """An answer other than success.

    Args:
        status: HTTP status.
        detail: what the client tells its user.
    """

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


@dataclass(frozen=True)
class Call:
    """One request.

    Args:
        method: e.g. ``"GET"``.
        target: path and query as they came.
        body: as it came.
    """

    method: str
    target: str
    body: bytes = b""

    @property
    def path(self) -> str:
        """Without what is the same for all; whichever project is named, all is in one."""
        path = urlsplit(self.target).path.removeprefix("/api/v1").strip("/")
        return re.sub(r"^projects/[^/]+/", "", path)

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.target).query)

    def option(self, name: str, default: str = "") -> str:
        return self.query.get(name, [default])[0]

    def read(self, cls: type[M]) -> M:
        try:
            return cls.FromString(self.body)
        except DecodeError:
            raise Refusal(400, f"The body is not a {cls.__name__}.") from None

    def job_type(self) -> str:
        """Of a job's creation the type, e.g. ``"compile"``."""
        return (self.read(pb.Job).WhichOneof("job") or "").removesuffix("_job")

    @property
    def creates(self) -> bool:
        return self.method == "POST" and self.path in ("models", "datasets", "jobs")

    @property
    def address(self) -> str:
        """What patterns of faults match."""
        kind = f" {self.job_type()}" if self.creates and self.path == "jobs" else ""
        return f"{self.method} {self.path}{kind}"

    def logged(self) -> Request:
        """The entry of the log."""
        name = ""
        if self.creates:
            messages = {"models": pb.Model, "datasets": pb.Dataset, "jobs": pb.Job}
            message: Any = self.read(messages[self.path])
            name = getattr(message, f"{self.job_type()}_job").name if self.path == "jobs" else message.name
        return Request(self.method, urlsplit(self.target).path, self.path.split("/")[0], name)


Endpoint = Callable[..., Message]
_ROUTES: list[tuple[str, re.Pattern[str], Endpoint]] = []


def _route(method: str, path: str) -> Callable[[Endpoint], Endpoint]:
    """Register an endpoint; each ``{}`` of the path, the id of a record or a number, becomes an argument."""

    def register(endpoint: Endpoint) -> Endpoint:
        _ROUTES.append((method, re.compile(path.replace("{}", r"(\w+)")), endpoint))
        return endpoint

    return register


class Service:
    """The endpoints.

    Args:
        store: where everything is.
        jobs: what runs the jobs.
        blob_url: where files go and come from.
        catalog: devices and frameworks.
        profile: file with the figures of every profile, read again for every answer.
        part_size: bytes of one part of an upload.
    """

    def __init__(
        self, store: Store, jobs: Jobs, blob_url: str, catalog: dict[str, Any], profile: Path, part_size: int
    ) -> None:
        self._store = store
        self._jobs = jobs
        self._blob_url = blob_url
        self._devices = [pb.Device(**device) for device in catalog["devices"]]
        self._frameworks = [pb.Framework(**framework) for framework in catalog["frameworks"]]
        self._profile = profile
        self._part_size = part_size

    def answer(self, call: Call, fault: Fault | None = None) -> Message:
        """Do what a call asks for.

        Raises:
            Refusal: if it cannot be done.
        """
        for method, pattern, endpoint in _ROUTES:
            match = pattern.fullmatch(call.path)
            if match and method == call.method:
                message: Any = (
                    endpoint(self, call, *match.groups()) if not call.creates else endpoint(self, call, fault)
                )
                if fault is not None and fault.effect == "status":
                    message.status = fault.text
                return message
        raise Refusal(404, f"There is no {call.method} {call.path}.")

    # --- devices, frameworks, users ---

    @_route("GET", "devices")
    def _list_devices(self, call: Call) -> Message:
        wanted = set(call.query.get("attributes", []))
        name, os = call.option("name"), call.option("os")
        found = [
            device
            for device in self._devices
            if name in ("", device.name) and _os_fits(device.os, os) and wanted <= set(device.attributes)
        ]
        if call.option("select") == "True":
            found = sorted(found, key=lambda device: Version(device.os))[-1:]
        return pb.DeviceList(devices=found, total_query_count=len(found))

    @_route("GET", "frameworks")
    def _list_frameworks(self, call: Call) -> Message:
        return pb.FrameworkList(frameworks=self._frameworks, total_query_count=len(self._frameworks))

    @_route("GET", "users/auth/user")
    def _user(self, call: Call) -> Message:
        return messages.USER

    # --- models ---

    @_route("POST", "models")
    def _create_model(self, call: Call, fault: Fault | None) -> Message:
        asked = call.read(pb.Model)
        model = self._store.create(
            Model, name=asked.name, created=time.time(), type=asked.model_type, is_directory=asked.is_directory
        )
        return messages.created(model)

    @_route("GET", "models/{}/multipart_upload")
    def _model_upload(self, call: Call, id: str) -> Message:
        size = int(call.option("file_size", "0"))
        self._get(Model, id)
        self._store.change(Model, id, size=size)
        urls = [f"{self._blob_url}/upload/{id}/{number}" for number in range(max(1, -(-size // self._part_size)))]
        bare = pb.FileMultipartUploadURL(urls=urls, upload_id=f"upload-{id}", max_part_size=self._part_size)
        return _transfer(call, bare, lambda: pb.FileUploadResponse(multipart_url=bare))

    @_route("POST", "models/{}/multipart_upload")
    def _complete_model(self, call: Call, id: str) -> Message:
        asked, model = call.read(pb.FileMultipartUploadComplete), self._get(Model, id)
        if model.complete:  # the client repeats this when the answer got lost
            return messages.created(model)
        try:
            parts = [self._store.blob(f"{id}.part{number}").read_bytes() for number in range(len(asked.etags))]
        except FileNotFoundError:
            raise Refusal(400, "A part of the upload is missing.") from None
        content = b"".join(parts)
        if asked.upload_id != f"upload-{id}" or list(asked.etags) != [etag(part) for part in parts]:
            raise Refusal(400, "The parts are not those of this upload.")
        if len(content) != model.size:
            raise Refusal(400, f"{len(content)} bytes were uploaded, {model.size} announced.")
        self._store.write(self._store.blob(id), content)
        for number in range(len(parts)):
            self._store.blob(f"{id}.part{number}").unlink()
        return messages.created(self._store.change(Model, id, complete=True))

    @_route("GET", "models")
    def _list_models(self, call: Call) -> Message:
        producer = call.option("producer")
        models = [model for model in self._store.all(Model) if producer in ("", model.producer)]
        # what a deleted job made is deleted with it
        models = [model for model in models if not model.producer or self._store.find(Job, model.producer)]
        found = [self._model_message(model) for model in _page(call, models)]
        return pb.ModelList(models=found, total_query_count=len(models))

    @_route("GET", "models/{}")
    def _show_model(self, call: Call, id: str) -> Message:
        return self._model_message(self._get(Model, id))

    @_route("GET", "models/{}/download")
    def _download_model(self, call: Call, id: str) -> Message:
        model = self._get(Model, id)
        if not self._model_message(model).file_upload_complete:
            raise Refusal(404, f"Model {id} has no file.")
        filename = model.name
        if model.is_directory and not filename.endswith(".zip"):
            filename += ".zip"
        return self._download(call, id, filename)

    def _model_message(self, model: Model) -> pb.Model:
        finished = not model.producer or self._jobs.state(self._get(Job, model.producer)) == DONE
        return messages.model(model, finished)

    # --- datasets ---

    @_route("POST", "datasets")
    def _create_dataset(self, call: Call, fault: Fault | None) -> Message:
        asked, now = call.read(pb.Dataset), time.time()
        dataset = self._store.create(
            Dataset, name=asked.name, created=now, expires=now + 30 * DAY, permanent=asked.permanent
        )
        return messages.created(dataset)

    @_route("GET", "datasets/{}/upload_url")
    def _dataset_upload(self, call: Call, id: str) -> Message:
        self._get(Dataset, id)
        url = f"{self._blob_url}/upload/{id}"
        bare = pb.FileUploadURL(url=url, file_field_name="file", fields={"key": id})
        return _transfer(call, bare, lambda: pb.FileUploadResponse(url=bare))

    @_route("PATCH", "datasets/{}")
    def _complete_dataset(self, call: Call, id: str) -> Message:
        self._get(Dataset, id)
        if not self._store.blob(id).is_file():
            raise Refusal(400, f"The file of dataset {id} was not uploaded.")
        return messages.created(self._store.change(Dataset, id, complete=call.read(pb.Dataset).file_upload_complete))

    @_route("GET", "datasets")
    def _list_datasets(self, call: Call) -> Message:
        datasets = self._store.all(Dataset)
        found = [messages.dataset(dataset) for dataset in _page(call, datasets)]
        return pb.DatasetList(datasets=found, total_query_count=len(datasets))

    @_route("GET", "datasets/{}")
    def _show_dataset(self, call: Call, id: str) -> Message:
        return messages.dataset(self._get(Dataset, id))

    @_route("GET", "datasets/{}/download_data")
    def _download_dataset(self, call: Call, id: str) -> Message:
        if not self._get(Dataset, id).complete:
            raise Refusal(404, f"Dataset {id} has no file.")
        return self._download(call, id, f"dataset-{id}.h5")

    # --- jobs ---

    @_route("POST", "jobs")
    def _create_job(self, call: Call, fault: Fault | None) -> Message:
        asked, kind = call.read(pb.Job), call.job_type()
        if kind not in TYPES:
            raise Refusal(400, f"The stand-in runs no {kind or 'such'} jobs.")
        part = messages.part_of(asked, kind)
        if kind == "compile":
            devices = list(part.devices.devices)
            try:
                compiler.CompileOptions.parse(part.options)
            except ValueError as error:
                raise Refusal(400, str(error)) from None
        else:
            devices = [part.device]
        if kind == "inference":
            self._check_dataset(part.dataset.dataset_id)
        known = {device.name for device in self._devices}
        if not devices or any(device.name not in known for device in devices):
            raise Refusal(400, "No devices match the given OS name, version, and attributes.")
        for model in part.models.models if kind == "link" else [part.model]:
            self._get(Model, model.model_id)
        return messages.created(self._jobs.create(kind, part.name, asked, fault))

    def _check_dataset(self, id: str) -> None:
        if id:
            dataset = self._get(Dataset, id)
            if not dataset.complete or (dataset.expires < time.time() and not dataset.permanent):
                raise Refusal(400, f"Dataset {id} is expired or was never uploaded.")

    @_route("GET", "jobs/{}")
    def _show_job(self, call: Call, id: str) -> Message:
        job = self._get(Job, id)
        state = self._jobs.state(job)
        asked = messages.part_of(messages.request_of(job), job.type)
        model = (asked.models.models[0] if job.type == "link" else asked.model).model_id
        source = self._store.find(Model, model)
        target = self._store.find(Model, job.target)
        inputs = self._store.find(Dataset, asked.dataset.dataset_id) if job.type == "inference" else None
        return messages.job(
            job,
            state,
            self._model_message(source) if source else pb.Model(model_id=model),
            messages.model(target, finished=state == DONE) if target else None,
            messages.dataset(inputs) if inputs else None,
        )

    @_route("PATCH", "jobs/{}")
    def _rename_job(self, call: Call, id: str) -> Message:
        self._get(Job, id)
        return messages.created(self._store.change(Job, id, name=call.read(pb.JobPublicUpdate).name))

    @_route("GET", "jobs/{}/result")
    def _job_result(self, call: Call, id: str) -> Message:
        job = self._get(Job, id)
        if self._jobs.state(job) != DONE:
            raise Refusal(404, f"Job {id} has no result.")
        return messages.job_result(job, json.loads(self._profile.read_bytes()))

    @_route("GET", "job_summaries")
    def _list_jobs(self, call: Call) -> Message:
        kind, creator = call.option("type"), call.option("creator")
        states = {int(state) for state in call.option("state").split(",") if state}
        found: list[tuple[Job, State]] = [(job, self._jobs.state(job)) for job in self._store.all(Job)]
        found = [(job, state) for job, state in found if kind in ("", job.type) and (not states or state in states)]
        if creator not in ("", messages.USER.email):
            found = []
        profile = json.loads(self._profile.read_bytes())
        summaries = [messages.job_summary(job, state, profile) for job, state in _page(call, found)]
        return pb.JobSummaryList(job_summaries=summaries, total_query_count=len(found))

    @_route("GET", "jobs/{}/device_runs/{}/artifact_list/{}")
    def _list_artifacts(self, call: Call, id: str, attempt: str, artifact: str) -> Message:
        job, name = self._get(Job, id), messages.LOGS.get(int(artifact))
        if self._jobs.state(job) not in (DONE, FAILED) or name is None:
            return pb.NamedArtifactDownloadURLList()
        filename = f"{id}-{name}.log"
        url = f"{self._blob_url}/download/{filename}"
        return pb.NamedArtifactDownloadURLList(artifacts=[pb.NamedArtifactDownloadURL(url=url, filename=filename)])

    # --- common ---

    def _get(self, cls: type[R], id: str) -> R:
        record = self._store.find(cls, id)
        if record is None:
            raise Refusal(404, f"{cls.__name__} {id} does not exist.")
        return record

    def _download(self, call: Call, blob: str, filename: str) -> Message:
        bare = pb.FileDownloadURL(url=f"{self._blob_url}/download/{blob}?name={quote(filename)}", filename=filename)
        return _transfer(call, bare, lambda: pb.FileDownloadResponse(url=bare))


def etag(part: bytes) -> str:
    """What storage answers to an uploaded part; the quotes belong to it."""
    return f'"{hashlib.md5(part).hexdigest()}"'


def _transfer(call: Call, bare: Message, wrapped: Callable[[], Message]) -> Message:
    """A URL by itself, or for clients that could also take S3 credentials in the message that offers both."""
    return wrapped() if call.option("supports_s3_credentials") else bare


def _os_fits(os: str, wanted: str) -> bool:
    """Whether a version is the wanted one, or in the wanted half-open interval, e.g. ``"[12,13)"``."""
    if not wanted.startswith("["):
        return wanted in ("", os)
    low, high = wanted[1:-1].split(",")
    return (not low or Version(low) <= Version(os)) and (not high or Version(os) < Version(high))


T = TypeVar("T")


def _page(call: Call, oldest_first: Sequence[T]) -> Sequence[T]:
    """The part of a list that a call asks for, newest first."""
    offset, limit = int(call.option("offset", "0")), int(call.option("limit", "50"))
    return oldest_first[::-1][offset : offset + limit]
