"""The graph for an app, beside the network's own: written, compared, and described."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lightning_quant.deploy.edges.attach import PIXELS, attach_edges
from lightning_quant.deploy.edges.contract import ClassLabel, Contract, IoTensor
from lightning_quant.deploy.edges.host import are_whole
from lightning_quant.deploy.edges.own_module import check_modules, quantize_modules
from lightning_quant.deploy.edges.plan import AppPlan, InputPlan, OutputPlan, plan_edges
from lightning_quant.deploy.edges.proof import prove_edges
from lightning_quant.deploy.edges.spec import Edges, ImageInput
from lightning_quant.deploy.graph.files import name_tensors
from lightning_quant.deploy.graph.passed_inputs import Grid, grids_of
from lightning_quant.deploy.graph.qdq import exact_session
from lightning_quant.deploy.manifest import AppManifest
from lightning_quant.recipe import QuantRecipe
from lightning_quant.simulation.inputs import tensors_in
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.utilities.modules import on_cpu_in_eval

if TYPE_CHECKING:
    import onnx

    from lightning_quant.deploy.bundle import Bundle


def write_app(
    model: onnx.ModelProto, plan: AppPlan, edges: Edges, samples: Sequence[Mapping[str, np.ndarray]], file: Path
) -> AppManifest:
    """Write a network's graph with edges, once it was compared with the host's own work around the network.

    Args:
        model: the network's QDQ graph; it stays as it is.
        plan: the edges fitted to it.
        edges: as they were asked for.
        samples: the network's float inputs by name, batch axis of length 1, for each sample.
        file: where the graph goes.

    Raises:
        ExportError: for an edge at a tensor that is not rounded.
        ConfigurationError: for samples that are no pixels.
        ParityError: where the graph computes something else than the host.
    """
    import onnx

    app = attach_edges(model, plan.inputs, plan.outputs)
    agreement = prove_edges(model, app, plan.inputs, plan.outputs, samples)
    onnx.save(app.model, file)
    return AppManifest(edges, [value.name for value in app.model.graph.output], **vars(agreement))


def warn_of_other_pixels(plan: AppPlan, samples: Sequence[Mapping[str, np.ndarray]]) -> None:
    """Warn of samples that are no whole pixels by the mean and std that were given, though within their range.

    Args:
        plan: the edges fitted to a network.
        samples: its float inputs by name, as data gave them.
    """
    for one in plan.inputs:
        if isinstance(one.edge, ImageInput) and not all(are_whole(sample[one.name], one.edge) for sample in samples):
            warnings.warn(
                f"The samples of {one.name!r} are no whole pixels by mean={list(one.edge.mean)} and "
                f"std={list(one.edge.std)}: either your data is normalized with others, and the device would see other "
                "images than the network was trained on; or it is resized after it was converted to floats, and this "
                "is no fault. The nearest whole pixels were compared.",
                stacklevel=2,
            )


def fit_edges(edges: Edges, model: onnx.ModelProto) -> AppPlan:
    """Fit edges to a QDQ graph.

    Raises:
        ConfigurationError: naming the first edge that does not fit.
    """
    inputs, outputs = (
        {value.name: shape_of(value) for value in part} for part in (model.graph.input, model.graph.output)
    )
    return plan_edges(edges, inputs, outputs, grids_of(model, [*inputs, *outputs]))


def quantize_own(
    edges: Edges, model: onnx.ModelProto, samples: Sequence[Mapping[str, np.ndarray]], recipe: QuantRecipe
) -> Edges:
    """Return edges whose modules of the user's own are quantized, see :func:`~.own_module.quantize_modules`.

    Args:
        edges: fitted to the network.
        model: the network's QDQ graph.
        samples: its float inputs by name, for each sample: of what it makes of them modules are calibrated.
        recipe: of the network.
    """
    if not edges.has_modules:
        return edges
    names, session = [value.name for value in model.graph.output], exact_session(model)
    wanted = {value.name for value in model.graph.input}
    found = [session.run(None, {name: one[name] for name in wanted}) for one in samples]
    return quantize_modules(
        edges, dict(zip(names, zip(*found, strict=True), strict=True)), grids_of(model, names), recipe
    )


def check_edges(network: QuantizedNetwork, edges: Edges | None) -> None:
    """Refuse edges that do not fit a network, before it is calibrated: it is run once, in float.

    Raises:
        ConfigurationError: naming the first edge that does not fit.
    """
    if edges is None:
        return
    known = network.network if network.float_network is None else network.float_network
    with on_cpu_in_eval(known), torch.no_grad():
        example = network.inputs.to(torch.device("cpu")).first(1)
        given = example.call(known)
        names = name_tensors(network, example, given)
    shapes = [[tuple(one.shape) for one in tensors] for tensors in (example.tensors, tensors_in(given))]
    inputs, outputs = (dict(zip(*pair, strict=True)) for pair in zip(names, shapes, strict=True))
    plan_edges(edges, inputs, outputs, {})
    check_modules(edges, dict(zip(names[1], map(torch.Tensor.detach, tensors_in(given)), strict=True)), network.recipe)


def plan_of(bundle: Bundle) -> AppPlan | None:
    """Return how an app feeds a graph with edges and reads it; ``None`` for a graph without."""
    import onnx

    app = bundle.manifest.app
    if app is None or not bundle.edged:
        return None
    return fit_edges(app.edges, onnx.load(bundle.qdq.with_name(f"{bundle.stem.removesuffix('.app')}.onnx")))


def shape_of(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    """Return the sizes of a graph's input or output."""
    return tuple(axis.dim_value for axis in value.type.tensor_type.shape.dim)


def contract_of(plan: AppPlan, model: onnx.ModelProto, file: str, classes: Sequence[ClassLabel] = ()) -> Contract:
    """Describe what goes into a graph and comes out of it.

    Args:
        plan: its edges, each of which may be none.
        model: the graph that runs on the device.
        file: its name.
        classes: what the network tells apart.
    """
    given = {value.name: value for value in (*model.graph.input, *model.graph.output)}
    outputs = [one for output in plan.outputs for one in _outputs(output, given, len(classes))]
    return Contract(file, tuple(_input(one, given[one.name]) for one in plan.inputs), tuple(outputs), tuple(classes))


def _input(plan: InputPlan, value: onnx.ValueInfoProto) -> IoTensor:
    if not isinstance(plan.edge, ImageInput):
        return IoTensor(plan.name, shape_of(value), _type(value), **_grid(plan.grid))
    image, channels = plan.edge, plan.shape[1]
    mean, std = (one[::-1] if image.reverses else one for one in image.of_channels(channels))
    return IoTensor(
        plan.name,
        shape_of(value),
        _type(value),
        "image",
        image.layout,
        "gray" if channels == 1 else image.color,
        mean=mean,
        std=std,
        **_grid(PIXELS),
    )


def _outputs(plan: OutputPlan, given: dict[str, onnx.ValueInfoProto], classes: int) -> list[IoTensor]:
    edge = plan.edge
    if edge is not None and edge.module is not None:
        pairs = zip(plan.names, edge.module.grids, strict=True)
        return [IoTensor(name, shape_of(given[name]), _type(given[name]), **_grid(grid)) for name, grid in pairs]
    value = given[plan.name]
    shape, kind, function = shape_of(value), _type(value), "none" if edge is None else edge.function
    if function == "argmax":
        return [IoTensor(plan.name, shape, kind, "classes")]
    grid = _grid(plan.function_grid)
    if function == "top_k":
        second = given[f"{plan.name}_classes"]
        scores = IoTensor(plan.name, shape, kind, "scores", axis=plan.axis, **grid)
        return [scores, IoTensor(second.name, shape_of(second), _type(second), "classes", axis=plan.axis)]
    if function in ("softmax", "sigmoid"):
        return [IoTensor(plan.name, shape, kind, "probabilities", axis=plan.axis, **grid)]
    of_classes = classes > 1 and len(shape) > 1 and shape[1] == classes
    if of_classes:
        return [IoTensor(plan.name, shape, kind, "scores", axis=1, **grid)]
    return [IoTensor(plan.name, shape, kind, **grid)]


def _grid(grid: Grid | None) -> dict[str, Any]:
    if grid is None:
        return {}
    return {"scale": grid.scale, "zero_point": int(grid.zero_point), "bits": 8 * grid.zero_point.dtype.itemsize}


def _type(value: onnx.ValueInfoProto) -> str:
    from onnx import helper

    return str(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
