"""Export: a calibrated network written as a bundle, checked against the simulation, whole or not at all."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from lightning_quant.deploy import audit, parity
from lightning_quant.deploy.blame.file import compare_file
from lightning_quant.deploy.blame.result import BLAME_NAME, Blame, LayerBlame, write_blames
from lightning_quant.deploy.bundle import MANIFEST_NAME, Bundle
from lightning_quant.deploy.edges.app import contract_of, fit_edges, quantize_own, warn_of_other_pixels, write_app
from lightning_quant.deploy.edges.contract import CONTRACT_NAME, ClassLabel
from lightning_quant.deploy.edges.spec import Edges
from lightning_quant.deploy.graph.files import ENCODINGS_VERSION, QDQ_OPSET, OnnxFiles, write_onnx
from lightning_quant.deploy.graph.qdq import exact_session, written_wrongly
from lightning_quant.deploy.hosts.write import write_hosts
from lightning_quant.deploy.manifest import AppManifest, BundleFile, BundleManifest, BundleSize
from lightning_quant.deploy.single_samples import calls_given, first_samples
from lightning_quant.deploy.sizes import (
    InputSize,
    Size,
    SizedCalls,
    check_same_graph,
    check_sizes,
    main_label,
    sized_calls,
)
from lightning_quant.errors import ExportError, ParityError
from lightning_quant.recipe import QuantRecipe
from lightning_quant.simulation.exportable import FLOAT_OPSET
from lightning_quant.simulation.inputs import NetworkInputs, tensors_in
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.utilities.files import exclusive_lock
from lightning_quant.utilities.hashing import file_sha256
from lightning_quant.utilities.modules import on_cpu_in_eval

log = logging.getLogger(__name__)

OnParity = Literal["raise", "warn"]
# Samples that are compared layer by layer at a time, until there is one whose outputs do not agree.
_COMPARED_BY_LAYER = 2
# Samples on which a graph with edges is compared with the host; pixels are compared one and all.
_SAMPLES_WITH_EDGES = 4


def export_bundle(
    network: nn.Module | QuantizedNetwork,
    path: str | Path,
    samples: Tensor | NetworkInputs | Iterable[Tensor | NetworkInputs],
    on_parity: OnParity = "raise",
    sizes: Sequence[Size] = (),
    inputs: Any = None,
    outputs: Any = None,
    classes: Sequence[ClassLabel] = (),
) -> Bundle:
    """Export a calibrated network, check the files against the simulation, and put them in place.

    Everything is written to a folder ``.<name>.new`` next to ``path`` and renamed at the end, so a full disk or a
    kill leaves the previous bundle, or none, but never half of one; the next export removes what is left over. Two
    exports into one folder at a time are refused.

    Args:
        network: the calibrated network.
        path: folder of the bundle; its last part names the files. An earlier bundle there is replaced.
        samples: batches or calls to compare simulation and export on, e.g. of calibration. At least one. The files are
            for the size that the network was built with, or that of the first sample if none has it; they are compared
            on samples of that size.
        on_parity: what to do when the files compute something else than the simulation: ``"raise"`` keeps them as
            ``<name>.failed``, beside an earlier bundle; ``"warn"`` makes them the bundle anyway. The next export
            into the folder removes ``<name>.failed``.
        sizes: further input sizes, each the last axes of the input: ``[256, 512]`` is a height and a width,
            ``[4, 3, 256, 512]`` a batch of four; of several inputs by name, ``{"image": [256, 512]}``. Each becomes a
            graph of its own in the bundle, ``<name>.256x512``, with the same encodings. It is compared with the
            simulation on those of ``samples`` that have its size, else on resized ones.
        inputs: what an app gives instead of the network's floats, see
            :meth:`~lightning_quant.deploy.edges.spec.Edges.of`.
        outputs: what it gets, likewise. With one of the two the bundle has a graph ``<name>.app.onnx`` beside the
            network's own ``<name>.onnx``; it is what runs on devices.
        classes: that the network tells apart, for ``io.json``.

    Returns:
        The bundle; its manifest holds hashes, versions, sizes, parity and the tensors without encodings.

    Raises:
        ConfigurationError: for a size that is none, or at which the network cannot be computed.
        ExportError: when not calibrated, a tensor lacks an encoding, a size changes operations or encodings, or the
            files cannot be written.
        ParityError: when ONNX Runtime computes something else from the files than the simulation, with
            ``on_parity="raise"``; or from the graph with edges than the host around the network.
        ConfigurationError: for edges that do not fit the network or the samples, and samples that are neither tensors
            nor calls.
    """
    path = Path(path).absolute()
    asked, edges = InputSize.parse(sizes), Edges.of(inputs, outputs)
    known = QuantizedNetwork.of(network)
    if known is None or not known.calibrated:
        raise ExportError(
            "The network is not calibrated: expected one that was run by a callback's fit, validate, test or "
            "predict, or passed to calibrate()."
        )
    for folder in (path, _failed_folder(path)):
        if folder.exists() and not (folder / MANIFEST_NAME).is_file():
            raise ExportError(
                f"{folder} exists and is not a bundle (it has no {MANIFEST_NAME}): expected a new folder or an earlier "
                "bundle. Give another folder."
            )
    network = known
    with on_cpu_in_eval(network.network):
        if not (calls := calls_given(samples, network.inputs)):
            raise ExportError("No samples to check the export with: expected at least one.")
        others, calls = calls, first_samples(calls, sum(call.batch_size for call in calls), network.inputs)
        check_sizes(network, asked, calls[0])
        further = sized_calls(network, asked, calls, others)
        size = main_label(network, asked, calls[0]) if further else ""
        busy = ExportError(
            f"Another process is exporting to {path}: expected a folder for each. Give another folder or name, or wait."
        )
        try:
            with exclusive_lock(path.with_name(f".{path.name}.lock"), busy):
                asked_of_all = {size: SizedCalls(calls, resized=False), **further}
                manifest = _write_whole(network, path, asked_of_all, on_parity, edges, classes)
        except OSError as error:
            raise ExportError(
                f"Writing the bundle {path} failed: {error}. Nothing was changed there; free some space or choose "
                "another folder that is writable and export again."
            ) from error
    return Bundle(path, manifest)


def _write_whole(
    network: QuantizedNetwork,
    path: Path,
    sizes: Mapping[str, SizedCalls],
    on_parity: OnParity,
    edges: Edges | None,
    classes: Sequence[ClassLabel],
) -> BundleManifest:
    """Write the graph of each size, the network's own first, check it, and move all into place together."""
    staging, retired = _staging(path), path.with_name(f".{path.name}.old")
    if retired.is_dir() and not path.exists():  # killed between the two renames
        os.replace(retired, path)
    for leftover in (staging, retired):
        shutil.rmtree(leftover, ignore_errors=True)
    staging.mkdir()
    try:
        (size, own), *further = sizes.items()
        manifest, graph = _write(network, staging, path.name, own.calls, edges, classes)
        manifest = _save(replace(manifest, size=size), staging)
        shutil.rmtree(_failed_folder(path), ignore_errors=True)  # of a network before
        _check_parity(network, Bundle(staging, manifest, path.name), path, own.calls, on_parity)
        edges = edges if manifest.app is None else manifest.app.edges  # with modules that are quantized now
        for size, given in further:
            try:
                manifest = _add_size(network, manifest, graph, path, size, given, on_parity, edges, classes)
            except ExportError as error:
                raise type(error)(f"At the input size {size}: {error}") from error
        _move_into_place(staging, path, retired)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return manifest


def _add_size(
    network: QuantizedNetwork,
    manifest: BundleManifest,
    own: OnnxFiles,
    path: Path,
    size: str,
    given: SizedCalls,
    on_parity: OnParity,
    edges: Edges | None,
    classes: Sequence[ClassLabel],
) -> BundleManifest:
    """Write and check the graph of a further size beside the network's own; return what the manifest says then."""
    staging, stem = _staging(path), f"{path.name}.{size}"
    one, further = _write(network, staging, stem, given.calls, edges, classes)
    check_same_graph(own, further, size, network.float_class.__name__)
    shapes = [list(tensor.shape) for tensor in given.calls[0].tensors]
    inputs = dict(zip(one.input_names, shapes, strict=True))
    entry = BundleSize(inputs, one.bytes, one.parity, resized=given.resized)
    files, sizes = {**manifest.files, **one.files}, {**manifest.sizes, size: entry}
    manifest = _save(replace(manifest, files=files, sizes=sizes), staging)
    _check_parity(network, Bundle(staging, one, stem), path, given.calls, on_parity)
    return manifest


def _staging(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def _save(manifest: BundleManifest, folder: Path) -> BundleManifest:
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest.to_dict(), indent=2) + "\n")
    return manifest


def _failed_folder(path: Path) -> Path:
    return path.with_name(f"{path.name}.failed")


def _check_parity(
    network: QuantizedNetwork,
    graph: Bundle,
    path: Path,
    calls: Sequence[NetworkInputs],
    on_parity: OnParity,
) -> None:
    """Refuse files that compute something else, and keep them where no target takes them from; or warn."""
    manifest, staging = graph.manifest, graph.path
    try:
        parity.check_parity(manifest.parity, manifest.precision)
    except ParityError as error:
        found = _compare_layers(network, manifest, graph.qdq, calls)
        if found is None:
            return
        why = "" if found.first is None else _first_that_differs(found.first)
        if on_parity == "warn":
            warnings.warn(f"{error}{why} Exported anyway, with on_parity='warn'.", stacklevel=4)
            return
        write_blames(staging / BLAME_NAME, [found])
        failed = _failed_folder(path)
        os.replace(staging, failed)
        raise ParityError(
            f"{error}{why} The files are kept in {failed}, with {BLAME_NAME} about every layer, not as the bundle: "
            "what runs on the device would not be what was measured. on_parity='warn' exports them anyway. Please "
            "report it with the network."
        ) from None


def _compare_layers(
    network: QuantizedNetwork, manifest: BundleManifest, qdq: Path, calls: Sequence[NetworkInputs]
) -> Blame | None:
    """Return what differs layer by layer; ``None`` if each layer computes what the simulation computes.

    Single values on the border between two integers are rounded either way, as sums are added in another order. A
    network with untrained weights amplifies that without limit, so its outputs prove nothing; its layers do.
    """
    import onnx

    model = onnx.load(qdq)
    for start in range(0, len(calls), _COMPARED_BY_LAYER):
        found = compare_file(network, model, manifest.input_names, calls[start : start + _COMPARED_BY_LAYER])
        if found.guilty or not found.observed_runs:
            return found
        if not parity.agrees(found.output, manifest.precision):  # else others are what the bar was missed by
            break
    if parity.is_explained_by_ties(manifest.parity, manifest.precision):
        return None
    log.warning(
        "The output of the exported file agrees with the simulation by %s only, but each of its %d layers computes "
        "what the simulation computes: values on the border between two integers are rounded either way, and this "
        "network amplifies it, as untrained ones do. The files were kept.",
        manifest.parity,
        len(found.layers),
    )
    return None


def _first_that_differs(layer: LayerBlame) -> str:
    return f" The first layer that differs is {layer.layer!r}: {'; '.join(map(str, layer.reasons))}."


def _write(
    network: QuantizedNetwork,
    staging: Path,
    name: str,
    calls: Sequence[NetworkInputs],
    edges: Edges | None,
    classes: Sequence[ClassLabel],
) -> tuple[BundleManifest, OnnxFiles]:
    folder = staging / f"{name}.aimet"
    folder.mkdir()
    float_onnx, encodings_file = folder / "model.onnx", folder / "model.encodings"
    qdq = staging / f"{name}.onnx"
    written = write_onnx(network, calls[0], float_onnx, qdq)
    explained = audit.check_encoded(written.model, written.encoded, network.findings)
    measured = parity.compare(_outputs(network, qdq, written, calls))
    app, further = _write_for_app(qdq, written, calls, edges, classes, network.recipe)
    manifest = BundleManifest(
        **vars(network.manifest()),
        name=name,
        encodings_version=ENCODINGS_VERSION,
        opset={"float": FLOAT_OPSET, "qdq": QDQ_OPSET},
        onnx=importlib.metadata.version("onnx"),
        onnxruntime=importlib.metadata.version("onnxruntime"),
        input_names=written.input_names,
        output_names=written.output_names,
        bytes={"float": float_onnx.stat().st_size, "quantized": qdq.stat().st_size},
        parity=measured.rounded(),
        without_encoding={name: str(explanation) for name, explanation in explained.items()},
        files={
            str(file.relative_to(staging)): BundleFile(file_sha256(file), file.stat().st_size)
            for file in (float_onnx, encodings_file, qdq, *further)
        },
        app=app,
    )
    return manifest, written


def _write_for_app(
    qdq: Path,
    written: OnnxFiles,
    calls: Sequence[NetworkInputs],
    edges: Edges | None,
    classes: Sequence[ClassLabel],
    recipe: QuantRecipe,
) -> tuple[AppManifest | None, list[Path]]:
    """Write what an app needs: the graph with edges, if any are asked for, ``io.json``, and programs that feed it.

    Returns:
        What was found of the graph with edges, and the files.
    """
    import onnx

    model, folder = onnx.load(qdq), qdq.parent
    plan = fit_edges(edges or Edges(), model)
    file, app, files = qdq, None, []
    if edges is not None:
        file = qdq.with_suffix(".app.onnx")
        named = [zip(written.input_names, call.tensors, strict=True) for call in calls]
        samples = [{name: tensor.numpy() for name, tensor in one} for one in named]
        edges = quantize_own(edges, model, samples, recipe)
        plan = fit_edges(edges, model)
        if not (folder / CONTRACT_NAME).exists():  # samples of further sizes may be resized
            warn_of_other_pixels(plan, samples)
        app = write_app(model, plan, edges, samples[:_SAMPLES_WITH_EDGES], file)
        files.append(file)
    contract = contract_of(plan, onnx.load(file), file.name, classes)
    if (folder / CONTRACT_NAME).exists():  # of the network's own size, which the programs are for
        files.append(qdq.with_suffix(f".{CONTRACT_NAME}"))
    else:
        files.append(folder / CONTRACT_NAME)
        write_hosts(folder, contract)  # to be changed by whoever builds on them: of no hash in the manifest
    contract.write(next(one for one in files if one.name.endswith(CONTRACT_NAME)))
    return app, files


def _outputs(
    network: QuantizedNetwork, qdq: Path, written: OnnxFiles, calls: Iterable[NetworkInputs]
) -> Iterator[tuple[list[np.ndarray], list[np.ndarray]]]:
    """Yield the outputs of the simulation and of the QDQ file in ONNX Runtime, sample by sample."""
    session = exact_session(qdq)
    wanted = {value.name for value in session.get_inputs()}
    output_names = written.output_names
    for sample in calls:
        given = zip(written.input_names, sample.tensors, strict=True)
        feeds = {name: tensor.numpy() for name, tensor in given if name in wanted}
        expected = [tensor.numpy() for tensor in tensors_in(sample.call(network.network))]
        try:
            computed = session.run(None, feeds)
        except Exception as error:  # of a class of its own for each cause
            raise written_wrongly("run", error) from error
        sizes = [[one.shape for one in outputs] for outputs in (expected, computed)]
        if sizes[0] != sizes[1]:
            raise ExportError(
                f"{network.float_class.__name__} returns {_sizes(output_names, sizes[0])} for a sample, "
                f"but the graph exported from another one returns {_sizes(output_names, sizes[1])}: its size "
                "depends on values. Expected outputs of fixed sizes, the only ones a device compiles. Move the "
                "post-processing out of the network (return all scores and boxes, select in the step), or "
                "quantize the part before it (network='model.backbone')."
            )
        for index, name in enumerate(output_names):  # the device returns it rounded
            if name in written.passed:
                expected[index] = written.passed[name].round(expected[index])
        yield expected, computed


def _sizes(names: Sequence[str], sizes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join(f"{name!r} of {list(size)}" for name, size in zip(names, sizes, strict=False))


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
