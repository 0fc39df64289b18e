"""Writes host programs into a bundle, from nothing but its contract."""

from __future__ import annotations

import functools
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_quant.deploy.edges.contract import Contract, IoTensor
from lightning_quant.deploy.hosts.host import MODES

HOSTS_NAME = "host"
_HERE = Path(__file__).parent
# What stands for itself in texts of C++ and Kotlin, and in their comments.
_PLAIN = re.compile(r"[A-Za-z0-9 _./:,()-]")
_ONNX_TYPES = {"float32": "FLOAT", "float64": "DOUBLE"}
# Arrays of a JVM, the buffers they are read from and made into, and how ONNX Runtime calls what they hold. Unsigned
# ones it can read, but not make.
_KOTLIN = {
    "float16": ("ShortArray", "asShortBuffer().", "Short", "FLOAT16"),
    "float32": ("FloatArray", "asFloatBuffer().", "Float", ""),
    "float64": ("DoubleArray", "asDoubleBuffer().", "Double", ""),
    "int8": ("ByteArray", "", "Byte", "INT8"),
    "uint8": ("ByteArray", "", "Byte", "UINT8"),
    "int16": ("ShortArray", "asShortBuffer().", "Short", "INT16"),
    "uint16": ("ShortArray", "asShortBuffer().", None, ""),
    "int32": ("IntArray", "asIntBuffer().", "Int", ""),
    "uint32": ("IntArray", "asIntBuffer().", None, ""),
    "int64": ("LongArray", "asLongBuffer().", "Long", ""),
    "uint64": ("LongArray", "asLongBuffer().", None, ""),
    "bool": ("ByteArray", "", "Byte", "BOOL"),
}
# A method of a JVM has 64 KB, and the names are made in one.
_MOST_NAMES = 2000


def write_hosts(bundle: Path, contract: Contract) -> list[str]:
    """Write programs that run the network: ``host.py``, ``host.cpp`` and, where Java has its types, ``Host.kt``.

    Args:
        bundle: the folder with the file that the contract is of.
        contract: as in its ``io.json``.

    Returns:
        Their paths in the bundle.
    """
    folder = bundle / HOSTS_NAME
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(_HERE / "host.py", folder / "host.py")
    values = {
        "contract": contract,
        "names": [one.name for one in contract.classes[:_MOST_NAMES]],
        "colors": [f"ff{one.color[1:]}" if one.color else "0" for one in contract.classes[:_MOST_NAMES]],
        "coded": _coded(contract),
        "position": lambda tensors, one: tensors.index(one),
        "sizes": _sizes,
        "elements": _elements,
        "bytes": lambda one: _elements(one) * np.dtype(one.type).itemsize,
        "onnx_type": lambda one: _ONNX_TYPES.get(one.type, one.type.upper()),
        "pixel_file": _pixel_file,
        "kotlin_type": lambda one: _KOTLIN[one.type][0],
        "kotlin_kind": lambda one: f", OnnxJavaType.{_KOTLIN[one.type][3]}" if _KOTLIN[one.type][3] else "",
        "kotlin_buffer": _kotlin_buffer,
        "kotlin_read": _kotlin_read,
    }
    written = ["host.py", "host.cpp", *(["Host.kt"] if _fits_java(contract) else [])]
    for name in written[1:]:
        (folder / name).write_text(_templates().get_template(name).render(values), encoding="utf-8")
    return [f"{HOSTS_NAME}/{name}" for name in written]


@functools.cache
def _templates() -> Any:
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("lightning_quant.deploy.hosts"), trim_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"cpp": cpp_string, "kotlin": kotlin_string}
    return environment


def feeding(contract: Contract) -> str:
    """Return the Python that feeds the network, a few lines to read."""
    lines = ["import numpy as np", "import onnxruntime"]
    if any(one.holds == "image" for one in contract.inputs):
        lines.append("from PIL import Image")
    lines += [
        "",
        "options = onnxruntime.SessionOptions()  # on a CPU compute as a device does, not with other kernels",
        "options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL",
        f"session = onnxruntime.InferenceSession({contract.file!r}, options)",
        "feeds = {",
    ]
    for one in contract.inputs:
        if one.holds != "image":
            lines.append(f"    {one.name!r}: np.zeros({one.shape}, np.{_numpy_name(one)}),  # your numbers")
            continue
        channels, height, width = _sizes(one)
        mode = MODES[channels]
        made = f"np.asarray(Image.open('photo.jpg').convert({mode!r}).resize({(width, height)}))"
        made += ".reshape" + str((height, width, channels)) if channels == 1 else ""
        made += "[..., ::-1]" if one.color == "bgr" else ""
        made += "" if one.layout == "nhwc" else ".transpose(2, 0, 1)"
        lines.append(f"    {one.name!r}: {made}[None],")
    lines.append("}")
    names = [one.name for one in contract.outputs]
    lines.append(f"outputs = dict(zip({names}, session.run({names}, feeds)))")
    lines += [
        f"reals = (outputs[{one.name!r}].astype('float32') - {one.zero_point}) * {one.scale}"
        for one in _coded(contract)
    ]
    return "\n".join(lines)


def cpp_string(text: str) -> str:
    """Return a text as a literal of C++: everything unusual as bytes of UTF-8, so that it can end nothing."""
    return '"' + "".join(_kept(letter) or "".join(f"\\{byte:03o}" for byte in letter.encode()) for letter in text) + '"'


def kotlin_string(text: str) -> str:
    """Return a text as a literal of Kotlin, likewise."""

    def units(letter: str) -> str:
        code = letter.encode("utf-16-be")
        return "".join(f"\\u{code[at : at + 2].hex()}" for at in range(0, len(code), 2))

    return '"' + "".join(_kept(letter) or units(letter) for letter in text) + '"'


def _kept(letter: str) -> str:
    return letter if _PLAIN.fullmatch(letter) else ""


def _coded(contract: Contract) -> list[IoTensor]:
    """The outputs whose integers stand for real numbers."""
    return [one for one in contract.outputs if one.scale is not None and one.type in ("uint8", "uint16")]


def _numpy_name(one: IoTensor) -> str:
    return "bool_" if one.type == "bool" else one.type


def _elements(one: IoTensor) -> int:
    return math.prod(one.shape)


def _sizes(one: IoTensor) -> tuple[int, int, int]:
    """Channels, height and width of an image; zeros for what is none."""
    if one.holds != "image":
        return 0, 0, 0
    _, *sizes = one.shape
    height, width, channels = sizes if one.layout == "nhwc" else (*sizes[1:], sizes[0])
    return channels, height, width


def _pixel_file(one: IoTensor) -> str:
    """What a file of pixels holds."""
    kinds = {1: "gray, or a .pgm", 3: "red, green, blue of each, or a .ppm", 4: "red, green, blue, alpha of each"}
    channels, height, width = _sizes(one)
    return f"{width} x {height} pixels, {kinds[channels]}"


def _fits_java(contract: Contract) -> bool:
    """Return whether ONNX Runtime's Java API has the types of all inputs, and a JVM arrays of their sizes."""
    tensors = (*contract.inputs, *contract.outputs)
    known = all(_KOTLIN[one.type][2] is not None for one in contract.inputs)
    return known and max(map(_elements, tensors)) < 2**31


def _kotlin_buffer(one: IoTensor, number: int) -> str:
    """The buffer that an input's tensor is made of."""
    given = f"input{number}"
    if one.holds == "image":
        # where red, green, blue and alpha are in a pixel of Android's
        shifts = {1: [0], 3: [16, 8, 0], 4: [16, 8, 0, 24]}[_sizes(one)[0]]
        order: Sequence[Any] = shifts[::-1] if one.color == "bgr" else shifts
        pixels = f"gray({given})" if len(shifts) == 1 else given
        listed = ", ".join(map(str, order))
        return f"ByteBuffer.wrap(arrange({pixels}, intArrayOf({listed}), {str(one.layout == 'nhwc').lower()}))"
    return f"{_KOTLIN[one.type][2]}Buffer.wrap({given})"


def _kotlin_read(one: IoTensor) -> str:
    """The array that an output is copied to."""
    array, view, *_ = _KOTLIN[one.type]
    return f"{array}({_elements(one)}).also {{ results.bytes({kotlin_string(one.name)}).{view}get(it) }}"
