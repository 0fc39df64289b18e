"""Further input sizes of one network: what is asked for, whether the network takes it, and samples of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_quant.deploy.graph.files import OnnxFiles, name_tensors
from lightning_quant.deploy.single_samples import first_samples
from lightning_quant.errors import ConfigurationError, ExportError
from lightning_quant.simulation.inputs import NetworkInputs
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.utilities.modules import on_cpu_in_eval
from lightning_quant.utilities.parsing import short_repr

# The last axes of the only input; or of some of several, by name.
Size = Sequence[int] | Mapping[str, Sequence[int]]
Shapes = list[tuple[int, ...]]

_MODES = {3: "linear", 4: "bilinear", 5: "trilinear"}


@dataclass(frozen=True)
class InputSize:
    """An input size beside the one that a network is exported for.

    Args:
        axes: the last axes of each input that it changes, by name; of an only input by the name ``""``.
    """

    axes: dict[str, tuple[int, ...]]

    @classmethod
    def parse(cls, sizes: Sequence[Size]) -> list[InputSize]:
        """Check what a user wrote.

        Raises:
            ConfigurationError: naming the first entry that is no size, or that is there twice.
        """
        expected = "a height and a width ([256, 512]), or more of the last axes ([4, 3, 256, 512]: a batch of four)"
        found: list[InputSize] = []
        for size in _list(sizes, "a list of them ([[256, 512]])"):
            named = size if isinstance(size, Mapping) else {"": size}
            axes = {str(name): tuple(_list(given, expected)) for name, given in named.items()}
            whole = all(type(length) is int and length >= 1 for given in axes.values() for length in given)
            if not axes or not all(axes.values()) or not whole:
                raise ConfigurationError(
                    f"sizes: {short_repr(size)} is no input size: expected {expected}, of several inputs by name "
                    "({image: [256, 512]})."
                )
            found.append(cls(axes))
        labels = [size.label for size in found]
        if twice := [label for label in labels if labels.count(label) > 1]:
            raise ConfigurationError(f"sizes has {twice[0]} twice: expected each size once. Leave one out.")
        return found

    @property
    def label(self) -> str:
        """What names its files, such as ``256x512``."""
        return _label(self.axes)

    def shapes(self, network: QuantizedNetwork, example: NetworkInputs) -> Shapes:
        """Return the shape of every tensor of a call at this size.

        Args:
            network: for the names of its inputs.
            example: a call of one sample, which says what this size leaves open.

        Raises:
            ConfigurationError: for an input that the network does not have, or more axes than it has.
        """
        shapes = _shapes(example)
        for name, axes in self.axes.items():
            place = self._place(network, example, name)
            own = shapes[place]
            if len(axes) > len(own):
                raise ConfigurationError(
                    f"sizes: {list(axes)} has {len(axes)} axes, expected at most {len(own)}: those of the input "
                    f"{list(own)} of {network.float_class.__name__}, the last ones first of all."
                )
            shapes[place] = (*own[: len(own) - len(axes)], *axes)
        return shapes

    def _place(self, network: QuantizedNetwork, example: NetworkInputs, name: str) -> int:
        names = name_tensors(network, example, ())[0]
        if name == "" and len(names) == 1:
            return 0
        if name not in names:
            given = f"an input {name!r}" if name else f"{list(self.axes[name])} without a name"
            raise ConfigurationError(
                f"sizes has {given}: expected the inputs of {network.float_class.__name__}, "
                f"{', '.join(map(repr, names))}, such as {{{names[0]}: {list(_shapes(example)[0][-2:])}}}."
            )
        return names.index(name)


@dataclass(frozen=True)
class SizedCalls:
    """Calls of the network at a further size.

    Args:
        calls: of that size and its number of samples each.
        resized: whether they were made of samples of another size.
    """

    calls: list[NetworkInputs]
    resized: bool


def sized_calls(
    network: QuantizedNetwork, sizes: Sequence[InputSize], calls: Sequence[NetworkInputs], others: Sequence[Any] = ()
) -> dict[str, SizedCalls]:
    """Return calls at each further size, by its label; a size that the calls have anyway is left out.

    Args:
        network: for the names of its inputs.
        sizes: what was asked for.
        calls: one sample each, all of the size that the network is exported for.
        others: calls of any size. Those that have a further size are taken for it; else ``calls`` are resized.

    Raises:
        ConfigurationError: see :meth:`InputSize.shapes`.
    """
    found = {}
    for size in sizes:
        shapes = size.shapes(network, calls[0])
        if shapes == _shapes(calls[0]):
            continue
        batches = [
            wanted[0] if len(own) > 1 and own[0] == 1 else 1
            for wanted, own in zip(shapes, _shapes(calls[0]), strict=True)
        ]
        single = [
            (own[0], *wanted[1:]) if batch > 1 else wanted
            for wanted, own, batch in zip(shapes, _shapes(calls[0]), batches, strict=True)
        ]
        samples = [_resized(call, single) for call in calls]
        fitting = first_samples(others, len(calls), samples[0]) if others else []
        resized = single != _shapes(calls[0])
        if resized and fitting and fitting[0].has_sizes_of(samples[0]):
            samples, resized = fitting, False
        found[size.label] = SizedCalls(_batched(samples, batches), resized)
    return found


def main_label(network: QuantizedNetwork, sizes: Sequence[InputSize], example: NetworkInputs) -> str:
    """Return what the size of a call is called beside further ones: as many axes of it as they say."""
    longest = max(sizes, key=lambda size: sum(map(len, size.axes.values())))
    shapes = dict(zip(name_tensors(network, example, ())[0], _shapes(example), strict=True))
    only = next(iter(shapes))
    return _label({name: shapes[name or only][-len(axes) :] for name, axes in longest.axes.items()})


def check_sizes(network: QuantizedNetwork, sizes: Sequence[InputSize], example: NetworkInputs | None = None) -> None:
    """Refuse a size that the network cannot compute, before any work is spent on it: it is run once at each.

    Args:
        network: the quantized network, calibrated or not. Its float network is run, where it is known.
        sizes: what was asked for.
        example: a call of one sample of the size that it is exported for. Default: that of the network.

    Raises:
        ConfigurationError: naming the size, and the layer that fails at it.
    """
    example = example or network.inputs.to(torch.device("cpu")).first(1)
    known = network.float_network
    runs = network.network if known is None else known
    title = network.float_class.__name__
    for label, given in sized_calls(network, sizes, [example]).items():
        with on_cpu_in_eval(runs), _entered_layers(runs) as entered:
            try:
                given.calls[0].call(runs)
            except Exception as error:
                where = f"its layer {entered[-1]!r}" if entered and entered[-1] else "its own forward"
                said = str(error).strip().splitlines() or ["no reason given"]
                raise ConfigurationError(
                    f"sizes: {title} cannot compute {label}, inputs of {_listed(_shapes(given.calls[0]))}: {where} "
                    f"fails with {type(error).__name__}: {said[0]} It takes {_listed(_shapes(example))}. Leave this "
                    "size out, or make that part independent of the size (AdaptiveAvgPool2d before Flatten, position "
                    "embeddings that are interpolated)."
                ) from error


def check_same_graph(own: OnnxFiles, further: OnnxFiles, label: str, title: str) -> None:
    """Refuse a further graph that is not the same network: other operations, or another grid of a tensor.

    Raises:
        ExportError: naming the first operation or tensor that differs.
    """
    expected = (
        f"expected one network with the same encodings at every size. Leave {label} out of sizes and export it alone, "
        "or move what depends on the size out of the network."
    )
    kinds = [[node.op_type for node in files.model.graph.node] for files in (own, further)]
    if kinds[0] != kinds[1]:
        pairs = zip(kinds[0], kinds[1], strict=False)
        place = next((at for at, (one, other) in enumerate(pairs) if one != other), min(map(len, kinds)))
        names = [kind[place] if place < len(kind) else "nothing" for kind in kinds]
        raise ExportError(
            f"{title} computes other operations at {label} than at its own size: {len(kinds[1])} of them instead of "
            f"{len(kinds[0])}, and number {place} is {names[1]} instead of {names[0]}; {expected}"
        )
    for part in ("activation_encodings", "param_encodings"):
        grids = [{entry["name"]: entry for entry in files.encodings[part]} for files in (own, further)]
        names = [name for name in {**grids[0], **grids[1]} if grids[0].get(name) != grids[1].get(name)]
        if names:
            raise ExportError(
                f"{title} has another encoding of {names[0]!r} at {label} than at its own size "
                f"({short_repr(grids[1].get(names[0]))} instead of {short_repr(grids[0].get(names[0]))}); {expected}"
            )


def _list(value: Any, expected: str) -> list[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ConfigurationError(f"sizes: {short_repr(value)} is no input size: expected {expected}.")
    return list(value)


def _label(axes: Mapping[str, Sequence[int]]) -> str:
    return "-".join(("_" if name else "").join(filter(None, (name, "x".join(map(str, a))))) for name, a in axes.items())


def _shapes(call: NetworkInputs) -> Shapes:
    return [tuple(tensor.shape) for tensor in call.tensors]


def _listed(shapes: Shapes) -> str:
    return ", ".join(str(list(shape)) for shape in shapes)


def _resized(call: NetworkInputs, shapes: Shapes) -> NetworkInputs:
    return call.with_tensors([_resize(tensor, shape) for tensor, shape in zip(call.tensors, shapes, strict=True)])


def _resize(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Interpolate images and sequences; of other axes, and of integers, take the nearest entry."""
    mode = _MODES.get(tensor.dim())
    if mode and tensor.is_floating_point() and tensor.shape[:2] == shape[:2] and tensor.shape != shape:
        return functional.interpolate(tensor, shape[2:], mode=mode, align_corners=False)
    for axis, (own, wanted) in enumerate(zip(tensor.shape, shape, strict=True)):
        if own != wanted:
            tensor = tensor.index_select(axis, torch.arange(wanted) * own // wanted)
    return tensor


def _batched(samples: list[NetworkInputs], batches: Sequence[int]) -> list[NetworkInputs]:
    """Put samples together to the batch that each tensor asks for; the last batch begins again with the first."""
    most = max(batches, default=1)
    made = []
    for start in range(0, len(samples), most):
        together = [samples[(start + index) % len(samples)] for index in range(most)]
        columns = zip(*(one.tensors for one in together), strict=True)
        tensors = [
            torch.cat(column[:batch]) if batch > 1 else column[0]
            for column, batch in zip(columns, batches, strict=True)
        ]
        made.append(together[0].with_tensors(tensors))
    return made


@contextmanager
def _entered_layers(network: nn.Module) -> Iterator[list[str]]:
    """Keep a list of the modules that are being run, the innermost last."""
    entered: list[str] = []
    handles = []

    def leave(*_: Any) -> None:
        entered.pop()

    for name, module in network.named_modules():
        label = f"{name} ({type(module).__name__})" if name else ""
        handles.append(module.register_forward_pre_hook(lambda *_, label=label: entered.append(label)))
        handles.append(module.register_forward_hook(leave))
    try:
        yield entered
    finally:
        for handle in handles:
            handle.remove()
