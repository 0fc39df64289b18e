"""The stand-in's jobs: a clock that walks each through its states, and a thread that does its work."""

from __future__ import annotations

import io
import threading
import time
import traceback

import h5py
from qai_hub import public_api_pb2 as pb
from qai_hub.util.dataset_entries_converters import dataset_entries_to_h5, h5_to_dataset_entries

from tests.aihub import compiler, runner
from tests.aihub.faults import Fault
from tests.aihub.store import Dataset, Job, Model, Store

State = int
"""Number of a ``pb.JobState``."""
DONE, FAILED = pb.JOB_STATE_DONE, pb.JOB_STATE_FAILED
TYPES = ("compile", "link", "inference")
QAIRT = "2.45.0.260326"
DAY = 24 * 3600.0
_HOLDS = "holds"
_GRAPH_NAMES = str(pb.MODEL_METADATA_KEY_QNN_MODEL_GRAPH_NAMES)


def request_of(job: Job) -> pb.Job:
    """The message that created a job."""
    return pb.Job.FromString(bytes.fromhex(job.request))


def on_the_way(job: Job) -> tuple[State, ...]:
    """The states of a job before its last; one that the client does not expect of its type stops a verbose client."""
    if job.type == "compile":
        return pb.JOB_STATE_CREATED, pb.JOB_STATE_OPTIMIZING_MODEL
    if job.type == "link":
        return pb.JOB_STATE_CREATED, pb.JOB_STATE_LINKING_MODELS
    profiling = request_of(job).inference_job.is_profiling_on
    last = pb.JOB_STATE_MEASURING_PERFORMANCE if profiling else pb.JOB_STATE_RUNNING_INFERENCE
    return pb.JOB_STATE_CREATED, pb.JOB_STATE_PROVISIONING_DEVICE, last


class Jobs:
    """Creates jobs, does their work in threads and tells their states.

    Args:
        store: where models, datasets and jobs are.
        frameworks: what each device can run, attributes by the device's name.
        tick: seconds that a state lasts at least; the state before the last also lasts until the work is done.
        float_outputs: whether outputs of a quantized type are delivered in float.
    """

    def __init__(self, store: Store, frameworks: dict[str, list[str]], tick: float, float_outputs: bool) -> None:
        self._store = store
        self._frameworks = frameworks
        self._tick = tick
        self._float_outputs = float_outputs
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []

    # --- life ---

    def start(self) -> None:
        """Go on with the work that a stop interrupted."""
        self._stopping = threading.Event()
        for job in self._store.all(Job):
            if not job.worked:
                self._begin(job)

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def create(self, kind: str, name: str, request: pb.Job, fault: Fault | None) -> Job:
        """Make the record of a job, and of the model a compile job makes, and begin with the work."""
        now = time.time()
        with self._store.lock:
            job = self._store.create(
                Job, name=name, created=now, started=now, type=kind, request=request.SerializeToString().hex()
            )
            job.stuck = fault is not None and fault.effect == "stuck"
            if kind == "compile":
                runtime = compiler.CompileOptions.parse(request.compile_job.options).runtime
                target = f"job_{job.id}_optimized{runtime.suffix}"
                job.target = self._store.create(
                    Model, name=target, created=now, type=runtime.model_type, producer=job.id
                ).id
            if kind == "link":
                target, kept = f"job_{job.id}_linked.bin", pb.MODEL_TYPE_QNN_CONTEXT_BINARY
                job.target = self._store.create(Model, name=target, created=now, type=kept, producer=job.id).id
            self._store.save(job)
        if fault is not None and fault.effect == "fail":
            self._finish(job, failure=fault.text)
        else:
            self._begin(job)
        return job

    # --- the clock ---

    def state(self, job: Job) -> State:
        """Where a job is now."""
        since = self._store.read_json(_HOLDS, {}).get(job.type)
        now = time.time() if since is None else since
        states = on_the_way(job)
        step = max(0, int((now - job.started) / self._tick))
        if step < len(states):
            return states[step]
        if job.stuck or not job.worked:
            return states[-1]
        return FAILED if job.failure else DONE

    def hold(self, kind: str) -> None:
        """Stop the clocks of all jobs of a type; new ones stay queued."""
        with self._store.lock:
            holds = self._store.read_json(_HOLDS, {})
            holds.setdefault(kind, time.time())
            self._store.write_json(_HOLDS, holds)

    def release(self, kind: str) -> None:
        """Let the clocks of jobs that were held start again."""
        with self._store.lock:
            held = [job for job in self._store.all(Job) if job.type == kind and self.state(job) not in (DONE, FAILED)]
            holds = self._store.read_json(_HOLDS, {})
            if holds.pop(kind, None) is None:
                return
            self._store.write_json(_HOLDS, holds)
            for job in held:
                self._store.change(Job, job.id, started=time.time())

    # --- the work ---

    def _begin(self, job: Job) -> None:
        thread = threading.Thread(target=self._work, args=(job.id,), daemon=True, name=f"aihub-{job.id}")
        self._threads.append(thread)
        thread.start()

    def _work(self, id: str) -> None:
        job = self._store.get(Job, id)
        failure, output = "", ""
        try:
            if job.type == "compile":
                self._compile(job)
            elif job.type == "link":
                self._link(job)
            else:
                output = self._infer(job)
        except runner.JobFailure as error:
            failure = str(error)
        except _Stopped:
            return
        except Exception:  # a mistake of the stand-in must show in the test, not hang it
            failure = f"The stand-in failed: {traceback.format_exc()}"
        self._finish(job, failure, output)

    def _finish(self, job: Job, failure: str = "", output: str = "") -> None:
        log = f"{job.type} job {job.id}: {failure or 'success'}\n"
        for name in ("device", "hub"):
            self._store.write(self._store.blob(f"{job.id}-{name}.log"), log.encode())
        self._store.change(Job, job.id, worked=True, failure=failure, output=output)

    def _compile(self, job: Job) -> None:
        request = request_of(job).compile_job
        options = compiler.CompileOptions.parse(request.options)
        for device in request.devices.devices:
            if options.runtime.framework not in self._frameworks[device.name]:
                raise runner.JobFailure(f"{device.name} cannot run {options.target_runtime} models.")
        source, upload = self._file(request.model.model_id)
        shapes = {spec.name: tuple(spec.tensor_type.shape) for spec in request.tensor_type_list.types}
        target = self._store.get(Model, job.target)
        opened = compiler.open_source(upload, source.type, source.is_directory)
        compiled = compiler.compile_source(opened, options, shapes, target.name)
        self._store.write(self._store.blob(target.id), compiled)
        metadata = {str(pb.MODEL_METADATA_KEY_QAIRT_SDK_VERSION): QAIRT}
        if target.type in (pb.MODEL_TYPE_QNN_DLC, pb.MODEL_TYPE_QNN_CONTEXT_BINARY):
            metadata[_GRAPH_NAMES] = options.graph_name or opened.model.graph.name
        interface = runner.interface(compiled).to_json()
        self._store.change(Model, target.id, complete=True, interface=interface, metadata=metadata)

    def _link(self, job: Job) -> None:
        """Put compiled graphs into one file, by their names."""
        graphs: dict[str, bytes] = {}
        for asked in request_of(job).link_job.models.models:
            model, compiled = self._file(asked.model_id)
            name = model.metadata[_GRAPH_NAMES]
            if model.type != pb.MODEL_TYPE_QNN_DLC or name in graphs:
                raise runner.JobFailure(f"Expected QNN DLC models with graphs of different names, got {name} again.")
            graphs[name] = compiled
        self._store.write(self._store.blob(job.target), runner.linked(graphs))
        self._store.change(Model, job.target, complete=True, metadata={_GRAPH_NAMES: ",".join(graphs)})

    def _infer(self, job: Job) -> str:
        """Compute the outputs and keep them as a dataset, whose id is returned; empty without inputs."""
        request = request_of(job).inference_job
        model, compiled = self._file(request.model.model_id)
        if not model.producer and model.type == compiler.ONNX:  # an ONNX model needs no compile job
            source = compiler.open_source(compiled, model.type, model.is_directory)
            compiled = compiler.compile_source(source, compiler.CompileOptions("onnx"), {}, "model.onnx.zip")
        if model.producer and self._store.get(Job, model.producer).type == "link":
            compiled = runner.graph_of(compiled, request.options)
        if not request.dataset.dataset_id:
            runner.run(compiled, runner.random_samples(runner.interface(compiled).inputs))
            return ""
        try:
            with h5py.File(self._store.blob(request.dataset.dataset_id), "r") as file:
                samples = h5_to_dataset_entries(file)
        except (OSError, KeyError, ValueError) as error:
            raise runner.JobFailure(f"The input dataset cannot be read: {error}") from None
        outputs = runner.run(compiled, dict(samples), self._float_outputs)
        content = io.BytesIO()
        with h5py.File(content, "w") as file:
            dataset_entries_to_h5(outputs, file)
        now = time.time()
        dataset = self._store.create(
            Dataset, name=f"{job.name}-output", created=now, expires=now + 30 * DAY, producer=job.id, complete=True
        )
        self._store.write(self._store.blob(dataset.id), content.getvalue())
        return dataset.id

    def _file(self, id: str) -> tuple[Model, bytes]:
        """A model and its file; if a job makes it, once that job is done."""
        model = self._store.get(Model, id)
        while model.producer:
            state = self.state(self._store.get(Job, model.producer))
            if state == FAILED:
                raise runner.JobFailure(f"Model {id} does not exist, since job {model.producer} failed.")
            if state == DONE:
                break
            if self._stopping.wait(self._tick):
                raise _Stopped
        if not model.complete and not model.producer:
            raise runner.JobFailure(f"The file of model {id} was never uploaded.")
        return self._store.get(Model, id), self._store.blob(id).read_bytes()


class _Stopped(Exception):
    """The stand-in stops; the work is done when it starts again."""
