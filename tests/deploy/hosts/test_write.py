"""Programs in C++ and Kotlin: texts that cannot become code, compiled and run where compilers and headers are.

ONNX Runtime's own headers and Java classes are in its package for Android (``onnxruntime-android``, an ``.aar`` file):
set ``ONNXRUNTIME_AAR`` to it. The library is that of the Python package. Kotlin needs ``kotlinc``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from lightning_quant.deploy.edges.contract import TYPES, ClassLabel, Contract, IoTensor
from lightning_quant.deploy.hosts.write import cpp_string, feeding, kotlin_string, write_hosts
from tests.helpers.handmade_bundles import NASTY, Ends, photos, scores_of, write_app, write_numbers
from tests.helpers.qdq import NO_EMULATOR

AAR = os.environ.get("ONNXRUNTIME_AAR")
needs_headers = pytest.mark.skipif(
    AAR is None or shutil.which("g++") is None, reason="needs g++ and ONNXRUNTIME_AAR, the file of onnxruntime-android"
)
needs_kotlin = pytest.mark.skipif(
    AAR is None or shutil.which("kotlinc") is None, reason="needs kotlinc and ONNXRUNTIME_AAR"
)


def unpacked(folder: Path) -> Path:
    with zipfile.ZipFile(str(AAR)) as archive:
        archive.extractall(folder)
    return folder


def compiled(bundle: Path, contract: Contract) -> Path:
    """The program in C++, compiled without a warning."""
    write_hosts(bundle, contract)
    headers = unpacked(bundle / "aar") / "headers"
    capi = Path(onnxruntime.__file__).parent / "capi"
    (library,) = capi.glob("libonnxruntime.so.*")
    (bundle / "libonnxruntime.so.1").symlink_to(library)  # the name that programs look for
    program = bundle / "host/program"
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-isystem", str(headers)]
    command += [str(bundle / "host/host.cpp"), str(library), f"-Wl,-rpath,{bundle}", "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return program


def ran(program: Path, *arguments: Any, status: int = 0) -> str:
    command = [str(program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr


def test_the_programs_are_written_from_the_contract_alone(tmp_path: Path) -> None:
    contract = write_app(tmp_path)
    paths = write_hosts(tmp_path, contract)
    assert paths == ["host/host.py", "host/host.cpp", "host/Host.kt"]
    first = [(tmp_path / path).read_bytes() for path in paths]
    assert write_hosts(tmp_path, contract) == paths
    assert [(tmp_path / path).read_bytes() for path in paths] == first
    python, cpp, kotlin = (text.decode() for text in first)
    assert "lightning_quant" not in python  # it runs where there is none
    assert '{"image", {1, 6, 10, 3}, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, 180, true, true, false, 3, 6, 10},' in cpp
    assert "IntArray(10 * 6)" in kotlin
    assert "0xffff0000.toInt()" in kotlin


@pytest.mark.parametrize("kind", ["uint16", "uint32", "uint64"])
def test_java_has_no_unsigned_integers_to_give(tmp_path: Path, kind: str) -> None:
    assert write_hosts(tmp_path, write_numbers(tmp_path, kind)) == ["host/host.py", "host/host.cpp"]


@pytest.mark.parametrize("make", [cpp_string, kotlin_string])
def test_texts_end_no_literal_comment_or_line(make: Any) -> None:
    for text in (NASTY, '"; system("x"); "', "\\", "*/", "??/", "\r\n", "$x", "${x}", "\U0001f600", "\x00"):
        inside = make(text)[1:-1]
        assert not set(inside) & set("\"\n\r$*?'\u2028"), inside
        assert inside.isascii()
        escapes = inside.split("\\")[1:]
        assert all(len(one) >= 3 and (one[0] in "01234567" or one[0] == "u") for one in escapes), inside


def test_names_are_the_same_in_cpp_and_kotlin_as_in_the_contract() -> None:
    assert eval(f"b{cpp_string(NASTY)}").decode() == NASTY  # Python reads both notations
    assert eval(kotlin_string(NASTY)) == NASTY


@pytest.mark.parametrize("ends", get_args(Ends))
@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_the_lines_that_feed_it_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Any, ends: Ends) -> None:
    contract = write_app(tmp_path, ends, layout, color="bgr", name=NASTY)
    (photo,) = photos(tmp_path, 1)
    photo.rename(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(feeding(contract), found)
    classes = scores_of(np.asarray(Image.open("photo.jpg"))).argmax(0)
    *_, last = found["outputs"].values()
    if ends == "codes":
        last = found["reals"]
    assert np.array_equal(
        last[0, 0] if ends == "top_k" else last[0].argmax(0) if ends != "classes" else last[0], classes
    )


@pytest.mark.parametrize("kind", TYPES)
def test_lines_for_every_type_are_python(kind: str) -> None:
    ends = IoTensor("x", (1, 4), kind), IoTensor("y", (1, 4), kind)
    compile(feeding(Contract("net.onnx", ends[:1], ends[1:])), "lines", "exec")


@pytest.mark.slow
@needs_headers
@pytest.mark.parametrize(("layout", "color"), [("nhwc", "rgb"), ("nchw", "bgr")])
def test_the_program_in_cpp_gives_the_bytes_of_onnx_runtime(tmp_path: Path, layout: Any, color: Any) -> None:
    contract = write_app(tmp_path, "top_k", layout, color, name=NASTY)
    program, model = compiled(tmp_path, contract), tmp_path / contract.file
    (photo,) = photos(tmp_path, 1)
    rgb = np.asarray(Image.open(photo))
    Image.fromarray(rgb).save(tmp_path / "photo.ppm")
    (tmp_path / "photo.raw").write_bytes(rgb.tobytes())
    scores = scores_of(rgb)
    order = np.argsort(-scores, axis=0, kind="stable")[:2]
    for file in ("photo.ppm", "photo.raw"):
        said = ran(program, "--out", tmp_path / file[-3:], model, tmp_path / file)
        assert NASTY in said
        best = np.frombuffer((tmp_path / file[-3:] / "output0.raw").read_bytes(), np.float32).reshape(order.shape)
        assert np.array_equal(best, np.take_along_axis(scores, order, 0))
        classes = np.frombuffer((tmp_path / file[-3:] / "output1.raw").read_bytes(), np.uint8)
        assert np.array_equal(classes.reshape(order.shape), order)
    (tmp_path / "small.ppm").write_bytes(b"P6 # small\n4 4 255\n" + bytes(48))
    assert "expected 10 x 6 pixels" in ran(program, model, tmp_path / "small.ppm", status=1)
    (tmp_path / "cut.raw").write_bytes(bytes(7))
    assert "holds 7 bytes, expected 180" in ran(program, model, tmp_path / "cut.raw", status=1)
    assert "cannot read" in ran(program, model, tmp_path / "none.raw", status=1)
    assert "expected the model and 1 files, got 1" in ran(program, model, status=1)


@pytest.mark.slow
@needs_headers
@pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))
def test_the_program_in_cpp_runs_on_the_emulated_npu(tmp_path: Path) -> None:
    import onnxruntime_qnn

    contract = write_app(tmp_path, "codes")
    program = compiled(tmp_path, contract)
    (photo,) = photos(tmp_path, 1)
    rgb = np.asarray(Image.open(photo))
    (tmp_path / "photo.raw").write_bytes(rgb.tobytes())
    library, backend = onnxruntime_qnn.get_library_path(), onnxruntime_qnn.get_qnn_htp_path()
    npu = ["--qnn", library, backend, "--soc", "SM8650"]
    said = ran(program, "--out", tmp_path, *npu, tmp_path / contract.file, tmp_path / "photo.raw")
    assert "numbers are (integer - 0) * 0.0039" in said
    codes = np.frombuffer((tmp_path / "output0.raw").read_bytes(), np.uint8).reshape(4, *rgb.shape[:2])
    assert np.abs(codes / 255 - scores_of(rgb)).max() < 2 / 255


@pytest.mark.slow
@needs_kotlin
def test_the_program_in_kotlin_compiles(tmp_path: Path) -> None:
    kinds = [one for one in TYPES if one not in ("uint16", "uint32", "uint64")]
    grid: dict[str, Any] = {"scale": 1e-5, "zero_point": 3, "bits": 8}
    image: dict[str, Any] = {"holds": "image", "mean": (0.0,), "std": (1.0,), **grid}
    ins = [IoTensor(f"{kind}{NASTY}", (1, 2, 3), kind) for kind in kinds]
    ins.append(IoTensor("gray", (1, 4, 6, 1), "uint8", layout="nhwc", color="gray", **image))
    outs = [IoTensor(f"out {one.name}", one.shape, one.type, **grid) for one in ins]
    outs += [IoTensor(kind, (1, 2), kind, **grid) for kind in ("uint16", "uint32", "uint64")]
    contract = Contract("net.app.onnx", tuple(ins), tuple(outs), (ClassLabel(NASTY, "#804020"), ClassLabel("b")) * 1000)
    write_hosts(tmp_path, contract)
    classes = unpacked(tmp_path / "aar") / "classes.jar"
    command = [
        "kotlinc",
        "-Werror",
        "-cp",
        str(classes),
        str(tmp_path / "host/Host.kt"),
        "-d",
        str(tmp_path / "out.jar"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
