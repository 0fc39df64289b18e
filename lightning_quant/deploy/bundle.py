"""A bundle on disk: everything a device's compiler needs of one quantized network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightning_quant.deploy.manifest import BundleManifest
from lightning_quant.errors import ExportError
from lightning_quant.utilities.hashing import file_sha256
from lightning_quant.utilities.parsing import read_json

MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class Bundle:
    """The files of one exported network.

    Args:
        path: the folder of the bundle, ``<name>``.
        manifest: content of its ``manifest.json``.
        stem: what the names of its files begin with. Default: ``<name>``; of a further graph, see :attr:`graphs`,
            ``<name>.<size>``, ``<name>.app`` or ``<name>.<size>.app``.
        edged: whether it is a graph with edges, which take pixels and give classes, say.
    """

    path: Path
    manifest: BundleManifest
    stem: str = ""
    edged: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "stem", self.stem or self.path.name)

    @property
    def sizes(self) -> dict[str, Bundle]:
        """The same network for further input sizes, each to be used like this bundle, by what they are called."""
        return {
            size: Bundle(self.path, self.manifest.at_size(size), f"{self.stem}.{size}") for size in self.manifest.sizes
        }

    @property
    def app(self) -> Bundle | None:
        """The graph with edges, if there is one."""
        if self.manifest.app is None or self.edged:
            return None
        stem = f"{self.stem}.app"
        manifest = self.manifest.of_app(stem.removeprefix(f"{self.path.name}."), f"{stem}.onnx")
        return Bundle(self.path, manifest, stem, edged=True)

    @property
    def graphs(self) -> dict[str, Bundle]:
        """All other graphs: for further input sizes and with edges, each to be used like this bundle, by its name."""
        sizes = self.sizes
        apps = [one.app for one in (self, *sizes.values())]
        return sizes | {one.manifest.size: one for one in apps if one is not None}

    @property
    def aimet(self) -> Path:
        """Folder ``<name>.aimet`` with exactly ``model.onnx`` and ``model.encodings``: what AI Hub takes.

        Of a graph with edges it is that of the network: what edges compute with is in :attr:`qdq` alone.
        """
        return self.path / f"{self.stem.removesuffix('.app') if self.edged else self.stem}.aimet"

    @property
    def qdq(self) -> Path:
        """ONNX file with integer weights and QuantizeLinear/DequantizeLinear: what ONNX Runtime takes."""
        return self.path / f"{self.stem}.onnx"


def load_bundle(path: str | Path) -> Bundle:
    """Read a bundle, and check that its files are the ones it was written with.

    Raises:
        ExportError: naming the file that is missing or changed.
    """
    path = Path(path).absolute()
    try:
        manifest = BundleManifest.from_dict(read_json(path / MANIFEST_NAME))
    except (OSError, ValueError) as error:
        raise ExportError(
            f"{path} is not a bundle: its manifest.json cannot be read ({error}). Export it again."
        ) from error
    bundle = Bundle(path, manifest)
    for name, entry in manifest.files.items():
        file = path / name
        if not file.resolve().is_relative_to(path.resolve()) or not file.is_file():
            raise ExportError(f"The bundle {path} lacks {name!r}; export it again.")
        if file_sha256(file) != entry.sha256:
            raise ExportError(f"{name!r} in the bundle {path} was changed since the export; export it again.")
    graphs = (bundle, *bundle.graphs.values())
    own = {str(file.relative_to(path)) for graph in graphs for file in (graph.qdq, *_uploaded(graph.aimet))}
    if unknown := sorted(own - manifest.files.keys()):  # all that lies there goes to a device
        raise ExportError(
            f"{unknown[0]!r} in the bundle {path} is none of the files in its manifest.json: expected those of the "
            "export, in a folder of the name they were exported to. Rename it, or export it again."
        )
    return bundle


def _uploaded(folder: Path) -> set[Path]:
    found = set(folder.iterdir()) if folder.is_dir() else set()
    return {folder / "model.onnx", folder / "model.encodings", *found}
