"""One network, quantized or float, on one device with one runtime."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from lightning_quant.deploy.targets.aihub.job import Graph, Job, Outcome, Source
from lightning_quant.deploy.targets.aihub.link import Link, graph_name
from lightning_quant.deploy.targets.aihub.submissions import JobFailed, Submissions
from lightning_quant.deploy.targets.aihub.tensors import as_specified, dequantized, in_layout, specs_of
from lightning_quant.deploy.targets.target import folder_name
from lightning_quant.errors import DeviceError, DeviceTimeoutError, DeviceUnavailableError
from lightning_quant.utilities.files import atomic_write
from lightning_quant.utilities.hashing import short_hash


class Variant(Enum):
    """Which network is run."""

    QUANTIZED = "quantized"
    FLOAT = "float"


class DeviceRun:
    """The steps of one run, and what came of it.

    Args:
        job: what was asked for.
        submissions: of the bundle.
        scratch: folder of the worker, for temporary files.
        device: as the client lists it.
        name: of the device.
        runtime: what to compile to.
        variant: which network.
        graph: for which input size.
        source: the file of that network.

    Attributes:
        link: the job that puts this graph and those of other sizes into one binary, if that was asked for.
    """

    def __init__(
        self,
        job: Job,
        submissions: Submissions,
        scratch: Path,
        device: Any,
        name: str,
        runtime: str,
        variant: Variant,
        graph: Graph,
        source: Source,
    ) -> None:
        self.job = job
        self.submissions = submissions
        self.service = submissions.service
        self.journal = submissions.journal
        self.scratch = scratch
        self.device = device
        self.name = name
        self.runtime = runtime
        self.variant = variant
        self.graph = graph
        self.source = source
        self.links_graphs = job.link and len(job.graphs) > 1 and variant is Variant.QUANTIZED
        self.link: Link | None = None
        self.error: str | None = None
        self.stopped: DeviceError | None = None
        self.profile: dict[str, Any] | None = None
        self.versions: dict[str, str] = {}
        self.artifacts: dict[str, str] = {}
        self.warnings: list[str] = []
        self.folder = Path(job.folder) / folder_name(name, runtime) / graph.size
        what = f"{source.hash} {name} {runtime} {self.options}"
        self.compile_key = f"compile-{short_hash(what)}"
        self.inference_key = f"inference-{short_hash(f'{what} {graph.inputs_hash}')}"
        self.links: dict[str, str] = {}

    @property
    def options(self) -> str:
        """Options of the compile job; the user's come last."""
        runtime = "qnn_dlc" if self.links_graphs else self.runtime  # what a link job takes
        options = [f"--target_runtime {runtime}", f"--output_names {','.join(self.job.output_names)}"]
        if self.links_graphs:
            options.append(f"--qnn_graph_name {graph_name(self.graph.size)}")
        if self.variant is Variant.QUANTIZED:
            as_bytes = self.runtime == "tflite" and self.job.activation_bits == 8
            options.append("--quantize_io" + (" --quantize_io_type uint8" if as_bytes else ""))
        return " ".join([*options, self.job.options]).strip()

    def attempt(self, step: Callable[[DeviceRun], None]) -> None:
        """Take a step unless an earlier one failed; what one device or network fails at does not end the others."""
        if self.error is None and self.stopped is None:
            try:
                step(self)
            except JobFailed as error:
                self.error = str(error)
            except DeviceTimeoutError as error:  # still queued: others may have finished
                self.stopped = error
            except DeviceUnavailableError:
                raise
            except DeviceError as error:  # refused
                self.stopped = error

    def submit_compile(self) -> None:
        """Upload the network and submit its compile job."""
        model_id = self.submissions.upload_model(self.source)
        client = self.service.client

        def request(name: str) -> Any:
            model = client.get_model(model_id)
            return client.submit_compile_job(model, self.device, name=name, options=self.options, retry=False)

        what = f"submitting the compile job for {self.name}"
        self.links["compile"] = self.submissions.submit(self.compile_key, what, request)

    def submit_inference(self) -> None:
        """Wait for the compiled model, upload the samples and submit the run; later if waiting was not asked for."""
        before = [self.compile_key] if self.link is None else [self.link.key]
        if not self.job.wait and not self._all_finished(before):
            return
        if self.link is not None:
            self.journal.note(self.link.key, target_model_id=self.link.wait())
        job = self.submissions.wait_for(self.compile_key, f"the compile job for {self.name}")
        client = self.service.client
        target_id = job.get_target_model().model_id
        self.journal.note(self.compile_key, target_model_id=target_id)
        dataset_id = ""
        if "id" not in self.journal.entry(self.inference_key):  # else the samples are not needed any more
            with self.submissions.forgetting_if_gone(self.compile_key):
                target = self.service.read("the compiled model", lambda: client.get_model(target_id))
            dataset_id = self.submissions.upload_inputs(self._inputs_for(target), self.graph.inputs_hash)
        options = "" if self.link is None else f"--qnn_options context_enable_graphs={graph_name(self.graph.size)}"

        def request(name: str) -> Any:
            dataset = client.get_dataset(dataset_id)
            model = client.get_model(self._run_id)
            return client.submit_inference_job(
                model, self.device, dataset, name=name, options=options, profile=True, retry=False
            )

        what = f"submitting the run on {self.name}"
        self.links["inference"] = self.submissions.submit(self.inference_key, what, request)

    def collect(self) -> None:
        """Wait for the run and fetch its profile, the compiled model and the outputs."""
        key = self.inference_key
        if "id" not in self.journal.entry(key) or not (self.job.wait or self._is_finished(key)):
            return
        job = self.submissions.wait_for(key, f"the run on {self.name}")
        service = self.service
        self.profile = service.read("the profile", job.download_profile)
        result = service.read("the tool versions", lambda: service.api.get_job_results(service.config, job.job_id))
        self.versions = {tool.name: tool.version for tool in result.inference_job_result.detail.tool_versions}
        if self.variant is Variant.FLOAT:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        target_id = self.journal.entry(self.compile_key)["target_model_id"]
        with self.submissions.forgetting_if_gone(self.compile_key):
            target = service.read("the compiled model", lambda: service.client.get_model(target_id))
        downloads = self.scratch / self.compile_key
        downloads.mkdir(exist_ok=True)
        with self.submissions.forgetting_if_gone(self.compile_key if self.link is None else self.link.key):
            runs = service.read("the compiled model", lambda: service.client.get_model(self._run_id))
        compiled = Path(service.read("downloading the compiled model", lambda: runs.download(str(downloads))))
        compiled = Path(shutil.move(compiled, self.folder / f"compiled{''.join(compiled.suffixes)}"))
        with self.submissions.forgetting_if_gone(key):
            data = service.read("downloading the outputs", lambda: job.download_output_data())
        outputs = self._outputs_of(data, target)
        with atomic_write(self.folder / "outputs.npz") as partial:
            np.savez(partial, **outputs)  # type: ignore[arg-type]
        self.artifacts = {"compiled": compiled.name, "outputs": "outputs.npz"}

    def submit_link(self) -> None:
        """Submit the job that links this graph with those of other sizes, if that was asked for."""
        if self.link is not None and (self.job.wait or self._all_finished(self.link.compile_keys)):
            self.link.submit()
            self.links["link"] = self.link.url

    @property
    def _run_id(self) -> str:
        """The model that runs: the compiled one, or what it was linked into."""
        key = self.compile_key if self.link is None else self.link.key
        identity: str = self.journal.entry(key)["target_model_id"]
        return identity

    def _all_finished(self, keys: Iterable[str]) -> bool:
        return all("id" in self.journal.entry(key) and self._is_finished(key) for key in keys)

    def _is_finished(self, key: str) -> bool:
        identity = self.journal.entry(key)["id"]
        client = self.service.client
        finished: bool = self.service.read("a job's state", lambda: client.get_job(identity).get_status()).finished
        return finished

    def _inputs_for(self, target: Any) -> Path:
        """Write the samples as the compiled model takes them: integers and layout by its specification."""
        from qai_hub.client import dataset_entries_to_h5

        entries = {}
        specs = specs_of(target.input_spec)
        with np.load(self.scratch / self.graph.inputs) as file:
            for position, name in enumerate(self.job.input_names):
                spec = specs.get(name) or (list(specs.values())[position] if len(specs) > position else None)
                given = list(file[name])
                entries[spec.name if spec else name] = [as_specified(value, spec) for value in given]
        form = [f"{name} {values[0].dtype} {values[0].shape}" for name, values in entries.items()]
        scales = [f"{spec.scale} {spec.zero_point}" for spec in specs.values()]
        path = self.scratch / f"{short_hash(' '.join([*form, *scales]))}.h5"
        if not path.is_file():
            import h5py

            with h5py.File(path, "w") as file:
                dataset_entries_to_h5(entries, file)
        return path

    def _outputs_of(self, data: dict[str, list[np.ndarray]], target: Any) -> dict[str, np.ndarray]:
        """Return outputs by their names in the bundle, one row a sample, in float and in the bundle's layout."""
        names = self.job.output_names
        if not set(names) <= set(data):
            if len(data) != len(names):
                raise DeviceError(f"AI Hub returned the outputs {', '.join(data)}: expected {', '.join(names)}.")
            self.warnings.append(f"AI Hub calls the outputs {', '.join(data)}; taken in their order.")
            data = dict(zip(names, data.values(), strict=True))
            specs = dict(zip(names, specs_of(target.output_spec).values(), strict=False))
        else:
            specs = specs_of(target.output_spec)
        found = {}
        for name in names:
            rows = [dequantized(value, specs.get(name)) for value in data[name]]
            shape = tuple(self.graph.output_shapes[name])
            found[name] = np.stack([in_layout(row, shape) for row in rows])
        return found

    def outcome(self) -> Outcome:
        """Return what came of the run so far."""
        late = isinstance(self.stopped, DeviceTimeoutError)
        error = self.error or (str(self.stopped) if self.stopped and not late else None)
        chips = [one.removeprefix("chipset:") for one in self.device.attributes if one.startswith("chipset:")]
        soc = [chip.upper() for chip in chips if not chip.startswith("qualcomm-")]  # sm8650, not its trade name
        return Outcome(
            self.name,
            self.runtime,
            self.graph.size,
            status="failed" if error else "finished" if self.profile is not None else "pending",
            soc=soc[0] if soc else None,
            jobs=dict(self.links),
            profile=self.profile,
            versions=self.versions,
            artifacts=self.artifacts,
            warnings=[*self.warnings, str(self.stopped)] if late else list(self.warnings),
            error=error,
        )
