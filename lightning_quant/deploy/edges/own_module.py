"""The user's own module behind an output: checked, quantized like a network, and computed on the host.

Its input is what the network returns, on the network's own grid, so that nothing is rounded twice between the two. The
user's module stays as it is: a copy of it is quantized.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_quant.deploy.audit import check_encoded
from lightning_quant.deploy.edges.spec import Edges, OwnModule
from lightning_quant.deploy.graph.files import write_onnx
from lightning_quant.deploy.graph.passed_inputs import Grid, grids_of, round_input
from lightning_quant.errors import ConfigurationError, ExportError, LightningQuantError
from lightning_quant.recipe import QuantRecipe
from lightning_quant.simulation.build import quantize
from lightning_quant.simulation.calibrate import calibrate
from lightning_quant.simulation.callsites.tied_ranges import roundings_of_input
from lightning_quant.simulation.inplace import copied
from lightning_quant.simulation.inputs import NetworkInputs, tensors_in
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.utilities.modules import on_cpu_in_eval


class Fault(Enum):
    """What no graph of fixed operations can compute. The value says what the module does."""

    READS_VALUES = "decides by values that it is given"
    VARYING_SIZE = "returns as many values as it finds"
    RANDOM = "draws random numbers"
    CHANGES = "changes its state from one call to the next"


def check_modules(edges: Edges, outputs: Mapping[str, Tensor], recipe: QuantRecipe) -> None:
    """Refuse modules that do not fit the network, before any work is spent on it.

    Args:
        edges: what was asked for, fitted to the network.
        outputs: what the float network returned for one sample, by name.
        recipe: of the network.

    Raises:
        ConfigurationError: naming the first module that fails, or that no device graph can hold.
    """
    for (name, values), edge in zip(outputs.items(), edges.outputs, strict=False):
        if edge is None or edge.module is None:
            continue
        checked = _checked(edge.module, values, name)
        try:
            _quantized(checked, values, recipe)
        except LightningQuantError as error:
            raise ConfigurationError(
                f"outputs: {edge.module.path} behind the output {name!r} cannot be quantized: {error}"
            ) from error


def quantize_modules(
    edges: Edges, outputs: Mapping[str, Sequence[np.ndarray]], grids: Mapping[str, Grid], recipe: QuantRecipe
) -> Edges:
    """Return edges whose modules are quantized and calibrated; those that are already stay, for another input size.

    Args:
        edges: what was asked for, fitted to the network.
        outputs: what the network's graph gave for each sample, by name: the calibration samples.
        grids: that these are rounded to, by name.
        recipe: of the network. Its overrides are about the network's layers.

    Raises:
        ConfigurationError: see :func:`check_modules`.
        ExportError: for an output that is not rounded.
    """
    given = []
    for (name, samples), edge in zip(outputs.items(), edges.outputs, strict=False):
        if edge is not None and edge.module is not None:
            values = [torch.from_numpy(one) for one in samples]
            module = _checked(edge.module, values[0], name)
            grid = grids.get(name)
            if grid is None:
                raise ExportError(
                    f"{module.path} behind the output {name!r}, which is not rounded to one grid where it leaves the "
                    "network: expected a quantized tensor of numbers. Give None for it in outputs=[…]."
                )
            if module.simulation is None:
                module = _calibrated(module, values, grid, recipe)
            edge = replace(edge, module=_written(module, values[0], grid))
        given.append(edge)
    return replace(edges, outputs=tuple(given))


def _written(module: OwnModule, example: Tensor, grid: Grid) -> OwnModule:
    """Return a module that was quantized with its graph for the size of an example."""
    import onnx

    known = _simulation(module)
    with tempfile.TemporaryDirectory(prefix="lightning-quant-module-") as scratch, on_cpu_in_eval(known.network):
        qdq = Path(scratch) / "qdq.onnx"
        written = write_onnx(known, NetworkInputs((example,)), Path(scratch) / "model.onnx", qdq)
        model = onnx.load(qdq)
    moved = round_input(model, grid)
    check_encoded(written.model, [*written.encoded, *moved], known.findings)
    grids = grids_of(model, written.output_names)
    return replace(module, model=model, grids=tuple(map(grids.get, written.output_names)))


def computed(module: OwnModule, values: np.ndarray, in_float: bool = False) -> list[np.ndarray]:
    """Return what a module that was quantized makes of an output of the network, one sample.

    Args:
        module: the module.
        values: the output.
        in_float: compute what it was before.

    Raises:
        ExportError: for one that was read from a file.
    """
    known = _simulation(module)
    network = known.network
    if in_float and known.float_network is not None:
        network = known.float_network
    with on_cpu_in_eval(network):
        return [one.numpy() for one in tensors_in(NetworkInputs((torch.from_numpy(values),)).call(network))]


def _simulation(module: OwnModule) -> QuantizedNetwork:
    if module.simulation is None:
        raise ExportError(
            f"{module.path} behind an output is not known here: expected the bundle that export_bundle returned, since "
            "no code is imported for a file. Export again."
        )
    known: QuantizedNetwork = module.simulation
    return known


def _checked(module: OwnModule, values: Tensor, name: str) -> OwnModule:
    """Run a copy of the module in float; return it with the names of what it returns.

    It is run twice, so that a cache which its first call fills is no change.
    """
    assert module.network is not None
    title = f"{module.path} behind the output {name!r}"
    if not values.is_floating_point():
        raise ConfigurationError(
            f"outputs: {title}, which holds {str(values.dtype).removeprefix('torch.')}: expected an output of floats. "
            "Give None for it."
        )
    with torch.random.fork_rng(devices=[]), _copy_in_eval(module.network, title) as network:
        found = []
        for given in (values, values.flip(-1) if values.dim() else values):
            before = _state(network)
            own = given.clone()  # it may be changed in place
            watch = _Watch(own)
            try:
                with watch:
                    found.append(network(own))
            except Exception as error:  # the user's code
                if watch.faults:
                    raise _refused(title, next(iter(watch.faults.items()))) from error
                said = (str(error).strip().splitlines() or ["no reason given"])[0]
                raise ConfigurationError(
                    f"outputs: {title} fails with {type(error).__name__}: {said} Expected a module that takes this "
                    f"output alone: {list(values.shape)}, the sample along the first axis."
                ) from error
            if watch.faults:
                raise _refused(title, next(iter(watch.faults.items())))
        if changed := [where for where, value in _state(network).items() if not _same(before.get(where), value)]:
            raise _refused(title, (Fault.CHANGES, changed[0]))
    names = _names(found[0], title)
    sizes = [[tuple(one.shape) for one in tensors_in(answer)] for answer in found]
    if sizes[0] != sizes[1]:
        raise _refused(title, (Fault.VARYING_SIZE, f"{sizes[0]} and {sizes[1]}"))
    return replace(module, names=names)


@contextmanager
def _copy_in_eval(network: nn.Module, title: str) -> Iterator[nn.Module]:
    try:
        copy = copied(network)
    except Exception as error:  # such as a lock or an open file in it
        raise ConfigurationError(
            f"outputs: {title} cannot be copied: {type(error).__name__}: {error}. Expected plain values and tensors in "
            "its attributes."
        ) from error
    with on_cpu_in_eval(copy):
        yield copy


def _names(answer: Any, title: str) -> tuple[str, ...]:
    """Return what tells the tensors that a module returns apart; nothing for a single one."""
    parts: dict[str, Any] = {}
    if isinstance(answer, Mapping):
        parts = {str(key): one for key, one in answer.items()}
    elif isinstance(answer, (tuple, list)):
        parts = {str(index): one for index, one in enumerate(answer)}
    elif isinstance(answer, Tensor):
        return ()
    fits = parts and all(isinstance(one, Tensor) and one.numel() and not one.is_complex() for one in parts.values())
    if not fits or any(not name or len(name) > 100 for name in parts):
        raise ConfigurationError(
            f"outputs: {title} returns {type(answer).__name__} of {', '.join(_kind(one) for one in parts.values())}: "
            "expected a tensor, or a tuple or dict of tensors with values."
        )
    return tuple(parts)


def _kind(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _refused(title: str, fault: tuple[Fault, str]) -> ConfigurationError:
    kind, where = fault
    return ConfigurationError(
        f"outputs: {title} {kind.value} ({where}): expected the same operations on tensors of the same sizes in each "
        "call, the only thing that a device compiles. Leave that part to the app, on what the module returns."
    )


def _state(module: nn.Module) -> dict[str, Any]:
    """Return copies of what a module holds: its tensors and plain attributes, by name."""
    found: dict[str, Any] = {}
    for name, part in module.named_modules():
        held = {**part._buffers, **part._parameters, **vars(part)}
        for key, value in held.items():
            if key not in _OF_EVERY_MODULE:
                found[f"{name}.{key}".lstrip(".")] = value.clone() if isinstance(value, Tensor) else _plain(value)
    return found


_OF_EVERY_MODULE = vars(nn.Module()).keys()


def _plain(value: Any) -> Any:
    """Return what tells a value from the one that it is changed to."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, Tensor):
        return value.clone()
    return value if isinstance(value, (bool, int, float, str, bytes)) or value is None else id(value)


def _same(before: Any, after: Any) -> bool:
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        return before.shape == after.shape and torch.equal(before, after)
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        return before.keys() == after.keys() and all(_same(before[key], after[key]) for key in after)
    if isinstance(before, list) and isinstance(after, list):
        return len(before) == len(after) and all(map(_same, before, after))
    return type(before) is type(after) and bool(before == after)


class _Watch(TorchDispatchMode):
    """Notes where Python reads values that depend on the given tensor, and sizes that do.

    Args:
        given: what the module is given.
    """

    def __init__(self, given: Tensor) -> None:
        super().__init__()
        self.faults: dict[Fault, str] = {}
        self._kept: list[Tensor] = []  # else another tensor gets the memory of one that is gone
        self._depending: set[int] = set()
        self.follow(given)

    def follow(self, tensor: Tensor) -> None:
        """Note that a tensor depends on what is given, and all views of it."""
        self._kept.append(tensor)
        self._depending.add(tensor.untyped_storage().data_ptr())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        taken = [one for one in tensors_in((args, named)) if one.untyped_storage().data_ptr() in self._depending]
        operation = func.overloadpacket.__name__
        if taken and torch.Tag.data_dependent_output in func.tags:
            self.faults.setdefault(Fault.READS_VALUES, "bool(), float(), int() or item() of one")
        if torch.Tag.dynamic_output_shape in func.tags and any(_is_found(func, args, one) for one in taken):
            self.faults.setdefault(Fault.VARYING_SIZE, operation)
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.faults.setdefault(Fault.RANDOM, operation)
        result = func(*args, **named)
        if taken:
            for one in tensors_in(result):
                self.follow(one)
        return result


def _is_found(func: Any, args: Any, tensor: Tensor) -> bool:
    """Return whether the size of what an operation gives depends on the values of a tensor that it takes."""
    if func.overloadpacket is not torch.ops.aten.index:
        return True
    return any(one is tensor and one.dtype in (torch.bool, torch.uint8) for one in args[1])


def _quantized(module: OwnModule, example: Tensor, recipe: QuantRecipe) -> QuantizedNetwork:
    assert module.network is not None
    network = copied(module.network).cpu().eval()
    return quantize(network, NetworkInputs((example,)), replace(recipe, overrides={}))


def _calibrated(module: OwnModule, values: Sequence[Tensor], grid: Grid, recipe: QuantRecipe) -> OwnModule:
    known = _quantized(module, values[0], replace(recipe, calibration_samples=len(values)))
    for quantizer in roundings_of_input(known.sim):
        _give(quantizer, grid)
    with on_cpu_in_eval(known.network):
        calibrate(known, [NetworkInputs((one,)) for one in values])
    return replace(module, simulation=known)


def _give(quantizer: Any, grid: Grid) -> None:
    """Let a quantizer round to a grid, to the last bit, whatever is calibrated."""
    limits, zero_point = np.iinfo(grid.zero_point.dtype), int(grid.zero_point)
    scale = np.float32(grid.scale)
    quantizer.bitwidth = limits.bits
    least, most = (np.float32((end - zero_point) * np.float64(scale)) for end in (limits.min, limits.max))
    for _ in range(64):  # a range is kept as its ends, of which the scale follows in float32
        quantizer.set_range(float(least), float(most))
        found = np.float32(quantizer.get_scale().item())
        if found == scale:
            break
        most = np.nextafter(most, np.float32(-np.inf if found > scale else np.inf))
    quantizer.allow_overwrite(False)
    for parameter in quantizer.parameters():
        parameter.requires_grad_(False)
