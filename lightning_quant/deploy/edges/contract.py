"""``io.json``: what an app hands to an exported network and gets from it, to the last bit."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lightning_quant.errors import ExportError
from lightning_quant.utilities.parsing import check, check_version, is_finite, parse_fields, read_json

CONTRACT_NAME = "io.json"
_FORMAT_VERSION = 1

Holds = Literal["image", "numbers", "scores", "classes", "probabilities"]
# What NumPy calls the types of tensors in ONNX.
TYPES = (
    "float16",
    "float32",
    "float64",
    "int8",
    "uint8",
    "int16",
    "uint16",
    "int32",
    "uint32",
    "int64",
    "uint64",
    "bool",
)
_MOST_CLASSES = 2**16
_COLOR = re.compile(r"#[0-9a-f]{6}")


@dataclass(frozen=True)
class IoTensor:
    """An input or output of the file that runs on a device.

    Args:
        name: in the graph.
        shape: of one sample, its batch axis of length 1 included.
        type: of its elements, one of :data:`TYPES`.
        holds: ``"image"``: pixels of 0…255. ``"numbers"``: whatever the network takes or returns. ``"scores"``: one
            for each class. ``"classes"``: indices of classes. ``"probabilities"``: 0…1.
        layout: ``"nhwc"`` or ``"nchw"`` of an image; ``None`` where axes have no such meaning.
        color: order of an image's channels.
        scale: of integers that stand for real numbers, ``(integer - zero_point) * scale``; of floats the grid that the
            device rounds them to. ``None`` for classes, and where nothing is rounded.
        zero_point: the integer that stands for 0.
        bits: of the grid.
        mean: what is subtracted from pixels in 0…1, for each channel; applied on the device. ``None`` for no image.
        std: what that is divided by; applied on the device.
        axis: of the classes, for scores and probabilities.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    holds: Holds = "numbers"
    layout: Literal["nhwc", "nchw"] | None = None
    color: Literal["rgb", "bgr", "gray"] | None = None
    scale: float | None = None
    zero_point: int | None = None
    bits: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    axis: int | None = None

    @property
    def range(self) -> tuple[float, float] | None:
        """The lowest and highest real number that the grid holds."""
        if self.scale is None or self.zero_point is None or self.bits is None:
            return None
        return -self.zero_point * self.scale, (2**self.bits - 1 - self.zero_point) * self.scale

    def validate(self, where: str) -> None:
        """Refuse values that no tensor has.

        Raises:
            FieldError: naming the first field, below ``where``.
        """
        check(self.type in TYPES, f"{where}.type", self.type, f"one of {', '.join(TYPES)}")
        sizes = len(self.shape) <= 8 and all(0 <= size < 2**31 for size in self.shape)
        check(sizes and math.prod(self.shape) < 2**40, f"{where}.shape", self.shape, "at most 8 sizes")
        check(0 < len(self.name) < 500, f"{where}.name", self.name, "a name")
        image = self.holds == "image"
        fits = len(self.shape) == 4 and self.layout is not None and self.color is not None and self.type == "uint8"
        check(not image or fits, where, self.name, "an image of uint8 with 4 axes, a layout and an order of colors")
        if image:
            channels = self.shape[3 if self.layout == "nhwc" else 1]
            check(channels in (1, 3, 4), f"{where}.shape", self.shape, "an image of 1, 3 or 4 channels")
            for name, numbers in {"mean": self.mean, "std": self.std}.items():
                known = numbers is not None and len(numbers) == channels and is_finite(*numbers)
                check(known, f"{where}.{name}", numbers, f"{channels} numbers, one for each channel")
            assert self.std is not None
            check(min(self.std) > 0, f"{where}.std", self.std, "numbers above 0")
        if self.scale is not None:
            check(is_finite(self.scale) and self.scale > 0, f"{where}.scale", self.scale, "a number above 0")
            check(self.zero_point is not None and self.bits is not None, where, self.name, "zero_point and bits too")
            assert self.bits is not None
            check(1 <= self.bits <= 32, f"{where}.bits", self.bits, "1 to 32")
        if self.axis is not None:
            check(0 <= self.axis < len(self.shape), f"{where}.axis", self.axis, "an axis of the shape")


@dataclass(frozen=True)
class ClassLabel:
    """A class that the network tells apart.

    Args:
        name: for people.
        color: to draw it in, ``#rrggbb``; ``None`` where none is known.
    """

    name: str
    color: str | None = None


@dataclass(frozen=True)
class Contract:
    """Content of ``io.json``.

    Args:
        file: the ONNX file that it speaks of, in the same folder.
        inputs: in the order of the graph.
        outputs: likewise.
        classes: by index, where they are known.
    """

    file: str
    inputs: tuple[IoTensor, ...]
    outputs: tuple[IoTensor, ...]
    classes: tuple[ClassLabel, ...] = ()

    def __post_init__(self) -> None:
        plain = Path(self.file).name == self.file and self.file.endswith(".onnx")
        check(plain, "file", self.file, "the name of an ONNX file in the same folder")
        for part in ("inputs", "outputs"):
            tensors = getattr(self, part)
            check(0 < len(tensors) < 1000, part, len(tensors), "at least one tensor")
            for at, one in enumerate(tensors):
                one.validate(f"{part}.{at}")
        names = [one.name for one in (*self.inputs, *self.outputs)]
        check(len(set(names)) == len(names), "the names", names, "names that are all different")
        check(len(self.classes) <= _MOST_CLASSES, "classes", len(self.classes), f"at most {_MOST_CLASSES}")
        for at, label in enumerate(self.classes):
            known = label.color is None or _COLOR.fullmatch(label.color) is not None
            check(known, f"classes.{at}.color", label.color, "#rrggbb")

    def write(self, path: Path) -> None:
        """Write it as JSON, into a folder that is not a bundle yet."""
        values = asdict(self)
        for part in ("inputs", "outputs"):  # for those who read it by eye
            for one, tensor in zip(values[part], getattr(self, part), strict=True):
                one["range"] = tensor.range
        path.write_text(json.dumps({"format_version": _FORMAT_VERSION, **values}, indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Contract:
        """Read the ``io.json`` of a bundle.

        Raises:
            ExportError: when it is missing or damaged, naming the field.
        """
        path = folder / CONTRACT_NAME
        try:
            values = read_json(path)
            check_version(values, _FORMAT_VERSION)
            given = {name: value for name, value in values.items() if name != "format_version"}
            for part in ("inputs", "outputs"):  # the range follows from the rest
                tensors = given.get(part)
                if isinstance(tensors, list):
                    given[part] = [
                        {name: one for name, one in tensor.items() if name != "range"}
                        if isinstance(tensor, dict)
                        else tensor
                        for tensor in tensors
                    ]
            contract: Contract = parse_fields(given, cls)
        except (OSError, ValueError) as error:
            raise ExportError(f"{path} cannot be read: {error}. Export the bundle again.") from error
        return contract

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)
