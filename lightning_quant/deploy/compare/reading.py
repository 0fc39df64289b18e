"""What is compared of a bundle: read from its files, with the exact values beside the summary."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_quant.deploy.blame.cuts import grid_of, piece_of
from lightning_quant.deploy.bundle import Bundle
from lightning_quant.deploy.compare.snapshot import (
    Constant,
    DeviceFigures,
    Graph,
    Grid,
    Operation,
    RunFigures,
    Snapshot,
)
from lightning_quant.deploy.device_report import DeviceReport
from lightning_quant.deploy.edges.contract import CONTRACT_NAME, Contract
from lightning_quant.deploy.graph.qdq import QdqGraph
from lightning_quant.deploy.manifest import BundleManifest
from lightning_quant.errors import ExportError
from lightning_quant.utilities.hashing import arrays_hash, short_hash
from lightning_quant.utilities.parsing import parse_as, read_json

if TYPE_CHECKING:
    import onnx

_ROUNDING = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True)
class Exact:
    """The numbers of which a snapshot has summaries.

    Args:
        grids: scale and offset of each channel, by graph and tensor.
        constants: values, by graph and name.
    """

    grids: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    constants: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Side:
    """One of two networks that are compared.

    Args:
        snapshot: all that is compared.
        exact: the values themselves; empty for a baseline, which has summaries only.
    """

    snapshot: Snapshot
    exact: Exact = field(default_factory=Exact)


def read_bundle(bundle: Bundle, run: RunFigures, reports: list[DeviceReport]) -> Side:
    """Read what is compared of a bundle.

    Args:
        bundle: whole, as :func:`~lightning_quant.deploy.bundle.load_bundle` returns it.
        run: what was measured in its run.
        reports: what devices made of it.

    Raises:
        ExportError: naming the file that cannot be read.
    """
    exact = Exact()
    float_file, encodings_file = bundle.aimet / "model.onnx", bundle.aimet / "model.encodings"
    float_model, model = _load(float_file), _load(bundle.qdq)
    encodings = _encodings(encodings_file)
    hashes = {name: entry.sha256 for name, entry in bundle.manifest.files.items()}
    of_aimet = [hashes.get(str(one.relative_to(bundle.path)), "") for one in (float_file, encodings_file)]
    try:
        graphs = {
            "aimet": _graph("aimet", float_model, of_aimet, encodings, exact),
            "qdq": _graph("qdq", model, [hashes.get(bundle.qdq.name, "")], {}, exact),
        }
        inputs, outputs = (_sizes(values) for values in (model.graph.input, model.graph.output))
    except Exception as error:  # a damaged graph fails with whatever its bytes happen to mean
        raise _unreadable(bundle.path, error) from error
    manifest = bundle.manifest
    snapshot = Snapshot(
        name=manifest.name,
        versions=_versions(manifest),
        recipe=_recipe(manifest),
        float_sha256=manifest.float_sha256,
        inputs=inputs,
        outputs=outputs,
        graphs=graphs,
        parity=manifest.parity,
        bytes=manifest.bytes,
        run=run,
        devices=[_device(report) for report in reports],
        io=_contract(bundle),
    )
    return Side(snapshot, exact)


def _contract(bundle: Bundle) -> dict[str, str]:
    """Return what an app relies on; of floats, which it gives and gets as they are, without their grid."""
    if CONTRACT_NAME not in bundle.manifest.files:  # exported before there was one
        return {}
    contract = Contract.read(bundle.path)
    found = {"classes": f"{len(contract.classes)}, {short_hash(repr(contract.classes))}"} if contract.classes else {}
    for one in (*contract.inputs, *contract.outputs):
        of_grid = ("scale", "zero_point", "bits") if one.type.startswith("float") else ()
        for name, value in vars(one).items():
            if name != "name" and name not in of_grid and value is not None:
                found[f"{one.name}: {name}"] = str(value)
    return found


def _unreadable(path: Path, error: Exception) -> ExportError:
    said = " ".join(str(error).split())[:300]
    return ExportError(f"{path} cannot be compared: {type(error).__name__}: {said}. Export it again.")


def _load(path: Path) -> onnx.ModelProto:
    import onnx

    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # likewise
        raise _unreadable(path, error) from error


@dataclass(frozen=True)
class _Encoding:
    """An entry of AIMET's file of encodings, version 1.0.0."""

    name: str
    bw: int
    scale: list[float]
    offset: list[float]


def _encodings(path: Path) -> dict[str, _Encoding]:
    try:
        values = parse_as(read_json(path), dict[str, Any])
        found = {}
        for part in ("activation_encodings", "param_encodings"):
            for at, entry in enumerate(parse_as(values.get(part, []), list[dict[str, Any]], part)):
                if entry.get("dtype", "INT") == "INT":
                    known = {name: entry.get(name) for name in ("name", "bw", "scale", "offset")}
                    one = parse_as(known, _Encoding, f"{part}.{at}")
                    found[one.name] = one
        return found
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _graph(
    part: str, model: onnx.ModelProto, hashes: list[str], encodings: Mapping[str, _Encoding], exact: Exact
) -> Graph:
    graph = QdqGraph(model)
    grids = {
        name: _grid(exact, (part, name), one.bw, np.asarray(one.scale, np.float32), np.asarray(one.offset, np.float64))
        for name, one in encodings.items()
    }
    constants: dict[str, Constant] = {}
    operations: dict[str, Operation] = {}
    for node in _computed(graph):
        values: dict[str, np.ndarray] = {}
        if node.op_type in _ROUNDING:
            name = _rounded(graph, node)
            if name is not None:
                scale, zero_point = grid_of(graph, node)
                bits, lowest = _integer_kind(zero_point.dtype.name)
                offset = lowest - zero_point.astype(np.float64)
                grids[name] = _grid(exact, (part, name), bits, scale.reshape(-1), offset.reshape(-1))
            integers = graph.known(node.input[0])
            if integers is not None:
                values[_base(node.input[0])] = integers
        elif node.op_type != "Constant":
            known = {name: graph.known(name) for name in node.input if name}
            values = {name: one for name, one in known.items() if one is not None and one.dtype.kind not in "iub"}
            operations[node.name or f"the source of {node.output[0]}"] = _operation(graph, node)
        for name, array in values.items():
            if name not in constants:
                exact.constants[part, name] = array
                constants[name] = _constant(array)
    return Graph(hashes, operations, grids, constants)


def _computed(graph: QdqGraph) -> list[onnx.NodeProto]:
    """Return the nodes that the outputs are computed of: a bias that nothing takes any more is not there."""
    nodes = list(graph.model.graph.node)
    if any(one.HasField("g") or one.graphs for node in nodes for one in node.attribute):  # these read what is outside
        return nodes
    needed = {id(node) for name in graph.outputs for node in piece_of(graph, name, ())}
    return [node for node in nodes if id(node) in needed]


def _base(name: str) -> str:
    return name.removesuffix("_q")


def _rounded(graph: QdqGraph, node: onnx.NodeProto) -> str | None:
    """Return the tensor that a node rounds, or reads; ``None`` where it reads on the grid that it was rounded to."""
    if node.op_type == "QuantizeLinear":
        plain = node.input[0].removesuffix("_qdq")  # an output is renamed before it is rounded
        return plain if plain in graph.outputs else str(node.input[0])
    before = graph.producers.get(node.input[0])
    if before is None or before.op_type != "QuantizeLinear":
        return _base(node.input[0])
    return None if list(before.input[1:]) == list(node.input[1:]) else f"{before.input[0]}, read by {node.name}"


def _integer_kind(name: str) -> tuple[int, int]:
    """Return the bits of an integer type, 4-bit ones of ml_dtypes among them, and its smallest value."""
    bits = int(name.lstrip("uint") or 32)
    return bits, 0 if name.startswith("u") else -(2 ** (bits - 1))


def _grid(exact: Exact, key: tuple[str, str], bits: int, scale: np.ndarray, offset: np.ndarray) -> Grid:
    scale, offset = np.nan_to_num(scale), np.broadcast_to(offset, scale.shape)
    exact.grids[key] = scale.astype(np.float64), offset
    return Grid(
        bits=bits,
        channels=scale.size,
        scale=(_short(scale.min()), _short(scale.max())),
        offset=(float(offset.min()), float(offset.max())),
        hash=arrays_hash([{"scale": scale.astype(np.float32), "offset": offset.astype(np.float64)}]),
    )


def _constant(array: np.ndarray) -> Constant:
    kind = array.dtype.name
    numbers = np.nan_to_num(array.astype(np.float64))
    some = numbers.size > 0
    plain = array.astype(np.int8) if kind in ("int4", "uint4", "int2", "uint2") else array
    return Constant(
        kind=kind,
        shape=tuple(array.shape),
        low=_short(numbers.min()) if some else 0.0,
        high=_short(numbers.max()) if some else 0.0,
        mean=_short(numbers.mean()) if some else 0.0,
        hash=arrays_hash([{kind: plain}]),
    )


def _short(number: Any) -> float:
    """Return a number with the digits that a 32-bit float has."""
    return float(f"{number:.9g}")


def _operation(graph: QdqGraph, node: onnx.NodeProto) -> Operation:
    """Summarize a node: its attributes, what it takes before rounding, its integer constants; no weights."""
    attributes = sorted(one.SerializeToString(deterministic=True).hex() for one in node.attribute)
    taken = list(_taken(graph, node))
    return Operation(node.op_type, short_hash(json.dumps([node.op_type, node.domain, attributes, taken])))


def _taken(graph: QdqGraph, node: onnx.NodeProto) -> Iterator[Any]:
    for given in node.input:
        name = given
        producer = graph.producers.get(name)
        while producer is not None and producer.op_type in _ROUNDING:
            name = producer.input[0]
            producer = graph.producers.get(name)
        known = graph.known(name)
        if known is None:
            yield name
        elif name == given and known.dtype.kind in "iub":  # a size or a position, not a weight
            yield known.tolist()


def _sizes(values: Any) -> dict[str, list[int]]:
    return {one.name: [axis.dim_value for axis in one.type.tensor_type.shape.dim] for one in values}


def _versions(manifest: BundleManifest) -> dict[str, str]:
    return {
        "lightning-quant": manifest.lightning_quant,
        "aimet-torch": manifest.aimet_torch,
        "torch": manifest.torch,
        "onnx": manifest.onnx,
        "onnxruntime": manifest.onnxruntime,
    }


def _recipe(manifest: BundleManifest) -> dict[str, str]:
    estimator = manifest.range_estimator
    return {
        "precision": str(manifest.precision),
        "hardware": manifest.hardware,
        "range estimator": estimator if isinstance(estimator, str) else json.dumps(estimator, sort_keys=True),
        "equalized": "yes" if manifest.equalized else "no",
        **{f"override of {name}": str(one) for name, one in manifest.overrides.items()},
        **{f"promoted {name}": str(one) for name, one in manifest.promoted.items()},
    }


def _device(report: DeviceReport) -> DeviceFigures:
    layers, memory, metric = report.layers, report.memory_bytes, report.metric.get("device")
    return DeviceFigures(
        tier=report.tier,
        device=report.place,
        runtime=report.runtime or "",
        status=report.status,
        versions=report.versions,
        samples=report.samples,
        latency_us=report.median_latency_us,
        memory_bytes=None if memory is None else memory[-1],
        compiled_bytes=report.bytes.get("compiled"),
        npu_layers=None if layers is None else len(layers["NPU"]),
        layers=None if layers is None else {unit: names for unit, names in layers.items() if unit != "NPU"},
        float_layers=report.float_islands,
        against_float=report.against_float,
        against_simulation=report.against_simulation,
        metric=metric if metric is not None and math.isfinite(metric) else None,
        monitor=report.monitor or "",
        mode=report.mode or "max",
    )
