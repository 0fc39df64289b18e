"""A bundle on disk: read as it was written, or refused with the file that is missing or changed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lightning_quant.deploy.bundle import Bundle, load_bundle
from lightning_quant.deploy.export import export_bundle
from lightning_quant.errors import ExportError
from lightning_quant.utilities.hashing import file_sha256
from tests.helpers.networks import Body, calibrated, call, images


@pytest.fixture
def old(tmp_path: Path) -> Bundle:
    """An earlier bundle at ``tmp_path / "net"``, alone in its folder."""
    return export_bundle(calibrated(Body()), tmp_path / "net", [call(images(3, seed=9))])


@pytest.mark.parametrize("name", ["net.aimet/model.onnx", "net.aimet/model.encodings", "net.onnx"])
def test_changed_or_missing_file_is_named(old: Bundle, name: str) -> None:
    file = old.path / name
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ExportError, match=rf"'{re.escape(name)}' in the bundle .* was changed"):
        load_bundle(old.path)
    file.write_bytes(data)
    load_bundle(old.path)
    file.unlink()
    with pytest.raises(ExportError, match=rf"lacks '{re.escape(name)}'"):
        load_bundle(old.path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"files": 3}', '{"files": ["a"]}', '{"files": {"net.onnx": {}}}']
)
def test_manifest_that_cannot_be_read(old: Bundle, text: str) -> None:
    (old.path / "manifest.json").write_text(text)
    with pytest.raises(ExportError, match="is not a bundle"):
        load_bundle(old.path)


def test_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"is not a bundle: its manifest\.json cannot be read"):
        load_bundle(tmp_path / "net")


@pytest.mark.parametrize("way", ["relative", "absolute", "link"])
def test_manifest_cannot_point_outside_the_bundle(old: Bundle, tmp_path: Path, way: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    name = {"relative": "../secret", "absolute": str(secret), "link": "inside"}[way]
    if way == "link":
        (old.path / "inside").symlink_to(secret)
    manifest = {**old.manifest.to_dict(), "files": {name: {"sha256": file_sha256(secret), "bytes": 6}}}
    (old.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ExportError, match="lacks"):
        load_bundle(old.path)
