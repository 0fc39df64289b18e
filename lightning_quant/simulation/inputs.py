"""What a network is called with: captured once, kept as an example, described so a checkpoint can hold it.

The simulation needs to run the network before there is any training: to trace it, to check a folded batch
norm and to export it. Networks take any structure of tensors (several arguments, dicts, tuples); everything
here works on that structure as it is, through Lightning's own ``apply_to_collection``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_quant.errors import CheckpointError
from lightning_quant.simulation.batch_axes import Along, Axes, Items, Whole, cut, first_axis, fit, samples_in


def tensors_in(data: Any) -> list[Tensor]:
    """Yield every tensor in a nested structure, in the order ``apply_to_collection`` visits them."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor  # a PackedSequence is made again of what comes back

    apply_to_collection(data, Tensor, note)
    return found


def tensor_names(structure: Any, name: str = "output") -> list[str]:
    """Return a name for every tensor in a nested structure: keys and positions, joined by underscores.

    Args:
        structure: what a network returned; keys at its top stand alone.
        name: of a tensor by itself, and before positions at the top.
    """
    if isinstance(structure, Mapping):
        return [one for key, value in structure.items() for one in _inner_names(value, str(key))]
    return _inner_names(structure, name)


def _inner_names(structure: Any, name: str) -> list[str]:
    if isinstance(structure, Tensor):
        return [name]
    if isinstance(structure, Mapping):
        items = list(structure.items())
    elif isinstance(structure, (list, tuple)):
        items = list(enumerate(structure))
    else:  # a dataclass: whatever tensors_in finds
        items = list(enumerate(tensors_in(structure)))
    return [one for key, value in items for one in _inner_names(value, f"{name}_{key}")]


def with_tensors(structure: Any, tensors: Sequence[Tensor]) -> Any:
    """Return the same structure with its tensors replaced, in order."""
    replacement = iter(tensors)
    return apply_to_collection(structure, Tensor, lambda _: next(replacement))


@dataclass
class NetworkInputs:
    """The arguments of one call of the network.

    Args:
        args: positional arguments, any structure of tensors and plain values.
        kwargs: keyword arguments, likewise.
        axes: where the samples of a batch lie in ``(args, kwargs)``, see :mod:`lightning_quant.simulation.batch_axes`.
            ``None``: along the first axis of the first tensor that has one, and of those that are as long there.
        last: whether the step that made this call made no other after it. The calls of one step are about the same
            samples.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    axes: Axes = None
    last: bool = True

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor of the call, flat and in order."""
        return tensors_in((self.args, self.kwargs))

    @property
    def ranks(self) -> list[int]:
        """Return the number of axes of each tensor."""
        return [tensor.dim() for tensor in self.tensors]

    @property
    def batch_size(self) -> int:
        """Samples in this call."""
        return samples_in((self.args, self.kwargs), self._known_axes)

    @property
    def _known_axes(self) -> Axes:
        return first_axis((self.args, self.kwargs)) if self.axes is None else self.axes

    def map(self, function: Callable[[Tensor], Tensor]) -> NetworkInputs:
        """Return the same call with ``function`` applied to each tensor."""
        args, kwargs = apply_to_collection((self.args, self.kwargs), Tensor, function)
        return replace(self, args=args, kwargs=kwargs)

    def with_tensors(self, tensors: Sequence[Tensor]) -> NetworkInputs:
        """Return the same call with other tensors, in order."""
        args, kwargs = with_tensors((self.args, self.kwargs), tensors)
        return replace(self, args=args, kwargs=kwargs)

    def first(self, samples: int) -> NetworkInputs:
        """Return the same call with only the first ``samples`` samples of every batched tensor."""
        return self.samples(0, samples)

    def samples(self, start: int, stop: int) -> NetworkInputs:
        """Return the same call with only the samples from ``start`` up to ``stop``."""
        args, kwargs = cut((self.args, self.kwargs), self._known_axes, start, stop)
        return replace(self, args=args, kwargs=kwargs)

    def batched_like(self, other: NetworkInputs) -> NetworkInputs:
        """Return this call with the batch axes of another one, if its own are unknown and they fit."""
        known = self.axes is not None or other.axes is None or not fit((self.args, self.kwargs), other.axes)
        return self if known else replace(self, axes=other.axes)

    def has_sizes_of(self, other: NetworkInputs) -> bool:
        """Return whether the tensors have the number, sizes and types of another call's, in the same structure."""
        mine, theirs = (replace(one, axes=None).structure() for one in (self, other))
        return mine == theirs

    def structure(self) -> dict[str, Any]:
        """Return what :meth:`describe` says, without values."""
        found: dict[str, Any] = _without_values(self.describe())
        return found

    def to(self, device: torch.device) -> NetworkInputs:
        """Return the same call with its tensors on ``device``."""
        # a PackedSequence keeps its lengths on the CPU
        moved = apply_to_collection((self.args, self.kwargs), (Tensor, PackedSequence), lambda one: one.to(device))
        return replace(self, args=moved[0], kwargs=moved[1])

    def call(self, network: nn.Module) -> Any:
        """Run ``network`` with copies of these arguments: it may change in place what it is given."""
        own = self.map(torch.clone)
        return network(*own.args, **own.kwargs)

    def describe(self) -> dict[str, Any]:
        """Return structure, shapes, types and known batch axes as JSON values for a checkpoint's manifest."""
        args, kwargs = (_UNKNOWN, _UNKNOWN) if self.axes is None else self.axes
        return {
            "args": [_describe(arg, _inner(args, index)) for index, arg in enumerate(self.args)],
            "kwargs": {name: _describe(value, _inner(kwargs, name)) for name, value in self.kwargs.items()},
        }

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> NetworkInputs:
        """Create inputs of the described structure: standard normal floats, zeros for integers.

        Raises:
            CheckpointError: if the description holds something that cannot be created.
        """
        try:
            budget = [_MAX_ELEMENTS]
            args = tuple(_create(item, budget) for item in description["args"])
            made = cls(args, {name: _create(item, budget) for name, item in description["kwargs"].items()})
            axes = (
                tuple(_axes(item) for item in description["args"]),
                {name: _axes(item) for name, item in description["kwargs"].items()},
            )
            if _UNKNOWN in _leaves(axes):  # written before there were any
                return made
            if not fit((made.args, made.kwargs), axes):
                raise ValueError("batch axes that no tensor has")
            return replace(made, axes=axes)
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError, OverflowError) as error:
            raise CheckpointError(
                f"The checkpoint's manifest describes inputs that cannot be created ({error!r}): expected "
                "tensors, numbers, strings and lists, tuples or dicts of them. Pass example_inputs=... to "
                "load_quantized."
            ) from error


class Passes:
    """Samples that can be run through more than once: each iteration starts another pass.

    Args:
        start: starts a pass over the same calls.
    """

    def __init__(self, start: Callable[[], Iterable[NetworkInputs]]) -> None:
        self._start = start

    def __iter__(self) -> Iterator[NetworkInputs]:
        return iter(self._start())


def take_samples(calls: Iterable[NetworkInputs], count: int) -> Iterator[NetworkInputs]:
    """Yield the calls with the first ``count`` samples, in the batches they come in; all calls of a step."""
    left, used = count, 0
    for call in calls:
        cut = call.first(left)
        used = max(used, cut.batch_size)
        yield cut
        if cut.last:
            left, used = left - used, 0
            if left <= 0:
                return


def counted(calls: Iterable[NetworkInputs]) -> Iterator[tuple[int, NetworkInputs]]:
    """Yield each call with the number of samples that it adds: the calls of one step are about the same ones."""
    used = 0
    for call in calls:
        yield max(call.batch_size - used, 0), call
        used = 0 if call.last else max(used, call.batch_size)


# What a manifest may ask for. Sizes are bounded so that a damaged or hostile file cannot ask for terabytes.
_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_MAX_ELEMENTS = 2**27
_MOST_AXES = 16
# Integers and truth values up to here are kept as they are.
_MOST_VALUES = 4096


_UNKNOWN = "unknown"


def _inner(axes: Axes, key: Any) -> Axes:
    return _UNKNOWN if axes is _UNKNOWN else axes[key] if isinstance(axes, (dict, tuple)) else None


def _without_values(described: Any) -> Any:
    if isinstance(described, list):
        return [_without_values(item) for item in described]
    if isinstance(described, dict):
        left_out = ("values",) if "tensor" in described else ()
        return {name: _without_values(item) for name, item in described.items() if name not in left_out}
    return described


def _describe(value: Any, axes: Axes) -> Any:
    if isinstance(value, Tensor):
        described: dict[str, Any] = {"tensor": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        if not value.is_floating_point() and not value.is_complex() and value.numel() <= _MOST_VALUES:
            described["values"] = value.flatten().tolist()  # masks, lengths and indices: what control flow depends on
        if axes is _UNKNOWN:
            return described
        return {**described, "batch": [axes.axis, axes.each] if isinstance(axes, Along) else None}
    if isinstance(value, Mapping):
        return {"dict": {str(key): _describe(item, _inner(axes, key)) for key, item in value.items()}}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        batch = {"batch": axes.each} if isinstance(axes, Items) else {}
        inner = [
            Whole(item.dim()) if batch and isinstance(item, Tensor) else _inner(axes, i) for i, item in enumerate(value)
        ]
        return {type(value).__name__: [_describe(item, one) for item, one in zip(value, inner, strict=True)], **batch}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    kind = "dataclass" if is_dataclass(value) else "object"
    return {kind: f"{type(value).__module__}.{type(value).__qualname__}"}


def _axes(item: Mapping[str, Any]) -> Axes:
    """Return the batch axes in what :func:`_describe` wrote."""
    (kind, content), *_ = item.items()
    if kind == "tensor":
        if item.get("batch", _UNKNOWN) is None:
            return Whole(len(content))
        if "batch" not in item:
            return _UNKNOWN
        axis, each = item["batch"]
        if not (type(axis) is type(each) is int and 0 <= axis < len(content) and each >= 1):
            raise ValueError(f"samples along {item['batch']!r}")
        return Along(len(content), axis, each)
    if kind == "dict":
        return {key: _axes(value) for key, value in content.items()}
    if kind in ("list", "tuple"):
        if "batch" not in item:
            return tuple(_axes(value) for value in content)
        if not (type(item["batch"]) is int and item["batch"] >= 1):
            raise ValueError(f"{item['batch']!r} entries a sample")
        return Items(item["batch"])
    return None


def _leaves(axes: Axes) -> Iterator[Axes]:
    if isinstance(axes, (dict, tuple)):
        for inner in axes.values() if isinstance(axes, dict) else axes:
            yield from _leaves(inner)
    else:
        yield axes


def _create(item: Mapping[str, Any], budget: list[int]) -> Any:
    (kind, content), *_ = item.items()
    if kind == "tensor":
        shape = [int(size) for size in content]
        elements = 1
        for size in shape[:_MOST_AXES]:
            elements *= size
        if len(shape) > _MOST_AXES:
            raise TypeError(f"a tensor with {len(shape)} axes")
        if item["dtype"] not in _DTYPES or min(shape, default=1) < 0 or elements > budget[0]:
            raise TypeError(f"a tensor of shape {shape} and type {item['dtype']!r}")
        budget[0] -= elements
        dtype = getattr(torch, item["dtype"])
        generator = torch.Generator().manual_seed(0)
        if dtype.is_floating_point:
            return torch.randn(shape, generator=generator).to(dtype)
        values = item.get("values")
        if values is None:
            return torch.zeros(shape, dtype=dtype)
        if not isinstance(values, list) or len(values) != elements or not all(isinstance(v, int) for v in values):
            raise TypeError(f"values of a tensor of shape {shape} that do not fill it")
        return torch.tensor(values, dtype=dtype).reshape(shape)
    if kind == "dict":
        return {key: _create(value, budget) for key, value in content.items()}
    if kind == "list":
        return [_create(value, budget) for value in content]
    if kind == "tuple":
        return tuple(_create(value, budget) for value in content)
    if kind == "value":
        return content
    raise TypeError(f"a {kind} of type {content}")
