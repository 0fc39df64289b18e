"""Values written into a part of a tensor: as a concatenation, of which the parts are picked by their places.

``y[:, 2:] = z`` leaves values of two origins in one tensor. The NPU computes ONNX's ScatterND in float, and
ScatterElements with wrong numbers where the two are of different grids; a concatenation brings both to one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_quant.simulation.callsites.traces import untraced

_WHOLE = slice(None)
# Of a tensor that holds one number: the number.
FILLED_WITH = "_filled_with"


def set_item(tensor: Tensor, index: Any, value: Any) -> Tensor:
    """Compute ``tensor[index] = value``, out of place."""
    if (mask := _mask_of(index, tensor)) is not None:
        return _masked(tensor, mask, value)
    key = per_axis(index, tensor.dim())
    is_number = not isinstance(value, Tensor)
    if is_number:
        value = tensor.new_full((), value)
    value = value.to(tensor.dtype)
    spans = [_span(part, size) for part, size in zip(key, tensor.shape, strict=True)]
    # a part cut off at the left, and a number in its place, is wrong on the NPU in front of a convolution or pooling
    if is_number and spans[-1] is not None and spans[-1][0] == 0 and spans[-1][1] < tensor.shape[-1]:
        return _masked(tensor, _places(tensor, key), value)
    if all(span is not None for span in spans):
        shape = [stop - start for start, stop in spans]  # type: ignore[misc]
        kept = [size for size, part in zip(shape, key, strict=True) if not isinstance(part, int)]
        return _between(tensor, spans, _shaped(_shaped(value, kept), shape))
    first = next(axis for axis, part in enumerate(key) if not _is_whole(part))
    last = next(axis for axis, part in reversed(list(enumerate(key))) if not _is_whole(part))
    before, written, behind = tensor.shape[:first], tensor.shape[first : last + 1], tensor.shape[last + 1 :]
    size = math.prod(written)
    taken = torch.arange(size, device=tensor.device).reshape(written)[tuple(key[first : last + 1])]
    count = taken.numel()
    value = _shaped(_shaped(value, [*before, *taken.shape, *behind]), [*before, count, *behind])
    places = torch.arange(size, device=tensor.device)
    places[taken.flatten()] = size + torch.arange(count, device=tensor.device)
    return _shaped(_picked(_shaped(tensor, [*before, size, *behind]), value, places, first), tensor.shape)


def box_of(index: Any, tensor: Tensor) -> tuple[slice, ...] | None:
    """Return the block of a tensor that an index stands for; ``None`` if it is none."""
    if _mask_of(index, tensor) is not None or not _is_fixed(index, tensor):
        return None
    spans = [_span(part, int(size)) for part, size in zip(per_axis(index, tensor.dim()), tensor.shape, strict=True)]
    return None if None in spans else tuple(slice(*span) for span in spans if span is not None)


def _places(tensor: Tensor, key: Sequence[Any]) -> Tensor:
    """Return a mask that is true where an index with one part for each axis leads, to spread over the tensor."""
    lengths = [int(size) for size in tensor.shape]
    is_whole = [_span(part, size) == (0, size) for part, size in zip(key, lengths, strict=True)]
    sizes = [1 if whole else size for whole, size in zip(is_whole, lengths, strict=True)]
    parts = [_WHOLE if whole else part for whole, part in zip(is_whole, key, strict=True)]
    with untraced():
        places = torch.arange(math.prod(sizes), device=tensor.device).reshape(sizes)
        return torch.isin(places, places[tuple(parts)].clone())


def _between(tensor: Tensor, spans: Sequence[Any], value: Tensor, axis: int = 0) -> Tensor:
    """Return a tensor with a value in the middle: a concatenation along each axis from ``axis`` on."""
    while axis < tensor.dim() and spans[axis] == (0, tensor.shape[axis]):
        axis += 1
    if axis == tensor.dim():
        return value.clone()
    start, stop = spans[axis]
    parts = [
        tensor.narrow(axis, 0, start),
        _between(tensor.narrow(axis, start, stop - start), spans, value, axis + 1),
        tensor.narrow(axis, stop, tensor.shape[axis] - stop),
    ]
    return torch.cat([part for part in parts if part.shape[axis]], axis)


def _picked(tensor: Tensor, value: Tensor, places: Tensor, axis: int) -> Tensor:
    """Return rows of two tensors by index, those of the second numbered after those of the first.

    The NPU's compiler reads zeros for the last row of a tensor, and other values than the right ones from 257 columns
    but not from 264: unused ones are appended, up to a multiple of eight.
    """
    missing = 8 - (tensor.shape[axis] + value.shape[axis]) % 8
    unused = tensor.narrow(axis, 0, min(missing, tensor.shape[axis]))
    return torch.cat([tensor, value, unused], axis).index_select(axis, places)


def supports_set_item(tensor: Tensor, index: Any, value: Any) -> bool:
    """Return whether the places do not depend on values, or one value goes where a mask of truth values has it."""
    if _mask_of(index, tensor) is not None:
        is_one = not isinstance(value, Tensor) or (value.numel() == 1 and value.is_floating_point())
        return is_one and tensor.is_floating_point()
    return _is_fixed(index, tensor) and _is_written(value, tensor)


def _mask_of(index: Any, tensor: Tensor) -> Tensor | None:
    """Return the only mask in an index, shaped to spread over the tensor; ``None`` if there are other places in it."""
    parts = index if isinstance(index, tuple) else (index,)
    at = next((place for place, part in enumerate(parts) if _is_truth_values(part)), None)
    if at is None or any(part is not ... and not _is_whole(part) for part in (*parts[:at], *parts[at + 1 :])):
        return None
    mask: Tensor = parts[at]
    before = at if ... not in parts[:at] else tensor.dim() - mask.dim() - (len(parts) - at - 1)
    return mask.reshape(*[1] * before, *mask.shape, *[1] * (tensor.dim() - before - mask.dim()))


def _masked(tensor: Tensor, mask: Tensor, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return torch.where(mask, value.reshape(()), tensor)
    return tensor.masked_fill(mask, value)


def copied(tensor: Tensor, source: Tensor, *_: Any) -> Tensor:
    """Compute ``tensor.copy_(source)``, out of place."""
    return source.to(tensor.dtype).expand_as(tensor).clone()


def filled(tensor: Tensor, value: Any = 0) -> Tensor:
    """Compute ``tensor.fill_(value)`` or ``tensor.zero_()``, out of place."""
    if isinstance(value, Tensor):
        return copied(tensor, value)
    made = torch.full_like(tensor, value)
    made.__dict__[FILLED_WITH] = value
    return made


def empty(*size: Any, memory_format: Any = None, **kwargs: Any) -> Tensor:
    """Compute ``torch.empty``, with zeros."""
    return torch.zeros(*size, **kwargs)


def index_put(tensor: Tensor, indices: Any, values: Tensor, accumulate: bool = False) -> Tensor:
    """Compute ``torch.index_put``."""
    return set_item(tensor, tuple(indices), values)


def supports_index_put(tensor: Tensor, indices: Any, values: Tensor, accumulate: bool = False) -> bool:
    """Return whether values are written, not added, and the places do not depend on values."""
    return not accumulate and _is_fixed(tuple(indices), tensor) and _is_written(values, tensor)


def index_copy(tensor: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """Compute ``torch.index_copy``."""
    return set_item(tensor, (*[_WHOLE] * (dim % tensor.dim()), index), source)


def index_fill(tensor: Tensor, dim: int, index: Tensor, value: Any) -> Tensor:
    """Compute ``torch.index_fill``."""
    return index_copy(tensor, dim, index, value)


def supports_index(tensor: Tensor, dim: int, index: Tensor, source: Any) -> bool:
    """Return whether it writes finite floating-point values."""
    return _is_written(source, tensor)


def scatter(tensor: Tensor, dim: int, index: Tensor, src: Any = None, *, value: Any = None) -> Tensor:
    """Compute ``torch.scatter``."""
    source = value if src is None else src
    if not isinstance(source, Tensor):
        source = tensor.new_full((), source).expand(index.shape)
    source = source[tuple(slice(size) for size in index.shape)]
    places = torch.arange(tensor.numel(), device=tensor.device)
    written = len(places) + torch.arange(index.numel(), device=tensor.device)
    places = places.reshape(tensor.shape).scatter(dim, index, written.reshape(index.shape))
    flat = _picked(tensor.reshape(-1), source.to(tensor.dtype).reshape(-1), places.reshape(-1), 0)
    return _shaped(flat, tensor.shape)


def supports_scatter(tensor: Tensor, dim: int, index: Tensor, src: Any = None, **kwargs: Any) -> bool:
    """Return whether values are written, not added or multiplied."""
    source = kwargs.get("value") if src is None else src
    return not kwargs.keys() - {"value"} and source is not None and _is_written(source, tensor)


def _shaped(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a tensor repeated or reshaped to a shape; leading axes of size one may be dropped."""
    if list(tensor.shape) == list(shape):
        return tensor
    if tensor.numel() == math.prod(shape):
        return tensor.reshape(shape)
    return tensor.reshape(tensor.shape[max(tensor.dim() - len(shape), 0) :]).expand(shape)


def _is_written(value: Any, into: Tensor) -> bool:
    if not into.is_floating_point() or not into.dim():
        return False
    return value.is_floating_point() if isinstance(value, Tensor) else math.isfinite(value)


def per_axis(index: Any, axes: int) -> list[Any]:
    """Return an index without an ellipsis: one part for each axis."""
    parts = list(index) if isinstance(index, tuple) else [index]
    at = next((place for place, part in enumerate(parts) if part is ...), len(parts))
    behind = parts[at + 1 :]
    return [*parts[:at], *[_WHOLE] * (axes - at - len(behind)), *behind]


def _span(part: Any, size: int) -> tuple[int, int] | None:
    """Return where a part of an index begins and ends, if it is contiguous."""
    if isinstance(part, int):
        return part % size, part % size + 1
    if not isinstance(part, slice):
        return None
    start, stop, step = part.indices(size)
    return (start, stop) if step == 1 else None


def _is_whole(part: Any) -> bool:
    return isinstance(part, slice) and part.start in (None, 0) and part.stop is None and part.step in (None, 1)


def _is_fixed(index: Any, tensor: Tensor) -> bool:
    """Return whether an index has one part for an axis, numbers all, and lists of them side by side."""
    parts = index if isinstance(index, tuple) else (index,)
    if any(part is None or isinstance(part, bool) or _is_mask(part) for part in parts):
        return False
    key = per_axis(index, tensor.dim())
    listed = [axis for axis, part in enumerate(key) if not isinstance(part, slice)]
    if all(isinstance(key[axis], int) for axis in listed):
        return True
    return listed == list(range(listed[0], listed[-1] + 1))


def _is_truth_values(part: Any) -> bool:
    return isinstance(part, Tensor) and part.dtype == torch.bool and part.dim() > 0


def _is_mask(part: Any) -> bool:
    if isinstance(part, Tensor):
        return part.is_floating_point() or part.dtype in (torch.bool, torch.uint8)
    if isinstance(part, Sequence):
        return any(not isinstance(one, int) or isinstance(one, bool) for one in part)
    return not isinstance(part, (int, slice, type(...)))
