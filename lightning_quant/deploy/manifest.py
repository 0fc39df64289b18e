"""The manifest of a bundle: how its network was quantized, and what its files are and hold."""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from lightning_quant.deploy.edges.spec import Edges
from lightning_quant.deploy.parity import Parity, of_export
from lightning_quant.precision import int16_activations
from lightning_quant.simulation.manifest import FORMAT_VERSION, Manifest
from lightning_quant.utilities.hashing import short_hash
from lightning_quant.utilities.parsing import check, check_version, parse_as


@dataclass(frozen=True)
class BundleFile:
    """A file of a bundle.

    Args:
        sha256: hash of its content.
        bytes: its size.
    """

    sha256: str
    bytes: int


@dataclass(frozen=True)
class AppManifest:
    """The graph with edges of a bundle, ``<name>.app.onnx``.

    Args:
        edges: what was asked for.
        output_names: of the graph, in order.
        samples: on how many it was compared with the host's own work around the network.
        pixels_apart: how many pixels the device rounds to the integer beside the host's, of 256 for each channel.
        equal: share of equal values over all outputs.
    """

    edges: Edges
    output_names: list[str]
    samples: int
    pixels_apart: int
    equal: float


@dataclass(frozen=True)
class BundleSize:
    """A further graph of a bundle: the same network and encodings, for another input size.

    Args:
        inputs: shapes, by the names of the graph's inputs.
        bytes: sizes of the ``float`` and the ``quantized`` ONNX file.
        parity: agreement of the quantized file, run by ONNX Runtime, with the simulation.
        resized: whether it was compared on samples of another size, interpolated.
    """

    inputs: dict[str, list[int]]
    bytes: dict[str, int]
    parity: Parity
    resized: bool

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**vars(self), "parity": of_export(self.parity)}


@dataclass(frozen=True)
class BundleManifest(Manifest):
    """Content of ``manifest.json``: everything in :class:`~lightning_quant.simulation.manifest.Manifest`, and more.

    Args:
        name: of the bundle, when it was exported.
        encodings_version: format of AIMET's encodings file.
        opset: of the ``float`` graph and of the ``qdq`` graph.
        onnx: version that wrote the files.
        onnxruntime: version that compared them with the simulation.
        input_names: of the graph, in order.
        output_names: of the graph, in order.
        bytes: sizes of the ``float`` and the ``quantized`` ONNX file.
        parity: agreement of the quantized file, run by ONNX Runtime, with the simulation.
        without_encoding: for each float tensor without an encoding the reason why it needs none.
        files: of the bundle, by their path in it.
        app: the graph with edges, if there is one.
        size: what the size of its own graph is called, where there are others; else empty.
        sizes: the further graphs, by what their sizes are called: that is in the names of their files.
    """

    name: str
    encodings_version: str
    opset: dict[str, int]
    onnx: str
    onnxruntime: str
    input_names: list[str]
    output_names: list[str]
    bytes: dict[str, int]
    parity: Parity
    without_encoding: dict[str, str]
    files: dict[str, BundleFile]
    app: AppManifest | None = None
    size: str = ""
    sizes: dict[str, BundleSize] = field(default_factory=dict)

    @property
    def files_sha256(self) -> str:
        """A short hash of all files: the same export."""
        return short_hash(json.dumps({path: file.sha256 for path, file in self.files.items()}, sort_keys=True))

    @property
    def int16_activations(self) -> str | None:
        """The part of the network with 16-bit activations; ``None`` without any."""
        return int16_activations(self.precision, {**self.overrides, **self.promoted})

    def at_size(self, size: str) -> BundleManifest:
        """Return what it says of a further graph, as the manifest of that one."""
        graph = self.sizes[size]
        return replace(self, size=size, sizes={}, bytes=graph.bytes, parity=graph.parity)

    def of_app(self, size: str, file: str) -> BundleManifest:
        """Return what it says of a graph with edges, as the manifest of that one: what it is called, and its file."""
        assert self.app is not None
        known = self.files[file].bytes if file in self.files else 0
        return replace(
            self,
            size=size,
            sizes={},
            output_names=self.app.output_names,
            bytes={**self.bytes, "quantized": known},
        )

    def __getitem__(self, entry: str) -> Any:
        """Return an entry as ``manifest.json`` has it, such as ``manifest["parity"]["psnr_db"]``."""
        return self.to_dict()[entry]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        own = {name: getattr(self, name) for name in _own_fields()}
        own["parity"] = of_export(self.parity)
        own["files"] = {path: asdict(file) for path, file in self.files.items()}
        own["app"] = None if self.app is None else {**vars(self.app), "edges": self.app.edges.to_json()}
        own["sizes"] = {name: graph.to_dict() for name, graph in self.sizes.items()}
        return {**super().to_dict(), **own}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BundleManifest:
        """Read what :meth:`to_dict` returned. Other entries are ignored.

        Raises:
            ValueError: when it is of another format, or naming the first entry that is missing or cannot be.
        """
        check_version(values, FORMAT_VERSION)
        parse_as(values, dict[str, Any])
        own = {}
        optional = {one.name for one in fields(cls) if one.default_factory is not MISSING or one.default is not MISSING}
        for name, kind in _own_fields().items():
            if name in optional and name not in values:  # written before there were any
                continue
            check(name in values, name, None, "the entry to be there")
            own[name] = parse_as(values[name], kind, name)
        for name in own.get("sizes", {}):
            check(bool(name) and Path(name).name == name, "a name in sizes", name, "a plain part of a file name")
        return cls(**vars(Manifest.from_dict(values)), **own)


def _own_fields() -> dict[str, Any]:
    """Return the fields that the manifest of a network does not have, with their types."""
    hints = typing.get_type_hints(BundleManifest)
    return {name: hints[name] for name in BundleManifest.__annotations__}
