"""What the exported graph takes and gives instead of the network's own floats, as the user asks for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lightning_quant.errors import ConfigurationError
from lightning_quant.utilities.parsing import FieldError, check, is_finite, parse_as, parse_fields, short_repr

Layout = Literal["nhwc", "nchw"]
ColorOrder = Literal["rgb", "bgr"]
Function = Literal["none", "argmax", "top_k", "softmax", "sigmoid"]
Resize = Literal["before", "after"]

QUANTIZED = "quantized"


@dataclass(frozen=True)
class ImageInput:
    """An input that takes the pixels of an image, ``uint8``; the device normalizes them.

    What the network saw in training is ``(pixel / 255 - mean) / std``, as ``torchvision`` normalizes.

    Args:
        mean: subtracted from pixels in 0…1, one for each channel of the network, or one for all.
        std: what that is divided by, likewise.
        layout: of the image: channels last, as cameras and bitmaps have them, or first.
        color: order of the image's channels.
        trained_on: order of the channels that the network was trained on, and of ``mean`` and ``std``.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: Layout = "nhwc"
    color: ColorOrder = "rgb"
    trained_on: ColorOrder = "rgb"

    @classmethod
    def from_json(cls, value: Any, where: str = "") -> ImageInput:
        """Make one of what a configuration, the command line or JSON holds.

        Raises:
            FieldError: naming the field that does not fit.
        """
        given = dict(value) if isinstance(value, Mapping) else value
        if isinstance(given, dict):
            for name in ("mean", "std"):  # one number for all channels
                if isinstance(given.get(name), (int, float)) and not isinstance(given[name], bool):
                    given[name] = [given[name]]
        image: ImageInput = parse_fields(given, cls, where)
        for name in ("mean", "std"):
            numbers = getattr(image, name)
            check(len(numbers) in (1, 3, 4) and is_finite(*numbers), f"{where}.{name}", list(numbers), "1 to 4 numbers")
        check(min(image.std) > 0, f"{where}.std", list(image.std), "numbers above 0")
        return image

    @property
    def reverses(self) -> bool:
        """Whether the image's channels come in the other order than the network's."""
        return self.color != self.trained_on

    def of_channels(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and standard deviation for each of the network's channels."""
        mean, std = ((one * channels if len(one) == 1 else one) for one in (self.mean, self.std))
        return mean, std


@dataclass(frozen=True)
class OutputEdge:
    """What the device computes of an output of the network, and in which form the app gets it.

    Args:
        function: ``"argmax"`` gives the class with the highest score (``uint8``, or ``int32`` beyond 256 classes);
            ``"top_k"`` the ``k`` highest scores and their classes; ``"softmax"`` and ``"sigmoid"`` probabilities;
            ``"none"`` the network's own numbers.
        axis: of the classes. Height and width are the last two others.
        k: of ``"top_k"``.
        resize: to height and width of the input: ``"before"`` the function, bilinearly, or ``"after"`` it, to the
            nearest. Before, every class has a plane of that size; after, there is one.
        quantized: give integers as they are, ``uint8`` or ``uint16``; scale and zero point are in ``io.json``.
    """

    function: Function = "none"
    axis: int = 1
    k: int = 5
    resize: Resize | None = None
    quantized: bool = False

    @classmethod
    def from_json(cls, value: Any, where: str = "") -> OutputEdge:
        """Make one of the name of a function, ``"quantized"``, or a mapping of the fields.

        Raises:
            FieldError: naming the field that does not fit.
        """
        given = dict(value) if isinstance(value, Mapping) else value
        if given == QUANTIZED:
            given = {"quantized": True}
        elif isinstance(given, str):
            given = {"function": given}
        edge: OutputEdge = parse_fields(given, cls, where)
        check(edge.k >= 1, f"{where}.k", edge.k, "a whole number of at least 1")
        no_floats = edge.function in ("argmax", "top_k")
        check(not (edge.quantized and no_floats), f"{where}.quantized", True, f"false: {edge.function} gives integers")
        return edge


@dataclass(frozen=True)
class Edges:
    """What goes in and out, for each input and output of a network; ``None`` is the network's own.

    Args:
        inputs: in the order in which the network takes them. ``"quantized"`` takes integers on the network's own grid.
        outputs: in the order in which it returns them.
    """

    inputs: tuple[ImageInput | Literal["quantized"] | None, ...] = ()
    outputs: tuple[OutputEdge | None, ...] = ()

    @classmethod
    def of(cls, inputs: Any, outputs: Any) -> Edges | None:
        """Make them of what a user gives; ``None`` if that is nothing.

        Args:
            inputs: one for a network with one input, or a list with one for each: an :class:`ImageInput`, a mapping
                of its fields, ``"image"`` for one with pixels in 0…1, ``"quantized"`` or ``None``.
            outputs: likewise: an :class:`OutputEdge`, a mapping of its fields, a function, ``"quantized"`` or ``None``.

        Raises:
            ConfigurationError: naming what cannot be meant.
        """
        try:
            edges = cls(
                tuple(_input(one, f"inputs[{at}]") for at, one in enumerate(_listed(inputs))),
                tuple(_output(one, f"outputs[{at}]") for at, one in enumerate(_listed(outputs))),
            )
        except FieldError as error:
            raise ConfigurationError(f"{error}.") from error
        return edges if any(edges.inputs) or any(edges.outputs) else None

    @classmethod
    def from_json(cls, value: Any, where: str = "") -> Edges:
        """Read what ``dataclasses.asdict`` made of one.

        Raises:
            FieldError: naming the field that does not fit.
        """
        parts = parse_as(value, dict[str, list[Any]], where)
        check(parts.keys() == {"inputs", "outputs"}, where, sorted(parts), "inputs and outputs")
        return cls(
            tuple(_input(one, f"{where}.inputs[{at}]") for at, one in enumerate(parts["inputs"])),
            tuple(_output(one, f"{where}.outputs[{at}]") for at, one in enumerate(parts["outputs"])),
        )


def _listed(given: Any) -> Sequence[Any]:
    single = given is None or isinstance(given, (str, Mapping, ImageInput, OutputEdge))
    if not single and not isinstance(given, Sequence):
        raise ConfigurationError(
            f"inputs or outputs is {short_repr(given)}: expected one for a network with one, or a list with one each."
        )
    return [given] if single else given


def _input(given: Any, where: str) -> ImageInput | Literal["quantized"] | None:
    if given is None or given == QUANTIZED:
        return given
    if given == "image":
        return ImageInput()
    if isinstance(given, ImageInput):  # its fields were not looked at yet
        given = asdict(given)
    if isinstance(given, str):
        raise FieldError(where, given, "image, quantized, or the fields of an image")
    return ImageInput.from_json(given, where)


def _output(given: Any, where: str) -> OutputEdge | None:
    if given is None:
        return None
    return OutputEdge.from_json(asdict(given) if isinstance(given, OutputEdge) else given, where)
