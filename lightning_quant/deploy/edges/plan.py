"""Edges fitted to a network: which input and output gets which, with sizes and grids; what cannot fit is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lightning_quant.deploy.edges.spec import Edges, ImageInput, OutputEdge
from lightning_quant.deploy.graph.passed_inputs import Grid
from lightning_quant.errors import ConfigurationError

_IMAGE_CHANNELS = (1, 3, 4)
Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class InputPlan:
    """How an app fills one input.

    Args:
        name: of the input.
        shape: as the network takes it, channels first, batch axis of length 1 included.
        edge: what was asked for.
        grid: that the network rounds it to; ``None`` where it does not.
    """

    name: str
    shape: tuple[int, ...]
    edge: ImageInput | Literal["quantized"] | None
    grid: Grid | None


@dataclass(frozen=True)
class OutputPlan:
    """What an app makes of one output.

    Args:
        name: of the output.
        shape: as the network returns it.
        edge: what was asked for.
        grid: that the network rounds it to; ``None`` where it does not.
        size: height and width that it is resized to; ``None`` without.
    """

    name: str
    shape: tuple[int, ...]
    edge: OutputEdge | None
    grid: Grid | None
    size: tuple[int, int] | None = None

    @property
    def names(self) -> list[str]:
        """Names of what an app gets of it."""
        if self.edge is not None and self.edge.module is not None and self.edge.module.names:
            return [f"{self.name}_{part}" for part in self.edge.module.names]
        both = self.edge is not None and self.edge.function == "top_k"
        return [self.name, f"{self.name}_classes"] if both else [self.name]

    @property
    def axis(self) -> int:
        """The axis of the classes, counted from the front."""
        return 0 if self.edge is None else self.edge.axis % len(self.shape)

    @property
    def spatial(self) -> tuple[int, int]:
        """The axes of height and width."""
        height, width = (axis for axis in range(1, 4) if axis != self.axis)
        return height, width

    @property
    def classes_dtype(self) -> np.dtype[Any]:
        """The type that indices of classes are given in."""
        return np.dtype(np.uint8 if self.shape[self.axis] <= 256 else np.int32)

    @property
    def function_grid(self) -> Grid | None:
        """The grid of what the function gives: of probabilities 0…1 with the bits of the network's output.

        A 16-bit sigmoid has the NPU's own (see :mod:`~lightning_quant.simulation.fixed_ranges`).
        """
        if self.edge is None or self.grid is None or self.edge.function not in ("softmax", "sigmoid"):
            return self.grid
        kind = self.grid.zero_point.dtype
        highest = np.iinfo(kind).max
        scale = 2.0**-16 if self.edge.function == "sigmoid" and kind == np.uint16 else 1 / highest
        return Grid(scale, np.zeros((), kind))


@dataclass(frozen=True)
class AppPlan:
    """How an app feeds a graph and reads it.

    Args:
        inputs: in the order of the network's.
        outputs: likewise.
    """

    inputs: list[InputPlan]
    outputs: list[OutputPlan]


def plan_edges(edges: Edges, inputs: Shapes, outputs: Shapes, grids: Mapping[str, Grid]) -> AppPlan:
    """Fit edges to a network.

    Args:
        edges: what was asked for.
        inputs: shapes of the network's inputs by name, in order, with a batch axis of length 1.
        outputs: likewise.
        grids: what inputs and outputs are rounded to, by name, as far as it is known.

    Raises:
        ConfigurationError: naming the first edge that does not fit.
    """
    for what, given, there in (("inputs", edges.inputs, inputs), ("outputs", edges.outputs, outputs)):
        if given and len(given) != len(there):
            raise ConfigurationError(
                f"{what} has {len(given)} entries: expected one for each of the network's {len(there)}, "
                f"{', '.join(map(repr, there))}. Give None for those to leave as they are."
            )
    ins = [
        InputPlan(name, tuple(shape), edge, grids.get(name))
        for (name, shape), edge in zip(inputs.items(), edges.inputs or (None,) * len(inputs), strict=True)
    ]
    for one in ins:
        if isinstance(one.edge, ImageInput):
            _check_image(one, one.edge)
    images = [one.shape for one in ins if len(one.shape) == 4]
    size = (images[0][2], images[0][3]) if images else None
    outs = []
    for (name, shape), edge in zip(outputs.items(), edges.outputs or (None,) * len(outputs), strict=True):
        wanted = size if edge is not None and edge.resize is not None else None
        outs.append(OutputPlan(name, tuple(shape), edge, grids.get(name), wanted))
        if edge is not None:
            _check_output(outs[-1], edge)
    names = [*inputs, *(name for one in outs for name in one.names)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigurationError(
            f"outputs: the graph with edges has {twice!r} twice: expected names that are all different. Let the "
            "network or your own module return it under another key."
        )
    return AppPlan(ins, outs)


def _check_image(plan: InputPlan, image: ImageInput) -> None:
    if len(plan.shape) != 4 or plan.shape[1] not in _IMAGE_CHANNELS:
        raise ConfigurationError(
            f"inputs asks for an image as {plan.name!r}, which is of shape {list(plan.shape)}: expected (N, C, H, W) "
            "with 1, 3 or 4 channels. Give None for an input that is no image."
        )
    if image.reverses and plan.shape[1] == 4:
        raise ConfigurationError(
            f"color={image.color!r} of {plan.name!r}, which has 4 channels: expected 3, of which the order is known. "
            "Give color and trained_on alike, and order the channels in your app."
        )
    for what, numbers in {"mean": image.mean, "std": image.std}.items():
        if len(numbers) not in (1, plan.shape[1]):
            raise ConfigurationError(
                f"{what}={list(numbers)} of {plan.name!r} has {len(numbers)} numbers: expected one, or one for each of "
                f"the network's {plan.shape[1]} channels."
            )


def _check_output(plan: OutputPlan, edge: OutputEdge) -> None:
    rank = len(plan.shape)
    over_classes = edge.function in ("argmax", "top_k", "softmax")
    if over_classes and not -rank <= edge.axis < rank:
        raise ConfigurationError(
            f"{edge.function} of {plan.name!r} over axis {edge.axis}: the output is of shape {list(plan.shape)}. "
            "Give axis= that of the classes."
        )
    needed = edge.k if edge.function == "top_k" else 2
    if over_classes and plan.shape[plan.axis] < max(2, needed):
        raise ConfigurationError(
            f"{edge.function} of {plan.name!r} needs at least {max(2, needed)} classes, and axis {plan.axis} of its "
            f"shape {list(plan.shape)} has {plan.shape[plan.axis]}: expected an output with a score for each class. "
            + ("Give a smaller k." if edge.function == "top_k" else "Use sigmoid for one class, or another axis=.")
        )
    if edge.resize is not None and (rank != 4 or plan.size is None or plan.axis == 0):
        raise ConfigurationError(
            f"resize={edge.resize!r} of {plan.name!r}, which is of shape {list(plan.shape)}: expected an output of 4 "
            "axes, the samples first, and an input of 4 axes whose height and width it gets. Leave resize out."
        )
