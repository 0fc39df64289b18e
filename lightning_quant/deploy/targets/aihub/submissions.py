"""What is uploaded to and submitted at AI Hub, once each.

Every step is in the journal the moment it is known, so a run that was killed resumes where it was.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lightning_quant.deploy.targets.aihub.job import Job, Source
from lightning_quant.deploy.targets.aihub.journal import Journal
from lightning_quant.deploy.targets.aihub.service import PAGE, Gone, Service
from lightning_quant.errors import DeviceError, DeviceTimeoutError
from lightning_quant.utilities.hashing import short_hash


class JobFailed(Exception):
    """A job that the service says has failed."""


class Submissions:
    """The models, samples and jobs of one bundle.

    Args:
        job: what was asked for.
        service: where to.
        journal: what was uploaded and submitted already.
    """

    def __init__(self, job: Job, service: Service, journal: Journal) -> None:
        self.job = job
        self.service = service
        self.journal = journal

    def upload_model(self, source: Source) -> str:
        """Upload a model unless it was, by this bundle or by any other; return its id.

        The float network of a sweep is the same for every precision, so the others find it at AI Hub by its name.
        Processes of one machine that want the same model wait for the one that uploads it.
        """
        with self._alone(f"model-{source.hash}"):
            return self._upload_model(source)

    def _upload_model(self, source: Source) -> str:
        key = f"model-{source.hash}"
        service = self.service

        def upload(name: str) -> str:
            return service.client.upload_model(source.path, name=name).model_id

        def find(name: str) -> str | None:
            found = service.find_by_name(name, lambda offset: service.client.get_models(offset, PAGE))
            return found and found.model_id

        identity = self._make_once(key, "uploading the model", upload, find, shared=True)

        def is_complete() -> bool:
            return service.api.get_model(service.config, identity).file_upload_complete

        with self.forgetting_if_gone(key):
            if not service.read("the uploaded model", is_complete):  # killed between its record and its last byte
                service.read(
                    "uploading the model", lambda: service.api.upload_model(service.config, source.path, identity)
                )
        return identity

    @contextlib.contextmanager
    def _alone(self, key: str) -> Iterator[None]:
        """Hold a lock for a block. Its empty file stays, for others may wait for it."""
        path = Path(self.job.locks) / f"{key}.lock"
        path.parent.mkdir(mode=0o700, exist_ok=True)
        try:
            with FileLock(path, timeout=max(0.0, self.service.deadline - time.monotonic())):
                yield
        except Timeout:
            raise DeviceTimeoutError(
                f"AI Hub did not finish in time: another process was still uploading {key} after "
                f"{self.job.timeout:g} s. Run again to resume."
            ) from None

    def upload_inputs(self, path: Path, digest: str) -> str:
        """Upload the samples, known by the hash of their values, unless they were; return the id of the data set."""
        key = f"inputs-{short_hash(f'{digest} {path.stem}')}"
        service = self.service

        def upload(name: str) -> str:
            return service.client.upload_dataset(str(path), name=name).dataset_id

        def find(name: str) -> str | None:
            found = service.find_by_name(
                name, lambda offset: list(service.api.get_dataset_list(service.config, offset, PAGE).datasets)
            )
            return found and found.dataset_id

        if (known := self.journal.entry(key).get("id")) and self._is_expired(key, known):
            self.journal.begin_again(key)
        identity = self._make_once(key, "uploading the samples", upload, find)

        def is_complete() -> bool:
            return service.api.get_dataset(service.config, identity).file_upload_complete

        with self.forgetting_if_gone(key):
            if not service.read("the uploaded samples", is_complete):
                service.read("uploading the samples", lambda: self._finish_dataset(identity, path))
        return identity

    @contextlib.contextmanager
    def forgetting_if_gone(self, key: str) -> Iterator[None]:
        """Forget what somebody deleted at the service, so that the next run makes it again."""
        try:
            yield
        except Gone as error:
            self.journal.begin_again(key)
            raise DeviceError(f"{error} Run again to upload or submit it again.") from None

    def _is_expired(self, key: str, dataset_id: str) -> bool:
        """Return whether a data set has expired, as they do after 30 days."""
        with self.forgetting_if_gone(key):
            dataset = self.service.read("the uploaded samples", lambda: self.service.client.get_dataset(dataset_id))
        return dataset.is_expired()

    def _finish_dataset(self, identity: str, path: Path) -> None:
        """Upload the file of a data set whose record was made; the client has no public call for this half."""
        from qai_hub import api_utils

        api, config, size = self.service.api, self.service.config, path.stat().st_size
        target = api._get_dataset_upload_response(config, identity, size, use_acceleration=True).url
        with path.open("rb", buffering=0) as file:
            api_utils.upload_asset(
                upload_url=target.url,
                asset_file=file,
                asset_size=size,
                full_file_size=size,
                file_field_name=target.file_field_name,
                fields=dict(target.fields),
                verbose=False,
                content_type=api_utils.guess_file_http_content_type(path),
            )
        api._confirm_dataset_upload(config, identity)

    def submit(self, key: str, what: str, request: Callable[[str], Any]) -> str:
        """Submit the job under ``key`` unless it was; return its link."""
        client = self.service.client

        def find(name: str) -> str | None:
            found = self.service.find_by_name(name, lambda offset: client.get_job_summaries(offset, PAGE))
            return found and found.job_id

        identity = self._make_once(key, what, lambda name: request(name).job_id, find)
        url = f"{self.service.config.web_url.rstrip('/')}/jobs/{identity}/"
        self.journal.note(key, url=url)
        return url

    def _make_once(
        self,
        key: str,
        what: str,
        request: Callable[[str], str],
        find: Callable[[str], str | None],
        shared: bool = False,
    ) -> str:
        """Return the id in the journal; else that of what bears the name already; else of what is made now.

        With ``shared``, what another bundle made under that name is looked for, even if this one never asked for it.
        """
        entry = self.journal.entry(key)
        if "id" in entry:
            return entry["id"]
        name = f"lq-{key}" + (f"-{entry['attempt']}" if "attempt" in entry else "")
        service = self.service
        found = None
        if shared or entry.get("state") == "asked":  # an earlier run may not have known what became of its request
            found = service.read(f"looking for {name}", lambda: find(name))
        self.journal.note(key, state="asked", name=name)
        identity = found or service.make(what, lambda: request(name), lambda: find(name))
        self.journal.note(key, state="made", id=identity)
        return identity

    def wait_for(self, key: str, what: str) -> Any:
        """Wait for the job under ``key`` and return it.

        Raises:
            JobFailed: with the service's reason.
            DeviceTimeoutError: at the deadline.
        """
        identity = self.journal.entry(key)["id"]
        client = self.service.client
        with self.forgetting_if_gone(key):
            job = self.service.read(what, lambda: client.get_job(identity))
        pause = 0.25
        while not (status := self.service.read(what, job.get_status)).finished:
            pause = min(2 * pause, self.job.poll_seconds)
            if time.monotonic() + pause > self.service.deadline:
                raise DeviceTimeoutError(
                    f"{what[:1].upper()}{what[1:]} ({identity}) was still {status.code} after {self.job.timeout:g} "
                    "s. It still runs at AI Hub; run again to fetch its results."
                )
            time.sleep(pause)
        if not status.success:
            self.journal.begin_again(key)
            raise JobFailed(f"{what} failed: {status.message or 'AI Hub gives no reason'}")
        return self.service.read(what, lambda: client.get_job(identity))  # only now its target model is whole
