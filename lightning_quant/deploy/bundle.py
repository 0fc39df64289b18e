"""The bundle: everything a device's compiler needs of one quantized network, written whole or not at all."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_quant.deploy import audit, parity
from lightning_quant.deploy.graph.files import ENCODINGS_VERSION, QDQ_OPSET, OnnxFiles, write_onnx
from lightning_quant.deploy.graph.qdq import exact_session
from lightning_quant.errors import CalibrationError, ExportError
from lightning_quant.precision import PRECISIONS
from lightning_quant.simulation.exportable import FLOAT_OPSET
from lightning_quant.simulation.inputs import NetworkInputs, tensors_in
from lightning_quant.simulation.manifest import FORMAT_VERSION
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.utilities.files import alone
from lightning_quant.utilities.parsing import check, check_version, fitting, read_json


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


def export_bundle(network: nn.Module | QuantizedNetwork, path: str | Path, samples: Iterable[NetworkInputs]) -> Bundle:
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
    known = QuantizedNetwork.of(network)
    if known is None or not known.calibrated:
        raise ExportError(
            "The network is not calibrated: expected one that was run by a callback's fit, validate, test or "
            "predict, or passed to calibrate()."
        )
    if path.exists() and not (path / "manifest.json").is_file():
        raise ExportError(
            f"{path} exists and is no bundle (it has no manifest.json): expected a new folder or an earlier "
            "bundle. Give another folder."
        )
    network = known
    with on_cpu_in_eval(network.network):
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
    folder = staging.path / f"{name}.aimet"
    folder.mkdir()
    float_onnx, encodings_file = folder / "model.onnx", folder / "model.encodings"
    qdq = staging.path / f"{name}.onnx"
    written = write_onnx(network, calls[0], float_onnx, qdq)
    encoded = [e["name"] for part in ("activation_encodings", "param_encodings") for e in written.encodings[part]]
    explained, missing = audit.unexplained(written.model, encoded, network.findings)
    if missing:
        raise ExportError(
            f"{len(missing)} tensors of the exported network have no encoding, e.g. {', '.join(missing[:5])}: the "
            "device would make ranges up for them. Expected a quantizer on each. Was one removed, or is there an "
            "operation AIMET does not quantize? Use nn modules for it, or run with strict=True to find it."
        )
    measured = parity.compare(_outputs(network, qdq, written, calls))
    parity.check(measured, network.recipe.precision)
    manifest = {
        **network.manifest().to_dict(),
        "name": name,
        "encodings_version": ENCODINGS_VERSION,
        "opset": {"float": FLOAT_OPSET, "qdq": QDQ_OPSET},
        "onnx": importlib.metadata.version("onnx"),
        "onnxruntime": importlib.metadata.version("onnxruntime"),
        **written.names,
        "bytes": {
            "float": float_onnx.stat().st_size,
            "quantized": qdq.stat().st_size,
        },
        "parity": {"tier": "onnxruntime", "reference": "simulation", **measured.as_dict()},
        "without_encoding": {name: str(explanation) for name, explanation in explained.items()},
        "files": {
            str(file.relative_to(staging.path)): {"sha256": _sha256(file), "bytes": file.stat().st_size}
            for file in (float_onnx, encodings_file, qdq)
        },
    }
    (staging.path / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def _outputs(
    network: QuantizedNetwork, qdq: Path, written: OnnxFiles, calls: Iterable[NetworkInputs]
) -> Iterator[tuple[list[np.ndarray], list[np.ndarray]]]:
    """Outputs of the simulation and of the QDQ file in ONNX Runtime, sample by sample."""
    session = exact_session(qdq)
    wanted = {value.name for value in session.get_inputs()}
    input_names, output_names = written.names["input_names"], written.names["output_names"]
    for sample in calls:
        given = zip(input_names, sample.tensors, strict=True)
        feeds = {name: tensor.numpy() for name, tensor in given if name in wanted}
        expected = [tensor.numpy() for tensor in tensors_in(sample.call(network.network))]
        answered = session.run(None, feeds)
        sizes = [[one.shape for one in outputs] for outputs in (expected, answered)]
        if sizes[0] != sizes[1]:
            raise ExportError(
                f"{network.float_class.__name__} answers a sample with {_sizes(output_names, sizes[0])}, "
                f"but the graph exported from another one with {_sizes(output_names, sizes[1])}: its size "
                "depends on values. Expected outputs of fixed sizes, the only ones a device compiles. Move the "
                "post-processing out of the network (return all scores and boxes, select in the step), or "
                "quantize the part before it (network='model.backbone')."
            )
        for index, name in enumerate(output_names):  # the device has rounded what it hands back
            if name in written.passed:
                expected[index] = written.passed[name].round(expected[index])
        yield expected, answered


def _sizes(names: Sequence[str], sizes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join(f"{name!r} of {list(size)}" for name, size in zip(names, sizes, strict=False))


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
