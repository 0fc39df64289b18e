"""Bundles as an app gets them, made by hand: a network that tells colors apart, with its ends as ``io.json`` says."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lightning_quant.deploy.edges.contract import CONTRACT_NAME, ClassLabel, Contract, IoTensor

# Names of a user's network, and of somebody who means no good.
NASTY = 'a"b\\\n*/ ${System.exit(1)} %s {{ 7 * 7 }} é\u2028??/'
HEIGHT, WIDTH = 6, 10
COLORS = ("#ff0000", "#00ff00", "#0000ff", None)
LABELS = tuple(ClassLabel(name, color) for name, color in zip(("red", "green", "blue", NASTY), COLORS, strict=True))
# A class for each channel, and one for what is dark.
WEIGHTS = np.float32([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]])
BIAS = np.float32([0, 0, 0, 0.25])
SCALE = 1 / 255

Ends = Literal["classes", "codes", "scores", "top_k"]


def photos(folder: Path, count: int = 2) -> list[Path]:
    """Write photographs in the size of the network."""
    from PIL import Image

    paths = []
    for seed in range(count):
        values = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        paths.append(folder / f"photo{seed}.png")
        Image.fromarray(values).save(paths[-1])
    return paths


def scores_of(rgb: np.ndarray) -> np.ndarray:
    """The scores of each class, (4, H, W), for pixels (H, W, 3)."""
    exact = np.einsum("oc,hwc->ohw", WEIGHTS, rgb / np.float32(255)) + BIAS[:, None, None]
    return (np.clip(np.rint(exact / SCALE), 0, 255) * SCALE).astype(np.float32)


def write_app(
    folder: Path,
    ends: Ends = "classes",
    layout: Literal["nhwc", "nchw"] = "nhwc",
    color: Literal["rgb", "bgr"] = "rgb",
    mean: bool = False,
    name: str = "image",
    labels: tuple[ClassLabel, ...] = LABELS,
) -> Contract:
    """Write the ONNX file of a network, and its contract.

    Args:
        folder: made if it is missing.
        ends: what it gives for each pixel; ``top_k``: the two best ones.
        layout: of the image.
        color: order of its channels.
        mean: give one answer for the whole image.
        name: of the input, and a part of the outputs'.
        labels: names of the classes.
    """
    shape = (1, HEIGHT, WIDTH, 3) if layout == "nhwc" else (1, 3, HEIGHT, WIDTH)
    place = [1, 1] if mean else [HEIGHT, WIDTH]
    weights = WEIGHTS if color == "rgb" else WEIGHTS[:, ::-1]
    constants = {
        "scale": np.float32(SCALE),
        "zero": np.uint8(0),
        "weight": np.ascontiguousarray(weights[..., None, None]),
        "bias": BIAS,
        "two": np.int64([2]),
        "flat": np.int64([1, 4]),
    }
    nodes = [("DequantizeLinear", [name, "scale", "zero"], ["pixels"], {})]
    if layout == "nhwc":
        nodes += [("Transpose", ["pixels"], ["planes"], {"perm": [0, 3, 1, 2]})]
    nodes += [("Conv", [nodes[-1][2][0], "weight", "bias"], ["each"], {})]
    nodes += (
        [("GlobalAveragePool", ["each"], ["mean"], {}), ("Reshape", ["mean", "flat"], ["scored"], {})] if mean else []
    )
    out = f"out {name}"
    codes = out if ends == "codes" else "codes"
    nodes += [("QuantizeLinear", [nodes[-1][2][0], "scale", "zero"], [codes], {})]
    real = out if ends == "scores" else "real"
    nodes += [("DequantizeLinear", [codes, "scale", "zero"], [real], {})] if ends != "codes" else []
    if ends == "classes":
        nodes += [("ArgMax", [real], ["index"], {"axis": 1, "keepdims": 0})]
        nodes += [("Cast", ["index"], [out], {"to": TensorProto.UINT8})]
    if ends == "top_k":
        nodes += [("TopK", [real, "two"], [out, "index"], {"axis": 1})]
        nodes += [("Cast", ["index"], [f"{out}_classes"], {"to": TensorProto.UINT8})]
    sizes = [] if mean else place
    grid: dict[str, Any] = {"scale": SCALE, "zero_point": 0, "bits": 8}
    outputs = {
        "classes": [IoTensor(out, (1, *sizes), "uint8", "classes")],
        "codes": [IoTensor(out, (1, 4, *sizes), "uint8", "scores", axis=1, **grid)],
        "scores": [IoTensor(out, (1, 4, *sizes), "float32", "scores", axis=1, **grid)],
        "top_k": [
            IoTensor(out, (1, 2, *sizes), "float32", "scores", axis=1, **grid),
            IoTensor(f"{out}_classes", (1, 2, *sizes), "uint8", "classes", axis=1),
        ],
    }[ends]
    image = IoTensor(name, shape, "uint8", "image", layout, color, **grid, mean=(0.0,) * 3, std=(1.0,) * 3)
    contract = Contract("net.app.onnx", (image,), tuple(outputs), labels)
    _save(folder, contract, nodes, constants)
    return contract


def write_numbers(folder: Path, kind: str = "float32", shape: tuple[int, ...] = (1, 3, 4, 4)) -> Contract:
    """Write a network that gives what it takes, and its contract; integers stand for halves."""
    grid: dict[str, Any] = {} if kind == "float32" else {"scale": 0.5, "zero_point": 3, "bits": 8}
    ends = (IoTensor("x", shape, kind, **grid), IoTensor("y/0", shape, kind, **grid))
    contract = Contract("net.onnx", ends[:1], ends[1:])
    _save(folder, contract, [("Identity", ["x"], ["y/0"], {})], {})
    return contract


def _save(folder: Path, contract: Contract, nodes: list[Any], constants: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    infos = [
        [helper.make_tensor_value_info(one.name, _kind(one), one.shape) for one in part]
        for part in (contract.inputs, contract.outputs)
    ]
    used = {name for node in nodes for name in node[1]}
    held = [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items() if key in used]
    made = [helper.make_node(kind, taken, given, **how) for kind, taken, given, how in nodes]
    model = helper.make_model(
        helper.make_graph(made, "g", *infos, held), opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    )
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, folder / contract.file)
    contract.write(folder / CONTRACT_NAME)


def _kind(one: IoTensor) -> int:
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(one.type)))
