"""A graph with edges against what it stands for: the app's own work on the host, around the network's graph."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from lightning_quant.deploy import parity
from lightning_quant.deploy.edges.attach import AppGraph
from lightning_quant.deploy.edges.host import answers, fed, taken
from lightning_quant.deploy.edges.plan import InputPlan, OutputPlan
from lightning_quant.deploy.edges.spec import ImageInput
from lightning_quant.deploy.graph.passed_inputs import Grid
from lightning_quant.deploy.graph.qdq import exact_session
from lightning_quant.errors import ParityError
from lightning_quant.simulation import aimet

if TYPE_CHECKING:
    import onnx

# Values between two integers may be rounded either way, as sums of floats are added in another order.
_STEP = 1.01


@dataclass(frozen=True)
class EdgeAgreement:
    """How a graph with edges agrees with the host's work around the network, in ONNX Runtime.

    Args:
        samples: how many were compared.
        pixels_apart: how many of the 256 pixels of each channel, all channels together, the device rounds to another
            integer than a host, by one.
        equal: share of equal values over all outputs. Classes are equal everywhere, but where ``resize="before"`` has
            put two scores within a step of each other.
    """

    samples: int
    pixels_apart: int
    equal: float


def prove_edges(
    model: onnx.ModelProto,
    app: AppGraph,
    inputs: Sequence[InputPlan],
    outputs: Sequence[OutputPlan],
    samples: Sequence[Mapping[str, np.ndarray]],
) -> EdgeAgreement:
    """Compare a graph with edges, sample by sample, and with every pixel that there is.

    Args:
        model: the network's own graph.
        app: the one with edges.
        inputs: what the edges are, in the order of the graph.
        outputs: likewise.
        samples: for each the network's float inputs by name, batch axis of length 1.

    Raises:
        ParityError: where they are apart by more than a step, or in a class.
        ConfigurationError: for a sample that holds no pixels.
    """
    fronts = {name: _Front(app, name) for name in app.codes}
    apart = sum(_pixels_apart(one, one.edge, fronts[one.name]) for one in inputs if isinstance(one.edge, ImageInput))
    network, whole = exact_session(model), exact_session(app.model)
    same = total = 0
    for sample in samples:
        given = {entry.name: fed(entry, sample[entry.name]) for entry in inputs}
        floats: dict[str, np.ndarray] = {}
        for entry in inputs:
            if entry.name in fronts and entry.grid is not None:
                floats[entry.name] = entry.grid.reals(fronts[entry.name].codes(given[entry.name]))
            else:
                floats[entry.name] = given[entry.name]
        computed = iter(whole.run(None, given))
        for plan, values in zip(outputs, network.run(None, floats), strict=True):
            for place, expected in enumerate(answers(plan, values)):
                actual = next(computed)
                _check(plan, values, expected, actual, place)
                same, total = same + int((expected == actual).sum()), total + expected.size
    return EdgeAgreement(len(samples), apart, same / max(total, 1))


class _Front:
    """What is in front of one of the network's inputs.

    Args:
        app: the whole graph.
        name: of the input.
    """

    def __init__(self, app: AppGraph, name: str) -> None:
        from onnx import helper

        self.name, codes = name, app.codes[name]
        self._session = None
        if codes != name:  # else it takes what it is given
            model = copy.deepcopy(app.model)
            del model.graph.output[:]
            model.graph.output.append(helper.make_empty_tensor_value_info(codes))
            aimet._remove_dangling_nodes_and_initializers(model)
            self._session = exact_session(model)

    def codes(self, given: np.ndarray) -> np.ndarray:
        """Return the integers that the network's first layer takes."""
        return given if self._session is None else self._session.run(None, {self.name: given})[0]


def _pixels_apart(plan: InputPlan, image: ImageInput, front: _Front) -> int:
    """Return how many pixels get another integer than on a host: each value in every channel, others beside it."""
    assert plan.grid is not None
    count, channels, height, width = plan.shape
    area, found = height * width, np.zeros((channels, 256), bool)
    for start in range(0, 256, area):
        shifts = 80 * np.arange(channels)[:, None]  # or exchanged channels would not show
        pixels = ((np.arange(area) + start + shifts) % 256).astype(np.uint8).reshape(1, channels, height, width)
        pixels = np.broadcast_to(pixels, (count, channels, height, width))
        given = np.ascontiguousarray(np.moveaxis(pixels, 1, -1) if image.layout == "nhwc" else pixels)
        expected = plan.grid.integers(taken(plan, given)).astype(np.int64)
        distance = np.abs(front.codes(given) - expected)
        if distance.max() > 1:
            raise ParityError(
                f"The pixels of {plan.name!r} are normalized to integers up to {distance.max()} away from those of a "
                "host, expected at most 1. Please report it with mean, std and the range of the input."
            )
        for channel in range(channels):
            found[channel, pixels[0, channel][distance[0, channel] > 0]] = True
    return int(found.sum())


def _check(plan: OutputPlan, values: np.ndarray, expected: np.ndarray, actual: np.ndarray, place: int) -> None:
    """Refuse what is apart by more than a step, or another class."""
    edge, grid = plan.edge, plan.function_grid
    if edge is None or grid is None:
        return
    if edge.module is not None:
        _check_own(plan, edge.module.grids[place], expected, actual)
        return
    of_classes = edge.function == "argmax" or (edge.function == "top_k" and place == 1)
    if of_classes:
        wrong = expected != actual
        if edge.resize == "before" and wrong.any() and edge.function == "argmax":
            scores = answers(_plain(plan), values)[0]
            chosen = np.take_along_axis(scores, np.expand_dims(actual.astype(np.int64), plan.axis), plan.axis)
            wrong &= scores.max(plan.axis) - chosen.squeeze(plan.axis) > 2 * _STEP * grid.scale  # each by one
        elif edge.resize == "before":
            return
        if wrong.any():
            raise _apart(plan, f"{wrong.mean():.2%} of its classes are others")
    else:
        step = 1 if edge.quantized else grid.scale
        most = _STEP * step
        if edge.resize == "before" and edge.function != "none" and plan.grid is not None:
            # scores that are rounded either way, each by one: a probability moves by half of that at most
            most += _STEP * plan.grid.scale / 2 * step / grid.scale
        distance = np.abs(expected.astype(np.float64) - actual.astype(np.float64)).max(initial=0)
        if not distance <= most or not math.isfinite(distance):
            raise _apart(plan, f"it is up to {distance / step:.0f} steps away")


def _check_own(plan: OutputPlan, grid: Grid | None, expected: np.ndarray, actual: np.ndarray) -> None:
    """Refuse what a module's graph computes otherwise than its simulation, see :func:`~parity.check_parity`."""
    if not np.issubdtype(expected.dtype, np.floating) and grid is None:
        if (expected != actual).any():
            raise _apart(plan, f"{(expected != actual).mean():.2%} of its integers are others")
        return
    assert plan.edge is not None
    step = 1 if plan.edge.quantized or grid is None else grid.scale
    distance = np.abs(expected.astype(np.float64) - actual.astype(np.float64)).max(initial=0)
    agreement = parity.compare([([expected.astype(np.float64)], [actual.astype(np.float64)])]).psnr_db
    # the rounding of a value between two integers can be amplified behind it
    if not (distance <= _STEP * step or agreement >= parity.BAR) or not math.isfinite(distance):
        raise _apart(plan, f"it is up to {distance / step:.0f} steps away, {agreement:.1f} dB")


def _plain(plan: OutputPlan) -> OutputPlan:
    """Return the plan without its function: the resized scores."""
    assert plan.edge is not None
    return replace(plan, edge=replace(plan.edge, function="none", quantized=False))


def _apart(plan: OutputPlan, how: str) -> ParityError:
    return ParityError(
        f"The graph with edges gives another {plan.name!r} than the network's graph with the same work on the host: "
        f"{how}. Expected the same classes, and numbers within a step. Please report it with the edges that you asked "
        "for."
    )
