"""The rule for each function, by its base name."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_quant.simulation.callsites.rules import weighted
from lightning_quant.simulation.callsites.rules.base import (
    Binary,
    Clip,
    Concatenation,
    Configured,
    Named,
    Padding,
    Rule,
    clip,
    hardtanh,
)
from lightning_quant.simulation.callsites.rules.generic import Generic

RULES: dict[str, Rule] = {
    **dict.fromkeys(("add", "iadd"), Binary("Add")),
    **dict.fromkeys(("sub", "isub", "subtract"), Binary("Subtract")),
    **dict.fromkeys(("mul", "imul", "multiply"), Binary("Multiply")),
    **dict.fromkeys(("div", "truediv", "itruediv", "divide", "true_divide"), Binary("Divide")),
    **dict.fromkeys(("matmul", "linalg_matmul", "bmm", "mm", "imatmul"), Binary("MatMul")),
    "radd": Binary("Add", swapped=True),
    "rsub": Binary("Subtract", swapped=True),
    "rmul": Binary("Multiply", swapped=True),
    "rtruediv": Binary("Divide", swapped=True),
    "rdiv": Binary("Divide", swapped=True),
    "rmatmul": Binary("MatMul", swapped=True),
    "maximum": Binary("Maximum"),
    "minimum": Binary("Minimum"),
    **dict.fromkeys(("cat", "concat", "concatenate"), Concatenation()),
    "softmax": Configured(nn.Softmax, "dim", "_stacklevel", "dtype"),
    "log_softmax": Configured(nn.LogSoftmax, "dim", "_stacklevel", "dtype"),
    "relu": Configured(nn.ReLU, "inplace"),
    "relu6": Configured(nn.ReLU6, "inplace"),
    "gelu": Configured(nn.GELU, "approximate"),
    "sigmoid": Configured(nn.Sigmoid),
    "tanh": Configured(nn.Tanh),
    "hardswish": Configured(nn.Hardswish, "inplace"),
    "hardsigmoid": Configured(nn.Hardsigmoid, "inplace"),
    "leaky_relu": Configured(nn.LeakyReLU, "negative_slope", "inplace"),
    "elu": Configured(nn.ELU, "alpha", "inplace"),
    "selu": Configured(nn.SELU, "inplace"),
    "softplus": Configured(nn.Softplus, "beta", "threshold"),
    "hardtanh": Configured(hardtanh, "min_val", "max_val", "inplace"),
    "clamp": Clip(clip, "min", "max"),
    "clip": Clip(clip, "min", "max"),
    "clamp_min": Clip(clip, "min"),
    "clamp_max": Clip(clip, "max"),
    **{
        name: Named(module)
        for name, module in {
            "interpolate": "Interpolate",
            "avg_pool2d": "AvgPool2d",
            "max_pool2d": "MaxPool2d",
            "adaptive_avg_pool2d": "AdaptiveAvgPool2d",
            "mean": "Mean",
            "sum": "Sum",
            "pow": "Pow",
            "ipow": "Pow",
            "sqrt": "Sqrt",
            "exp": "Exponential",
            "log": "Log",
            "abs": "Abs",
            "neg": "Neg",
            "sin": "Sin",
            "cos": "Cos",
            "erf": "Erf",
            "amax": "AMax",
            "amin": "AMin",
            "cumsum": "CumSum",
            "norm": "Norm",
            "square": "Square",
        }.items()
    },
    "grid_sample": Named("GridSample", tensors=2),
    "pad": Padding("Pad"),
    "linear": weighted.Weighted(("input", "weight", "bias"), weighted.linear),
    **{f"conv{d}d": weighted.Weighted(weighted.CONVOLUTION, weighted.convolution(transposed=False)) for d in (1, 2, 3)},
    **{
        f"conv_transpose{d}d": weighted.Weighted(weighted.TRANSPOSED, weighted.convolution(transposed=True))
        for d in (1, 2, 3)
    },
    "embedding": weighted.Weighted(
        ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"), weighted.embedding
    ),
    "layer_norm": weighted.Weighted(("input", "normalized_shape", "weight", "bias", "eps"), weighted.layer_norm),
    "instance_norm": weighted.InstanceNorm(weighted.INSTANCE_NORM, weighted.instance_norm),
    "batch_norm": weighted.BatchNorm(weighted.BATCH_NORM, weighted.batch_norm),
    "prelu": weighted.Weighted(("input", "weight"), weighted.prelu),
}
GENERIC = Generic()

# Where a setting "inplace" stands among the arguments of functions that can be given it by position.
_INPLACE_AT = {
    name: 1 + rule.names.index("inplace")
    for name, rule in RULES.items()
    if isinstance(rule, Configured) and "inplace" in rule.names
}


def inplace_by_position(name: str, args: Any) -> bool:
    """Return whether a function is passed ``inplace=True`` by position."""
    at = _INPLACE_AT.get(name)
    return at is not None and len(args) > at and bool(args[at])
