"""One operator at one precision: quantized by this package, exported, compiled and emulated for each chip."""

from __future__ import annotations

import importlib.metadata
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from benchmarks.operators.catalogue import Operator, catalogue
from benchmarks.zoo import emulator
from benchmarks.zoo.record import Record, described
from lightning_quant.deploy.bundle import Bundle
from lightning_quant.deploy.export import export_bundle
from lightning_quant.deploy.graph.qdq import QdqGraph, of_integers
from lightning_quant.deploy.socs import HEXAGON, check_activations
from lightning_quant.deploy.targets.worker import ERROR
from lightning_quant.errors import DeviceError, DeviceFallbackError, DeviceTimeoutError
from lightning_quant.precision import Precision
from lightning_quant.recipe import QuantRecipe
from lightning_quant.simulation.build import quantize
from lightning_quant.simulation.calibrate import calibrate
from lightning_quant.simulation.inputs import NetworkInputs, tensors_in
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.operators import Placement, operation_of
from lightning_quant.simulation.precisions import quantized_layers
from lightning_quant.simulation.second_operands import multiplies_by_int16

# One chip of each version of the NPU.
CHIPS = ("SM8350", "SM8450", "SM8550", "SM8650", "SM8750", "SM8850")
# Seconds for one chip: the compiler takes a tenth.
_LIMIT_S = 60.0
# Share of the output's grid by which no rounding moves a value.
_WRONG = 0.1
_CONVERSIONS = ("QuantizeLinear", "DequantizeLinear")


def versions() -> dict[str, str]:
    """What a row depends on, besides this package."""
    return {
        name: importlib.metadata.version(name) for name in ("onnxruntime-qnn", "onnxruntime", "torch", "aimet-torch")
    }


def measure(record: Record, folder: Path) -> None:
    """Fill the record of an operator (``network``) at a precision."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    operator, precision = catalogue()[record.values["network"]], Precision.parse(record.values["precision"])
    record.values |= {"family": operator.family, "versions": versions(), "chips": {}}
    calls = [NetworkInputs(sample) for sample in operator.samples()]
    with record.stage("quantize"):
        network = _quantized(operator, precision, calls)
        record.values["operations"] = [operation_of(layer) for layer in quantized_layers(network).values()]
    if not record.passed("quantize"):
        return
    with record.stage("export"):
        bundle = export_bundle(network, folder / "operator", calls, on_parity="warn")
        record.values["parity"] = bundle.manifest.parity.to_dict()
    if not record.passed("export"):
        return
    made = {QuantRecipe(precision).hardware: (bundle, _simulated(network, calls))}
    for chip in CHIPS:
        with record.stage(chip):
            hardware = _hardware(chip, precision)
            if hardware not in made:
                other = _quantized(operator, precision, calls, hardware)
                exported = export_bundle(other, folder / hardware, calls, on_parity="warn")
                made[hardware] = exported, _simulated(other, calls)
            record.values["chips"][chip] = on_chip(made[hardware][0], chip, calls, made[hardware][1], folder / chip)


def _hardware(chip: str, precision: Precision) -> str:
    """Return the hardware config to quantize with: older chips multiply 16 bits by 8, by a file of theirs."""
    by_8_bits = precision.activation_bits == 16 and not multiplies_by_int16(HEXAGON[chip])
    return f"htp_v{HEXAGON[chip]}" if by_8_bits else QuantRecipe(precision).hardware


def _quantized(
    operator: Operator, precision: Precision, calls: list[NetworkInputs], hardware: str = QuantRecipe.hardware
) -> QuantizedNetwork:
    recipe = QuantRecipe(precision, calibration_samples=len(calls), hardware=hardware)
    network = quantize(operator.network(), calls[0], recipe)
    calibrate(network, calls)
    return network


def _simulated(network: QuantizedNetwork, calls: list[NetworkInputs]) -> list[list[np.ndarray]]:
    with torch.no_grad():
        return [[tensor.numpy() for tensor in tensors_in(call.call(network.network))] for call in calls]


def on_chip(
    bundle: Bundle, chip: str, calls: list[NetworkInputs], simulated: list[list[np.ndarray]], folder: Path
) -> dict[str, Any]:
    """Return where a chip computes a bundle, and how far its outputs are from the simulation's."""
    names = bundle.manifest.input_names
    samples = [dict(zip(names, (tensor.numpy() for tensor in call.tensors), strict=True)) for call in calls]
    try:
        check_activations(chip, bundle.manifest.int16_activations)
        placed, outputs = emulator.emulate(bundle.qdq, samples, folder, _LIMIT_S, chip)
    except Exception as error:  # whatever refuses it is a result here
        return {"placement": _failed(error, folder).value, "error": described(error), "cpu": _reasons(folder)}
    found = agreement(bundle, simulated, outputs)
    placement = Placement.CPU if placed.fallen_back else Placement.FLOAT if placed.float_islands else Placement.NPU
    if found["steps"] is not None and found["steps"] > _WRONG * 2**bundle.manifest.precision.activation_bits:
        placement = Placement.WRONG
    where = {"cpu": placed.fallen_back, "islands": placed.float_islands, "qairt": placed.qairt}
    return {"placement": placement.value, **where, **found}


def _failed(error: Exception, folder: Path) -> Placement:
    if isinstance(error, DeviceFallbackError):
        return Placement.CPU
    died = isinstance(error, DeviceError) and not isinstance(error, DeviceTimeoutError)
    if died and not (folder / ERROR).is_file():  # nothing was raised in the process
        return Placement.CRASHED
    return Placement.REFUSED


def _reasons(folder: Path) -> dict[str, str]:
    """Return what the compiler says of the operators that it left; nothing where it did not come that far."""
    trace = folder / "traces0" / "qnn_op_trace.json"
    nodes = json.loads(trace.read_text())["unsupported_nodes"] if trace.is_file() else []
    return {node["node_name"]: node["reason"] for node in nodes if node["op_type"] not in _CONVERSIONS}


def agreement(
    bundle: Bundle, simulated: list[list[np.ndarray]], outputs: list[dict[str, np.ndarray]]
) -> dict[str, Any]:
    """Return the share of outputs that are equal, and the largest difference in steps of their grid, if there is one.

    Both sides are multiples of one scale, computed in float32: what is nearer than half a step is the same integer.
    """
    graph = QdqGraph(onnx.load(bundle.qdq))
    most: float | None = 0.0
    equal = count = 0
    for expected, actual in zip(simulated, outputs, strict=True):
        for name, mine in zip(bundle.manifest.output_names, expected, strict=True):
            producer = graph.producers.get(name)
            scale = graph.number(producer.input[1]) if producer is not None and of_integers(producer) else None
            difference = np.abs(mine.astype(np.float64) - actual[name].astype(np.float64))
            steps = difference if scale is None else np.round(difference / scale)
            equal, count = equal + int((steps == 0).sum()), count + steps.size
            most = None if most is None or scale is None else max(most, float(steps.max()))
    return {"equal": equal / count, "steps": most}
