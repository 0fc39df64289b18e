"""Which functions are decomposed, and which are replaced in traces."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_quant.simulation.callsites.decompositions import (
    arithmetic,
    attention,
    composed,
    einsum,
    indexed_writes,
    norms,
    pooling,
    recurrent,
    resampling,
)
from lightning_quant.simulation.callsites.functions import tensors_among
from lightning_quant.simulation.callsites.traces import untraced


class Decomposition(NamedTuple):
    """How a function is computed with others.

    Args:
        compute: takes the function's arguments.
        supports: returns whether ``compute`` computes the same for given arguments; ``None``: for all.
    """

    compute: Callable[..., Any]
    supports: Callable[..., bool] | None = None


DECOMPOSITIONS: dict[str, Decomposition] = {
    "scaled_dot_product_attention": Decomposition(attention.attention),
    "multi_head_attention_forward": Decomposition(
        attention.multi_head_attention, attention.supports_multi_head_attention
    ),
    **{kind: Decomposition(recurrent.recurrent(kind), recurrent.supports_recurrent) for kind in recurrent.KINDS},
    **{f"{kind}_cell": Decomposition(recurrent.cell(kind)) for kind in recurrent.KINDS},
    "group_norm": Decomposition(norms.group_norm),
    "rms_norm": Decomposition(norms.rms_norm),
    "silu": Decomposition(arithmetic.silu),
    "mish": Decomposition(arithmetic.mish),
    **dict.fromkeys(("pow", "ipow"), Decomposition(arithmetic.power, arithmetic.supports_power)),
    "rsqrt": Decomposition(arithmetic.rsqrt),
    "reciprocal": Decomposition(arithmetic.reciprocal),
    "glu": Decomposition(arithmetic.glu),
    "normalize": Decomposition(norms.normalize, norms.supports_normalize),
    "norm": Decomposition(norms.norm, norms.supports_norm),
    "linalg_vector_norm": Decomposition(norms.vector_norm, norms.supports_vector_norm),
    "vector_norm": Decomposition(norms.vector_norm, norms.supports_vector_norm),
    "stack": Decomposition(arithmetic.stack),
    **dict.fromkeys(("cat", "concat", "concatenate"), Decomposition(arithmetic.join)),
    "addcmul": Decomposition(arithmetic.addcmul),
    "addcdiv": Decomposition(arithmetic.addcdiv),
    "lerp": Decomposition(arithmetic.lerp),
    "addmm": Decomposition(arithmetic.addmm),
    "baddbmm": Decomposition(arithmetic.baddbmm),
    "masked_fill": Decomposition(arithmetic.masked_fill, arithmetic.supports_masked_fill),
    **{name: Decomposition(arithmetic.triangle(name)) for name in ("tril", "triu")},
    **dict.fromkeys(
        ("mul", "multiply", "imul", "rmul"), Decomposition(arithmetic.selected, arithmetic.supports_selected)
    ),
    **dict.fromkeys(
        ("floor_divide", "floordiv", "ifloordiv"),
        Decomposition(arithmetic.floor_divide, arithmetic.supports_floor_divide),
    ),
    "rfloordiv": Decomposition(
        lambda input, other: arithmetic.floor_divide(other, input), arithmetic.supports_floor_divide
    ),
    "softplus": Decomposition(arithmetic.softplus, arithmetic.supports_softplus),
    **{function.__name__: Decomposition(function) for function in composed.OF_ONE_NUMBER},
    "softmin": Decomposition(composed.softmin),
    "rpow": Decomposition(composed.raised, composed.supports_raised),
    "hypot": Decomposition(composed.hypotenuse),
    "cosine_similarity": Decomposition(composed.cosine_similarity),
    "cross": Decomposition(composed.cross),
    "linalg_cross": Decomposition(composed.linalg_cross),
    "linear": Decomposition(composed.linear),  # with a computed weight
    "dot": Decomposition(composed.dot),
    "outer": Decomposition(composed.outer),
    "remainder": Decomposition(composed.remainder),
    "ger": Decomposition(composed.outer),
    "mv": Decomposition(composed.matrix_by_vector),
    "var": Decomposition(composed.variance),
    "std": Decomposition(composed.deviation),
    "var_mean": Decomposition(composed.variance_and_mean),
    "std_mean": Decomposition(composed.deviation_and_mean),
    "local_response_norm": Decomposition(composed.local_response_norm, composed.supports_local_response_norm),
    "lp_pool2d": Decomposition(composed.lp_pool2d, composed.supports_lp_pool2d),
    "cdist": Decomposition(composed.distances, composed.supports_distances),
    "diff": Decomposition(arithmetic.diff),
    "cumsum": Decomposition(arithmetic.cumsum, arithmetic.supports_cumsum),
    "einsum": Decomposition(einsum.einsum, einsum.supports_einsum),
    "tensordot": Decomposition(einsum.tensordot, einsum.supports_tensordot),
    "interpolate": Decomposition(resampling.interpolate, resampling.supports_interpolate),
    **{
        f"adaptive_{kind}_pool{axes}d": Decomposition(compute(axes), pooling.supports(axes))
        for kind, compute in (("avg", pooling.mean), ("max", pooling.maximum))
        for axes in (1, 2, 3)
    },
    "adaptive_max_pool3d": Decomposition(
        pooling.maximum(3), lambda input, output_size, return_indices=False: not return_indices
    ),
    "avg_pool1d": Decomposition(pooling.avg_pool1d, pooling.supports_avg_pool1d),
    "avg_pool2d": Decomposition(pooling.avg_pool2d, pooling.supports_avg_pool2d),
    "avg_pool3d": Decomposition(pooling.avg_pool3d, pooling.supports_avg_pool3d),
    "max_pool3d": Decomposition(pooling.max_pool3d, pooling.supports_max_pool3d),
    "layer_norm": Decomposition(norms.layer_norm, norms.supports_layer_norm),
    "prelu": Decomposition(arithmetic.prelu),
    "logsumexp": Decomposition(composed.logsumexp),
    "prod": Decomposition(composed.product, composed.supports_product),
    **dict.fromkeys(("affine_grid", "affine_grid_generator"), Decomposition(resampling.affine_grid)),
    "fold": Decomposition(resampling.fold),
    "pad": Decomposition(resampling.pad, resampling.supports_pad),
    "unfold": Decomposition(resampling.unfold, resampling.supports_unfold),
    "setitem": Decomposition(indexed_writes.set_item, indexed_writes.supports_set_item),
    "copy": Decomposition(indexed_writes.copied),
    **dict.fromkeys(("fill", "zero"), Decomposition(indexed_writes.filled)),
    "empty": Decomposition(indexed_writes.empty),
    "empty_like": Decomposition(torch.zeros_like),
    "new_empty": Decomposition(Tensor.new_zeros),
    "index_put": Decomposition(indexed_writes.index_put, indexed_writes.supports_index_put),
    "index_copy": Decomposition(indexed_writes.index_copy, indexed_writes.supports_index),
    "index_fill": Decomposition(indexed_writes.index_fill, indexed_writes.supports_index),
    "scatter": Decomposition(indexed_writes.scatter, indexed_writes.supports_scatter),
}
# Of a longer row the NPU's emulator picks other values in 8 bits if its length is odd.
_LONG = 256
# Those that are decomposed only where they join inputs of the network.
JOINS = frozenset(("cat", "concat", "concatenate"))
# Those that are decomposed in place only.
OVERWRITES = frozenset(("copy", "fill", "zero"))
# Tensors of any values, which their places are written into one after the other: those not yet written would give the
# tensor a range.
UNWRITTEN = frozenset(("empty", "empty_like", "new_empty"))
# Those that compute every step with the same layer: each tensor has one range over all steps.
REPEATED_STEPS = frozenset(recurrent.KINDS)


def _cumsum(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return torch.cumsum(input.long() if input.dtype == torch.bool else input, *args, **kwargs)


def _channel_shuffle(input: Tensor, groups: int) -> Tensor:
    """Compute ``channel_shuffle`` of (N, C, ...), which ONNX does not have."""
    return input.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def _movedim(input: Tensor, source: Any, destination: Any) -> Tensor:
    """Compute ``movedim`` of axes counted from the front: PyTorch's exporter writes those from the end as they are."""
    sources, destinations = (
        [axis % input.dim() for axis in ([axes] if isinstance(axes, int) else axes)] for axes in (source, destination)
    )
    return torch.movedim(input, sources, destinations)


def _diagonal(input: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Tensor:
    """Compute ``diagonal``, which PyTorch's exporter writes as a graph that is not valid, by its places."""
    flat = input.movedim((dim1 % input.dim(), dim2 % input.dim()), (input.dim() - 2, input.dim() - 1)).flatten(-2)
    rows, columns = input.shape[dim1], input.shape[dim2]
    with untraced():
        places = torch.arange(int(rows) * int(columns), device=input.device).reshape(int(rows), int(columns))
        on_it = places.diagonal(offset).clone()
    return flat.index_select(-1, on_it)


def _tile(input: Tensor, *counted: Any, dims: Any = None) -> Tensor:
    """Compute ``tile`` by ``repeat``: PyTorch's exporter writes it with a branch."""
    counts = _listed(counted if dims is None else dims)
    return _repeat(input, [1] * (input.dim() - len(counts)) + counts)


def _listed(given: Any) -> list[int]:
    """Return numbers that were given one by one, or as a list."""
    numbers = [given] if isinstance(given, int) else list(given)
    return list(numbers[0]) if len(numbers) == 1 and isinstance(numbers[0], (tuple, list)) else numbers


def _repeat(input: Tensor, *counted: Any, repeats: Any = None) -> Tensor:
    """Compute ``repeat``, nothing of it where each axis is there once: the NPU's compiler crashes on that."""
    counts = _listed(counted if repeats is None else repeats)
    if any(int(count) != 1 for count in counts):
        return input.repeat(counts)
    in_front = len(counts) - input.dim()
    return input.reshape([1] * in_front + [*input.shape]) if in_front else input


def _repeat_interleave(input: Tensor, repeats: Any, dim: int | None = None, **kwargs: Any) -> Tensor:
    if isinstance(repeats, int) and repeats == 1:
        return input if dim is not None else input.flatten()
    return torch.repeat_interleave(input, repeats, dim, **kwargs)


def _chunk(input: Tensor, chunks: int, dim: int = 0) -> Any:
    """Split a tensor: its chunks are slices in ONNX, which ONNX Runtime moves in front of a Transpose."""
    return input.split(-(-input.shape[dim] // chunks), dim)


def _max_unpool(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Give ``F.max_unpool2d`` and its like the size of their output: how PyTorch checks its own cannot be traced."""

    def unpool(
        input: Tensor, indices: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, output_size: Any = None
    ) -> Tensor:
        if output_size is None:
            sizes = np.array([int(size) for size in indices.shape[-axes:]])
            steps = np.array(kernel_size if stride is None else stride)
            output_size = ((sizes - 1) * steps - 2 * np.array(padding) + np.array(kernel_size)).tolist()
        return function(input, indices, kernel_size, stride, padding, output_size)

    axes = int(function.__name__[-2])
    return unpool


def _tensor_split(input: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """Compute ``tensor_split`` by slices: PyTorch's exporter writes it with a loop."""
    axis = kwargs["dim"] if "dim" in kwargs else args[1] if len(args) > 1 else 0
    with untraced():
        parts = torch.tensor_split(torch.empty([int(size) for size in input.shape], device="meta"), *args, **kwargs)
    starts = itertools.accumulate((part.shape[axis] for part in parts), initial=0)
    return tuple(input.narrow(axis, start, part.shape[axis]) for start, part in zip(starts, parts, strict=False))


def _hsplit(input: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    return _tensor_split(input, *args, dim=1 if input.dim() > 1 else 0, **kwargs)


def _vsplit(input: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    return _tensor_split(input, *args, dim=0, **kwargs)


def _dsplit(input: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    return _tensor_split(input, *args, dim=2, **kwargs)


def _roll(input: Tensor, shifts: Any, dims: Any = None) -> Tensor:
    """Compute ``roll`` along the axes that move: PyTorch's exporter joins the others with a tensor of no values."""
    if dims is None or dims == ():
        return _roll(input.flatten(), shifts, 0).reshape(input.shape) if input.dim() != 1 else _roll(input, shifts, 0)
    amounts, axes = ([one] if isinstance(one, int) else list(one) for one in (shifts, dims))
    lengths = [int(input.shape[axis]) for axis in axes]
    moved = [(amount % length, axis) for amount, axis, length in zip(amounts, axes, lengths, strict=True) if length]
    moved = [(amount, axis) for amount, axis in moved if amount]
    return torch.roll(input, [amount for amount, _ in moved], [axis for _, axis in moved]) if moved else input


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    """Compute ``F.one_hot`` by comparisons: the NPU has none."""
    return (tensor.unsqueeze(-1) == torch.arange(num_classes, device=tensor.device)).to(tensor.dtype)


def _clamp(input: Tensor, min: Any = None, max: Any = None, **kwargs: Any) -> Tensor:
    """Compute ``clamp`` with one limit: AIMET's exporter cannot read a Clip that leaves the other out."""
    if kwargs or (min is None) == (max is None):
        return torch.clamp(input, min, max, **kwargs)
    limit = min if max is None else max
    limit = torch.as_tensor(limit, dtype=torch.result_type(input, limit), device=input.device)
    return torch.maximum(input, limit) if max is None else torch.minimum(input, limit)


def _item(input: Tensor, key: Any) -> Tensor:
    """Compute ``input[key]``; AIMET does not follow the alias that ``input[...]`` is in a trace."""
    if key is Ellipsis:
        return input
    parts = indexed_writes.per_axis(key, input.dim())
    picked = [axis for axis, part in enumerate(parts) if not (isinstance(part, slice) and part == slice(None))]
    if len(picked) == 1 and isinstance(parts[picked[0]], (list, Tensor)):
        index = torch.as_tensor(parts[picked[0]], device=input.device)
        if index.dtype in (torch.long, torch.int32) and index.dim() > 0:
            if bool((index < 0).any()):
                index = torch.where(index < 0, index + input.shape[picked[0]], index)
            if index.dim() == 1:  # of any length, which may depend on values
                return _index_select(input, picked[0], index)
            return _index_select(input, picked[0], index.flatten()).unflatten(picked[0], index.shape)
    return input[key]


def _set_item(input: Tensor, key: Any, value: Any) -> None:
    """Compute ``input[key] = value``, nothing where the key is of no value: PyTorch's exporter cannot write that."""
    if not tensors_among(key):
        with untraced():
            if not torch.empty([int(size) for size in input.shape], device="meta")[key].numel():
                return
    input[key] = value


def _index_select(input: Tensor, dim: int, index: Tensor) -> Tensor:
    """Compute ``index_select`` along the last axis, long rows a multiple of eight long: others the NPU gets wrong."""
    dim %= input.dim()
    if not input.is_floating_point() or (input.dim() == 4 and dim == 1):  # channels
        return torch.index_select(input, dim, index)
    rows = input.transpose(dim, -1)
    length = int(rows.shape[-1])
    if length > _LONG and (missing := -length % 8):
        rows = torch.cat([rows, rows.narrow(-1, 0, missing)], -1)
    return rows.index_select(-1, index).transpose(dim, -1)


# Functions that ONNX does not have, or AIMET's exporter not in this form, and what computes the same in a trace.
TRACE_SUBSTITUTES: dict[Any, Callable[..., Any]] = {
    # of positions and masks, which nothing rounds
    torch.diff: arithmetic.diff,
    torch.cumsum: _cumsum,
    Tensor.cumsum: _cumsum,
    torch.channel_shuffle: _channel_shuffle,
    Tensor.__getitem__: _item,
    Tensor.__setitem__: _set_item,
    **dict.fromkeys((torch.roll, Tensor.roll), _roll),
    **dict.fromkeys((torch.chunk, Tensor.chunk), _chunk),
    **dict.fromkeys((torch.tensor_split, Tensor.tensor_split), _tensor_split),
    **dict.fromkeys((torch.hsplit, Tensor.hsplit), _hsplit),
    **dict.fromkeys((torch.vsplit, Tensor.vsplit), _vsplit),
    **dict.fromkeys((torch.dsplit, Tensor.dsplit), _dsplit),
    **dict.fromkeys((torch.index_select, Tensor.index_select), _index_select),
    **dict.fromkeys((torch.movedim, torch.moveaxis, Tensor.movedim, Tensor.moveaxis), _movedim),
    **dict.fromkeys((torch.diagonal, Tensor.diagonal), _diagonal),
    torch.clamp: _clamp,
    Tensor.clamp: _clamp,
    **dict.fromkeys((torch.tile, Tensor.tile), _tile),
    Tensor.repeat: _repeat,
    **dict.fromkeys((torch.repeat_interleave, Tensor.repeat_interleave), _repeat_interleave),
    F.one_hot: _one_hot,
    **{function: _max_unpool(function) for function in (F.max_unpool1d, F.max_unpool2d, F.max_unpool3d)},
    # integers are finite
    **dict.fromkeys((torch.nan_to_num, Tensor.nan_to_num), lambda input, *_, **__: input),
    **dict.fromkeys((torch.isfinite, Tensor.isfinite), lambda input: torch.ones_like(input, dtype=torch.bool)),
    **dict.fromkeys(
        (torch.isnan, Tensor.isnan, torch.isinf, Tensor.isinf),
        lambda input: torch.zeros_like(input, dtype=torch.bool),
    ),
    Tensor.unfold: resampling.windows,
    # of positions that are learned
    F.interpolate: resampling.interpolate,
}
