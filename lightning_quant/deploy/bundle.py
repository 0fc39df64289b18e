"""The bundle: everything a device's compiler needs of one quantized network, written whole or not at all."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_quant.deploy import audit, parity
from lightning_quant.deploy.biases import rescale_biases, update_encodings
from lightning_quant.errors import CalibrationError, ExportError
from lightning_quant.files import alone
from lightning_quant.precision import PRECISIONS
from lightning_quant.reading import check, check_version, fitting, read_json
from lightning_quant.simulation import aimet
from lightning_quant.simulation.inputs import NetworkInputs, tensors_in
from lightning_quant.simulation.network import FORMAT_VERSION, QuantizedNetwork

# Version of AIMET's encodings file. 1.0.0 is what AI Hub is documented to read.
ENCODINGS_VERSION = "1.0.0"
# 16-bit activations and 4-bit weights exist in QuantizeLinear from this opset on.
_QDQ_OPSET = 21
_FLOAT_OPSET = 17


@dataclass(frozen=True)
class Bundle:
    """The files of one exported network.

    Args:
        path: the folder of the bundle, ``<name>``.
        manifest: content of its ``manifest.json``.
    """

    path: Path
    manifest: dict[str, Any]

    @property
    def aimet(self) -> Path:
        """Folder ``<name>.aimet`` with exactly ``model.onnx`` and ``model.encodings``: what AI Hub takes."""
        return self.path / f"{self.path.name}.aimet"

    @property
    def qdq(self) -> Path:
        """ONNX file with integer weights and QuantizeLinear/DequantizeLinear: what ONNX Runtime takes."""
        return self.path / f"{self.path.name}.onnx"

    @property
    def needs_int16(self) -> str | None:
        """What in the network has 16-bit activations, which not every chip computes; ``None`` if nothing has."""
        precision = self.manifest["precision"]
        if precision.endswith("a16"):
            return precision
        layers = {**self.manifest["overrides"], **self.manifest["raised"]}
        fine = [f"{name} in {value}" for name, value in layers.items() if value.endswith("a16")]
        return f"{precision} with {', '.join(fine)}" if fine else None


def export_bundle(network: QuantizedNetwork, path: str | Path, samples: Iterable[NetworkInputs]) -> Bundle:
    """Export a calibrated network, check the files against the simulation, and put them in place.

    Everything is written to a folder ``.<name>.new`` beside ``path`` and renamed at the end, so a full disk or a
    kill leaves the previous bundle, or none, but never half of one; the next export removes what is left over. Two
    exports into one folder at a time are refused.

    Args:
        network: the calibrated network.
        path: folder of the bundle; its last part names the files. An earlier bundle there is replaced.
        samples: calls to compare simulation and export on, e.g. some calibration samples. At least one. The files are
            for the size that the network was built with, or that of the first sample if none has it; they are compared
            on samples of that size.

    Returns:
        The bundle; its manifest holds hashes, versions, sizes, parity and the tensors without encodings.

    Raises:
        ExportError: when not calibrated, a tensor lacks an encoding, or the files cannot be written.
        ParityError: when ONNX Runtime computes something else from the files than the simulation.
    """
    path = Path(path).absolute()
    if not network.calibrated:
        raise ExportError(
            "The network is not calibrated: expected one that was run by a callback's fit, validate, test or "
            "predict, or passed to calibrate()."
        )
    if path.exists() and not (path / "manifest.json").is_file():
        raise ExportError(
            f"{path} exists and is no bundle (it has no manifest.json): expected a new folder or an earlier "
            "bundle. Give another folder."
        )
    with on_cpu_in_eval(network):
        calls = [call.to(torch.device("cpu")).batched_like(network.inputs) for call in samples]
        if not calls:
            raise ExportError("No samples to check the export with: expected at least one.")
        calls = first_samples(calls, sum(call.batch_size for call in calls), network.inputs)
        busy = ExportError(
            f"Another process is exporting to {path}: expected a folder for each. Give another folder or name, or wait."
        )
        try:
            with alone(path.with_name(f".{path.name}.lock"), busy):
                manifest = _write_whole(network, path, calls)
        except OSError as error:
            raise ExportError(
                f"Writing the bundle {path} failed: {error}. Nothing was changed there; free some space or choose "
                "another folder that is writable and export again."
            ) from error
    return Bundle(path, manifest)


def _write_whole(network: QuantizedNetwork, path: Path, calls: Sequence[NetworkInputs]) -> dict[str, Any]:
    staging, retired = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    if retired.is_dir() and not path.exists():  # killed between the two renames
        os.replace(retired, path)
    for leftover in (staging, retired):
        shutil.rmtree(leftover, ignore_errors=True)
    staging.mkdir()
    try:
        manifest = _write(network, Bundle(staging, {}), path.name, calls)
        _move_into_place(staging, path, retired)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return manifest


def load_bundle(path: str | Path) -> Bundle:
    """Read a bundle and check that its files are the ones it was written with.

    Raises:
        ExportError: naming the file that is missing or changed.
    """
    path = Path(path).absolute()
    try:
        manifest = _read_manifest(path / "manifest.json")
        digests = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    except (OSError, ValueError) as error:
        raise ExportError(
            f"{path} is no bundle: its manifest.json cannot be read ({error}). Export it again."
        ) from error
    bundle = Bundle(path, manifest)
    for name, digest in digests.items():
        file = path / name
        if not file.resolve().is_relative_to(path.resolve()) or not file.is_file():
            raise ExportError(f"The bundle {path} lacks {name!r}; export it again.")
        if _sha256(file) != digest:
            raise ExportError(f"{name!r} in the bundle {path} was changed since the export; export it again.")
    own = {str(file.relative_to(path)) for file in (bundle.qdq, *_uploaded(bundle.aimet))}
    if unknown := sorted(own - digests.keys()):  # all that lies there goes to a device
        raise ExportError(
            f"{unknown[0]!r} in the bundle {path} is none of the files in its manifest.json: expected those of the "
            "export, in a folder of the name they were exported to. Rename it, or export it again."
        )
    return bundle


def _uploaded(folder: Path) -> set[Path]:
    found = set(folder.iterdir()) if folder.is_dir() else set()
    return {folder / "model.onnx", folder / "model.encodings", *found}


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest with everything in it that a target goes by.

    Raises:
        OSError, ValueError: when it is missing or damaged.
    """
    manifest = read_json(path)
    check_version(manifest, FORMAT_VERSION)
    fitting(manifest, dict[str, Any])
    kinds = {
        "files": dict[str, dict[str, Any]],
        "precision": str,
        "overrides": dict[str, str],
        "raised": dict[str, str],
        "input_names": list[str],
        "output_names": list[str],
        "bytes": dict[str, int],
    }
    for name, kind in kinds.items():
        check(name in manifest, name, None, "the field to be there")
        fitting(manifest[name], kind, name)
    check(manifest["precision"] in PRECISIONS, "precision", manifest["precision"], f"one of {', '.join(PRECISIONS)}")
    for name in ("overrides", "raised"):
        for layer, precision in manifest[name].items():
            check(precision in PRECISIONS, f"{name}.{layer}", precision, f"one of {', '.join(PRECISIONS)}")
    for name, entry in manifest["files"].items():
        fitting(entry.get("sha256"), str, f"files.{name}.sha256")
    return dict(manifest)


def _write(network: QuantizedNetwork, staging: Bundle, name: str, calls: Sequence[NetworkInputs]) -> dict[str, Any]:
    import onnx

    folder = staging.path / f"{name}.aimet"
    folder.mkdir()
    float_onnx, encodings_file = folder / "model.onnx", folder / "model.encodings"
    qdq = staging.path / f"{name}.onnx"
    example = calls[0]
    names = dict(zip(("input_names", "output_names"), _names(network, example), strict=True))
    tensors = tuple(example.tensors)
    with aimet.quiet() as aimet_torch:
        from aimet_torch.onnx import _remove_dangling_nodes_and_initializers

        try:
            network.sim.onnx.export(
                tensors,
                str(float_onnx),
                encoding_version=ENCODINGS_VERSION,
                opset_version=_FLOAT_OPSET,
                dynamo=False,
                **names,
            )
            aimet_torch.onnx.export(
                network.sim.model,
                tensors,
                str(qdq),
                opset_version=_QDQ_OPSET,
                prequantize_constants=True,
                dynamo=False,
                **names,
            )
        except OSError:
            raise
        except Exception as error:  # PyTorch's exporter adds the whole graph to what it says
            said = str(error).strip().splitlines()[0]
            raise ExportError(
                f"{network.float_class.__name__} cannot be written as ONNX: {type(error).__name__}: {said} Expected "
                "operations that ONNX has, at sizes it can express: try torch.onnx.export(..., dynamo=False) on the "
                "float network."
            ) from error
        quantized = onnx.load(qdq)
        parameters = network.sim.model.named_parameters()
        biases = {name: value.detach().numpy() for name, value in parameters if name.endswith("bias")}
        coarser = rescale_biases(quantized, biases)
        onnx.save(quantized, qdq)
        # tracing leaves the quantizers' own constants behind, used by nothing
        model = onnx.load(float_onnx)
        _remove_dangling_nodes_and_initializers(model)
        onnx.save(model, float_onnx)
    encodings = json.loads(encodings_file.read_text())
    if coarser:
        update_encodings(encodings, coarser)
        encodings_file.write_text(json.dumps(encodings, indent=2) + "\n")
    encoded = [e["name"] for part in ("activation_encodings", "param_encodings") for e in encodings[part]]
    reasons, missing = audit.unexplained(model, encoded, network.findings)
    if missing:
        raise ExportError(
            f"{len(missing)} tensors of the exported network have no encoding, e.g. {', '.join(missing[:5])}: the "
            "device would make ranges up for them. Expected a quantizer on each. Was one removed, or is there an "
            "operation AIMET does not quantize? Use nn modules for it, or run with strict=True to find it."
        )
    measured = parity.compare(_outputs(network, qdq, names["input_names"], calls))
    parity.check(measured, network.recipe.precision)
    manifest = {
        **network.manifest(),
        "name": name,
        "encodings_version": ENCODINGS_VERSION,
        "opset": {"float": _FLOAT_OPSET, "qdq": _QDQ_OPSET},
        "onnx": importlib.metadata.version("onnx"),
        "onnxruntime": importlib.metadata.version("onnxruntime"),
        **names,
        "bytes": {
            "float": float_onnx.stat().st_size,
            "quantized": qdq.stat().st_size,
        },
        "parity": {"tier": "onnxruntime", "reference": "simulation", **measured.as_dict()},
        "without_encoding": reasons,
        "files": {
            str(file.relative_to(staging.path)): {"sha256": _sha256(file), "bytes": file.stat().st_size}
            for file in (float_onnx, encodings_file, qdq)
        },
    }
    (staging.path / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def _outputs(
    network: QuantizedNetwork, qdq: Path, input_names: Sequence[str], calls: Iterable[NetworkInputs]
) -> Iterator[tuple[list[np.ndarray], list[np.ndarray]]]:
    """Outputs of the simulation and of the QDQ file in ONNX Runtime, sample by sample."""
    session = exact_session(qdq)
    wanted = {value.name for value in session.get_inputs()}
    for sample in calls:
        feeds = {
            name: tensor.numpy() for name, tensor in zip(input_names, sample.tensors, strict=True) if name in wanted
        }
        expected = [tensor.numpy() for tensor in tensors_in(sample.call(network))]
        yield expected, session.run(None, feeds)


def exact_session(path: Path) -> Any:
    """An ONNX Runtime session on the host's CPU that computes every node as it is written."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # The optimized integer kernels saturate on CPUs without VNNI (57 → 35 dB).
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def single_samples(call: NetworkInputs) -> Iterator[NetworkInputs]:
    """The samples of a call, one call each."""
    return (call.samples(index, index + 1) for index in range(call.batch_size))


def first_samples(
    calls: Iterable[NetworkInputs], count: int, like: NetworkInputs | None = None, among: int | None = None
) -> list[NetworkInputs]:
    """The first ``count`` samples of a stream of calls, one call each, all of one size: a file has fixed shapes.

    Of a step that calls the network several times they are dealt out over its calls, so that states that begin at
    zero are not zero in all of them.

    Args:
        calls: of the network, of any size.
        count: how many samples are wanted.
        like: a call of the size that is wanted. If no sample has it, that of the first one is taken.
        among: look no further than this number of samples. Default: to the end.

    Raises:
        CalibrationError: if there is none.
    """
    like = None if like is None else like.first(1)
    wanted: list[NetworkInputs] = []
    others: list[NetworkInputs] = []
    for index, samples in enumerate(_by_sample(calls)):
        for size, found in ((like, wanted), (others[0] if others else None, others)):
            fitting = [one for one in samples if size is not None and one.has_sizes_of(size)]
            if fitting:
                found.append(fitting[index % len(fitting)])
                break
        else:
            if not others:
                same_structure = (one for one in samples if like is not None and one.ranks == like.ranks)
                others.append(next(same_structure, samples[0]))
        if len(others if like is None else wanted) >= count or index + 1 == among:
            break
    if not wanted and not others:
        raise CalibrationError("The data loader gave no batch: expected at least one sample.")
    return (wanted or others)[:count]


def _by_sample(calls: Iterable[NetworkInputs]) -> Iterator[list[NetworkInputs]]:
    """For each sample, what each call of its step was given of it."""
    step: list[NetworkInputs] = []
    for call in calls:
        step.append(call)
        if call.last:
            for index in range(max(one.batch_size for one in step)):
                yield [one.samples(index, index + 1) for one in step if index < one.batch_size]
            step = []


def _names(network: QuantizedNetwork, example: NetworkInputs) -> tuple[list[str], list[str]]:
    """Names of the graph's inputs and outputs, from the network's own signature and output structure."""
    parameters = inspect.signature(network.network.forward).parameters.values()
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    positional += [f"input_{index}" for index in range(len(positional), len(example.args))]  # of *args
    given = [*zip(positional, example.args, strict=False), *example.kwargs.items()]
    inputs = [label for name, value in given for label in _label(value, name, is_top=True)]
    outputs = _label(example.call(network), "output", is_top=True)
    unique: list[str] = []
    for label in [*inputs, *outputs]:  # in ONNX, inputs and outputs share one namespace
        names = chain([label], (f"{label}_{number}" for number in count(1)))
        unique.append(next(name for name in names if name not in unique))
    return unique[: len(inputs)], unique[len(inputs) :]


def _label(structure: Any, name: str, is_top: bool = False) -> list[str]:
    """One name for every tensor in a structure: its keys or positions, joined by underscores."""
    if isinstance(structure, torch.Tensor):
        return [name]
    if isinstance(structure, dict):
        items = [(str(key) if is_top else f"{name}_{key}", value) for key, value in structure.items()]
    elif isinstance(structure, (list, tuple)):
        items = [(f"{name}_{index}", value) for index, value in enumerate(structure)]
    else:  # a dataclass: whatever tensors_in finds
        items = [(f"{name}_{index}", value) for index, value in enumerate(tensors_in(structure))]
    return [label for key, value in items for label in _label(value, key)]


@contextmanager
def on_cpu_in_eval(network: nn.Module) -> Iterator[None]:
    """Export happens on the CPU in eval mode, without gradients; afterwards all is as it was."""
    modes = {module: module.training for module in network.modules()}
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    try:
        network.cpu().eval()
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        network.to(device)
        for module, training in modes.items():  # frozen parts may be in another mode than the whole
            module.training = training


def _move_into_place(staging: Path, path: Path, retired: Path) -> None:
    for file in staging.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    if path.exists():
        os.replace(path, retired)
        try:
            os.replace(staging, path)
        except OSError:
            os.replace(retired, path)
            raise
        finally:
            shutil.rmtree(retired, ignore_errors=True)
    else:
        os.replace(staging, path)


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def float_bytes(network: nn.Module) -> int:
    """Bytes of a network's parameters and buffers in float32."""
    return sum(tensor.numel() * 4 for tensor in [*network.parameters(), *network.buffers()])
