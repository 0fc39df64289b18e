"""Layers that the NPU computes wrongly or not at all, lowered to ones that it takes and that compute the same."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_quant.simulation import aimet
from lightning_quant.simulation.batch_norms import WEIGHT_BITS, ends_on_device, output_factors, sums
from lightning_quant.simulation.callsites.attributes import DEPTHWISE, GATES, ROUNDED_BY
from lightning_quant.simulation.callsites.passes import paused

# All taps but the one in the middle are 0. With a single one, the NPU's compiler of QAIRT 2.51 ends its process at
# W4A16 and refuses 8-bit activations on chips before SM8550.
_TAPS = 3
# The smallest block of a mean that is wrong; compiled with QAIRT 2.51, as are those of 6, 8, 10, 12, 16 and 8 by 4.
_MISCOMPUTED = 4
# The only block of a maximum that is, with 8-bit activations: neither others up to 16, nor these where they overlap.
_MISCOMPUTED_MAXIMUM = [8, 8]
# Feature maps lie in the NPU's memory in tiles: what is parted at their border is not moved within them.
_ROWS_OF_A_TILE = 8
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
# Attributes of any module, its hooks among them.
_EVERY_MODULE = vars(nn.Module()).keys() - {"_parameters", "_buffers", "_modules"}
_CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@contextmanager
def lowered(network: nn.Module) -> Iterator[None]:
    """Lower layers of a simulation for the length of a block: what is exported is what the NPU takes.

    - A batch norm that no layer took in is a depthwise convolution. Its own file would be a batch norm with one 8-bit
      scale for the factors of all channels and 8 bits for what is added, as ONNX Runtime's QNN provider has it
      (``batch_norm_op_builder.cc``), and the NPU computes something else with 4-bit weights and for vectors.
    - A depthwise convolution with one tap has three along each axis.
    - A transposed convolution in groups, refused or with a bias wrong, is one without groups whose other weights are 0.
    - Weights of fewer than 8 bits are stored in 8, on the same grid, where the compiler of QAIRT 2.51 refuses them
      otherwise: in convolutions of three dimensions, and of two dimensions to one channel, with a bias.
    - A weight that is the largest of its channel and the integer 1 (``F.unfold``, identities) is a greater one on a
      finer grid: with 16-bit activations, products with 1 lose the low byte.
    - A mean over blocks of an even height and width of 4 or more, which the NPU gets wrong where the blocks do not
      overlap, is one over blocks that do, of which every second is taken.
    - A maximum over blocks of 8 by 8 that do not overlap is the maximum along the height, then along the width.
    - A 16-bit sigmoid of a feature map that is multiplied with its own input (SiLU) is cut in two and joined again.
      Otherwise the compiler of QAIRT 2.51 makes one operation of both, most of whose values are wrong in maps of 9 to
      12 rows, of more rows and up to 8 columns, and in some of fewer. SiLU of 8 bits is right.
    - A 16-bit softplus of a feature map, wrong in the same maps, is one of rows and columns along one axis, and so is a
      16-bit tanh whose output is multiplied: of 16 by 16 values in one channel most are wrong otherwise.
    - An instance norm without weights, which the NPU computes in float, has ones and zeros.

    Args:
        network: the simulation, on the CPU in eval mode; its layers stay the objects they are. Those at call sites are
            lowered in a block of ``weights_attached``.
    """
    with ExitStack() as restored:
        layer: Any
        for layer in network.modules():
            if "_takes_weights" in vars(layer) and "weight" not in layer._parameters:
                continue  # at a call site, without the weights that it is passed
            if isinstance(layer, _BatchNorm) and DEPTHWISE in vars(layer):
                restored.enter_context(_being(layer, _of_norm(layer)))
            elif isinstance(layer, nn.modules.conv._ConvNd) and isinstance(layer, aimet.BaseQuantizationMixin):
                if _has_a_single_tap(layer):
                    restored.enter_context(_being(layer, _of_single_tap(layer)))
                elif _is_transposed_in_groups(layer):
                    restored.enter_context(_being(layer, _of_transposed_groups(layer)))
                elif _is_refused_in_few_bits(layer):
                    restored.enter_context(_stored_in_8_bits(layer))
                elif (finer := _finer_than_one(layer)) is not None:
                    restored.enter_context(_on_grid(layer, finer))
            elif isinstance(layer, _INSTANCE_NORMS) and isinstance(layer, aimet.BaseQuantizationMixin):
                if layer.weight is None and not layer.track_running_stats:
                    restored.enter_context(_being(layer, _with_ones(layer)))
            elif isinstance(layer, nn.Sigmoid) and GATES in vars(layer):
                restored.enter_context(_being(layer, _of_16_bits(layer, 4, _in_two)))
            elif isinstance(layer, nn.Softplus) or (isinstance(layer, nn.Tanh) and GATES in vars(layer)):
                if vars(layer).get(ROUNDED_BY) is not None:
                    restored.enter_context(_being(layer, _of_16_bits(layer, 3, _along_one_axis)))
            elif isinstance(layer, aimet.BaseQuantizationMixin) and (pooling := _pooling(layer)):
                restored.enter_context(_being(layer, _deciding(layer, *pooling)))
        yield


def _of_norm(norm: Any) -> nn.Module:
    """Return the convolution that a batch norm in eval mode is."""
    factors = output_factors(norm).detach()
    axes, channels = vars(norm)[DEPTHWISE], factors.numel()
    plain = _CONVOLUTIONS[max(axes, 1)](channels, channels, _TAPS, padding=_TAPS // 2, groups=channels)
    plain.bias = nn.Parameter(sums(norm).detach(), requires_grad=False)
    return _rounding_like(norm, plain, factors) if axes else _of_vectors(norm, _rounding_like(norm, plain, factors))


def _of_vectors(norm: Any, made: Any) -> nn.Module:
    """Let a convolution take vectors, side by side as one sequence that is rounded like them."""
    of_input, of_output = vars(norm).get(ROUNDED_BY), made.output_quantizers[0]
    kind = type(made)

    def forward(self: Any, features: Tensor) -> Any:
        with paused():
            sequence = features.T.unsqueeze(0)
            outputs = kind.forward(self, sequence if of_input is None else of_input(sequence)).squeeze(0).T
            return outputs if of_output is None else of_output(outputs)

    made.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    return made


def _has_a_single_tap(layer: Any) -> bool:
    """Return whether a layer is a convolution whose output channels have a weight, and a range, each."""
    if layer.transposed or len(layer.kernel_size) > 2 or layer.groups != layer.in_channels:
        return False
    quantizer: Any = layer.param_quantizers["weight"]
    is_padded_with_zeros = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    is_single = is_padded_with_zeros and set(layer.kernel_size) == {1}
    return is_single and quantizer is not None and math.prod(quantizer.shape) == layer.out_channels > 1


def _of_single_tap(layer: Any) -> nn.Module:
    """Return the convolution with zeros around the tap, which has its rounded weights and biases."""
    from lightning_quant.simulation.fast.biases import rounded_bias  # imports AIMET

    factory = _CONVOLUTIONS[len(layer.kernel_size)]
    plain = factory(
        layer.in_channels, layer.out_channels, _TAPS, layer.stride, [size + _TAPS // 2 for size in layer.padding],
        groups=layer.groups, bias=False,
    )  # fmt: skip
    bias = rounded_bias(layer)
    plain.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    rounded = layer.param_quantizers["weight"](layer.weight).detach()
    return _rounding_like(layer, plain, rounded.as_subclass(Tensor))


def _is_transposed_in_groups(layer: Any) -> bool:
    if not layer.transposed or layer.groups == 1 or layer.param_quantizers["weight"] is None:
        return False
    return len(layer.kernel_size) < 3 and (layer.bias is not None or layer.groups < layer.in_channels)


def _of_transposed_groups(layer: Any) -> nn.Module:
    """Return the convolution without groups, which has its rounded weights and biases."""
    from lightning_quant.simulation.fast.biases import rounded_bias  # imports AIMET

    factory = (nn.ConvTranspose1d, nn.ConvTranspose2d)[len(layer.kernel_size) - 1]
    plain: Any = factory(
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.output_padding,
        bias=False, dilation=layer.dilation,
    )  # fmt: skip
    bias, quantizer = rounded_bias(layer), layer.param_quantizers["weight"]
    plain.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    blocks = quantizer(layer.weight).detach().as_subclass(Tensor).chunk(layer.groups)
    own, padded = blocks[0].shape[1], []
    for index, block in enumerate(blocks):
        padded.append(F.pad(block.movedim(1, -1), (own * index, own * (layer.groups - 1 - index))))
    plain.weight = nn.Parameter(torch.cat(padded).movedim(-1, 1), requires_grad=False)
    made: Any = aimet.QuantizationMixin.from_module(plain)
    axes = [1] * len(layer.kernel_size)
    scale = quantizer.get_scale().detach().expand(1, own, *axes).repeat(1, layer.groups, *axes)
    made.param_quantizers["weight"] = _symmetric(scale, quantizer.bitwidth)
    return _rounding_as(layer, made)


def _rounding_like(layer: Any, plain: Any, factors: Tensor) -> nn.Module:
    """Return ``plain`` with one weight for each channel, exactly on its grid, and the roundings of ``layer``."""
    factors = factors.reshape(-1, *[1] * (plain.weight.dim() - 1))
    plain.weight = nn.Parameter(F.pad(factors, [_TAPS // 2] * (2 * len(plain.kernel_size))), requires_grad=False)
    made: Any = aimet.QuantizationMixin.from_module(plain)
    quantizer = aimet.QuantizeDequantize(factors.shape, bitwidth=WEIGHT_BITS, symmetric=True)
    quantizer.set_range(*ends_on_device(factors))
    made.param_quantizers["weight"] = quantizer
    return _rounding_as(layer, made)


def _rounding_as(layer: Any, made: Any) -> nn.Module:
    """Return ``made`` with what rounds input and output of ``layer``, in a class that traces see as one layer."""
    from lightning_quant.simulation.fast.short_path import accelerate  # imports AIMET

    made.input_quantizers, made.output_quantizers = layer.input_quantizers, layer.output_quantizers
    result: nn.Module = made.eval()
    accelerate(result)
    return result


def _with_ones(layer: Any) -> nn.Module:
    """Return an instance norm with weights of one and biases of zero."""
    factory = next(kind for kind in _INSTANCE_NORMS if isinstance(layer, kind))
    made: Any = aimet.QuantizationMixin.from_module(factory(layer.num_features, layer.eps, affine=True))
    quantizer = aimet.QuantizeDequantize((), bitwidth=WEIGHT_BITS, symmetric=True)
    quantizer.set_range(*ends_on_device(torch.ones(())))
    made.param_quantizers["weight"] = quantizer
    return _rounding_as(layer, made)


def _pooling(layer: Any) -> tuple[Sequence[str], Callable[..., Any]] | None:
    """Return what says, besides its input, of which blocks a layer takes what, and how that is lowered."""
    if isinstance(layer, nn.AvgPool2d | aimet.custom.AvgPool2d):
        names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
        return names, _means_of_blocks
    if isinstance(layer, nn.AdaptiveAvgPool2d | aimet.custom.AdaptiveAvgPool2d):
        return ("output_size",), _means_of_blocks
    if isinstance(layer, nn.MaxPool2d | aimet.custom.MaxPool2d):
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
        return names, _maxima_of_blocks
    return (("output_size", "return_indices"), _maxima_of_blocks) if isinstance(layer, nn.AdaptiveMaxPool2d) else None


def _deciding(layer: Any, names: Sequence[str], lowered_on: Callable[..., Any]) -> nn.Module:
    """Return a pooling layer that decides by its input how its file computes it."""
    kind = type(layer)

    def forward(self: Any, maps: Tensor, *args: Any, **kwargs: Any) -> Any:
        called = dict(zip(names, args, strict=False)) | kwargs  # of a function; a module holds them
        given = {name: called.get(name, getattr(self, name, None)) for name in names}
        with paused():
            result = lowered_on(self, maps, [int(size) for size in maps.shape[-2:]], given)
        return kind.forward(self, maps, *args, **kwargs) if result is None else result

    made = copy.copy(layer)
    made.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    result: nn.Module = made
    return result


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


def _of_16_bits(layer: Any, axes: int, lowered_on: Callable[..., Tensor]) -> nn.Module:
    """Return an activation function that is lowered where it computes 16-bit tensors of at least so many axes."""
    kind = type(layer)

    def forward(self: Any, maps: Tensor) -> Any:
        rounding = self.output_quantizers[0]
        if maps.dim() < axes or rounding is None or rounding.bitwidth != 16:
            return kind.forward(self, maps)
        with paused():
            return lowered_on(self, kind.forward, maps, rounding)

    made = copy.copy(layer)
    made.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    changed: nn.Module = made
    return changed


def _in_two(function: Any, compute: Callable[..., Tensor], maps: Tensor, rounding: Any) -> Tensor:
    result, sizes = compute(function, maps), [int(size) for size in maps.shape]
    axis = max((-2, -1, -3), key=lambda axis: sizes[axis] > 1)  # of one value alone there is nothing to part
    half = sizes[axis] // 2
    if half > _ROWS_OF_A_TILE:
        half -= half % _ROWS_OF_A_TILE
    if half == 0:
        return result
    parts = result.narrow(axis, 0, half), result.narrow(axis, half, sizes[axis] - half)
    joined: Tensor = rounding(torch.cat([rounding(part) for part in parts], axis))  # all on one grid
    return joined


def _along_one_axis(function: Any, compute: Callable[..., Tensor], maps: Tensor, rounding: Any) -> Tensor:
    of_input = vars(function)[ROUNDED_BY]
    moved: Tensor = rounding(compute(function, of_input(maps.flatten(-2))).reshape(maps.shape))
    return moved


def _is_refused_in_few_bits(layer: Any) -> bool:
    quantizer: Any = layer.param_quantizers["weight"]
    if quantizer is None or quantizer.bitwidth >= WEIGHT_BITS:
        return False
    dimensions = len(layer.kernel_size)
    return dimensions == 3 or (dimensions == 2 and layer.out_channels == 1 and layer.bias is not None)


def _symmetric(scale: Tensor, bits: int) -> Any:
    """Return a quantizer of weights with these scales."""
    made = aimet.QuantizeDequantize(scale.shape, bitwidth=bits, symmetric=True)
    made.set_range(-scale * 2 ** (bits - 1), scale * (2 ** (bits - 1) - 1))
    return made


def _stored_in_8_bits(layer: Any) -> AbstractContextManager[None]:
    """Give a layer its rounded weights, and the same steps in more bits."""
    return _on_grid(layer, _symmetric(layer.param_quantizers["weight"].get_scale().detach(), WEIGHT_BITS))


def _finer_than_one(layer: Any) -> Any:
    """Return a grid on which no channel's largest weight is the integer 1; ``None`` where that does not matter."""
    quantizer, of_input = layer.param_quantizers["weight"], vars(layer).get(ROUNDED_BY)
    if quantizer is None or of_input is None or of_input.bitwidth != 16 or not quantizer.symmetric:
        return None
    scale = quantizer.get_scale().detach()
    integers = (layer.weight.detach().as_subclass(Tensor) / scale).round().abs()
    if integers.dim() != scale.dim():  # one for all channels
        return None
    axes = [axis for axis, size in enumerate(scale.shape) if size == 1]
    is_one = integers.amax(axes, keepdim=True) == 1
    return (
        _symmetric(torch.where(is_one, scale / 2 ** (quantizer.bitwidth - 2), scale), quantizer.bitwidth)
        if is_one.any()
        else None
    )


@contextmanager
def _on_grid(layer: Any, grid: Any) -> Iterator[None]:
    """Give a layer its rounded weights and bias, and another grid that has them all."""
    from lightning_quant.simulation.fast.biases import rounded_bias  # imports AIMET

    quantizer, before = layer.param_quantizers["weight"], dict(layer._parameters)
    rounded = {"weight": quantizer(layer.weight), "bias": rounded_bias(layer)}
    for name, value in rounded.items():
        if value is not None:
            layer._parameters[name] = nn.Parameter(value.detach().as_subclass(Tensor), requires_grad=False)
    layer.param_quantizers["weight"] = grid
    try:
        yield
    finally:
        layer._parameters.update(before)
        layer.param_quantizers["weight"] = quantizer


@contextmanager
def _being(layer: nn.Module, other: nn.Module) -> Iterator[None]:
    """Let a layer be another one, for all that hold it; hooks and what a call site keeps on it stay."""
    kind, values = type(layer), dict(vars(layer))
    layer.__class__ = type(other)
    vars(layer).update({name: value for name, value in vars(other).items() if name not in _EVERY_MODULE})
    try:
        yield
    finally:
        layer.__class__ = kind
        vars(layer).clear()
        vars(layer).update(values)
