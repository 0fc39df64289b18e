"""What the stand-in remembers, as files below one folder, so that it continues after a restart."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar


@dataclass
class Record:
    """What models, datasets and jobs have in common.

    Args:
        id: the kind's letter and a number in order of creation, always 7 characters.
        name: as its creator called it.
        created: seconds since the epoch.
    """

    kind: ClassVar[str]

    id: str
    name: str
    created: float


@dataclass
class Model(Record):
    """An uploaded model, or what a compile job makes.

    Args:
        type: number of its ``ModelType``.
        is_directory: whether its file is a zipped folder.
        producer: the compile job, if one makes it.
        size: bytes that the upload announced.
        complete: whether its file is there.
        interface: names, types and shapes of its inputs and outputs, of a compiled one.
        metadata: strings by the number of their ``ModelMetadataKey``.
    """

    kind: ClassVar[str] = "models"

    type: int
    is_directory: bool = False
    producer: str = ""
    size: int = 0
    complete: bool = False
    interface: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass
class Dataset(Record):
    """Uploaded inputs, or what an inference job computed (``producer``)."""

    kind: ClassVar[str] = "datasets"

    expires: float
    permanent: bool = False
    producer: str = ""
    complete: bool = False


@dataclass
class Job(Record):
    """A compile or inference job.

    Args:
        type: ``"compile"`` or ``"inference"``.
        request: the message that asked for it, serialized, in hexadecimal digits.
        started: when its clock began; later than its creation if it was held.
        target: the model that a compile job makes.
        output: the dataset that an inference job makes.
        worked: whether its work is done; it is reported once its clock has run down too.
        failure: why it fails, once it has worked.
        stuck: whether it never ends.
    """

    kind: ClassVar[str] = "jobs"

    type: str
    request: str
    started: float
    target: str = ""
    output: str = ""
    worked: bool = False
    failure: str = ""
    stuck: bool = False


class Request(NamedTuple):
    """One HTTP request, as the log has it.

    Args:
        method: ``"GET"``, ``"POST"`` …
        path: without host and query.
        kind: the collection, e.g. ``"models"``, or ``"blobs"`` on the second port.
        name: the name in the message that a POST creates something with, otherwise empty.
    """

    method: str
    path: str
    kind: str
    name: str


R = TypeVar("R", bound=Record)


class Store:
    """Records as JSON files, blobs as they are; every write is whole or not there.

    Args:
        folder: is created.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = threading.RLock()
        for name in (Model.kind, Dataset.kind, Job.kind, "blobs"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def create(self, cls: type[R], **values: Any) -> R:
        with self.lock:
            number = 1 + max((int(path.stem[1:]) for path in self._files(cls)), default=0)
            record = cls(id=f"{cls.kind[0]}{number:06d}", **values)
            self.save(record)
            return record

    def find(self, cls: type[R], id: str) -> R | None:
        path = self.folder / cls.kind / f"{id}.json"
        with self.lock:
            return self._load(cls, path) if path.is_file() else None

    def get(self, cls: type[R], id: str) -> R:
        record = self.find(cls, id)
        if record is None:
            raise KeyError(f"no {cls.__name__.lower()} {id}")
        return record

    def all(self, cls: type[R]) -> list[R]:
        """Oldest first."""
        with self.lock:
            return [self._load(cls, path) for path in self._files(cls)]

    def save(self, record: Record) -> None:
        with self.lock:
            self.write(self.folder / record.kind / f"{record.id}.json", json.dumps(asdict(record)).encode())

    def change(self, cls: type[R], id: str, **values: Any) -> R:
        with self.lock:
            record = self.get(cls, id)
            for name, value in values.items():
                setattr(record, name, value)
            self.save(record)
            return record

    def forget(self, cls: type[Record], id: str) -> None:
        with self.lock:
            (self.folder / cls.kind / f"{id}.json").unlink()

    def blob(self, name: str) -> Path:
        return self.folder / "blobs" / name

    def write(self, path: Path, content: bytes) -> None:
        with self.lock:
            staging = path.with_name(f".{path.name}.part")
            staging.write_bytes(content)
            os.replace(staging, path)

    def read_json(self, name: str, default: Any) -> Any:
        with self.lock:
            path = self.folder / f"{name}.json"
            return json.loads(path.read_bytes()) if path.is_file() else default

    def write_json(self, name: str, value: Any) -> None:
        self.write(self.folder / f"{name}.json", json.dumps(value).encode())

    def log(self, request: Request) -> None:
        with self.lock, (self.folder / "requests.jsonl").open("a") as file:
            file.write(json.dumps(request) + "\n")

    def requests(self) -> list[Request]:
        with self.lock:
            path = self.folder / "requests.jsonl"
            return [Request(*json.loads(line)) for line in path.open()] if path.is_file() else []

    def _files(self, cls: type[Record]) -> list[Path]:
        return sorted((self.folder / cls.kind).glob("[a-z]*.json"))

    @staticmethod
    def _load(cls: type[R], path: Path) -> R:
        values = json.loads(path.read_bytes())
        return cls(**{field.name: values[field.name] for field in fields(cls)})
