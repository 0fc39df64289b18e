"""The process that talks to Qualcomm AI Hub. Not to be imported: run by ``aihub``.

Every step is in the journal the moment it is known, so a run that was killed goes on where it was. A
request that makes something (a model, a data set, a job) is never simply repeated: when its reply is lost, the service
is first asked for what bears the name that was given. For that the client's own repeating is switched off,
which knows of no such thing.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
from filelock import FileLock, Timeout

from lightning_quant.deploy.targets.aihub.journal import Journal
from lightning_quant.deploy.targets.target import folder_name
from lightning_quant.deploy.targets.worker import serve
from lightning_quant.errors import (
    ConfigurationError,
    DeviceError,
    DeviceTimeoutError,
    DeviceUnavailableError,
    LightningQuantError,
)

T = TypeVar("T")

# How far back a lost submission is looked for among the newest models, data sets and jobs.
_LOOK_BACK = 200
_PAGE = 50
# From this version of the Hexagon NPU on activations may have 16 bits.
_HEXAGON_WITH_INT16 = 69


class _Failed(Exception):
    """A job that the service says has failed."""


class _Gone(DeviceError):
    """What the journal knows is not at the service any more."""


class _Service:
    """The client, its requests made safe to lose.

    Args:
        profile: name of the configuration, see :class:`~lightning_quant.deploy.targets.aihub.target.AiHubTarget`.
        patience: seconds for which a failing request is tried again.
        deadline: :func:`time.monotonic` at which everything has to be done.
    """

    def __init__(self, profile: str | None, patience: float, deadline: float) -> None:
        import qai_hub
        from qai_hub import api_utils, public_rest_api
        from qai_hub.util import session

        session.MAX_RETRIES = 0  # it repeats POSTs whose reply is late or lost, and so makes things twice
        self.api = public_rest_api
        path = Path(api_utils.get_config_path(profile))
        try:
            self.config = api_utils.load_api_config_from_file(str(path))
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be read: {error.strerror or 'not there'}.") from None
        except Exception:  # configparser's message quotes the line, token included
            raise ConfigurationError(
                f"{path} is no valid configuration of AI Hub (not shown here, for it holds the token): expected "
                "[api] with api_token, api_url and web_url. Run `qai-hub configure --api_token <token>`."
            ) from None
        token = self.config.api_token
        if not token.isascii() or not token.isprintable() or " " in token:
            # an indented line after it belongs to it for configparser; requests would quote it in an error
            raise ConfigurationError(
                f"api_token in {path} holds spaces, line breaks or letters no token has (not shown here): expected one "
                "word. Run `qai-hub configure --api_token <token>` to write it anew."
            )
        self.config.verbose = False
        self.client = qai_hub.Client(config=self.config)
        self.hub = qai_hub
        self.patience = patience
        self.deadline = deadline

    def read(self, what: str, request: Callable[[], T]) -> T:
        """A request that changes nothing: repeated until it succeeds or patience ends."""
        return self._insist(what, request, lambda: None)

    def make(self, what: str, request: Callable[[], T], find: Callable[[], T | None]) -> T:
        """A request that makes something: before it is repeated, what it may have made is looked for."""
        return self._insist(what, request, find)

    def _insist(self, what: str, request: Callable[[], T], find: Callable[[], T | None]) -> T:
        from qai_hub import UserError

        give_up = min(time.monotonic() + self.patience, self.deadline)
        for attempt in count():
            try:
                if attempt and (found := find()) is not None:
                    return found
                return request()
            except UserError as error:
                if "could not be found" in str(error) or "expired dataset" in str(error):
                    raise _Gone(f"AI Hub does not know {what} any more: {self._without_token(error)}") from None
                raise DeviceError(f"AI Hub refused {what}: {self._without_token(error)}") from None
            except LightningQuantError:
                raise
            except Exception as error:  # the client raises what its parts raise: AssertionError, DecodeError …
                wait = min(0.5 * 2**attempt, 20.0)
                if self._status(error) == 404:
                    raise _Gone(f"AI Hub does not know {what} any more: {self._without_token(error)}") from None
                if self._is_final(error):
                    raise DeviceError(f"AI Hub refused {what}: {self._without_token(error)}") from None
                if time.monotonic() + wait > give_up:
                    self._give_up(what, error)
                time.sleep(wait)
        raise AssertionError

    def _status(self, error: Exception) -> int | None:
        return getattr(error, "status_code", None) or getattr(error.__cause__, "status_code", None)

    def _is_final(self, error: Exception) -> bool:
        status = self._status(error)
        return isinstance(status, int) and 400 <= status < 500 and status != 429

    def _give_up(self, what: str, error: Exception) -> NoReturn:
        reason = f"{type(error).__name__}: {self._without_token(error)}"
        if time.monotonic() >= self.deadline - 1:
            raise DeviceTimeoutError(
                f"AI Hub did not finish in time: {what} ({reason}). What was begun is in the journal; run again to go "
                "on with it."
            ) from None
        raise DeviceUnavailableError(
            f"AI Hub failed for {self.patience:g} s in a row at {what} ({reason}). What was begun is in the journal; "
            "run again to go on with it."
        ) from None

    def _without_token(self, error: Exception) -> str:
        text, token = str(error).strip() or "no reason given", self.config.api_token
        for secret in (token, repr(token)[1:-1]):  # some messages quote what was sent
            text = text.replace(secret, "***")
        return text

    def find_by_name(self, name: str, page: Callable[[int], list[Any]]) -> Any | None:
        """The newest thing of that name among the newest ones; ``page`` gives those from an offset on."""
        for offset in range(0, _LOOK_BACK, _PAGE):
            items = page(offset)
            for item in items:
                if item.name == name:
                    return item
            if len(items) < _PAGE:
                break
        return None


class _Push:
    """One bundle on its way to its devices."""

    def __init__(self, job: dict[str, Any], folder: Path) -> None:
        self.job = job
        self.scratch = folder
        self.deadline = time.monotonic() + job["timeout"]
        self.service = _Service(job["profile"], job["patience"], self.deadline)
        self.journal = Journal(Path(job["journal"]))

    def run(self) -> dict[str, Any]:
        pairs = [(device, runtime) for device in self.job["devices"] for runtime in self.job["runtimes"]]
        devices = {name: self._device(name) for name in self.job["devices"]}
        variants = ["quantized"] + (["float"] if self.job["float"] else [])
        runs = [_Run(self, devices[name], name, runtime, variant) for name, runtime in pairs for variant in variants]
        for step in (_Run.submit_compile, _Run.submit_inference, _Run.collect):  # all queue before one is waited for
            for run in runs:
                run.attempt(step)
        stopped = [run.stopped for run in runs if run.stopped]
        if stopped and not any(run.profile for run in runs if run.variant == "quantized"):
            raise stopped[0]
        results = []
        for name, runtime in pairs:
            mine = {run.variant: run for run in runs if (run.name, run.runtime) == (name, runtime)}
            results.append(self._result(mine["quantized"], mine.get("float")))
        return {"results": results}

    def _result(self, run: _Run, float_run: _Run | None) -> dict[str, Any]:
        result = run.result()
        if float_run is not None:
            result["jobs"] |= {f"float {what}": url for what, url in float_run.links.items()}
            result["float_profile"] = float_run.profile
            if reason := float_run.error or float_run.stopped:
                result["warnings"].append(f"The float network could not be measured: {reason}")
        return result

    def _device(self, name: str) -> Any:
        """The device as AI Hub lists it, refused before anything is uploaded if it cannot run the network."""
        client = self.service.client
        found = self.service.read("the list of devices", lambda: client.get_devices(name=name))
        if not found:
            import difflib

            known = sorted({one.name for one in self.service.read("the list of devices", client.get_devices)})
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            raise ConfigurationError(
                f"AI Hub has no device {name!r}: expected one of its {len(known)} devices"
                f"{', e.g. ' + ', '.join(near) if near else ''}. `qai-hub list-devices` lists them all."
            )
        device = found[-1]  # the newest system
        for runtime, framework in self.job["runtimes"].items():
            if f"framework:{framework}" not in device.attributes:
                offered = [one.partition(":")[2] for one in device.attributes if one.startswith("framework:")]
                raise ConfigurationError(
                    f"runtime={runtime!r} on {name}: it needs {framework}, the device offers "
                    f"{', '.join(offered) or 'nothing'}. Choose another runtime."
                )
        hexagon = next((int(one[9:]) for one in device.attributes if one.startswith("hexagon:v")), 0)
        if self.job["needs_int16"] and hexagon < _HEXAGON_WITH_INT16:
            chip = f"its Hexagon v{hexagon}" if hexagon else "its chip (no Hexagon NPU is named for it)"
            raise ConfigurationError(
                f"{self.job['needs_int16']} on {name}: expected an NPU with 16-bit activations, {chip} has 8-bit ones "
                "at most. Use w8a8 or w4a8, or a newer device."
            )
        return device

    def upload_model(self, source: dict[str, str]) -> str:
        """Id of the uploaded model."""
        key = f"model-{source['hash']}"
        service = self.service

        def upload(name: str) -> str:
            return service.client.upload_model(source["path"], name=name).model_id

        def find(name: str) -> str | None:
            found = service.find_by_name(name, lambda offset: service.client.get_models(offset, _PAGE))
            return found and found.model_id

        identity = self._make_once(key, "uploading the model", upload, find)

        def is_complete() -> bool:
            return service.api.get_model(service.config, identity).file_upload_complete

        with self.forgetting_what_is_gone(key):
            if not service.read("the uploaded model", is_complete):  # killed between its record and its last byte
                service.read(
                    "uploading the model", lambda: service.api.upload_model(service.config, source["path"], identity)
                )
        return identity

    def upload_inputs(self, path: Path) -> str:
        """Id of the uploaded data set."""
        key = f"inputs-{_short_hash(self.job['inputs_hash'], path.stem)}"
        service = self.service

        def upload(name: str) -> str:
            return service.client.upload_dataset(str(path), name=name).dataset_id

        def find(name: str) -> str | None:
            found = service.find_by_name(
                name, lambda offset: list(service.api.get_dataset_list(service.config, offset, _PAGE).datasets)
            )
            return found and found.dataset_id

        if (known := self.journal.entry(key).get("id")) and self._is_expired(key, known):
            self.journal.begin_again(key)
        identity = self._make_once(key, "uploading the samples", upload, find)

        def is_complete() -> bool:
            return service.api.get_dataset(service.config, identity).file_upload_complete

        with self.forgetting_what_is_gone(key):
            if not service.read("the uploaded samples", is_complete):
                service.read("uploading the samples", lambda: self._finish_dataset(identity, path))
        return identity

    @contextlib.contextmanager
    def forgetting_what_is_gone(self, key: str) -> Iterator[None]:
        """The next run makes anew what somebody deleted at the service."""
        try:
            yield
        except _Gone as error:
            self.journal.begin_again(key)
            raise DeviceError(f"{error} Run again to make it anew.") from None

    def _is_expired(self, key: str, dataset_id: str) -> bool:
        """Data sets expire after 30 days."""
        with self.forgetting_what_is_gone(key):
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
        """Link to the job under ``key``, submitted now or earlier."""
        client = self.service.client

        def find(name: str) -> str | None:
            found = self.service.find_by_name(name, lambda offset: client.get_job_summaries(offset, _PAGE))
            return found and found.job_id

        identity = self._make_once(key, what, lambda name: request(name).job_id, find)
        url = f"{self.service.config.web_url.rstrip('/')}/jobs/{identity}/"
        self.journal.note(key, url=url)
        return url

    def _make_once(self, key: str, what: str, request: Callable[[str], str], find: Callable[[str], str | None]) -> str:
        """The id in the journal; else that of what bears the name already; else of what is made now."""
        entry = self.journal.entry(key)
        if "id" in entry:
            return entry["id"]
        name = f"lq-{key}" + (f"-{entry['attempt']}" if "attempt" in entry else "")
        service = self.service
        found = None
        if entry.get("state") == "asked":  # an earlier run asked for it and never knew what became of that
            found = service.read(f"looking for {name}", lambda: find(name))
        self.journal.note(key, state="asked", name=name)
        identity = found or service.make(what, lambda: request(name), lambda: find(name))
        self.journal.note(key, state="made", id=identity)
        return identity

    def wait_for(self, key: str, what: str) -> Any:
        """The finished job under ``key``.

        Raises:
            _Failed: with the service's reason.
            DeviceTimeoutError: at the deadline.
        """
        identity = self.journal.entry(key)["id"]
        client = self.service.client
        with self.forgetting_what_is_gone(key):
            job = self.service.read(what, lambda: client.get_job(identity))
        pause = 0.25
        while not (status := self.service.read(what, job.get_status)).finished:
            pause = min(2 * pause, self.job["poll_seconds"])
            if time.monotonic() + pause > self.deadline:
                raise DeviceTimeoutError(
                    f"{what[:1].upper()}{what[1:]} ({identity}) was still {status.code} after {self.job['timeout']:g} "
                    "s. It goes on at AI Hub; run again to fetch what becomes of it."
                )
            time.sleep(pause)
        if not status.success:
            self.journal.begin_again(key)
            raise _Failed(f"{what} failed: {status.message or 'AI Hub gives no reason'}")
        return self.service.read(what, lambda: client.get_job(identity))  # only now its target model is whole


class _Run:
    """One network, quantized or float, on one device with one runtime."""

    def __init__(self, push: _Push, device: Any, name: str, runtime: str, variant: str) -> None:
        self.push = push
        self.device = device
        self.name = name
        self.runtime = runtime
        self.variant = variant
        self.source: dict[str, str] = push.job[variant]
        self.error: str | None = None
        self.stopped: DeviceError | None = None
        self.profile: dict[str, Any] | None = None
        self.versions: dict[str, str] = {}
        self.artifacts: dict[str, str] = {}
        self.warnings: list[str] = []
        self.folder = Path(push.job["folder"]) / folder_name(name, runtime)
        what = f"{self.source['hash']} {name} {runtime} {self.options}"
        self.compile_key = f"compile-{_short_hash(what)}"
        self.inference_key = f"inference-{_short_hash(what, push.job['inputs_hash'])}"
        self.links: dict[str, str] = {}

    @property
    def options(self) -> str:
        """Options of the compile job; the user's come last."""
        names = ",".join(self.push.job["output_names"])
        options = [f"--target_runtime {self.runtime}", f"--output_names {names}"]
        if self.variant == "quantized":
            as_bytes = self.runtime == "tflite" and self.push.job["precision"].endswith("a8")
            options.append("--quantize_io" + (" --quantize_io_type uint8" if as_bytes else ""))
        return " ".join([*options, self.push.job["options"]]).strip()

    def attempt(self, step: Callable[[_Run], None]) -> None:
        """Take a step unless an earlier one failed; what one device or network fails at does not end the others."""
        if self.error is None and self.stopped is None:
            try:
                step(self)
            except _Failed as error:
                self.error = str(error)
            except DeviceTimeoutError as error:  # still queued: others may have finished
                self.stopped = error
            except DeviceUnavailableError:
                raise
            except DeviceError as error:  # refused
                self.stopped = error

    def submit_compile(self) -> None:
        model_id = self.push.upload_model(self.source)
        client = self.push.service.client

        def request(name: str) -> Any:
            model = client.get_model(model_id)
            return client.submit_compile_job(model, self.device, name=name, options=self.options, retry=False)

        what = f"submitting the compile job for {self.name}"
        self.links["compile"] = self.push.submit(self.compile_key, what, request)

    def submit_inference(self) -> None:
        if not self.push.job["wait"] and not self._is_finished(self.compile_key):
            return
        job = self.push.wait_for(self.compile_key, f"the compile job for {self.name}")
        client, service = self.push.service.client, self.push.service
        target_id = job.get_target_model().model_id
        self.push.journal.note(self.compile_key, target_model_id=target_id)
        dataset_id = ""
        if "id" not in self.push.journal.entry(self.inference_key):  # else the samples have done their duty
            with self.push.forgetting_what_is_gone(self.compile_key):
                target = service.read("the compiled model", lambda: client.get_model(target_id))
            dataset_id = self.push.upload_inputs(self._inputs_for(target))

        def request(name: str) -> Any:
            dataset = client.get_dataset(dataset_id)
            model = client.get_model(target_id)
            return client.submit_inference_job(model, self.device, dataset, name=name, profile=True, retry=False)

        what = f"submitting the run on {self.name}"
        self.links["inference"] = self.push.submit(self.inference_key, what, request)

    def collect(self) -> None:
        key = self.inference_key
        if "id" not in self.push.journal.entry(key) or not (self.push.job["wait"] or self._is_finished(key)):
            return
        job = self.push.wait_for(key, f"the run on {self.name}")
        service = self.push.service
        self.profile = service.read("the profile", job.download_profile)
        result = service.read("the tool versions", lambda: service.api.get_job_results(service.config, job.job_id))
        self.versions = {tool.name: tool.version for tool in result.inference_job_result.detail.tool_versions}
        if self.variant == "float":
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        target_id = self.push.journal.entry(self.compile_key)["target_model_id"]
        with self.push.forgetting_what_is_gone(self.compile_key):
            target = service.read("the compiled model", lambda: service.client.get_model(target_id))
        partial = self.push.scratch / self.compile_key
        partial.mkdir(exist_ok=True)
        compiled = Path(service.read("downloading the compiled model", lambda: target.download(str(partial))))
        compiled = Path(shutil.move(compiled, self.folder / f"compiled{''.join(compiled.suffixes)}"))
        with self.push.forgetting_what_is_gone(key):
            data = service.read("downloading the outputs", lambda: job.download_output_data())
        outputs = self._outputs_of(data, target)
        np.savez(self.folder / "outputs.partial.npz", **outputs)  # type: ignore[arg-type]
        (self.folder / "outputs.partial.npz").replace(self.folder / "outputs.npz")
        self.artifacts = {"compiled": compiled.name, "outputs": "outputs.npz"}

    def _is_finished(self, key: str) -> bool:
        identity = self.push.journal.entry(key)["id"]
        client = self.push.service.client
        return self.push.service.read("a job's state", lambda: client.get_job(identity).get_status()).finished

    def _inputs_for(self, target: Any) -> Path:
        """The samples as the compiled model takes them: integers and layout by its specification."""
        from qai_hub.client import dataset_entries_to_h5

        entries = {}
        specs = _specs(target.input_spec)
        with np.load(self.push.scratch / "inputs.npz") as file:
            for position, name in enumerate(self.push.job["input_names"]):
                spec = specs.get(name) or (list(specs.values())[position] if len(specs) > position else None)
                given = list(file[name])
                entries[spec.name if spec else name] = [_as_specified(value, spec) for value in given]
        form = [f"{name} {values[0].dtype} {values[0].shape}" for name, values in entries.items()]
        scales = [f"{spec.scale} {spec.zero_point}" for spec in specs.values()]
        path = self.push.scratch / f"{_short_hash(*form, *scales)}.h5"
        if not path.is_file():
            import h5py

            with h5py.File(path, "w") as file:
                dataset_entries_to_h5(entries, file)
        return path

    def _outputs_of(self, data: dict[str, list[np.ndarray]], target: Any) -> dict[str, np.ndarray]:
        """Outputs by their names in the bundle, one row a sample, in float and in the bundle's layout."""
        names = self.push.job["output_names"]
        if not set(names) <= set(data):
            if len(data) != len(names):
                raise DeviceError(f"AI Hub returned the outputs {', '.join(data)}: expected {', '.join(names)}.")
            self.warnings.append(f"AI Hub calls the outputs {', '.join(data)}; taken in their order.")
            data = dict(zip(names, data.values(), strict=True))
            specs = dict(zip(names, _specs(target.output_spec).values(), strict=False))
        else:
            specs = _specs(target.output_spec)
        found = {}
        for name in names:
            rows = [_dequantized(value, specs.get(name)) for value in data[name]]
            shape = tuple(self.push.job["output_shapes"][name])
            found[name] = np.stack([_in_layout(row, shape) for row in rows])
        return found

    def result(self) -> dict[str, Any]:
        late = isinstance(self.stopped, DeviceTimeoutError)
        error = self.error or (str(self.stopped) if self.stopped and not late else None)
        status = "failed" if error else "finished" if self.profile is not None else "pending"
        chips = [one.removeprefix("chipset:") for one in self.device.attributes if one.startswith("chipset:")]
        soc = [chip.upper() for chip in chips if not chip.startswith("qualcomm-")]  # sm8650, not its trade name
        return {
            "device": self.name,
            "runtime": self.runtime,
            "status": status,
            "soc": soc[0] if soc else None,
            "jobs": self.links,
            "profile": self.profile,
            "versions": self.versions,
            "artifacts": self.artifacts,
            "warnings": [*self.warnings, str(self.stopped)] if late else self.warnings,
            "error": error,
        }


def _short_hash(*parts: str) -> str:
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:12]


def _specs(io_spec: dict[Any, list[Any]]) -> dict[str, Any]:
    """Tensors of a model's only graph by name."""
    return {spec.name: spec for specs in (io_spec or {}).values() for spec in specs}


def _as_specified(value: np.ndarray, spec: Any) -> np.ndarray:
    if spec is None:
        return value
    if spec.shape:
        value = _in_layout(value, tuple(spec.shape))
    kind = np.dtype(spec.dtype)
    if np.issubdtype(kind, np.integer) and spec.scale and np.issubdtype(value.dtype, np.floating):
        limits = np.iinfo(kind)
        return np.clip(np.rint(value / spec.scale) + (spec.zero_point or 0), limits.min, limits.max).astype(kind)
    return value


def _dequantized(value: np.ndarray, spec: Any) -> np.ndarray:
    if spec is not None and spec.scale and np.issubdtype(value.dtype, np.integer):
        return ((value.astype(np.float64) - (spec.zero_point or 0)) * spec.scale).astype(np.float32)
    return value


def _in_layout(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Channels first or last, whichever ``shape`` has; runtimes move them to the end."""
    if value.shape == shape or value.ndim != len(shape) or value.ndim < 3:
        return value
    for moved in (np.moveaxis(value, -1, 1), np.moveaxis(value, 1, -1)):
        if moved.shape == shape:
            return np.ascontiguousarray(moved)
    return value


@contextlib.contextmanager
def _leaving_nothing(folder: Path) -> Iterator[None]:
    """The client leaves temporary files behind: keep them in the folder that the parent removes."""
    tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = None


def work(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Push a bundle to its devices and bring back what came of it."""
    journal = Path(job["journal"])
    journal.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{journal}.lock", timeout=5), _leaving_nothing(folder):
            return _Push(job, folder).run()
    except Timeout:
        raise DeviceError(
            f"Another process is sending this bundle to AI Hub (it holds {journal}.lock): wait for it, then run again."
        ) from None


if __name__ == "__main__":
    serve(work)
