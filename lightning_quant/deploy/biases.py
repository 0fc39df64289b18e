"""Integer biases in the one scale that the hardware adds them in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

# Where these operations take weight and bias.
_BIASED = ("Conv", "ConvTranspose", "Gemm")


def rescale_biases(model: onnx.ModelProto) -> list[str]:
    """Give every 32-bit bias the scale of its input times that of its weight, as integer hardware adds it.

    AIMET derives that scale while it runs the network, and loses track of the input's behind operations without
    ranges of their own (padding): there it takes the finest scale the bias fits in. ONNX Runtime computes the same from
    either, but an NPU, which knows one scale only, puts out other numbers (measured: 16 dB after the first layer).

    Args:
        model: a QDQ graph; changed in place.

    Returns:
        Names of the operations whose bias was changed.
    """
    from onnx import numpy_helper

    producers = {output: node for node in model.graph.node for output in node.output}
    initializers = {one.name: one for one in model.graph.initializer}
    changed = []
    for node in model.graph.node:
        if node.op_type not in _BIASED or len(node.input) < 3:
            continue
        sources = [producers[name] for name in node.input[:3] if name in producers]
        if len(sources) < 3 or any(source.op_type != "DequantizeLinear" for source in sources):
            continue
        names = [*(source.input[1] for source in sources), sources[2].input[0]]
        if any(name not in initializers for name in names):
            continue
        scales, bias = [initializers[name] for name in names[:3]], initializers[names[3]]
        of_input, of_weight, of_bias = (numpy_helper.to_array(scale).astype(np.float64) for scale in scales)
        wanted = np.broadcast_to(of_input * of_weight, of_bias.shape)
        if np.allclose(of_bias, wanted, rtol=1e-3, atol=0):
            continue
        values = numpy_helper.to_array(bias).astype(np.float64) * of_bias
        limits = np.iinfo(np.int32)
        integers = np.clip(np.rint(values / wanted), limits.min, limits.max).astype(np.int32)
        bias.CopyFrom(numpy_helper.from_array(integers, bias.name))
        scales[2].CopyFrom(numpy_helper.from_array(wanted.astype(np.float32), scales[2].name))
        changed.append(node.name)
    return changed
