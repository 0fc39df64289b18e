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

from lightning_quant.deploy.graph.lowered_pooling import lowered_pooling
from lightning_quant.simulation import aimet
from lightning_quant.simulation.batch_norms import WEIGHT_BITS, ends_on_device, output_factors, sums
from lightning_quant.simulation.callsites.attributes import DEPTHWISE, GATES, ROUNDED_BY, SCALED_FROM
from lightning_quant.simulation.callsites.passes import paused

# All taps but the one in the middle are 0. With a single one, the NPU's compiler of QAIRT 2.51 ends its process at
# W4A16 and refuses 8-bit activations on chips before SM8550.
_TAPS = 3
# Depthwise convolutions of blocks of 2 by 2 side by side are wrong up to so many channels.
_FEW_CHANNELS = 4
# From this stride on most depthwise convolutions are refused: of 3 by 3 taps only those of 4 by 4 are not.
_LONG_STRIDE = 4
# Feature maps lie in the NPU's memory in tiles: what is parted at their border is not moved within them.
_ROWS_OF_A_TILE = 8
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
# Attributes of any module, its hooks among them.
_EVERY_MODULE = vars(nn.Module()).keys() - {"_parameters", "_buffers", "_modules"}
_CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@contextmanager
def lowered(network: nn.Module) -> Iterator[None]:
    """Lower layers of a simulation for the length of a block: what is exported is what the NPU takes.

    - A norm with running statistics that no layer took in is a depthwise convolution. Its own file would be a batch
      norm with one 8-bit scale for the factors of all channels and 8 bits for what is added, as ONNX Runtime's QNN
      provider has it (``batch_norm_op_builder.cc``), and the NPU computes something else with 4-bit weights and for
      vectors.
    - A depthwise convolution with one tap has three along each axis.
    - A convolution in groups that is refused or wrong is one without groups whose other weights are 0: most that are
      transposed, and depthwise ones with strides of 4 or more and of blocks of 2 by 2 in up to four channels.
    - Weights of fewer than 8 bits are stored in 8, on the same grid, where the compiler of QAIRT 2.51 refuses them
      otherwise: in convolutions of three dimensions, and of two dimensions to one channel, with a bias.
    - A weight that is the largest of its channel and the integer 1 (``F.unfold``, identities) is a greater one on a
      finer grid: with 16-bit activations, products with 1 lose the low byte.
    - A mean over blocks of an even height and width of 4 or more, which the NPU gets wrong where the blocks do not
      overlap, is one over blocks that do, of which every second is taken.
    - A maximum over blocks of 8 by 8 that do not overlap is the maximum along the height, then along the width.
    - A 16-bit sigmoid of a feature map that is multiplied with its own input (SiLU) is cut in two and joined again.
      Otherwise the compiler of QAIRT 2.51 makes one operation of both, most of whose values are wrong in maps of 9 to
      12 rows, of more rows and up to 8 columns, and in some of fewer, also of tokens that become a feature map again
      (MobileViT). SiLU of 8 bits is right.
    - A 16-bit softplus of a feature map, wrong in the same maps, is one of rows and columns along one axis, and so is a
      16-bit tanh of a matrix: of one with 16 rows most values are wrong otherwise.
    - An instance norm without weights, which the NPU computes in float, has ones and zeros. One of volumes, which stays
      on the CPU, is one of maps.

    Args:
        network: the simulation, on the CPU in eval mode; its layers stay the objects they are. Those at call sites are
            lowered in a block of ``weights_attached``.
    """
    with ExitStack() as restored:
        layer: Any
        for layer in network.modules():
            if "_takes_weights" in vars(layer) and "weight" not in layer._parameters:
                continue  # at a call site, without the weights that it is passed
            if DEPTHWISE in vars(layer):
                restored.enter_context(_being(layer, _of_norm(layer)))
            elif isinstance(layer, nn.modules.conv._ConvNd) and isinstance(layer, aimet.BaseQuantizationMixin):
                if _has_a_single_tap(layer):
                    restored.enter_context(_being(layer, _of_single_tap(layer)))
                elif _is_miscompiled_in_groups(layer):
                    restored.enter_context(_being(layer, _without_groups(layer)))
                elif _is_refused_in_few_bits(layer):
                    restored.enter_context(_stored_in_8_bits(layer))
                elif (finer := _finer_than_one(layer)) is not None:
                    restored.enter_context(_on_grid(layer, finer))
            elif isinstance(layer, _INSTANCE_NORMS) and isinstance(layer, aimet.BaseQuantizationMixin):
                if (layer.weight is None or isinstance(layer, nn.InstanceNorm3d)) and not layer.track_running_stats:
                    restored.enter_context(_being(layer, _of_maps(layer)))
            elif isinstance(layer, nn.Sigmoid) and GATES in vars(layer):
                restored.enter_context(_being(layer, _of_16_bits(layer, lambda sizes: len(sizes) > 2, _in_two)))
            elif isinstance(layer, (nn.Softplus, nn.Tanh)):
                where = _is_matrix if isinstance(layer, nn.Tanh) else lambda sizes: len(sizes) > 2
                if _knows_its_input(function := _of_16_bits(layer, where, _along_one_axis)):
                    restored.enter_context(_being(layer, function))
            elif isinstance(layer, aimet.BaseQuantizationMixin) and (pooling := lowered_pooling(layer)) is not None:
                restored.enter_context(_being(layer, pooling))
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


def _is_miscompiled_in_groups(layer: Any) -> bool:
    axes = len(layer.kernel_size)
    if layer.groups == 1 or layer.param_quantizers["weight"] is None:
        return False
    if layer.transposed:
        return axes == 3 or layer.bias is not None or layer.groups < layer.in_channels
    if layer.groups < layer.in_channels or axes != 2:
        return False
    is_of_few = layer.in_channels <= _FEW_CHANNELS and layer.kernel_size == layer.stride == (2, 2)
    return is_of_few or max(layer.stride) >= _LONG_STRIDE


def _without_groups(layer: Any) -> nn.Module:
    """Return the convolution over all channels, which has a layer's rounded weights and biases, and zeros."""
    from lightning_quant.simulation.fast.biases import rounded_bias  # imports AIMET

    axes = len(layer.kernel_size)
    options = {"dilation": layer.dilation, "padding_mode": layer.padding_mode, "bias": False}
    if layer.transposed:
        options["output_padding"] = layer.output_padding
    factory = (_TRANSPOSED if layer.transposed else _CONVOLUTIONS)[axes]
    plain = factory(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, **options)
    bias, quantizer = rounded_bias(layer), layer.param_quantizers["weight"]
    plain.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    blocks = quantizer(layer.weight).detach().as_subclass(Tensor).chunk(layer.groups)
    own, padded = blocks[0].shape[1], []
    for index, block in enumerate(blocks):
        padded.append(F.pad(block.movedim(1, -1), (own * index, own * (layer.groups - 1 - index))))
    plain.weight = nn.Parameter(torch.cat(padded).movedim(-1, 1), requires_grad=False)
    made: Any = aimet.QuantizationMixin.from_module(plain)
    scale = quantizer.get_scale().detach()
    if layer.transposed:  # its second axis has the outputs
        scale = scale.expand(1, own, *[1] * axes).repeat(1, layer.groups, *[1] * axes)
    bits = WEIGHT_BITS if _is_refused_in_few_bits(layer) else quantizer.bitwidth
    made.param_quantizers["weight"] = _symmetric(scale, bits)
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


def _of_maps(layer: Any) -> nn.Module:
    """Return an instance norm with weights, of one if it had none, that takes volumes as maps of their rows."""
    factory: Any = nn.InstanceNorm1d if isinstance(layer, nn.InstanceNorm1d) else nn.InstanceNorm2d
    made: Any = aimet.QuantizationMixin.from_module(factory(layer.num_features, layer.eps, affine=True))
    if layer.weight is None:
        quantizer = aimet.QuantizeDequantize((), bitwidth=WEIGHT_BITS, symmetric=True)
        quantizer.set_range(*ends_on_device(torch.ones(())))
    else:
        quantizer, made.weight, made.bias = layer.param_quantizers["weight"], layer.weight, layer.bias
    made.param_quantizers["weight"] = quantizer
    _rounding_as(layer, made)
    kind, of_output = type(made), made.output_quantizers[0]

    def forward(self: Any, volumes: Tensor) -> Any:
        with paused():
            normed = kind.forward(self, volumes.flatten(-3, -2)).reshape(volumes.shape)
            return normed if of_output is None else of_output(normed)

    if isinstance(layer, nn.InstanceNorm3d):
        made.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    result: nn.Module = made
    return result


def _is_matrix(sizes: Sequence[int]) -> bool:
    return len(sizes) > 1 and math.prod(sizes[:-2]) == 1


def _of_16_bits(layer: Any, where: Callable[[Sequence[int]], bool], lowered_on: Callable[..., Tensor]) -> nn.Module:
    """Return an activation function that is lowered where it computes 16-bit tensors of such sizes."""
    kind = type(layer)

    def forward(self: Any, maps: Tensor) -> Any:
        rounding = self.output_quantizers[0]
        if rounding is None or rounding.bitwidth != 16 or not where([int(size) for size in maps.shape]):
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


def _knows_its_input(function: Any) -> bool:
    """Return whether it is known what rounds a function's input; behind a product with a number, make what does."""
    if vars(function).get(ROUNDED_BY) is not None:
        return True
    quantizer, factor = vars(function).get(SCALED_FROM, (None, 1.0))
    if quantizer is None:
        return False
    scaled = aimet.QuantizeDequantize((), bitwidth=quantizer.bitwidth, symmetric=quantizer.symmetric)
    scaled.signed = quantizer.signed
    scaled.set_range(*sorted((quantizer.get_min().item() * factor, quantizer.get_max().item() * factor)))
    vars(function)["_modules"] = {**function._modules, "of_input": scaled}  # the layer has its own
    vars(function)[ROUNDED_BY] = scaled
    return True


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
