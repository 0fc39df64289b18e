"""Runs an exported network on photographs or arrays: ``python host.py photo.jpg``.

Needs onnxruntime, numpy and pillow, nothing else. What goes in and comes out is read from ``io.json`` in the folder
above, or in ``--bundle``. On a Snapdragon, ``--provider qnn`` runs it on the NPU (``pip install onnxruntime-qnn``);
elsewhere on x86 Linux that emulates one, and ``--soc`` names it.

Class maps become ``<name>.png``, classes by rank are printed, everything else is in ``<name>.npz``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

# An input or output in io.json, and the whole of it.
Tensor = Mapping[str, Any]
Contract = Mapping[str, Any]
Arrays = dict[str, np.ndarray]
Color = tuple[int, int, int]

RANKS = 5
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_ROW, _TEXT, _ENTRY, _NARROWEST, _LONGEST = 18, 12, 110, 256, 40


def open_session(model: Path, provider: str = "cpu", soc: str | None = None) -> Any:
    """Return an ONNX Runtime session.

    Args:
        model: the ONNX file.
        provider: ``"cpu"``, which computes every node as it is written, or ``"qnn"``, the NPU.
        soc: chip to emulate where there is no NPU, such as ``SM8650``.

    Raises:
        RuntimeError: when nothing of it was compiled for the NPU.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if provider == "cpu":
        # fused integer kernels saturate on CPUs without VNNI, and other results are no bug of the network's
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    import onnxruntime_qnn

    name = onnxruntime_qnn.get_ep_name()
    onnxruntime.register_execution_provider_library(name, onnxruntime_qnn.get_library_path())
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    options.add_session_config_entry("session.disable_double_qdq_remover", "1")  # two roundings stay two
    settings = {"backend_path": onnxruntime_qnn.get_qnn_htp_path(), **({} if soc is None else {"soc_model": soc})}
    options.add_provider_for_devices(devices, settings)
    session = onnxruntime.InferenceSession(str(model), sess_options=options)
    session.disable_fallback()  # else after an error it continues on the CPU, silently
    if not any(part.ep_name == name for part in session.get_provider_graph_assignment_info()):
        raise RuntimeError(f"no layer of {model.name} was compiled for the NPU: it would run on the CPU")
    return session


def upright(image: Image.Image) -> Image.Image:
    """Return a photograph with 8 bits a channel, turned as it was taken.

    Raises:
        ValueError: for numbers that have no known range.
    """
    if image.mode.startswith("I;16"):  # Pillow would clip it
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are of 32 bits (mode {image.mode}), expected 8 or 16")
    return ImageOps.exif_transpose(image)


def pixels(photo: Image.Image, tensor: Tensor) -> np.ndarray:
    """Return what an input that ``holds`` an image is given: ``uint8`` in its size, layout and order of colors."""
    nhwc = tensor["layout"] == "nhwc"
    _, *sizes = tensor["shape"]
    height, width, channels = sizes if nhwc else (*sizes[1:], sizes[0])
    values = _resized(photo, (width, height), channels)
    if tensor["color"] == "bgr":
        values = values[..., ::-1]
    return np.ascontiguousarray(values if nhwc else np.moveaxis(values, -1, 0))[None]


def normalized(photo: Image.Image, tensor: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Return what an input of floats is given, ``(pixel / 255 - mean) / std``, channels first.

    Args:
        photo: the photograph.
        tensor: the input, of shape (1, C, H, W).
        mean: of pixels in 0…1, one for each channel.
        std: likewise.
    """
    _, channels, height, width = tensor["shape"]
    planes = np.moveaxis(_resized(photo, (width, height), channels), -1, 0).astype(np.float32) / np.float32(255)
    shift, scale = (np.asarray(one, np.float32).reshape(-1, 1, 1) for one in (mean, std))
    return ((planes - shift) / scale)[None]


def _resized(photo: Image.Image, size: tuple[int, int], channels: int) -> np.ndarray:
    if channels not in MODES:
        raise ValueError(f"the network takes {channels} channels, expected 1, 3 or 4 of an image")
    values = np.asarray(photo.convert(MODES[channels]).resize(size, Image.Resampling.BILINEAR))
    return values.reshape(size[1], size[0], channels)


def numbers(values: np.ndarray, tensor: Tensor) -> np.ndarray:
    """Return an array as an input takes it: with a batch axis, reals rounded to the input's integers.

    Raises:
        ValueError: for another shape, or a type that the input cannot hold.
    """
    shape, kind = tuple(tensor["shape"]), np.dtype(tensor["type"])
    if values.shape == shape[1:]:
        values = values[None]
    if values.shape != shape:
        raise ValueError(f"it is of shape {list(values.shape)}, expected {list(shape)}")
    if values.dtype.kind == "f" and kind.kind in "iu" and tensor["scale"] is not None:
        limits: Any = np.iinfo(tensor["type"])
        steps = np.rint(values / np.float32(tensor["scale"])) + tensor["zero_point"]
        return np.clip(steps, limits.min, limits.max).astype(kind)
    if values.dtype != kind and not (values.dtype.kind == "f" and kind.kind == "f"):
        raise ValueError(f"it holds {values.dtype}, expected {kind}")
    return values.astype(kind)


def reals(values: np.ndarray, tensor: Tensor) -> np.ndarray:
    """Return the real numbers that an output's integers stand for; floats and classes as they are."""
    if values.dtype.kind not in "iu" or tensor["scale"] is None:
        return values
    return (values.astype(np.float32) - np.float32(tensor["zero_point"])) * np.float32(tensor["scale"])


@dataclass
class Answer:
    """What the classes of one output are.

    Args:
        name: of the output.
        class_map: the class of every pixel, (H, W); ``None`` where there is one for the whole image.
        ranking: classes of the whole image, best first, with their scores where they are known.
    """

    name: str
    class_map: np.ndarray | None = None
    ranking: Sequence[tuple[int, float | None]] = ()


def answers(contract: Contract, outputs: Arrays) -> tuple[list[Answer], Arrays]:
    """Return the classes that the outputs hold, and the outputs that hold none, as real numbers."""
    tensors = {one["name"]: one for one in contract["outputs"]}
    found, rest = [], {}
    for name, tensor in tensors.items():
        if f"{name}_classes" in tensors:  # the scores of top_k
            continue
        scores = tensors.get(name.removesuffix("_classes"))
        ranked = tensor["holds"] == "classes" and scores is not None and tensor["axis"] is not None
        if ranked and scores is not None:
            values = reals(outputs[scores["name"]], scores)
            answer = _answer(name, *(np.moveaxis(one, tensor["axis"], 0) for one in (outputs[name], values)))
        elif tensor["holds"] == "classes":
            answer = _answer(name, outputs[name][None], None)
        elif tensor["holds"] in ("scores", "probabilities") and tensor["axis"] and tensor["shape"][tensor["axis"]] > 1:
            values = np.moveaxis(reals(outputs[name], tensor), tensor["axis"], 0)
            if values.ndim == 4:
                answer = _answer(name, values.argmax(0)[None], None)
            else:
                order = np.argsort(-values, axis=0, kind="stable")[:RANKS]
                answer = _answer(name, order, np.take_along_axis(values, order, 0))
        else:
            answer = None
        if answer is not None:
            found.append(answer)
            continue
        rest[name] = reals(outputs[name], tensor)
        if ranked and scores is not None:
            rest[scores["name"]] = values
    return found, rest


def _answer(name: str, classes: np.ndarray, scores: np.ndarray | None) -> Answer | None:
    """Make an answer of classes by rank, (ranks, batch of 1, …)."""
    if classes.shape[1:2] != (1,) or classes.ndim not in (2, 4):
        return None
    if classes.ndim == 4:
        return Answer(name, class_map=classes[0, 0])
    known = [None] * len(classes) if scores is None else scores[:, 0].tolist()
    return Answer(name, ranking=list(zip(classes[:, 0].tolist(), known, strict=True)))


def class_name(contract: Contract, index: int) -> str:
    """Return the name of a class, or its number."""
    labels = contract["classes"]
    return labels[index]["name"] if index < len(labels) else f"class {index}"


def class_color(contract: Contract, index: int) -> Color:
    """Return the color of a class: its own, or one that is far from those of its neighbors (PASCAL VOC's)."""
    labels = contract["classes"]
    own = labels[index]["color"] if index < len(labels) else None
    if own is not None:
        return int(own[1:3], 16), int(own[3:5], 16), int(own[5:7], 16)
    # bit 3n of the index is the n-th highest bit of red, 3n+1 of green, 3n+2 of blue
    red, green, blue = (
        sum((index + 1 >> 3 * bit + channel & 1) << 7 - bit for bit in range(8)) for channel in range(3)
    )
    return red, green, blue


def overlay(photo: Image.Image, class_map: np.ndarray, contract: Contract) -> Image.Image:
    """Draw the classes of pixels over a photograph, half and half, with a legend of those that occur.

    Where names of classes are known, pixels of other numbers, such as 255 for none, stay as they are.
    """
    picture = photo.convert("RGB")
    rows, columns = (
        ((np.arange(wanted) + 0.5) * have / wanted).astype(np.int64)
        for wanted, have in zip(picture.size[::-1], class_map.shape, strict=True)
    )
    wide = class_map[rows][:, columns]
    mixed = np.array(picture)
    present, legend = np.unique(class_map).tolist(), {}
    for index in present:
        if index < 0 or (contract["classes"] and index >= len(contract["classes"])):
            continue
        color = class_color(contract, index)
        where = wide == index
        mixed[where] = np.rint((mixed[where] + np.asarray(color, np.float32)) / 2)
        legend[class_name(contract, index)] = color
    times = -(-_NARROWEST // picture.width)
    size = (times * picture.width, times * picture.height)
    return with_legend(Image.fromarray(mixed).resize(size, Image.Resampling.NEAREST), legend)


def with_legend(picture: Image.Image, legend: Mapping[str, Color]) -> Image.Image:
    """Return a picture with what its colors stand for below it."""
    font = ImageFont.load_default(size=_TEXT)
    names = [name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…" for name in legend]
    entry = max([_ENTRY, *(int(font.getlength(name)) + _TEXT + 16 for name in names)])
    columns = max(1, picture.width // entry)
    canvas = Image.new("RGB", (picture.width, picture.height + -(-len(legend) // columns) * _ROW), "white")
    canvas.paste(picture, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for index, (name, color) in enumerate(zip(names, legend.values(), strict=True)):
        left, top = index % columns * entry, picture.height + index // columns * _ROW
        draw.rectangle((left + 2, top + 3, left + 2 + _TEXT, top + 3 + _TEXT), fill=tuple(color))
        draw.text((left + _TEXT + 8, top + 2), name, fill="black", font=font)
    return canvas


def ranks(contract: Contract, answer: Answer) -> str:
    """Return classes by rank in words: ``cat 0.93, dog 0.04``."""
    return ", ".join(
        class_name(contract, index) + ("" if score is None else f" {score:.3g}") for index, score in answer.ranking
    )


def write_answers(contract: Contract, outputs: Arrays, photo: Image.Image | None, stem: Path) -> list[str]:
    """Write the outputs of one sample, and return what was found, in words.

    Args:
        contract: content of io.json.
        outputs: by name, as the network gave them.
        photo: what it saw; without one class maps are written as numbers.
        stem: path of the files, without an ending.
    """
    found, rest = answers(contract, outputs)
    said, maps = [], 0
    for answer in found:
        if answer.class_map is None:
            said.append(ranks(contract, answer))
        elif photo is None:
            rest[answer.name] = answer.class_map
        else:
            path = stem.with_name(f"{stem.name}{f'.{maps}' if maps else ''}.png")
            overlay(photo, answer.class_map, contract).save(path)
            maps += 1
            said.append(str(path))
    if rest:
        said.append(str(write_arrays(stem.with_name(f"{stem.name}.npz"), rest)))
    return said


def write_arrays(path: Path, arrays: Arrays) -> Path:
    """Write arrays by name; what is no letter, digit, dot or dash in one becomes ``_``."""
    plain = {name: re.sub(r"[^\w.-]", "_", name) for name in arrays}
    taken = {"file", "allow_pickle"}  # arguments of numpy.savez
    for name in arrays:
        while plain[name] in taken:
            plain[name] += "_"
        taken.add(plain[name])
    np.savez(path, **{plain[name]: value for name, value in arrays.items()})  # type: ignore[arg-type]
    return path


def free_names(paths: Iterable[Path]) -> dict[Path, str]:
    """Return a name for the results of each file: its own without the ending, numbered where that is taken."""
    names: dict[Path, str] = {}
    for path in paths:
        name, number = path.stem, 1
        while name in names.values():
            number += 1
            name = f"{path.stem}-{number}"
        names.setdefault(path, name)
    return names


def _fed(path: Path, contract: Contract, mean: Sequence[float], std: Sequence[float]) -> tuple[Arrays, Any]:
    inputs = contract["inputs"]
    if path.suffix == ".npz":
        with np.load(path) as file:
            return {one["name"]: numbers(file[one["name"]], one) for one in inputs}, None
    if len(inputs) > 1:
        raise ValueError(f"the network takes {len(inputs)} inputs: expected an .npz file with {[*_names(inputs)]}")
    (tensor,) = inputs
    if path.suffix == ".npy":
        return {tensor["name"]: numbers(np.load(path), tensor)}, None
    with Image.open(path) as image:
        photo = upright(image)
    if tensor["holds"] == "image":
        return {tensor["name"]: pixels(photo, tensor)}, photo
    if not std:
        raise ValueError("the network takes floats: expected an .npy file, or --mean and --std to normalize by")
    return {tensor["name"]: normalized(photo, tensor, mean, std)}, photo


def _names(tensors: Iterable[Tensor]) -> list[str]:
    return [one["name"] for one in tensors]


def main() -> None:
    """Run the network on files; the exit status is 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="images; .npy, or .npz with one array for each input")
    parser.add_argument("--bundle", type=Path, default=Path(__file__).resolve().parent.parent)
    parser.add_argument("--out", type=Path, default=Path("predictions"))
    parser.add_argument("--provider", choices=("cpu", "qnn"), default="cpu")
    parser.add_argument("--soc", help="chip to emulate where there is no NPU, such as SM8650")
    parser.add_argument("--mean", type=float, nargs="+", default=[0.0], help="of pixels in 0…1, for inputs of floats")
    parser.add_argument("--std", type=float, nargs="+", default=[], help="likewise")
    parser.add_argument("--raw", action="store_true", help="write all outputs as they are, too: <name>.raw.npz")
    given = parser.parse_args()
    contract = json.loads((given.bundle / "io.json").read_text())
    session = open_session(given.bundle / Path(contract["file"]).name, given.provider, given.soc)
    names = _names(contract["outputs"])
    given.out.mkdir(parents=True, exist_ok=True)
    failed = False
    for path, name in free_names(given.files).items():
        try:
            inputs, photo = _fed(path, contract, given.mean, given.std)
            outputs = dict(zip(names, session.run(names, inputs), strict=True))
        except Exception as error:  # the others may be well
            print(f"{path}: {error}", file=sys.stderr)
            failed = True
            continue
        if given.raw:
            write_arrays(given.out / f"{name}.raw.npz", outputs)
        print(f"{path}: {'; '.join(write_answers(contract, outputs, photo, given.out / name))}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
