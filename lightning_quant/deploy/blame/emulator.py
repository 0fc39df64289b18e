"""The NPU's emulator compared with the simulation: what both compute of each tensor that the file rounds."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_quant.deploy import parity
from lightning_quant.deploy.blame.cuts import Cut, given, own, piece_of, pieces_on_grid, seen, watched_on_grid
from lightning_quant.deploy.blame.differences import Difference, Differences
from lightning_quant.deploy.blame.file import cuts_of
from lightning_quant.deploy.blame.places import modules_in
from lightning_quant.deploy.blame.reasons import Cause, Change, Reason, Remedy
from lightning_quant.deploy.blame.result import Against, Blame, LayerBlame
from lightning_quant.deploy.graph.qdq import QdqGraph
from lightning_quant.deploy.targets.htp.job import Compiled
from lightning_quant.deploy.targets.htp.target import HtpEmulatorTarget
from lightning_quant.simulation.fixed_ranges import fixed_range
from lightning_quant.simulation.inputs import NetworkInputs, tensors_in
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.precisions import quantized_layers
from lightning_quant.simulation.rounded_tensors import RoundedTensor, rounded_tensors

if TYPE_CHECKING:
    import onnx

Arrays = dict[str, np.ndarray]
# Steps of the grid, by its bits, that the NPU may be off in one layer: it scales sums back less exactly. Of 16 bits
# it is one step of 8.
_STEPS = {8: 1.5, 16: 256.0}
# Share of the values of an 8-bit grid that may be off by one.
_DIFFERING = 0.2
# Operations whose 16-bit outputs the device has on a grid of its own, whatever the file says: what is read of one in
# the file's units is something else, while the operation behind computes with the right values. For the first two it is
# in the provider's source (`lightning_quant.simulation.fixed_ranges`).
_ON_OWN_GRID = ("Sigmoid", "Tanh", "HardSigmoid")


def compare_with_emulator(
    network: QuantizedNetwork,
    model: onnx.ModelProto,
    input_names: Sequence[str],
    call: NetworkInputs,
    target: HtpEmulatorTarget,
) -> Blame:
    """Compare the NPU's emulator with the simulation, on one sample.

    The file is compiled and computed three times: as it is, with its inner tensors as outputs, and cut into pieces.
    What the device has on another grid than the file's cannot be read: it is in one piece with what is behind it.

    Args:
        network: the simulation, calibrated, on the CPU in eval mode.
        model: the file.
        input_names: its inputs, in the order of the tensors of a call.
        call: of one sample, of the file's sizes.
        target: the emulator of a chip.

    Raises:
        DeviceError: when it cannot be compiled or computed.
        ExportError: when the file is that of another network.
    """
    graph = QdqGraph(model)
    tensors, returned = rounded_tensors(network, call)
    wanted = {value.name for value in model.graph.input}
    feeds = {name: one.numpy() for name, one in zip(input_names, call.tensors, strict=True) if name in wanted}
    found, unmatched = cuts_of(network, graph, tensors, feeds)
    cuts = [
        cut
        for cut in found
        if cut.quantizer is not None
        and not cut.handed_on
        and cut.values[0] not in wanted
        and not _is_on_another_grid(graph, cut, tensors[cut.position].quantizer)
    ]
    plain, placed = _emulated(model, feeds, target)
    arrived, _ = _emulated(watched_on_grid(model, cuts), feeds, target)
    inputs = {given(cut.values[0]): _values(cut, tensors).reshape(arrived[seen(cut.values[0])].shape) for cut in cuts}
    computed, _ = _emulated(pieces_on_grid(model, cuts), {**feeds, **inputs}, target)
    layers = []
    for cut in cuts:
        quantizer = tensors[cut.position].quantizer
        figures = []
        for actual in (computed[own(cut.values[0])], arrived[seen(cut.values[0])]):
            difference = Differences()
            difference.add(_values(cut, tensors), actual, quantizer.get_scale().reshape(-1)[0].item())
            figures.append(difference.result())
        layer, modules = modules_in(graph, cut.tensor, found, quantized_layers(network))
        reasons = [*_placement(graph, cut, found, placed)] or [*_arithmetic(figures[0], quantizer.bitwidth)]
        layers.append(LayerBlame(layer, cut.tensor, modules, figures[0], figures[1], tuple(reasons)))
    names = [value.name for value in model.graph.output]
    expected = [tensor.detach().numpy() for tensor in tensors_in(returned)]
    return Blame(
        tuple(layers),
        parity.compare([(expected, [plain[name] for name in names])]),
        samples=1,
        observed_runs=all(np.array_equal(plain[name], arrived[name]) for name in names),
        unmatched=tuple(unmatched),
        against=Against.EMULATOR,
    )


def _emulated(model: onnx.ModelProto, feeds: Arrays, target: HtpEmulatorTarget) -> tuple[Arrays, Compiled]:
    import onnx

    with tempfile.TemporaryDirectory(prefix="lightning-quant-blame-") as scratch:
        path = Path(scratch) / "model.onnx"
        onnx.save(model, path)
        (Path(scratch) / "work").mkdir()
        compiled, (outputs,) = target.emulate(path, [feeds], Path(scratch) / "work")
    return outputs, compiled


def _values(cut: Cut, tensors: Sequence[RoundedTensor]) -> np.ndarray:
    values: np.ndarray = tensors[cut.position].values.numpy()
    return values


def _is_on_another_grid(graph: QdqGraph, cut: Cut, quantizer: Any) -> bool:
    producer = graph.producers.get(cut.tensor)
    if producer is None or producer.op_type not in _ON_OWN_GRID or quantizer.bitwidth != 16:
        return False
    return fixed_range(quantizer) is None  # else the file has that grid


def _placement(graph: QdqGraph, cut: Cut, cuts: Sequence[Cut], placed: Compiled) -> Iterator[Reason]:
    """Yield why a piece is not computed in integers on the NPU."""
    nodes = [node for node in piece_of(graph, cut.tensor, cuts) if node.op_type != "DequantizeLinear" and node.name]
    for node in nodes:
        if node.name in placed.fallen_back:
            yield Reason(Cause.FALLEN_BACK, said=placed.fallen_back[node.name], remedy=Remedy(Change.OPERATION))
    names = {node.name for node in nodes}
    if any(_is_of(island, names) for island in placed.float_islands):
        yield Reason(Cause.FLOAT_ISLAND)


def _is_of(island: str, names: set[str]) -> bool:
    """Return whether a node of the compiled graph is one of some of the file's; the compiler appends to their names."""
    return any(island == name or island.startswith(f"{name}_") for name in names)


def _arithmetic(own: Difference, bits: int) -> Iterator[Reason]:
    if own.largest > _STEPS.get(bits, 1.5) or (bits == 8 and own.differing > _DIFFERING):
        yield Reason(Cause.ARITHMETIC, found=own.largest, share=own.differing)
