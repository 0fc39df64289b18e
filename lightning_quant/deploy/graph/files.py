"""The two ONNX files of a bundle: written by AIMET, made what the NPU takes."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_quant.deploy.graph import activations, biases, constants, many_axes, shared_grids, uniform_constants
from lightning_quant.deploy.graph.fixed import check_fixed, check_repeatable
from lightning_quant.deploy.graph.log_softmax import divide_before_log_softmax
from lightning_quant.deploy.graph.logarithms import log_in_float
from lightning_quant.deploy.graph.lowering import lowered
from lightning_quant.deploy.graph.padding import keep_padding_apart
from lightning_quant.deploy.graph.passed_inputs import Grid, encode_passed_inputs, round_passed_inputs
from lightning_quant.deploy.graph.products import keep_within
from lightning_quant.deploy.graph.second_operands import sign_second_operands
from lightning_quant.deploy.graph.unused_parts import slice_used_parts
from lightning_quant.errors import ExportError
from lightning_quant.simulation import aimet
from lightning_quant.simulation.callsites.aimet_views import weights_attached
from lightning_quant.simulation.callsites.passes import noting
from lightning_quant.simulation.exportable import FLOAT_OPSET
from lightning_quant.simulation.inputs import NetworkInputs, tensor_names, tensors_in
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.second_operands import hexagon_simulated, multiplies_by_int16
from lightning_quant.utilities.modules import preserve_parameters

if TYPE_CHECKING:
    import onnx

# Version of AIMET's encodings file. 1.0.0 is what AI Hub is documented to read.
ENCODINGS_VERSION = "1.0.0"
# 16-bit activations and 4-bit weights exist in QuantizeLinear from this opset on.
QDQ_OPSET = 21


@dataclass(frozen=True)
class OnnxFiles:
    """What was written.

    Args:
        model: the float graph.
        encodings: AIMET's encodings of it.
        input_names: of both graphs, in order.
        output_names: of both graphs, in order.
        passed: the outputs that are inputs, handed on, and the grid that the device rounds them to.
    """

    model: onnx.ModelProto
    encodings: dict[str, Any]
    input_names: list[str]
    output_names: list[str]
    passed: dict[str, Grid]

    @property
    def encoded(self) -> list[str]:
        """Names of the tensors that have an encoding."""
        return [e["name"] for part in ("activation_encodings", "param_encodings") for e in self.encodings[part]]


def write_onnx(network: QuantizedNetwork, example: NetworkInputs, float_file: Path, qdq_file: Path) -> OnnxFiles:
    """Write the float graph, its encodings, and the graph with integer weights.

    Args:
        network: the calibrated network, on the CPU in eval mode.
        example: a call of one sample, whose sizes the files get.
        float_file: where the float graph goes. AIMET writes its encodings next to it, to the same name that ends in
            ``.encodings``.
        qdq_file: where the graph with QuantizeLinear and DequantizeLinear goes.

    Raises:
        ExportError: when ONNX cannot express the network, or no device graph can.
    """
    import onnx

    given, title = example.call(network.network), network.float_class.__name__
    check_repeatable(network.network, example, given, title)
    names = dict(zip(("input_names", "output_names"), name_tensors(network, example, given), strict=True))
    sizes = [tuple(tensor.shape) for tensor in tensors_in(given)]
    tensors = tuple(example.tensors)
    with (
        aimet.quiet(),
        aimet.export_mended(),
        preserve_parameters(network.network),
        weights_attached(network.network),
        lowered(network.network),
        noting() as noted,
    ):
        try:
            network.sim.onnx.export(
                tensors,
                str(float_file),
                encoding_version=ENCODINGS_VERSION,
                opset_version=FLOAT_OPSET,
                dynamo=False,
                **names,
            )
            # tracing leaves the quantizers' own constants behind, used by nothing
            model = onnx.load(float_file)
            aimet._remove_dangling_nodes_and_initializers(model)
            check_fixed(model, title)
            _check_known(network, noted)
            gone = constants.fold_constants(model) | slice_used_parts(model)
            divide_before_log_softmax(model)
            aimet.export(
                network.sim.model,
                tensors,
                str(qdq_file),
                opset_version=QDQ_OPSET,
                prequantize_constants=True,
                dynamo=False,
                **names,
            )
        except (OSError, ExportError):
            raise
        except Exception as error:  # PyTorch's exporter adds the whole graph to what it says
            said = str(error).strip().splitlines()[0].rstrip(".")
            raise ExportError(
                f"{title} cannot be written as ONNX: {type(error).__name__}: {said}. Expected operations that ONNX "
                "has, at sizes it can express: try torch.onnx.export(..., dynamo=False) on the float network."
            ) from error
        quantized = onnx.load(qdq_file)
        # a parameter that several modules share goes into the file under one of its names
        parameters = network.sim.model.named_parameters(remove_duplicate=False)
        floats = {name: value.detach().numpy() for name, value in parameters if name.endswith("bias")}
        constants.fold_constants(quantized)
        slice_used_parts(quantized)
        divide_before_log_softmax(quantized)
        shared = shared_grids.share_grids(quantized)
        parted = activations.part_activations(quantized)
        encoded = constants.encode_constants(quantized)
        shared |= keep_within(quantized)
        uniform_constants.rewrite_uniform(quantized)
        keep_padding_apart(quantized)
        biases.complete_norms(quantized)
        log_in_float(quantized)
        passed = round_passed_inputs(quantized)
        coarser = biases.rescale_biases(quantized, floats)
        many_axes.write_in_fewer_axes(quantized)
        if multiplies_by_int16(hexagon_simulated(network.sim)):
            sign_second_operands(quantized)
    encodings_file = float_file.with_suffix(".encodings")
    encodings = json.loads(encodings_file.read_text())
    written = copy.deepcopy(encodings)
    constants.update_encodings(encodings, gone, encoded)
    shared_grids.update_encodings(encodings, shared)
    activations.update_encodings(encodings, parted)
    biases.update_encodings(encodings, coarser)
    uniform_constants.rewrite_encoded(model, encodings)
    keep_padding_apart(model, encodings)
    encode_passed_inputs(model, encodings)
    many_axes.rewrite_encoded(model, encodings)
    if encodings != written:
        encodings_file.write_text(json.dumps(encodings, indent=2) + "\n")
    for graph, file in ((model, float_file), (quantized, qdq_file)):
        _write_sizes(graph, sizes)
        onnx.save(graph, file)
    return OnnxFiles(model, encodings, **names, passed=passed)


def _write_sizes(model: onnx.ModelProto, sizes: Sequence[tuple[int, ...]]) -> None:
    """Give the outputs their sizes, where PyTorch's exporter lost track of them and wrote a name."""
    for value, size in zip(model.graph.output, sizes, strict=True):
        shape = value.type.tensor_type.shape
        del shape.dim[:]
        for length in size:
            shape.dim.add().dim_value = length


def _check_known(network: QuantizedNetwork, noted: dict[torch.nn.Module, list[str]]) -> None:
    """Refuse a graph with operations that were never quantized: the sample took another branch than the examples."""
    for module, operations in noted.items():
        name = next((name for name, one in network.network.named_modules() if one is module), "")
        raise ExportError(
            f"The sample that {network.float_class.__name__} is exported with comes to {', '.join(operations)} in "
            f"{name or 'the network itself'}, which nothing quantized: expected the code that the network ran when it "
            "was quantized. Export with samples like those, or move what depends on values out of the network."
        )


def name_tensors(network: QuantizedNetwork, example: NetworkInputs, given: Any) -> tuple[list[str], list[str]]:
    """Name the graph's inputs and outputs after the network's own signature and output structure.

    Args:
        network: the network; of one without a readable signature, inputs are numbered.
        example: a call of it.
        given: what it returned.
    """
    try:
        parameters = list(inspect.signature(network.network.forward).parameters.values())
    except (TypeError, ValueError):  # a callable that is not written in Python
        parameters = []
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    positional += [f"input_{index}" for index in range(len(positional), len(example.args))]  # of *args
    called = [*zip(positional, example.args, strict=False), *example.kwargs.items()]
    inputs = [label for name, value in called for label in tensor_names(value, name)]
    outputs = tensor_names(given)
    unique: list[str] = []
    for label in [*inputs, *outputs]:  # in ONNX, inputs and outputs share one namespace
        numbered = chain([label], (f"{label}_{number}" for number in count(1)))
        unique.append(next(name for name in numbered if name not in unique))
    return unique[: len(inputs)], unique[len(inputs) :]
