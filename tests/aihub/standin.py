"""A stand-in for Qualcomm AI Hub that the real ``qai_hub`` client talks to over HTTP, for tests without an account.

It keeps models, datasets and jobs, "compiles" by writing the encodings into the graph, computes outputs in ONNX
Runtime, remembers every request and, when asked to, fails in all the ways a cloud service does::

    with StandIn(tmp_path / "hub", token="t0ken") as hub, speed_up():
        client = qai_hub.Client(hub.config())
        hub.inject(faults.answer(401), faults.POLL, times=None, after=2)  # the token expires while waiting
        ...
        assert hub.duplicates() == []

What it knows of the service is what the client's source shows. It takes no model that the real one would refuse for
its operators, and its times are those of ``profile.json``.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any

import qai_hub

from tests.aihub.faults import Fault, Faults
from tests.aihub.jobs import DAY, TYPES, Jobs, request_of
from tests.aihub.messages import part_of
from tests.aihub.servers import ApiHandler, Behind, BlobHandler, Server
from tests.aihub.service import Service
from tests.aihub.store import Dataset, Job, Model, Request, Store

_HERE = Path(__file__).parent


class StandIn:
    """AI Hub on two ports of this machine: its interface, and the storage where files go.

    Everything is kept below ``folder``: another stand-in with the same folder, token and ports continues where this
    one was stopped, jobs included.

    Args:
        folder: is created.
        token: the only one that is let in; may be changed while it runs.
        ports: of interface and storage; 0 takes a free one, which a restart of the same object keeps.
        tick: seconds that each state of a job lasts at least.
        part_size: bytes of one part of a model's upload; small ones make uploads of many parts.
        profile: figures that every profile answers with, in the form of ``InferenceJob.download_profile``.
        float_outputs: whether outputs with a quantized type come back dequantized. It is not known which the real
            service does, so a program has to cope with both.
    """

    def __init__(
        self,
        folder: Path,
        token: str,
        *,
        ports: tuple[int, int] = (0, 0),
        tick: float = 0.02,
        part_size: int = 8 * 2**20,
        profile: Path = _HERE / "profile.json",
        float_outputs: bool = False,
    ) -> None:
        self.token = token
        self.ports = ports
        self._store = Store(folder)
        self._faults = Faults(self._store)
        self._part_size = part_size
        self._profile = profile
        self._catalog: dict[str, Any] = json.loads((_HERE / "catalog.json").read_bytes())
        frameworks = {device["name"]: device["attributes"] for device in self._catalog["devices"]}
        self._jobs = Jobs(self._store, frameworks, tick, float_outputs)
        self._stopping = threading.Event()
        self._servers: list[Server] = []
        self._life = threading.Lock()

    # --- life ---

    def start(self) -> StandIn:
        """Listen, and resume unfinished jobs."""
        with self._life:
            if self._stopping.is_set():  # faults.die may not have got to closing yet
                self._close()
            if not self._servers:
                self._stopping = threading.Event()
                self._servers = [Server(self.ports[0], ApiHandler), Server(self.ports[1], BlobHandler)]
                self.ports = (self._servers[0].server_port, self._servers[1].server_port)
                service = Service(self._store, self._jobs, self.blob_url, self._catalog, self._profile, self._part_size)
                behind = Behind(self._store, self._faults, service, lambda: self.token, self._stopping, self._die)
                self._jobs.start()
                for server in self._servers:
                    server.behind = behind
                    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Refuse connections from now on and break those that hang; nothing that was kept is lost."""
        with self._life:
            self._close()

    def _close(self) -> None:
        self._stopping.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()
        self._jobs.stop()
        self._servers = []

    def _die(self) -> None:
        """Stop from within a request, which a stop would wait for."""
        ours = self._stopping
        ours.set()

        def close() -> None:
            with self._life:
                if self._stopping is ours:
                    self._close()

        threading.Thread(target=close).start()

    @property
    def running(self) -> bool:
        """Whether it listens; :func:`faults.die` may have stopped it."""
        return bool(self._servers) and not self._stopping.is_set()

    def __enter__(self) -> StandIn:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # --- for the client ---

    @property
    def api_url(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}"

    @property
    def blob_url(self) -> str:
        return f"http://127.0.0.1:{self.ports[1]}"

    def config(self) -> qai_hub.ClientConfig:
        """For ``qai_hub.Client(…)``; nothing in it refers to the public service."""
        return qai_hub.ClientConfig(api_token=self.token, api_url=self.api_url, web_url=self.api_url, verbose=False)

    def write_ini(self, path: Path) -> Path:
        """The same as a ``client.ini``, for ``QAIHUB_CLIENT_INI`` or ``~/.qai_hub``."""
        lines = [f"api_token = {self.token}", f"api_url = {self.api_url}", f"web_url = {self.api_url}"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(["[api]", *lines, "verbose = False", ""]))
        return path

    # --- for the test: steering ---

    def inject(self, fault: Fault, where: str, times: int | None = 1, after: int = 0) -> int:
        """Let something go wrong; see :mod:`tests.aihub.faults` for what and where.

        Args:
            fault: what happens.
            where: to which requests.
            times: how often; ``None`` means always.
            after: how many of these requests are answered as usual before.

        Returns:
            A number for :meth:`fired`.

        Raises:
            ValueError: if the fault does not fit the requests.
        """
        starts = {"fail": "POST jobs", "stuck": "POST jobs", "status": "POST "}
        if not where.startswith(starts.get(fault.effect, "")):
            raise ValueError(f"{fault.effect!r} happens to {starts[fault.effect]!r} only, not to {where!r}")
        return self._faults.inject(fault, where, times, after)

    def fired(self, number: int) -> int:
        """How often a fault has happened."""
        return self._faults.fired(number)

    def clear_faults(self) -> None:
        """Nothing goes wrong any more."""
        self._faults.clear()

    def hold(self, kind: str = "") -> None:
        """Keep jobs of this type (``"compile"``, ``"link"``, ``"inference"``; all by default) from running, new ones queued."""
        for each in [kind] if kind else TYPES:
            self._jobs.hold(each)

    def release(self, kind: str = "") -> None:
        """End :meth:`hold`."""
        for each in [kind] if kind else TYPES:
            self._jobs.release(each)

    def expire_datasets(self) -> None:
        """As if 30 days had passed."""
        for dataset in self._store.all(Dataset):
            self._store.change(Dataset, dataset.id, expires=time.time() - DAY)

    def forget(self, id: str) -> None:
        """Delete the record of a model, dataset or job, as someone else with access to the account could."""
        kinds: dict[str, type[Model] | type[Dataset] | type[Job]] = {"m": Model, "d": Dataset, "j": Job}
        self._store.forget(kinds[id[0]], id)

    # --- for the test: what happened ---

    def blob(self, id: str) -> bytes:
        """The file of a model or dataset, as it was uploaded or made."""
        return self._store.blob(id).read_bytes()

    def requests(self) -> list[Request]:
        """All requests on both ports in order, those that were refused or broken included."""
        return self._store.requests()

    def posts(self, kind: str) -> list[str]:
        """The names in all POSTs that were to create a ``"models"``, ``"datasets"`` or ``"jobs"``, in order."""
        paths = {"models", "datasets", "jobs"}
        assert kind in paths, f"{kind!r} is none of {paths}"
        return [
            request.name
            for request in self.requests()
            if request.method == "POST" and request.path.strip("/").split("/")[-1] == request.kind == kind
        ]

    def models(self) -> list[Model]:
        """Uploaded models, oldest first; :meth:`targets` has those that compile jobs make."""
        return [model for model in self._store.all(Model) if not model.producer]

    def targets(self) -> list[Model]:
        return [model for model in self._store.all(Model) if model.producer]

    def datasets(self) -> list[Dataset]:
        """Uploaded datasets, oldest first."""
        return [dataset for dataset in self._store.all(Dataset) if not dataset.producer]

    def jobs(self, kind: str = "") -> list[Job]:
        """All jobs, or those of a type, oldest first."""
        return [job for job in self._store.all(Job) if kind in ("", job.type)]

    def duplicates(self) -> list[str]:
        """What was created more than once: models and datasets by name, jobs by name, type, options and devices.

        For each device of a list the client creates a job of its own with the same name: these are not duplicates.
        """
        made = [f"model {model.name}" for model in self.models()]
        made += [f"dataset {dataset.name}" for dataset in self.datasets()]
        for job in self.jobs():
            asked = part_of(request_of(job), job.type)
            devices = asked.devices.devices if job.type == "compile" else [asked.device]
            on = ", ".join(device.name for device in devices)
            made.append(f"{job.type} job {job.name} on {on} {asked.options}".rstrip())
        return sorted(what for what, count in Counter(made).items() if count > 1)
