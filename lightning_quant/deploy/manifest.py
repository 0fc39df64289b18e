"""The manifest of a bundle: how its network was quantized, and what its files are and hold."""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

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

    @property
    def files_sha256(self) -> str:
        """A short hash of all files: the same export."""
        return short_hash(json.dumps({path: file.sha256 for path, file in self.files.items()}, sort_keys=True))

    @property
    def int16_activations(self) -> str | None:
        """The part of the network with 16-bit activations; ``None`` without any."""
        return int16_activations(self.precision, {**self.overrides, **self.promoted})

    def __getitem__(self, entry: str) -> Any:
        """Return an entry as ``manifest.json`` has it, such as ``manifest["parity"]["psnr_db"]``."""
        return self.to_dict()[entry]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        own = {name: getattr(self, name) for name in _own_fields()}
        own["parity"] = of_export(self.parity)
        own["files"] = {path: asdict(file) for path, file in self.files.items()}
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
        for name, kind in _own_fields().items():
            check(name in values, name, None, "the entry to be there")
            own[name] = parse_as(values[name], kind, name)
        return cls(**vars(Manifest.from_dict(values)), **own)


def _own_fields() -> dict[str, Any]:
    """Return the fields that the manifest of a network does not have, with their types."""
    hints = typing.get_type_hints(BundleManifest)
    return {name: hints[name] for name in BundleManifest.__annotations__}
