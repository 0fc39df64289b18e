"""What an app computes on the host where a graph has no edges: the reference for what is computed on the device.

Everything is NumPy, in float32, in the order in which the usual libraries compute it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest

import numpy as np

from lightning_quant.deploy.edges.own_module import computed
from lightning_quant.deploy.edges.plan import AppPlan, InputPlan, OutputPlan
from lightning_quant.deploy.edges.spec import ImageInput
from lightning_quant.errors import ConfigurationError

# Pixels may be this far outside 0…255, and this far from whole ones: float32 after mean and std.
_OUTSIDE, _WHOLE = 0.5, 0.02


def normalized(pixels: np.ndarray, image: ImageInput) -> np.ndarray:
    """Return what the network saw in training: ``(pixel / 255 - mean) / std``, channels first, float32.

    Args:
        pixels: ``uint8`` of shape (N, H, W, C) or (N, C, H, W), as ``image.layout`` says.
        image: layout, order of colors, mean and standard deviation.
    """
    planes = np.moveaxis(pixels, -1, 1) if image.layout == "nhwc" else pixels
    if image.reverses:
        planes = planes[:, ::-1]
    mean, std = (np.asarray(one, np.float32).reshape(-1, 1, 1) for one in image.of_channels(planes.shape[1]))
    return np.ascontiguousarray((planes.astype(np.float32) / np.float32(255) - mean) / std)


def pixels_of(floats: np.ndarray, image: ImageInput, name: str) -> np.ndarray:
    """Return the pixels that were normalized, rounded to whole ones.

    Args:
        floats: what the network was given, (N, C, H, W).
        image: how it was normalized.
        name: of the input, for the error.

    Raises:
        ConfigurationError: where they are no pixels: mean or std are not those of the data.
    """
    planes = _planes(floats, image)
    lowest, highest = float(planes.min()), float(planes.max())
    if not (lowest >= -_OUTSIDE and highest <= 255 + _OUTSIDE):  # NaN is none either
        raise ConfigurationError(
            f"The input {name!r} holds {floats.min():.3g} to {floats.max():.3g}: with mean={list(image.mean)} and "
            f"std={list(image.std)} that is pixels from {lowest:.0f} to {highest:.0f}, expected 0 to 255. Give "
            "inputs= the mean and std that your data is normalized with (of pixels in 0…1)."
        )
    planes = np.clip(np.rint(planes), 0, 255).astype(np.uint8)
    if image.reverses:
        planes = planes[:, ::-1]
    return np.ascontiguousarray(np.moveaxis(planes, 1, -1) if image.layout == "nhwc" else planes)


def _planes(floats: np.ndarray, image: ImageInput) -> np.ndarray:
    mean, std = (np.asarray(one, np.float32).reshape(-1, 1, 1) for one in image.of_channels(floats.shape[1]))
    return (floats * std + mean) * np.float32(255)


def are_whole(floats: np.ndarray, image: ImageInput) -> bool:
    """Return whether whole pixels were normalized: else floats were resized, or mean or std are others."""
    planes = _planes(floats, image)
    return bool(np.abs(planes - np.rint(planes)).max(initial=0) <= _WHOLE)


def fed(plan: InputPlan, floats: np.ndarray) -> np.ndarray:
    """Return what the graph with edges is given for an input of the network."""
    if isinstance(plan.edge, ImageInput):
        return pixels_of(floats, plan.edge, plan.name)
    if plan.edge is not None and plan.grid is not None:
        return plan.grid.integers(floats)
    return floats


def taken(plan: InputPlan, given: np.ndarray) -> np.ndarray:
    """Return what the network sees of what the graph with edges is given."""
    if isinstance(plan.edge, ImageInput):
        return normalized(given, plan.edge)
    if plan.edge is not None and plan.grid is not None:
        return plan.grid.reals(given)
    return given


def answers(plan: OutputPlan, values: np.ndarray, in_float: bool = False) -> list[np.ndarray]:
    """Return what an app makes of an output of the network: one array, or for ``top_k`` two.

    Args:
        plan: of the output.
        values: what the network returned, one sample or more.
        in_float: let a module of the user's own compute in float, as the network did that returned them.
    """
    edge = plan.edge
    if edge is None:
        return [values]
    grid = plan.grid
    if edge.module is not None:
        found = computed(edge.module, values, in_float)
        grids = edge.module.grids if edge.quantized else ()
        return [one if g is None else g.integers(one) for one, g in zip_longest(found, grids)]
    if edge.resize == "before":
        values = _bilinear(plan, values)
        values = values if grid is None else grid.round(values)
    if edge.function in ("argmax", "top_k"):
        found = _classes(plan, values)
    else:
        found = [_probabilities(edge.function, values, plan.axis)]
        grid = plan.function_grid
        if grid is not None and edge.function != "none":
            found = [grid.round(found[0])]
    if edge.resize == "after":
        found = [_nearest(plan, one) for one in found]
    if edge.quantized and grid is not None:
        found = [grid.integers(found[0])]
    return found


def _classes(plan: OutputPlan, values: np.ndarray) -> list[np.ndarray]:
    assert plan.edge is not None
    kind = plan.classes_dtype
    if plan.edge.function == "argmax":
        return [values.argmax(plan.axis).astype(kind)]
    order = np.argsort(-values, axis=plan.axis, kind="stable")  # of equal ones the first, as ONNX says
    order = order.take(range(plan.edge.k), plan.axis)
    return [np.take_along_axis(values, order, plan.axis), order.astype(kind)]


def _probabilities(function: str, values: np.ndarray, axis: int) -> np.ndarray:
    if function == "softmax":
        powers = np.exp(values - values.max(axis, keepdims=True))
        return powers / powers.sum(axis, keepdims=True)
    if function == "sigmoid":
        return (1 / (1 + np.exp(-values.astype(np.float64)))).astype(values.dtype)
    return values


def _bilinear(plan: OutputPlan, values: np.ndarray) -> np.ndarray:
    """Resize height and width between pixels' centers, as ``interpolate(mode="bilinear", align_corners=False)``."""
    assert plan.size is not None
    for axis, length in zip(plan.spatial, plan.size, strict=True):
        low, high, share = between(values.shape[axis], length)
        shape = [1] * values.ndim
        shape[axis] = length
        weight = share.astype(np.float32).reshape(shape)
        values = values.take(low, axis) * (1 - weight) + values.take(high, axis) * weight
    return values


def between(length: int, wanted: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return for each of ``wanted`` positions the two of ``length`` beside it, and the share of the second."""
    centers = np.clip((np.arange(wanted) + 0.5) * (length / wanted) - 0.5, 0, length - 1)
    low = np.floor(centers).astype(int)
    return low, np.minimum(low + 1, length - 1), centers - low


def nearest(length: int, wanted: int) -> np.ndarray:
    """Return for each of ``wanted`` positions the nearest of ``length``, as ``interpolate(mode="nearest-exact")``."""
    return np.minimum(((np.arange(wanted) + 0.5) * (length / wanted)).astype(np.int64), length - 1)


def _nearest(plan: OutputPlan, values: np.ndarray) -> np.ndarray:
    assert plan.size is not None
    for axis, length in zip(resized_axes(plan), plan.size, strict=True):
        values = values.take(nearest(values.shape[axis], length), axis)
    return values


def resized_axes(plan: OutputPlan) -> Sequence[int]:
    """Return the axes of height and width behind the function, which may have taken that of the classes away."""
    gone = plan.edge is not None and plan.edge.function == "argmax"
    return [axis - int(gone and axis > plan.axis) for axis in plan.spatial]


def app_outputs(plan: AppPlan, values: Mapping[str, np.ndarray], in_float: bool = False) -> dict[str, np.ndarray]:
    """Return what an app makes of all outputs of the network, by name, see :func:`answers`."""
    return {
        name: array
        for one in plan.outputs
        for name, array in zip(one.names, answers(one, values[one.name], in_float), strict=True)
    }


def network_outputs(plan: AppPlan, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return outputs as the network returns them, such that an app makes the same of them again.

    Of a class the score is 1 and of all others 0; of the highest scores, the others are as low as the lowest of them;
    of probabilities it is their logarithm or logit. So a metric of classes is that of what the device gave. Resized
    outputs keep their size.
    """
    return {one.name: _restored(one, [given[name] for name in one.names]) for one in plan.outputs}


def _restored(plan: OutputPlan, given: list[np.ndarray]) -> np.ndarray:
    edge = plan.edge
    values = given[0]
    if edge is None:
        return values
    grid = plan.function_grid
    if edge.quantized and grid is not None:
        values = grid.reals(values)
    classes, axis = plan.shape[plan.axis], plan.axis
    if edge.function == "argmax":
        every = np.arange(classes).reshape([-1 if at == axis else 1 for at in range(len(plan.shape))])
        return (np.expand_dims(values, axis) == every).astype(np.float32)
    if edge.function == "top_k":
        shape = [classes if at == axis else length for at, length in enumerate(values.shape)]
        scores = np.broadcast_to(values.min(axis, keepdims=True) - 1, shape).copy()
        np.put_along_axis(scores, given[1].astype(np.int64), values, axis)
        return scores
    tiny = np.float32(1e-6)
    if edge.function == "softmax":
        return np.log(np.maximum(values, tiny))
    if edge.function == "sigmoid":
        share = np.clip(values, tiny, 1 - tiny)
        return np.log(share / (1 - share))
    return values
