"""PyTorch's functions by what they do to values: move them, compute with them, or make a loss of them."""

from __future__ import annotations

import functools
from numbers import Real
from typing import Any

from torch import Tensor

# Functions that keep values as they are: what was rounded before stays rounded.
MOVES = frozenset(
    """
    adjoint alpha_dropout apply argmax argmin as_strided as_subclass atleast_1d atleast_2d atleast_3d bernoulli
    bfloat16 bool broadcast_tensors broadcast_to channel_shuffle chunk clone contiguous copy cpu cuda data
    data_ptr dequantize detach detach_copy diag_embed diagonal dim double dropout dropout1d dropout2d dropout3d
    dsplit empty_like expand expand_as feature_alpha_dropout feature_dropout fill flatten flip fliplr
    flipud float from_numpy full_like gather get get_device getitem half hash hsplit identity index
    index_select is_complex is_contiguous is_floating_point is_same_size
    is_set_to is_shared item iter len mT map masked_select max_unpool1d max_unpool2d max_unpool3d meshgrid
    moveaxis movedim
    nan_to_num narrow native_dropout new_empty new_full new_ones new_tensor new_zeros nonzero normal numel numpy
    numpy_T one_hot ones_like permute pin_memory pixel_shuffle pixel_unshuffle rand_like randn_like ravel
    register_hook repeat repeat_interleave repr requires_grad requires_grad_ reshape reshape_as retain_grad roll
    rot90 select set setitem share_memory size sort split split_with_sizes squeeze squeeze_copy
    storage stride swapaxes swapdims t take take_along_dim tensor_split tile to to_dense tolist topk transpose
    tril triu type type_as unbind unflatten unfold uniform unsafe_chunk unsafe_split unsqueeze untyped_storage
    view view_as vsplit zero zeros_like
    """.split()  # noqa: SIM905
)
# Functions that choose among values, which they take from one tensor.
CHOICES = frozenset(("amax", "amin", "max_pool1d", "max_pool2d", "max_pool3d")) | {
    f"adaptive_max_pool{axes}d" for axes in (1, 2, 3)
}
# Functions that compare values, which nothing rounds behind them.
COMPARISONS = frozenset(
    ("eq", "ge", "greater", "greater_equal", "gt", "le", "less", "less_equal", "lt", "ne", "not_equal")
)
# Losses stay in float: the device computes none.
LOSSES = frozenset(
    """
    binary_cross_entropy binary_cross_entropy_with_logits cosine_embedding_loss cross_entropy ctc_loss
    gaussian_nll_loss hinge_embedding_loss huber_loss kl_div l1_loss margin_ranking_loss mse_loss
    multi_margin_loss multilabel_margin_loss multilabel_soft_margin_loss nll_loss poisson_nll_loss
    smooth_l1_loss soft_margin_loss triplet_margin_loss triplet_margin_with_distance_loss
    """.split()  # noqa: SIM905
)
SHAPES = frozenset(("size", "get", "numel", "dim", "stride", "len"))
# Tensors that are made from the size and type of another, whose values they do not take.
MADE_LIKE = frozenset(
    """
    empty_like full_like new_empty new_full new_ones new_zeros ones_like rand_like randn_like zeros_like
    """.split()  # noqa: SIM905
)
# They take values of their first argument alone; of the second its size or type.
LIKE_ANOTHER = frozenset(("expand_as", "reshape_as", "to", "type_as", "view_as"))
# Where AIMET follows a tensor through.
SEEN_THROUGH = frozenset(
    """
    as_subclass bool clone contiguous cpu cuda data_ptr detach dim double dropout empty_like expand_as flatten float
    full_like get getitem get_device half identity is_complex is_contiguous is_floating_point is_same_size item iter len
    narrow new_empty new_full new_ones new_tensor new_zeros numel numpy ones_like permute rand_like randn_like
    register_hook requires_grad requires_grad_ reshape reshape_as retain_grad select setitem size squeeze stride t to
    tolist transpose type type_as unsqueeze view view_as zeros_like repr hash bfloat16 data fill zero copy apply
    """.split()  # noqa: SIM905
)
# Casts that are an operation where numbers come from integers or truth values.
CASTS = frozenset(("to", "float", "type", "type_as", "double", "half"))
# The number that arithmetic leaves a tensor as it is with: ``sum()`` of a list begins with 0.
_NEUTRAL = {
    **dict.fromkeys(("add", "radd", "sub", "subtract"), 0),
    **dict.fromkeys(("mul", "rmul", "multiply", "div", "truediv", "divide", "true_divide", "pow"), 1),
}
# What ``x += y`` calls, and what computes the same out of place.
AUGMENTED = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div", "ipow": "pow", "imatmul": "matmul"}


@functools.lru_cache(4096)
def base_name(func: Any) -> str:
    """Return the name of a function without underscores, of ``__radd__`` as of ``add_``: radd, add."""
    return str(getattr(func, "__name__", "")).strip("_")


@functools.lru_cache(4096)
def in_place(func: Any, name: str) -> bool:
    """Return whether a function changes its first argument by its very name."""
    own = str(getattr(func, "__name__", ""))
    return (own.endswith("_") and not own.endswith("__")) or name in AUGMENTED or own == "__setitem__"


def kept(name: str, args: Any, kwargs: Any) -> Tensor | None:
    """Return the floating-point tensor that arithmetic with a number leaves as it is; ``None`` where it does not.

    Exporters drop such arithmetic, so nothing is rounded there.
    """
    neutral = _NEUTRAL.get(AUGMENTED.get(name, name))
    if neutral is None:
        return None
    if kwargs:
        given = dict(kwargs)
        if given.pop("rounding_mode", None) is not None:
            return None
        given.pop("alpha", None)  # of a number that is 0
        operands = *args, *(given.pop(one) for one in ("input", "other", "exponent") if one in given)
        if given:
            return None
    else:
        operands = args
    if len(operands) != 2:
        return None
    tensor, number = operands
    is_kept = isinstance(number, Real) and number == neutral and isinstance(tensor, Tensor)
    return tensor if is_kept and tensor.is_floating_point() else None


def computes(name: str, given: list[Tensor], result: Any) -> bool:
    """Return whether a function computed floating-point values that the hardware would round again."""
    if name in MOVES or name in LOSSES or not (isinstance(result, Tensor) and result.is_floating_point()):
        return False
    return any(tensor.is_floating_point() and tensor.dim() for tensor in given)  # without axes: sizes, in a trace


def values_taken(name: str, given: list[Tensor]) -> list[Tensor]:
    """Return the arguments of a function whose values it computes with; of others it takes the size or type."""
    if name in MADE_LIKE:
        return []
    if name == "new_tensor":  # of other values, given behind it
        return given[1:]
    return given[:1] if name in LIKE_ANOTHER else given


def tensors_among(data: Any) -> list[Tensor]:
    """Return the tensors among the arguments of a function, in order."""
    if isinstance(data, Tensor):
        return [data]
    if isinstance(data, (list, tuple)):
        return [tensor for item in data for tensor in tensors_among(item)]
    if isinstance(data, dict):
        return [tensor for item in data.values() for tensor in tensors_among(item)]
    return []
