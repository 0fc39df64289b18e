"""Everything that can go wrong between a program and AI Hub, to be injected into the stand-in.

A fault says what happens; ``where``, a pattern for :func:`fnmatch.fnmatch`, to which requests. A request's address
is its method and its path without ``/api/v1/`` and slashes at the ends, for example ``"GET jobs/j000001/result"``;
the creation of a job also names the job's type, ``"POST jobs compile"``, and requests to the second port begin with
``blobs/``, ``"PUT blobs/upload/m000001/0"``. The usual ones have names here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from tests.aihub.store import Store

ANY = "*"
ANY_API = "[A-Z]* [!b]*"
ANY_GET = "GET [!b]*"
DEVICES = "GET devices"
CREATE_MODEL, CREATE_DATASET, CREATE_JOB = "POST models", "POST datasets", "POST jobs *"
CREATE_COMPILE_JOB, CREATE_INFERENCE_JOB = "POST jobs compile", "POST jobs inference"
COMPLETE_MODEL, COMPLETE_DATASET = "POST models/*/multipart_upload", "PATCH datasets/*"
POLL, RESULT, LOGS = "GET jobs/???????", "GET jobs/*/result", "GET jobs/*/artifact_list/*"
UPLOAD, UPLOAD_MODEL, UPLOAD_DATASET = "P* blobs/*", "PUT blobs/*", "POST blobs/*"
DOWNLOAD, DOWNLOAD_MODEL, DOWNLOAD_DATASET = "GET blobs/*", "GET blobs/download/m*", "GET blobs/download/d*"


@dataclass(frozen=True)
class Fault:
    """What happens to a request.

    Args:
        effect: one of the functions below makes it; the servers act on it.
        status: HTTP status, of :func:`answer`.
        text: the detail of :func:`answer`, the reason of :func:`fail`, the status of :func:`status`.
        seconds: how late, of :func:`late` and for ``Retry-After``.
    """

    effect: str
    status: int = 0
    text: str = ""
    seconds: float = 0


def answer(status: int, detail: str = "", retry_after: int = 0) -> Fault:
    """An error, nothing else is done: 401, 403, 404, 413, 422, 426, 429, 500, 502, 503 …"""
    return Fault("answer", status, detail or f"The stand-in answers {status}.", retry_after)


def hang() -> Fault:
    """Nothing is done and no answer comes, until the stand-in stops. On an upload, its body is not read either."""
    return Fault("hang")


def cut() -> Fault:
    """Nothing is done and the connection is closed, in the middle of an upload's body."""
    return Fault("cut")


def lose_reply() -> Fault:
    """What was asked for is done, then the connection is closed without an answer."""
    return Fault("lose reply")


def late(seconds: float) -> Fault:
    """What was asked for is done at once, the answer comes after ``seconds``."""
    return Fault("late", seconds=seconds)


def garbage() -> Fault:
    """An answer that claims to be a protobuf message and is none."""
    return Fault("garbage")


def html() -> Fault:
    """Status 200 with a web page, as a captive portal answers."""
    return Fault("html")


def empty() -> Fault:
    """Status 200 with an empty message: no id on creation, no devices in a list."""
    return Fault("empty")


def status(text: str = "Not now.") -> Fault:
    """A creation whose answer has a status: the client then skips the upload, silently."""
    return Fault("status", text=text)


def fail(reason: str = "The model could not be converted.") -> Fault:
    """The job that is created fails for this reason (``where``: one of ``CREATE_…JOB``)."""
    return Fault("fail", text=reason)


def stuck() -> Fault:
    """The job that is created never ends (``where``: one of ``CREATE_…JOB``)."""
    return Fault("stuck")


def no_etag() -> Fault:
    """An uploaded part is taken without an ETag."""
    return Fault("no etag")


def truncate() -> Fault:
    """A download ends after half its bytes."""
    return Fault("truncate")


def die() -> Fault:
    """The stand-in stops, as if its machine had been switched off, until a test starts it again."""
    return Fault("die")


class Faults:
    """The faults that are still to happen; they and their counters outlive a restart."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def inject(self, fault: Fault, where: str, times: int | None, after: int) -> int:
        with self._store.lock:
            pending = self._load()
            pending.append({"fault": asdict(fault), "where": where, "left": times, "after": after, "fired": 0})
            self._store.write_json("faults", pending)
            return len(pending) - 1

    def take(self, address: str) -> Fault | None:
        """The fault that hits this request, the one that was injected first; counts it."""
        with self._store.lock:
            pending = self._load()
            hit = None
            for entry in pending:
                if entry["left"] == 0 or not fnmatchcase(address, entry["where"]):
                    continue
                if entry["after"]:
                    entry["after"] -= 1
                    continue
                entry["fired"] += 1
                entry["left"] = None if entry["left"] is None else entry["left"] - 1
                hit = Fault(**entry["fault"])
                break
            if pending:
                self._store.write_json("faults", pending)
            return hit

    def fired(self, number: int) -> int:
        return int(self._load()[number]["fired"])

    def clear(self) -> None:
        """No fault happens any more; counters stay."""
        with self._store.lock:
            self._store.write_json("faults", [{**entry, "left": 0} for entry in self._load()])

    def _load(self) -> list[dict[str, Any]]:
        pending: list[dict[str, Any]] = self._store.read_json("faults", [])
        return pending
