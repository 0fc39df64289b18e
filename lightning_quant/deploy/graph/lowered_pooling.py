"""Poolings whose blocks the NPU's compiler gets wrong, lowered to ones that it gets right."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_quant.simulation import aimet
from lightning_quant.simulation.callsites.passes import paused

# The smallest block of a mean that is wrong; compiled with QAIRT 2.51, as are those of 6, 8, 10, 12, 16 and 8 by 4.
_MISCOMPUTED = 4
# The only block of a maximum that is, with 8-bit activations: neither others up to 16, nor these where they overlap.
_MISCOMPUTED_MAXIMUM = [8, 8]


def lowered_pooling(layer: Any) -> nn.Module | None:
    """Return a pooling layer as one that decides by its input how its file computes it; ``None`` for other layers."""
    if (pooling := _arguments_and_way(layer)) is None:
        return None
    names, lowered_on = pooling
    kind = type(layer)

    def forward(self: Any, maps: Tensor, *args: Any, **kwargs: Any) -> Any:
        called = dict(zip(names, args, strict=False)) | kwargs  # of a function; a module holds them
        given = {name: called.get(name, getattr(self, name, None)) for name in names}
        with paused():
            result = lowered_on(self, maps, [int(size) for size in maps.shape[-2:]], given)
        return kind.forward(self, maps, *args, **kwargs) if result is None else result

    made: nn.Module = copy.copy(layer)
    made.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    return made


def _arguments_and_way(layer: Any) -> tuple[Sequence[str], Callable[..., Any]] | None:
    """Return the names of what a pooling layer takes besides its input, and what lowers it."""
    if isinstance(layer, nn.AvgPool2d | aimet.custom.AvgPool2d):
        names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
        return names, _means_of_blocks
    if isinstance(layer, nn.AdaptiveAvgPool2d | aimet.custom.AdaptiveAvgPool2d):
        return ("output_size",), _means_of_blocks
    if isinstance(layer, nn.MaxPool2d | aimet.custom.MaxPool2d):
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
        return names, _maxima_of_blocks
    return (("output_size", "return_indices"), _maxima_of_blocks) if isinstance(layer, nn.AdaptiveMaxPool2d) else None


def _means_of_blocks(layer: Any, maps: Tensor, sizes: Sequence[int], given: dict[str, Any]) -> Any:
    block = [] if given.get("ceil_mode") or given.get("divisor_override") is not None else _block(sizes, given)
    if not block or not all(size >= _MISCOMPUTED and size % 2 == 0 for size in block):
        return None
    (height, width), of_output = block, layer.output_quantizers[0]
    if of_output is None:
        return None
    padding, counted = given.get("padding") or 0, given.get("count_include_pad") is not False
    pool: Any = aimet.QuantizationMixin.from_module(
        nn.AvgPool2d((height, width), (height // 2, width // 2), padding, False, counted)
    )
    pool.input_quantizers, pool.output_quantizers = layer.input_quantizers, layer.output_quantizers
    means = pool(maps)
    for every_second in ((..., slice(None, None, 2), slice(None)), (..., slice(None, None, 2))):
        means = of_output(means[every_second])  # on the same grid
    return means


def _maxima_of_blocks(layer: Any, maps: Tensor, sizes: Sequence[int], given: dict[str, Any]) -> Any:
    is_plain = not given["return_indices"] and list(_pair(given.get("dilation") or 1)) == [1, 1]
    if not is_plain or _block(sizes, given) != _MISCOMPUTED_MAXIMUM:
        return None
    padding, rounds_up = _pair(given.get("padding") or 0), bool(given.get("ceil_mode"))
    (height, width), modules = _MISCOMPUTED_MAXIMUM, []
    for block, around in (((height, 1), (padding[0], 0)), ((1, width), (0, padding[1]))):
        modules.append(aimet.QuantizationMixin.from_module(nn.MaxPool2d(block, None, around, ceil_mode=rounds_up)))
    along_height, along_width = modules
    along_height.input_quantizers, along_width.output_quantizers = layer.input_quantizers, layer.output_quantizers
    return along_width(along_height(maps))


def _block(sizes: Sequence[int], given: dict[str, Any]) -> list[int]:
    """Return height and width of the blocks of a pooling layer; nothing if they overlap or there is one alone."""
    if (kernel_size := given.get("kernel_size")) is None:
        given_sizes = _pair(given["output_size"])
        counts = [size if count is None else int(count) for size, count in zip(sizes, given_sizes, strict=True)]
        block = [size // count for size, count in zip(sizes, counts, strict=True)]
        exact = [size * count for size, count in zip(block, counts, strict=True)] == list(sizes)
    else:
        block = [int(size) for size in _pair(kernel_size)]
        stride = given.get("stride")
        exact = stride is None or stride == [] or [int(size) for size in _pair(stride)] == block
    is_alone = block == list(sizes) and not any(_pair(given.get("padding") or 0))
    return block if exact and not is_alone else []


def _pair(sizes: Any) -> Sequence[Any]:
    return (sizes, sizes) if not isinstance(sizes, Sequence) else sizes if len(sizes) == 2 else (*sizes, *sizes)
