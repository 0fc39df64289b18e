"""What the exported graph takes and gives instead of the network's own floats, as the user asks for it."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lightning_quant.deploy.graph.passed_inputs import Grid
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
class OwnModule:
    """A small module of the user's own behind an output, such as the decoding of boxes.

    Args:
        path: dotted path of its class.
        names: what tells the tensors that it returns apart: keys or positions; none for a single tensor.
        network: the module, an ``nn.Module`` in float; ``None`` for one in a file, for which nothing is imported.
        simulation: the :class:`~lightning_quant.simulation.network.QuantizedNetwork` made of it for the export.
        model: its QDQ graph, an ``onnx.ModelProto``, for one input size of the network.
        grids: what its outputs are rounded to in that; ``None`` for integers.
    """

    path: str
    names: tuple[str, ...] = ()
    network: Any = field(default=None, compare=False, repr=False)
    simulation: Any = field(default=None, compare=False, repr=False)
    model: Any = field(default=None, compare=False, repr=False)
    grids: tuple[Grid | None, ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def from_json(cls, value: Any, where: str = "") -> OwnModule:
        """Make one of a module, of a dotted path, or of what :meth:`to_json` returned.

        Raises:
            FieldError: naming the field that does not fit.
        """
        from torch import nn

        if isinstance(value, cls):
            return value
        if isinstance(value, nn.Module):
            return cls(f"{type(value).__module__}.{type(value).__qualname__}", network=value)
        parts = parse_as(value if isinstance(value, Mapping) else {"path": value}, dict[str, Any], where)
        known = parts.keys() <= {"path", "names"} and isinstance(parts.get("path"), str)
        path = parts["path"] if known else ""
        check("." in path, where, value, "a torch.nn.Module or the dotted path of its class")
        return cls(path, parse_as(parts.get("names", ()), tuple[str, ...], f"{where}.names"))

    def made(self) -> OwnModule:
        """Return it with a module made of its class, where none was given.

        Raises:
            ConfigurationError: for a path that is no ``nn.Module``, or one that takes arguments.
        """
        import torch

        if self.network is not None:
            return self
        advice = "Give the dotted path of a torch.nn.Module that is made without arguments, or the module itself."
        try:
            kind = pkgutil.resolve_name(self.path)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigurationError(f"outputs: {self.path!r} cannot be imported: {error}. {advice}") from error
        if not (isinstance(kind, type) and issubclass(kind, torch.nn.Module)):
            raise ConfigurationError(f"outputs: {self.path!r} is no class of torch.nn.Module. {advice}")
        try:
            with torch.random.fork_rng(devices=[]):
                return replace(self, network=kind())
        except Exception as error:  # the user's code
            raise ConfigurationError(
                f"outputs: {self.path!r} cannot be made: {type(error).__name__}: {error}. {advice}"
            ) from error

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"path": self.path, "names": list(self.names)}


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
        module: what is computed instead of a function: an ``nn.Module`` of your own, or the dotted path of its class,
            which is made without arguments. It takes the output, a float tensor with one sample along its first axis,
            and returns a tensor or a tuple or dict of tensors, each an output of the graph: ``<output>`` for a single
            one, else ``<output>_<key or position>``. It is quantized as the network is.
    """

    function: Function = "none"
    axis: int = 1
    k: int = 5
    resize: Resize | None = None
    quantized: bool = False
    module: OwnModule | None = None

    @classmethod
    def from_json(cls, value: Any, where: str = "") -> OutputEdge:
        """Make one of the name of a function, ``"quantized"``, a module or its dotted path, or a mapping of the fields.

        Raises:
            FieldError: naming the field that does not fit.
        """
        given = dict(value) if isinstance(value, Mapping) else value
        if given == QUANTIZED:
            given = {"quantized": True}
        elif isinstance(given, str):
            given = {"module" if "." in given else "function": given}
        elif not isinstance(given, dict):
            given = {"module": given}
        edge: OutputEdge = parse_fields(given, cls, where)
        check(edge.k >= 1, f"{where}.k", edge.k, "a whole number of at least 1")
        no_floats = edge.function in ("argmax", "top_k")
        check(not (edge.quantized and no_floats), f"{where}.quantized", True, f"false: {edge.function} gives integers")
        alone = edge.module is None or (edge.function == "none" and edge.resize is None)
        check(alone, f"{where}.module", edge.module, "no function and no resize beside it: the module computes them")
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
            outputs: likewise: an :class:`OutputEdge`, a mapping of its fields, a function, ``"quantized"``, a module or
                its dotted path, or ``None``.

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
        known = tuple(
            one if one is None or one.module is None else replace(one, module=one.module.made())
            for one in edges.outputs
        )
        edges = replace(edges, outputs=known)
        return edges if any(edges.inputs) or any(edges.outputs) else None

    @property
    def has_modules(self) -> bool:
        """Whether there is a module of the user's own."""
        return any(one is not None and one.module is not None for one in self.outputs)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        outputs = [None if one is None else dict(vars(one)) for one in self.outputs]
        for one in outputs:
            if one is not None:
                one["module"] = None if one["module"] is None else one["module"].to_json()
        return {
            "inputs": [vars(one) if isinstance(one, ImageInput) else one for one in self.inputs],
            "outputs": outputs,
        }

    @classmethod
    def from_json(cls, value: Any, where: str = "") -> Edges:
        """Read what :meth:`to_json` returned.

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
    from torch import nn

    if given is None:  # the network's own, however many there are
        return []
    single = isinstance(given, (str, Mapping, ImageInput, OutputEdge, nn.Module))
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
        given = vars(given)
    if isinstance(given, str):
        raise FieldError(where, given, "image, quantized, or the fields of an image")
    return ImageInput.from_json(given, where)


def _output(given: Any, where: str) -> OutputEdge | None:
    if given is None:
        return None
    return OutputEdge.from_json(vars(given) if isinstance(given, OutputEdge) else given, where)
