"""The lesson runs as it stands, in an empty folder, and shows what its text says."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

pytestmark = pytest.mark.slow

LESSON = Path(__file__).resolve().parent.parent / "examples" / "quantization_lesson.ipynb"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lesson")


@pytest.fixture(scope="module")
def lesson(folder: Path) -> NotebookNode:
    """The notebook with its outputs; a cell that raises is an error here."""
    notebook = nbformat.read(LESSON, as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("QAIHUB_CLIENT_INI", str(folder / "none.ini"))  # not on anybody's account
        return NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()


@pytest.fixture(scope="module")
def text(lesson: NotebookNode) -> str:
    """Everything that was printed."""
    outputs = [output for cell in lesson.cells for output in cell.get("outputs", [])]
    return "".join(output["text"] for output in outputs if output.get("name") == "stdout")


def test_it_is_committed_without_outputs() -> None:
    notebook = nbformat.read(LESSON, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.outputs or cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


def test_pictures(lesson: NotebookNode) -> None:
    outputs = [output for cell in lesson.cells for output in cell.get("outputs", [])]
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 3  # calibration images, float prediction, comparison
    for encoded in pictures:
        with Image.open(io.BytesIO(base64.b64decode(encoded))) as picture:
            assert picture.convert("RGB").getcolors(maxcolors=1000) is None  # more colors than an empty plot has


def test_the_network_learned_and_8_bits_keep_it(text: str) -> None:
    ((in_float, quantized),) = re.findall(r"mIoU in float: (\S+)\nmIoU at W8A8:  (\S+)\n", text)
    assert float(in_float) > 0.15
    assert float(quantized) == pytest.approx(float(in_float), abs=0.03)
    (same,) = re.findall(r"(\S+)% of the pixels have the same class", text)
    assert 95 < float(same) <= 100


def test_what_the_simulation_inserts(text: str) -> None:
    assert "BatchNorm2d: 25 in float, 0 now" in text
    (quantizers,) = re.findall(r"QuantizeDequantize: 0 in float, (\d+) now", text)
    assert int(quantizers) > 50
    assert "left in float: nothing" in text
    assert "calibrated: False" in text


def test_export_and_device(text: str, folder: Path) -> None:
    sizes = {name: float(size) for size, name in re.findall(r"(\S+) kB  lesson/(\S+)", text)}
    assert sizes.keys() == {
        *("lesson.aimet/model.onnx", "lesson.aimet/model.encodings", "lesson.onnx", "manifest.json", "io.json"),
        *("host/host.py", "host/host.cpp", "host/Host.kt"),
    }
    assert sizes["lesson.onnx"] < sizes["lesson.aimet/model.onnx"] / 3
    assert (folder / "export/lesson/lesson.onnx").stat().st_size / 1000 == pytest.approx(sizes["lesson.onnx"], abs=0.1)
    (tier,) = re.findall(r"target: (\S+)", text)
    assert tier in ("htp_emulator", "onnxruntime")
    assert re.search(r"mIoU: \{'float': 0\.\d+, 'simulation': 0\.\d+, 'device': 0\.\d+\} on 8 images", text)


def test_fewer_bits_cost_more_until_they_are_repaired(text: str) -> None:
    drops = {name: float(drop) for name, drop in re.findall(r"^(w\da\d+) +\S+ +(\S+)$", text, re.MULTILINE)}
    assert drops["w4a16"] > max(drops["w8a8"], drops["w8a16"])
    rungs = re.findall(r"^(\w+) +mIoU \S+  drop +(\S+) ", text, re.MULTILINE)
    assert rungs[0][0] == "ptq"
    assert min(float(drop) for _, drop in rungs[1:]) < float(rungs[0][1])
