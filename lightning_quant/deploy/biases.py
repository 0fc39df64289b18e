"""Integer biases in the one scale that the hardware adds them in, and with room for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx

# Where these operations take weight and bias.
_BIASED = ("Conv", "ConvTranspose", "Gemm")

# Largest integer of a bias: half of what 32 bits hold, the rest is for the sum that it is added to.
_LARGEST = 2**30


def rescale_biases(model: onnx.ModelProto, biases: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    """Give every 32-bit bias the scale of its input times that of its weight, as integer hardware adds it.

    Two things go wrong otherwise, both unseen by ONNX Runtime, which computes with whatever scale is written:

    - AIMET derives that scale while it runs the network, and loses track of the input's behind operations without
      ranges of their own (padding). There it takes the finest scale that the bias fits in; an NPU knows one scale only
      and puts out other numbers (0.6 dB where 57 are right).
    - A channel whose weights are all but zero has so fine a scale that its bias does not fit in 32 bits: AIMET cuts
      it off, or an NPU overflows and the channel puts out its negative. Its weights get a coarser scale, as ONNX
      Runtime's own quantizer gives them; what they lose is below anything the bias leaves visible.

    Args:
        model: a QDQ graph; changed in place.
        biases: the float biases, by the names of the parameters.

    Returns:
        The new scales of the weights that were changed, by name, for the encodings to agree.
    """
    from onnx import numpy_helper

    producers = {output: node for node in model.graph.node for output in node.output}
    initializers = {one.name: one for one in model.graph.initializer}
    coarser = {}
    for node in model.graph.node:
        if node.op_type not in _BIASED or len(node.input) < 3:
            continue
        sources = [producers[name] for name in node.input[:3] if name in producers]
        if len(sources) < 3 or any(source.op_type != "DequantizeLinear" for source in sources):
            continue
        names = [source.input[1] for source in sources] + [sources[1].input[0], sources[2].input[0]]
        if any(name not in initializers for name in names):
            continue
        scales, weight, bias = [initializers[name] for name in names[:3]], *(initializers[name] for name in names[3:])
        of_input, of_weight, of_bias = (numpy_helper.to_array(scale).astype(np.float64) for scale in scales)
        given = biases.get(bias.name.removesuffix("_q"))
        cut_off = numpy_helper.to_array(bias).astype(np.float64) * of_bias
        values = cut_off if given is None or given.shape != cut_off.shape else given.astype(np.float64)
        needed = np.abs(values) / (of_input * _LARGEST)
        roomy = np.maximum(of_weight, needed if of_weight.ndim else needed.max())
        if (roomy > of_weight).any():
            integers = numpy_helper.to_array(weight)
            ratio = _along(of_weight / roomy, integers.ndim, sources[1])
            fewer = np.rint(integers.astype(np.float64) * ratio).astype(integers.dtype)
            weight.CopyFrom(numpy_helper.from_array(fewer, weight.name))
            scales[1].CopyFrom(numpy_helper.from_array(roomy.astype(np.float32), scales[1].name))
            coarser[weight.name.removesuffix("_q")] = roomy.astype(np.float32).ravel().tolist()
        wanted = np.broadcast_to(of_input * roomy, of_bias.shape)
        if given is not None or not np.allclose(of_bias, wanted, rtol=1e-3, atol=0):
            bias.CopyFrom(numpy_helper.from_array(np.rint(values / wanted).astype(np.int32), bias.name))
            scales[2].CopyFrom(numpy_helper.from_array(wanted.astype(np.float32), scales[2].name))
    return coarser


def update_encodings(encodings: dict[str, Any], coarser: dict[str, list[float]]) -> None:
    """Write the scales that :func:`rescale_biases` gave weights into AIMET's encodings (version 1.0.0)."""
    for entry in encodings["param_encodings"]:
        if entry["name"] in coarser:
            entry["scale"] = coarser[entry["name"]]


def _along(values: np.ndarray, dimensions: int, dequantize: onnx.NodeProto) -> np.ndarray:
    """Values per channel, in the shape that multiplies a weight."""
    if values.ndim == 0:
        return values
    axis = next((int(attribute.i) for attribute in dequantize.attribute if attribute.name == "axis"), 1)
    return values.reshape([-1 if index == axis % dimensions else 1 for index in range(dimensions)])
