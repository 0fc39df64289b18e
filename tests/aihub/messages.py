"""The stand-in's records as the protobuf messages that the client reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp  # type: ignore[import-untyped]
from qai_hub import public_api_pb2 as pb
from qai_hub.api_utils import io_spec_to_tensor_type_list_pb
from qai_hub.public_rest_api import TensorSpec

from tests.aihub import runner
from tests.aihub.jobs import DONE, FAILED, QAIRT, State, request_of
from tests.aihub.store import Dataset, Job, Model

USER = pb.User(id=1, first_name="Stand", last_name="In", email="standin@example.com", org_id=1)
_DEVICE_LOG, _HUB_LOG = pb.JOB_ARTIFACT_TYPE_DEVICE_LOG, pb.JOB_ARTIFACT_TYPE_HUB_LOG
LOGS: dict[int, str] = {_DEVICE_LOG: "device", _HUB_LOG: "hub"}
_TOOLS = [pb.ToolVersion(name="QAIRT", version=QAIRT)]


def timestamp(seconds: float) -> Timestamp:
    return Timestamp(seconds=int(seconds))


def created(record: Model | Dataset | Job) -> pb.CreateUpdateResponse:
    """The answer to everything that creates or changes something."""
    response = pb.CreateUpdateResponse(id=record.id, creation_time=timestamp(record.created))
    if isinstance(record, Dataset) and not record.permanent:
        response.expiration_time.CopyFrom(timestamp(record.expires))
    return response


def model(record: Model, finished: bool = True) -> pb.Model:
    """A model; of one whose job has not finished, the file and what is known of it are not there yet."""
    message = pb.Model(
        model_id=record.id,
        owner=USER,
        name=record.name,
        creation_time=timestamp(record.created),
        model_type=pb.ModelType.ValueType(record.type),
        file_upload_complete=record.complete and finished,
        is_directory=record.is_directory,
    )
    if record.producer:
        message.producer_id = record.producer
    if record.interface and finished:
        interface = runner.Interface.from_json(record.interface)
        message.input_spec.CopyFrom(_spec(interface.inputs))
        message.output_spec.CopyFrom(_spec(interface.outputs))
        message.metadata.entries.update({int(key): value for key, value in record.metadata.items()})
    return message


def _spec(tensors: tuple[runner.Tensor, ...]) -> pb.NamedTensorTypeList:
    specs = [TensorSpec(t.name, t.dtype, t.shape, t.scale, t.zero_point) for t in tensors]
    return io_spec_to_tensor_type_list_pb({None: specs})


def dataset(record: Dataset) -> pb.Dataset:
    message = pb.Dataset(
        dataset_id=record.id,
        owner=USER,
        name=record.name,
        creation_time=timestamp(record.created),
        file_upload_complete=record.complete,
        permanent=record.permanent,
    )
    if not record.permanent:
        message.expiration_time.CopyFrom(timestamp(record.expires))
    return message


def part_of(request: pb.Job, kind: str) -> Any:
    """What a request says of the type of its job."""
    return getattr(request, f"{kind}_job")


def job(record: Job, state: State, source: pb.Model, target: pb.Model | None, inputs: pb.Dataset | None) -> pb.Job:
    """A job: what was asked for, its state, its model, and for one that makes a model its target, from the beginning."""
    message = request_of(record)
    message.hub_version = "stand-in"
    part = part_of(message, record.type)
    setattr(part, f"{record.type}_job_id", record.id)
    part.name, part.job_state = record.name, state
    part.user.CopyFrom(USER)
    if record.type != "link":
        part.model.CopyFrom(source)
    part.creation_time.CopyFrom(timestamp(record.created))
    part.start_time.CopyFrom(timestamp(record.started))
    if record.type == "compile":
        part.device.CopyFrom(part.devices.devices[0])
        assert target is not None
        part.target_model.CopyFrom(target)
        part.target_tensor_type_list.CopyFrom(target.input_spec)
    elif target is not None:
        part.target_model.CopyFrom(target)
    elif inputs is not None:
        part.dataset.CopyFrom(inputs)
    if state == DONE and record.type == "inference":
        part.tensor_type_list.CopyFrom(source.input_spec)
    if state == FAILED:
        part.failure_reason = record.failure
        message.failure_type = pb.JOB_FAILURE_TYPE_MODEL_UNKNOWN
    if state in (DONE, FAILED):
        message.available_artifacts.extend([_DEVICE_LOG, _HUB_LOG] if record.type == "inference" else [_HUB_LOG])
    return message


def job_summary(record: Job, state: State, profile: Mapping[str, Any]) -> pb.JobSummary:
    request = request_of(record)
    message = pb.JobSummary()
    part: Any
    if record.type == "compile":
        part, device = message.compile_job_summary, request.compile_job.devices.devices[0]
    elif record.type == "link":
        part, device = message.link_job_summary, request.link_job.device
    else:
        part, device = message.inference_job_summary, request.inference_job.device
        part.is_profiling_on = request.inference_job.is_profiling_on
        if state == DONE:
            detail = profile_detail(profile)
            part.execution_time = detail.execution_time
            part.execution_peak_memory.CopyFrom(detail.execution_memory.peak)
    part.job_id, part.name, part.job_state = record.id, record.name, state
    part.user.CopyFrom(USER)
    part.creation_time.CopyFrom(timestamp(record.created))
    part.device_name, part.device_os_version = device.name, device.os
    return message


def job_result(record: Job, profile: Mapping[str, Any]) -> pb.JobResult:
    """What a finished job leaves; the layers only if the job profiled."""
    if record.type == "compile":
        tools = pb.CompileDetail(tool_versions=_TOOLS)
        return pb.JobResult(compile_job_result=pb.CompileJobResult(compile_job_id=record.id, compile_detail=tools))
    if record.type == "link":
        return pb.JobResult(link_job_result=pb.LinkJobResult(link_job_id=record.id))
    detail = profile_detail(profile)
    if not request_of(record).inference_job.is_profiling_on:
        del detail.layer_details[:]
    result = pb.InferenceJobResult(inference_job_id=record.id, output_dataset_id=record.output, detail=detail)
    return pb.JobResult(inference_job_result=result)


def profile_detail(profile: Mapping[str, Any]) -> pb.ProfileDetail:
    """The message from which the client makes this dictionary (``InferenceJob.download_profile``)."""
    summary = profile["execution_summary"]
    detail = pb.ProfileDetail(
        major_version=1,
        minor_version=2,
        execution_time=summary["estimated_inference_time"],
        after_execution_peak_memory=summary["estimated_inference_peak_memory"],
        tool_versions=_TOOLS,
    )
    stages = {"compile": "compile", "first_load": "cold_load", "warm_load": "warm_load", "inference": "execution"}
    for theirs, stage in stages.items():
        if theirs != "inference":
            setattr(detail, f"{stage}_time", summary[f"{theirs}_time"])
            setattr(detail, f"after_{stage}_peak_memory", summary[f"{theirs}_peak_memory"])
        getattr(detail, f"all_{stage}_times").extend(summary[f"all_{theirs}_times"])
        increase, peak = (summary[f"{theirs}_memory_{part}_range"] for part in ("increase", "peak"))
        if increase is not None and peak is not None:
            memory = getattr(detail, f"{stage}_memory")
            memory.increase.CopyFrom(pb.Range(lower=increase[0], upper=increase[1]))
            memory.peak.CopyFrom(pb.Range(lower=peak[0], upper=peak[1]))
    for layer in profile["execution_detail"]:
        unit = pb.ComputeUnit.Value(f"COMPUTE_UNIT_{layer['compute_unit']}")
        measured = {key: layer[key] for key in ("execution_time", "execution_cycles") if key in layer}
        detail.layer_details.add(name=layer["name"], layer_type_name=layer["type"], compute_unit=unit, **measured)
    return detail
