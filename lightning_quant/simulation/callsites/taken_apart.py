"""Operations that PyTorch has as one and an NPU as several: each rewritten with those that it has.

What is called here is answered by call sites again, so that every value in between gets a range. With nothing rounded
the results are those of PyTorch within the order of float32 sums; random numbers are drawn in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_quant.simulation.callsites import resampling, written_parts
from lightning_quant.simulation.callsites.running import IN_TRACES, MADE_UP

# What a masked position gets added: softmax makes 2e-22 of it, and unlike -inf it lies within a range.
MASKED = -50.0


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention``: (…, L, E), (…, S, E), (…, S, V) to (…, L, V)."""
    if enable_gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
        value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
    if is_causal:
        size = query.shape[-2], key.shape[-2]
        attn_mask = torch.ones(size, dtype=torch.bool, device=query.device).tril()
    mask = None if attn_mask is None else additive(attn_mask, query, keep=True)
    return _attend(query, key, value, mask, dropout_p, scale)[0]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """What is attended to, and how much."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = torch.matmul(query * scale, key.transpose(-2, -1))
    if mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, -1)
    if dropout > 0:
        weights = F.dropout(weights, dropout)
    return torch.matmul(weights, value), weights


def additive(mask: Tensor, like: Tensor, keep: bool) -> Tensor:
    """A mask as numbers to add; of a boolean one, ``keep`` is what is not masked."""
    if mask.dtype != torch.bool:
        return mask.clamp(min=MASKED)
    zeros = torch.zeros(mask.shape, dtype=like.dtype, device=like.device)
    return zeros.masked_fill(~mask if keep else mask, MASKED)


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``F.multi_head_attention_forward`` on (L, N, E) or (L, E): what ``nn.MultiheadAttention`` calls."""
    batched = query.dim() == 3
    if not batched:
        query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    length, batch, width = query.shape
    weights: Sequence[Any] = (q_proj_weight, k_proj_weight, v_proj_weight)
    if not use_separate_proj_weight:
        assert in_proj_weight is not None
        weights = in_proj_weight.chunk(3)
    biases: Sequence[Any] = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
    # the batch first, as the NPU wants it
    parts = [
        F.linear(tensor.transpose(0, 1), weight, bias)
        for tensor, weight, bias in zip((query, key, value), weights, biases, strict=True)
    ]
    q, k, v = (part.reshape(batch, part.shape[1], num_heads, width // num_heads).transpose(1, 2) for part in parts)
    if is_causal and attn_mask is None:
        attn_mask = torch.ones(length, k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    mask = None
    if attn_mask is not None:
        mask = additive(attn_mask, q, keep=False)
        if mask.dim() == 3:
            mask = mask.reshape(batch, num_heads, *mask.shape[-2:])
    if key_padding_mask is not None:
        padding = additive(key_padding_mask, q, keep=False)[:, None, None, :]
        mask = padding if mask is None else mask + padding
    seen, looked = _attend(q, k, v, mask, dropout_p if training else 0.0)
    # laid out in memory as PyTorch does, which decides what a dropout behind it drops
    joined = seen.permute(2, 0, 1, 3).reshape(length, batch, width)
    output = F.linear(joined, out_proj_weight, out_proj_bias)
    if not batched:
        output = output.squeeze(1)
    if not need_weights:
        return output, None
    if average_attn_weights:
        looked = looked.mean(1)
    return output, looked if batched else looked.squeeze(0)


def takes_multi_head_attention(*args: Any, **kwargs: Any) -> bool:
    """Whether :func:`multi_head_attention` can take a call apart: not with keys of its own or given ones."""
    bound = dict(zip(_ATTENTION_ARGUMENTS, args, strict=False)) | kwargs
    given = [bound.get(name) for name in ("bias_k", "bias_v", "static_k", "static_v")]
    return not bound.get("add_zero_attn") and all(one is None for one in given)


_ATTENTION_ARGUMENTS = multi_head_attention.__code__.co_varnames[: multi_head_attention.__code__.co_argcount]


# ---- recurrent layers ------------------------------------------------------------------------------------------------
_PARTS = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def recurrent(kind: str) -> Callable[..., Any]:
    """``torch.lstm``, ``torch.gru``, ``torch.rnn_tanh`` or ``torch.rnn_relu``, unrolled over the steps.

    A state of zeros that the layer made itself is left out of the first step: nothing is multiplied with it.
    """

    def unrolled(
        input: Tensor,
        hx: Any,
        weights: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> Any:
        x = input.transpose(0, 1) if batch_first else input
        states = tuple(hx) if kind == "lstm" else (hx,)
        directions = 2 if bidirectional else 1
        each = len(weights) // (num_layers * directions)
        last: list[list[Tensor]] = [[] for _ in states]
        for layer in range(num_layers):
            outputs = []
            for direction in range(directions):
                index = layer * directions + direction
                own = list(weights[index * each : (index + 1) * each])
                state = [None if is_made_up(one) else one[index] for one in states]
                output, state = _layer(kind, x, state, own, has_biases, bool(direction))
                outputs.append(output)
                for kept, value in zip(last, state, strict=True):
                    kept.append(value)
            x = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
            if dropout and train and layer + 1 < num_layers:
                x = F.dropout(x, dropout)
        ends = tuple(torch.stack(kept) for kept in last)
        return (x.transpose(0, 1) if batch_first else x, *ends)

    return unrolled


def takes_recurrent(*args: Any, **kwargs: Any) -> bool:
    """Whether a call is not of packed sequences, whose steps have batches of their own sizes."""
    return len(args) >= 3 and isinstance(args[2], (list, tuple)) and isinstance(args[3], bool)


def is_made_up(state: Tensor) -> bool:
    """Whether a recurrent layer's first state is one that PyTorch's module made of zeros."""
    return MADE_UP in state.__dict__


def _layer(
    kind: str, x: Tensor, state: list[Any], own: list[Tensor], has_biases: bool, backwards: bool
) -> tuple[Tensor, list[Any]]:
    """One layer in one direction over (T, N, F)."""
    inward, around = own[:2]
    bias_in, bias_around = own[2:4] if has_biases else (None, None)
    projection = own[-1] if len(own) % 2 else None
    steps = F.linear(x, inward, bias_in).unbind(0)
    outputs = []
    for step in reversed(steps) if backwards else steps:
        state = _cell(kind, step, state, around, bias_around, projection)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backwards else outputs), state


def _cell(
    kind: str, x: Tensor, state: Sequence[Any], around: Tensor, bias: Tensor | None, projection: Tensor | None = None
) -> list[Any]:
    """One step; ``x`` went through the layer's input weights already."""
    hidden = state[0]
    back = F.linear(hidden, around, bias) if hidden is not None else bias
    if kind == "gru":
        xr, xz, xn = x.chunk(3, -1)
        if back is None:
            n = torch.tanh(xn)
            return [n - torch.sigmoid(xz) * n]
        hr, hz, hn = back.chunk(3, -1)
        r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
        n = torch.tanh(xn + r * hn)
        return [n + z * (hidden - n)] if hidden is not None else [n - z * n]
    total = x if back is None else x + back
    if kind == "lstm":
        i, f, g, o = total.chunk(4, -1)
        memory = torch.sigmoid(i) * torch.tanh(g)
        if state[1] is not None:
            memory = torch.sigmoid(f) * state[1] + memory
        hidden = torch.sigmoid(o) * torch.tanh(memory)
        return [hidden if projection is None else F.linear(hidden, projection), memory]
    return [torch.relu(total) if kind == "rnn_relu" else torch.tanh(total)]


def cell(kind: str) -> Callable[..., Any]:
    """``torch.lstm_cell``, ``torch.gru_cell`` and the plain ones: one step of one layer."""

    def step(
        input: Tensor,
        hx: Any,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Any:
        states = hx if kind == "lstm" else (hx,)
        state = _cell(
            kind, F.linear(input, w_ih, b_ih), [None if is_made_up(one) else one for one in states], w_hh, b_hh
        )
        return tuple(state) if kind == "lstm" else state[0]

    return step


# ---- norms and activations -------------------------------------------------------------------------------------------
def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """``F.group_norm`` as the instance norm of each group, which the NPU has for integers, then weight and bias."""
    shape = input.shape
    groups = input.reshape(shape[0], num_groups, shape[1] // num_groups, -1)
    normed = F.instance_norm(groups, eps=eps).reshape(shape)
    along = (1, -1, *[1] * (len(shape) - 2))
    if weight is not None:
        normed = normed * weight.reshape(along)
    return normed if bias is None else normed + bias.reshape(along)


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """``F.rms_norm``."""
    axes = list(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    normed = input * torch.rsqrt((input * input).mean(axes, keepdim=True) + eps)
    return normed if weight is None else normed * weight


def power(input: Tensor, exponent: float) -> Tensor:
    """``x ** n`` for the exponents that PyTorch computes as products and roots: the NPU has no power in integers."""
    if exponent < 0:
        return 1.0 / power(input, -exponent)
    if exponent == 0.5:
        return torch.sqrt(input)
    if exponent == 1:
        return input
    return torch.square(input) if exponent == 2 else torch.square(input) * input


def takes_power(input: Any, exponent: Any) -> bool:
    """Whether it is 1, 2, 3, a square root, or one over these."""
    return isinstance(input, Tensor) and not isinstance(exponent, Tensor) and abs(exponent) in (0.5, 1, 2, 3)


def rsqrt(input: Tensor) -> Tensor:
    """``torch.rsqrt``."""
    return 1.0 / torch.sqrt(input)


def reciprocal(input: Tensor) -> Tensor:
    """``torch.reciprocal``."""
    return 1.0 / input


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """``F.silu``."""
    return input * torch.sigmoid(input)


def mish(input: Tensor, inplace: bool = False) -> Tensor:
    """``F.mish``."""
    return input * torch.tanh(F.softplus(input))


def glu(input: Tensor, dim: int = -1) -> Tensor:
    """``F.glu``."""
    value, gate = input.chunk(2, dim)
    return value * torch.sigmoid(gate)


def norm(
    input: Tensor, p: Any = "fro", dim: Any = None, keepdim: bool = False, dtype: Any = None, out: Any = None
) -> Tensor:
    """``torch.norm`` for p = 2."""
    axes = tuple(range(input.dim())) if dim is None else dim
    return torch.sqrt((input * input).sum(axes, keepdim=keepdim))


def takes_norm(
    input: Tensor, p: Any = "fro", dim: Any = None, keepdim: bool = False, dtype: Any = None, out: Any = None
) -> bool:
    """Whether it is the Euclidean length."""
    return p in ("fro", 2, None) and dtype is None


def vector_norm(
    input: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None, out: Any = None
) -> Tensor:
    """``torch.linalg.vector_norm`` for the Euclidean length."""
    return norm(input, ord, dim, keepdim)


def takes_vector_norm(
    input: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None, out: Any = None
) -> bool:
    """Whether it is the Euclidean length."""
    return ord == 2 and dtype is None


def normalize(input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Any = None) -> Tensor:
    """``F.normalize`` for p = 2."""
    length = torch.sqrt((input * input).sum(dim, keepdim=True))
    return input / length.clamp(min=eps)


def takes_normalize(input: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: Any = None) -> bool:
    """Whether it is the Euclidean length."""
    return p == 2 and out is None


def stack(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """``torch.stack``."""
    dim = dim if dim >= 0 else dim + tensors[0].dim() + 1
    return torch.cat([tensor.unsqueeze(dim) for tensor in tensors], dim)


def addcmul(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    """``torch.addcmul``."""
    product = tensor1 * tensor2
    return input + (product if value == 1 else product * value)


def addcdiv(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    """``torch.addcdiv``."""
    ratio = tensor1 / tensor2
    return input + (ratio if value == 1 else ratio * value)


def lerp(input: Tensor, end: Tensor, weight: Any) -> Tensor:
    """``torch.lerp``."""
    return input + (end - input) * weight


def addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """``torch.addmm`` as a linear layer."""
    return F.linear(mat1, mat2.transpose(0, 1), input)


def takes_addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> bool:
    """Whether it is a linear layer's sum: a bias for each column, nothing scaled."""
    return beta == 1 and alpha == 1 and input.dim() == 1


def baddbmm(input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """``torch.baddbmm``."""
    product = torch.matmul(batch1, batch2)
    product = product if alpha == 1 else product * alpha
    return product if beta == 0 else product + (input if beta == 1 else input * beta)


def masked_fill(input: Tensor, mask: Tensor, value: Any) -> Tensor:
    """``Tensor.masked_fill`` as a choice between two values, the lowest of which a range can hold."""
    return torch.where(mask, torch.full((), max(float(value), MASKED), dtype=input.dtype, device=input.device), input)


def takes_masked_fill(input: Tensor, mask: Tensor, value: Any) -> bool:
    """Whether what is filled in is minus infinity, or the most negative number in its stead."""
    return not isinstance(value, Tensor) and float(value) < -1e4


def diff(
    input: Tensor, n: int = 1, dim: int = -1, prepend: Tensor | None = None, append: Tensor | None = None
) -> Tensor:
    """``torch.diff``, which ONNX does not have."""
    parts = [part for part in (prepend, input, append) if part is not None]
    x = torch.cat(parts, dim) if len(parts) > 1 else input
    for _ in range(n):
        x = x.narrow(dim, 1, x.shape[dim] - 1) - x.narrow(dim, 0, x.shape[dim] - 1)
    return x


def einsum(equation: str, *operands: Any) -> Tensor:
    """``torch.einsum`` of two tensors as a matrix product between changes of the axes."""
    left, right = operands[0] if len(operands) == 1 else operands
    (of_left, of_right), output = _letters(equation)
    left, of_left = _summed(left, of_left, of_right + output)
    right, of_right = _summed(right, of_right, of_left + output)
    batch = [one for one in of_left if one in of_right and one in output]
    shared = [one for one in of_left if one in of_right and one not in output]
    rows = [one for one in of_left if one not in of_right]
    columns = [one for one in of_right if one not in of_left]
    sizes = dict(zip(of_left, left.shape, strict=True)) | dict(zip(of_right, right.shape, strict=True))
    left = _grouped(left, of_left, batch, rows, shared, sizes)
    right = _grouped(right, of_right, batch, shared, columns, sizes)
    product = torch.matmul(left, right).reshape([sizes[one] for one in (*batch, *rows, *columns)])
    order = [(*batch, *rows, *columns).index(one) for one in output]
    return product if order == sorted(order) else product.permute(order)


def takes_einsum(equation: Any, *operands: Any) -> bool:
    """Whether it is a product of two tensors without ellipses, diagonals or letters that the output makes up."""
    tensors = operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    if not isinstance(equation, str) or "." in equation or len(tensors) != 2 or equation.count(",") != 1:
        return False
    (left, right), output = _letters(equation)
    return all(len(set(letters)) == len(letters) for letters in (left, right, output)) and set(output) <= set(
        left + right
    )


def _letters(equation: str) -> tuple[list[str], str]:
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    if not arrow:
        output = "".join(sorted(one for one in set(inputs) - {","} if inputs.count(one) == 1))
    return inputs.split(","), output


def _summed(tensor: Tensor, letters: str, needed: str) -> tuple[Tensor, str]:
    gone = [index for index, one in enumerate(letters) if one not in needed]
    return (tensor.sum(gone) if gone else tensor), "".join(one for one in letters if one in needed)


def _grouped(
    tensor: Tensor, letters: str, batch: list[str], first: list[str], second: list[str], sizes: dict[str, int]
) -> Tensor:
    """As (batch…, first, second), the last two of them flattened."""
    order = [letters.index(one) for one in (*batch, *first, *second)]
    tensor = tensor if order == sorted(order) else tensor.permute(order)
    ends = [math.prod(sizes[one] for one in part) for part in (first, second)]
    return tensor.reshape([*(sizes[one] for one in batch), *ends])


# name of the function → what computes it, and whether it can for given arguments
APART: dict[str, tuple[Callable[..., Any], Callable[..., bool] | None]] = {
    "scaled_dot_product_attention": (attention, None),
    "multi_head_attention_forward": (multi_head_attention, takes_multi_head_attention),
    **{kind: (recurrent(kind), takes_recurrent) for kind in _PARTS},
    **{f"{kind}_cell": (cell(kind), None) for kind in _PARTS},
    "group_norm": (group_norm, None),
    "rms_norm": (rms_norm, None),
    "silu": (silu, None),
    "mish": (mish, None),
    **dict.fromkeys(("pow", "ipow"), (power, takes_power)),
    "rsqrt": (rsqrt, None),
    "reciprocal": (reciprocal, None),
    "glu": (glu, None),
    "normalize": (normalize, takes_normalize),
    "norm": (norm, takes_norm),
    "linalg_vector_norm": (vector_norm, takes_vector_norm),
    "vector_norm": (vector_norm, takes_vector_norm),
    "stack": (stack, None),
    "addcmul": (addcmul, None),
    "addcdiv": (addcdiv, None),
    "lerp": (lerp, None),
    "addmm": (addmm, takes_addmm),
    "baddbmm": (baddbmm, None),
    "masked_fill": (masked_fill, takes_masked_fill),
    "diff": (diff, None),
    "einsum": (einsum, takes_einsum),
    "interpolate": (resampling.interpolate, resampling.takes_interpolate),
    "fold": (resampling.fold, None),
    "unfold": (resampling.unfold, resampling.takes_unfold),
    "setitem": (written_parts.set_item, written_parts.takes_set_item),
    "index_put": (written_parts.index_put, written_parts.takes_index_put),
    "index_copy": (written_parts.index_copy, written_parts.takes_index),
    "index_fill": (written_parts.index_fill, written_parts.takes_index),
    "scatter": (written_parts.scatter, written_parts.takes_scatter),
}
# Those that compute step after step with the same layer: one range for each tensor over all steps.
STEPPING = frozenset(_PARTS)


def _cumsum(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return torch.cumsum(input.long() if input.dtype == torch.bool else input, *args, **kwargs)


def _clamp(input: Tensor, min: Any = None, max: Any = None, **kwargs: Any) -> Tensor:
    """With one limit: AIMET's exporter cannot read a Clip that leaves the other out."""
    if kwargs or (min is None) == (max is None):
        return torch.clamp(input, min, max, **kwargs)
    limit = min if max is None else max
    limit = torch.as_tensor(limit, dtype=torch.result_type(input, limit), device=input.device)
    return torch.maximum(input, limit) if max is None else torch.minimum(input, limit)


# of positions and masks, which nothing rounds
IN_TRACES |= {torch.diff: diff, torch.cumsum: _cumsum, Tensor.cumsum: _cumsum}
IN_TRACES |= {torch.clamp: _clamp, Tensor.clamp: _clamp}
# of positions that are learned
IN_TRACES |= {F.interpolate: resampling.interpolate}
