"""Real phones: Qualcomm AI Hub compiles the bundle for a device, runs it there and measures it.

The client library runs in a process of its own (:mod:`~lightning_quant.deploy.targets.aihub.worker`): it can block for
minutes where this package promises limits, it keeps the token in objects that end up in pickles, and it prints. The
token stays in the user's ``client.ini`` and in that process.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import socket
import tempfile
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from typing_extensions import override

from lightning_quant.deploy.bundle import Bundle, load_bundle
from lightning_quant.deploy.device_report import DeviceReport
from lightning_quant.deploy.graph.structure import structure_sha256
from lightning_quant.deploy.samples import Tensors
from lightning_quant.deploy.socs import check_activations
from lightning_quant.deploy.targets.aihub.job import (
    RUNTIMES,
    DeviceCheck,
    DevicesFound,
    Graph,
    Job,
    Outcome,
    Outcomes,
    Source,
)
from lightning_quant.deploy.targets.aihub.profile import Profile
from lightning_quant.deploy.targets.target import LONGEST, Measured, Target, folder_name
from lightning_quant.deploy.targets.worker import run_worker
from lightning_quant.errors import ConfigurationError, DeviceError, DeviceUnavailableError
from lightning_quant.recipe import QuantRecipe
from lightning_quant.utilities.hashing import arrays_hash, short_hash
from lightning_quant.utilities.parsing import check, read_arrays

SOURCES = ("aimet", "qdq")
JOURNAL_NAME = "journal.json"

# The worker keeps the limits itself; should its library hang, it is killed this much later.
_GRACE = 60.0
# Before training devices are only looked up, and not for longer than a user waits for nothing.
_CHECK_SECONDS, _CHECK_GRACE = 6.0, 4.0


class AiHubTarget(Target):
    """Devices in Qualcomm's device farm.

    Args:
        devices: their names, as AI Hub lists them.
        runtimes: what to compile to, of :data:`RUNTIMES`.
        options: more options for the compile job, e.g. ``"--qairt_version 2.40"``; they come last and so override.
        profile: name of the file in ``~/.qai_hub`` with URL and token, without ``.ini``. Default: the one
            in the environment variable ``QAIHUB_CLIENT_INI``, or ``client``.
        source: what to upload: ``"aimet"`` (ONNX and encodings) or ``"qdq"`` (QuantizeLinear/DequantizeLinear).
        compare_float: compile and measure the float network as well, to know how much faster the quantized one is.
        wait: wait for the results. Otherwise upload, submit and return; :func:`~lightning_quant.deploy.push.resume`
            fetches them later.
        timeout: seconds for everything, waiting for jobs in the queue included.
        patience: seconds for which a failing service is asked again before giving up.
        link: link the graphs of all input sizes of a bundle into one context binary, which holds their weights once;
            with the runtime ``qnn_context_binary`` only. Otherwise each is compiled to a file of its own.

    Raises:
        ConfigurationError: for an unknown runtime or source, or a limit that is not a time.
    """

    name = "aihub"

    def __init__(
        self,
        devices: Sequence[str],
        runtimes: Sequence[str] = ("qnn_dlc",),
        options: str = "",
        profile: str | None = None,
        source: Literal["aimet", "qdq"] = "aimet",
        compare_float: bool = True,
        wait: bool = True,
        timeout: float = 3600.0,
        patience: float = 120.0,
        poll_seconds: float = 10.0,
        link: bool = False,
    ) -> None:
        if unknown := [one for one in runtimes if one not in RUNTIMES]:
            raise ConfigurationError(f"Unknown runtime {unknown[0]!r}: expected one of {', '.join(RUNTIMES)}.")
        if source not in SOURCES:
            raise ConfigurationError(f"Unknown source {source!r}: expected one of {', '.join(SOURCES)}.")
        if not devices or not runtimes:
            raise ConfigurationError("No device or no runtime given: expected at least one of each.")
        if link and list(runtimes) != ["qnn_context_binary"]:
            raise ConfigurationError(
                f"link=True with the runtime {', '.join(runtimes)}: expected qnn_context_binary alone, the only one "
                "that holds several graphs. Give runtime='qnn_context_binary', or leave link out."
            )
        for name, value in {"timeout": timeout, "patience": patience, "poll_seconds": poll_seconds}.items():
            if not 0 < value <= LONGEST:
                raise ConfigurationError(f"{name}={value!r}: expected seconds above 0, at most {LONGEST:.0f}.")
        if profile is not None and Path(profile).name != profile:
            raise ConfigurationError(
                f"profile={profile!r}: expected a plain file name without a folder, of a file in ~/.qai_hub."
            )
        self.devices = list(devices)
        self.runtimes = list(runtimes)
        self.options = options
        self.profile = profile
        self.source = source
        self.compare_float = compare_float
        self.wait = wait
        self.timeout = timeout
        self.patience = patience
        self.poll_seconds = poll_seconds
        self.link = link

    @property
    def config_path(self) -> Path:
        """The file with URL and token that the client reads."""
        default = Path.home() / ".qai_hub" / f"{self.profile or 'client'}.ini"
        return default if self.profile else Path(os.environ.get("QAIHUB_CLIENT_INI", default)).expanduser()

    @override
    def unavailable(self) -> str | None:
        path = self.config_path
        if not path.is_file():
            return f"there is no AI Hub token at {path}: run `qai-hub configure --api_token <token>` once"
        found = re.search(r"^\s*api_url\s*[=:]\s*(\S+)", path.read_text(errors="replace"), re.MULTILINE)
        if not found:
            return f"{path} has no api_url: run `qai-hub configure --api_token <token>` to write it again"
        url = urllib.parse.urlsplit(found[1])
        host = url.hostname or ""
        if url.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host):
            return None  # a proxy knows the way, and a probe of our own does not
        try:
            socket.create_connection((host, url.port or (443 if url.scheme == "https" else 80)), timeout=2).close()
        except OSError as error:
            return f"AI Hub at {host} cannot be reached ({error})"
        return None

    @override
    def check_recipe(self, recipe: QuantRecipe) -> None:
        what = recipe.int16_activations
        for device in self.devices:
            check_activations(device, what)
        if self.unavailable() is not None:
            return
        job = DeviceCheck(self.profile, self.devices, self.runtimes, what, _CHECK_SECONDS)
        worker = "lightning_quant.deploy.targets.aihub.devices"
        with tempfile.TemporaryDirectory(prefix="lightning-quant-aihub-") as scratch:
            try:
                run_worker(worker, job, Path(scratch), _CHECK_SECONDS + _CHECK_GRACE, DevicesFound)
            except DeviceUnavailableError:
                raise DeviceUnavailableError("AI Hub gave no list of its devices within a few seconds.") from None

    @override
    def check(self, bundle: Bundle) -> None:
        load_bundle(bundle.path)  # every file is the one that was exported

    @override
    def run(self, bundle: Bundle, inputs: list[Tensors], folder: Path) -> list[Measured]:
        return self.run_sizes([(bundle, inputs)], folder)[0]

    @override
    def run_sizes(self, graphs: Sequence[tuple[Bundle, list[Tensors]]], folder: Path) -> list[list[Measured]]:
        """Compile and run all graphs at the same time, linked into one context binary if that was asked for."""
        bundle, _ = graphs[0]
        sizes = {one.manifest.size if one.stem != one.path.name else "": one for one, _ in graphs}
        with tempfile.TemporaryDirectory(prefix="lightning-quant-aihub-") as scratch:
            work = Path(scratch)
            job = Job(
                profile=self.profile,
                graphs=[
                    self._graph(size, one, inputs, work)
                    for (size, one), (_, inputs) in zip(sizes.items(), graphs, strict=True)
                ],
                link=self.link,
                input_names=bundle.manifest.input_names,
                output_names=bundle.output_names,
                activation_bits=bundle.manifest.precision.activation_bits,
                int16_activations=bundle.manifest.int16_activations,
                devices=self.devices,
                runtimes=self.runtimes,
                options=self.options,
                wait=self.wait,
                timeout=self.timeout,
                patience=self.patience,
                poll_seconds=self.poll_seconds,
                journal=str((folder / JOURNAL_NAME).absolute()),
                locks=str(Path(tempfile.gettempdir()) / f"lightning-quant-{short_hash(str(Path.home()))}"),
                folder=str(folder.absolute()),
            )
            worker = "lightning_quant.deploy.targets.aihub.worker"
            outcomes = run_worker(worker, job, work, self.timeout + _GRACE, Outcomes)
        try:
            measured = [
                [self._measured(one, sizes[size], folder) for one in outcomes.results if one.size == size]
                for size in sizes
            ]
        except (OSError, ValueError) as error:
            raise DeviceError(
                f"AI Hub returned a profile or outputs that cannot be read: {error}. Expected those of its client "
                f"qai-hub {importlib.metadata.version('qai-hub')}; they are in {folder}. Run again."
            ) from error
        reports = [one.report for found in measured for one in found]
        if all(report.status == "failed" for report in reports):
            raise DeviceError("; ".join(f"{report.device}: {report.error}" for report in reports))
        return measured

    def _graph(self, size: str, bundle: Bundle, inputs: list[Tensors], work: Path) -> Graph:
        name = f"inputs{size}.npz"
        np.savez(work / name, **_stacked(inputs))  # type: ignore[arg-type]
        return Graph(
            size=size,
            quantized=self._quantized_source(bundle, work),
            float_network=_float_source(bundle) if self.compare_float else None,
            inputs=name,
            inputs_hash=arrays_hash(inputs),
            output_shapes=_shapes(bundle),
        )

    def _quantized_source(self, bundle: Bundle, work: Path) -> Source:
        """Return what is uploaded, zipped here: the client would leave its temporary zip file behind."""
        if self.source == "qdq" or bundle.manifest.app is not None:  # edges are integers of the QDQ file alone
            return Source(str(bundle.device_file), _hash(bundle, bundle.device_file))
        path = work / f"{bundle.stem}.aimet.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for file in sorted(bundle.aimet.iterdir()):
                archive.write(file, f"model.aimet/{file.name}")
        return Source(str(path), _hash(bundle, *sorted(bundle.aimet.iterdir())))

    def _measured(self, outcome: Outcome, bundle: Bundle, folder: Path) -> Measured:
        where = folder / folder_name(outcome.device, outcome.runtime) / outcome.size
        report = DeviceReport(
            tier=self.name,
            device=outcome.device,
            precision=bundle.manifest.precision,
            status=outcome.status,
            soc=outcome.soc,
            runtime=outcome.runtime,
            versions={"qai-hub": importlib.metadata.version("qai-hub"), **outcome.versions},
            jobs=outcome.jobs,
            artifacts=outcome.artifacts,
            error=outcome.error,
        )
        if outcome.profile:
            _fill_in(report, Profile.from_json(outcome.profile, "profile"))
        if outcome.float_profile:
            report.float_latency_us = Profile.from_json(outcome.float_profile, "float_profile").latency_us
        report.validate()
        if "compiled" in report.artifacts:
            report.bytes["compiled"] = (where / report.artifacts["compiled"]).stat().st_size
        report.warnings += outcome.warnings
        outputs: list[Tensors] = []
        if "outputs" in report.artifacts:
            file = where / Path(report.artifacts["outputs"]).name
            try:
                arrays = read_arrays(file)
                check(len(arrays) > 0, "the number of outputs", 0, "at least one")
                check(all(value.ndim > 0 for value in arrays.values()), "an output", "a number", "a row per sample")
            except (OSError, ValueError) as error:
                raise DeviceError(f"{file} holds no outputs: {error}. Run again to fetch it again.") from error
            count = min(len(value) for value in arrays.values())
            outputs = [{name: value[index] for name, value in arrays.items()} for index in range(count)]
        return Measured(report, outputs, where)


def _stacked(inputs: list[Tensors]) -> Tensors:
    return {name: np.stack([tensors[name] for tensors in inputs]) for name in inputs[0]}


def _float_source(bundle: Bundle) -> Source:
    """Return the float network, named by its structure: only its latency counts, whatever the weights are."""
    path = bundle.aimet / "model.onnx"
    try:
        return Source(str(path), short_hash(structure_sha256(path)))
    except Exception as error:  # of protobuf's own classes
        raise DeviceError(f"{path} cannot be read as ONNX: {error}. Export it again.") from error


def _hash(bundle: Bundle, *files: Path) -> str:
    return short_hash("".join(bundle.manifest.files[str(file.relative_to(bundle.path))].sha256 for file in files))


def _shapes(bundle: Bundle) -> dict[str, list[int]]:
    """Return the shapes of the graph's outputs, to recognize a layout that the compiler changed."""
    import onnx

    try:
        graph = onnx.load(bundle.device_file, load_external_data=False).graph
    except Exception as error:  # of protobuf's own classes
        raise DeviceError(f"{bundle.device_file} cannot be read as ONNX: {error}. Export it again.") from error
    return {value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in graph.output}


def _fill_in(report: DeviceReport, profile: Profile) -> None:
    """Copy the figures of a profile into a report."""
    report.latency_us = profile.latency_us
    report.load_us = profile.load_us
    report.memory_bytes = profile.memory_bytes
    report.layers = profile.layers
    elsewhere = [name for unit, names in (profile.layers or {}).items() if unit != "NPU" for name in names]
    if elsewhere:
        report.fallen_back = dict.fromkeys(elsewhere, "not said by AI Hub")
        report.warnings.append(f"{len(elsewhere)} layers do not run on the NPU, e.g. {elsewhere[0]}.")
