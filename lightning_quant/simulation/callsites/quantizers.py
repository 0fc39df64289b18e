"""Quantizers that AIMET leaves out or makes twice, corrected once the simulation is built."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_quant.simulation.callsites.attributes import (
    DEPTHWISE,
    GATES,
    OWNER,
    ROUNDED_BY,
    SCALED_FROM,
    is_at_call_site,
)
from lightning_quant.simulation.callsites.tied_ranges import (
    leave_out_roundings,
    outputs,
    passes_values,
    rounded_before,
    rounding,
    tie_ranges,
)
from lightning_quant.simulation.fixed_ranges import note_fixed_ranges
from lightning_quant.simulation.masks import note_masks
from lightning_quant.simulation.second_operands import undo_exceptions

# Hardware that computes a layer and the activation behind it one after the other: not an HTP, and one without a name.
_COMPUTE_APART = (None, "V66")


def complete(sim: Any, returned: Container[nn.Module]) -> None:
    """Give every tensor that the hardware rounds a quantizer, and what is one tensor on the device one quantizer.

    Args:
        sim: AIMET's simulation, newly built; changed in place.
        returned: the layers whose outputs the network returns.
    """
    leave_out_roundings(sim)
    for module in _sites(sim):
        if module.__dict__.get("_compares"):  # into truth values
            module.output_quantizers[0] = None
        if "_has_default_weights" in vars(module):  # weights of one: their range is known
            for parameter in module.param_quantizers.parameters():
                parameter.requires_grad_(False)
    _share_weights(sim)
    _share_over_steps(sim)
    _leave_scales_of_channels(sim)
    _fuse_activations(sim, returned)
    _round_before_activations(sim)
    _round_before_norms(sim)
    _quantize_constants(sim)
    _leave_numbers(sim)
    tie_ranges(sim)
    _guard_divisions(sim)
    _note_roundings(sim)
    _note_gates(sim)
    note_fixed_ranges(sim)
    undo_exceptions(sim)
    note_masks(sim, returned)
    _keep_ranges_of_inputs(sim)


def _sites(sim: Any) -> list[Any]:
    return [module for module in sim.model.modules() if is_at_call_site(module)]


def _share_weights(sim: Any) -> None:
    """Round a weight that several calls use once."""
    known: list[tuple[Any, Tensor, Any]] = []
    for module in _sites(sim):
        weight = module.__dict__.pop("_weight_of", None)
        quantizers = getattr(module, "param_quantizers", {})
        if weight is None or "weight" not in quantizers or quantizers["weight"] is None:
            continue
        kind = type(module), module.__dict__[OWNER]
        for other, same, quantizer in known:
            if other == kind and (same is weight or _is_same_value(same, weight)):
                quantizers["weight"] = quantizer
                break
        else:
            known.append((kind, weight, quantizers["weight"]))


def _is_same_value(a: Tensor, b: Tensor) -> bool:
    """Return whether two weights that were computed are one: of a layer that is called twice."""
    computed = not (isinstance(a, nn.Parameter) or isinstance(b, nn.Parameter))
    return computed and a.shape == b.shape and torch.equal(a, b)


def _share_over_steps(sim: Any) -> None:
    """Share the range of each tensor of a recurrent layer over all steps, as the layer has one of each."""
    first: dict[Any, Any] = {}
    for module in _sites(sim):
        key = module.__dict__["_repeats"]
        if key is None or not hasattr(module, "output_quantizers"):
            continue
        like = first.setdefault(key, module)
        if like is module:
            continue
        for part in ("input_quantizers", "output_quantizers"):
            own, theirs = getattr(module, part), getattr(like, part)
            for index in range(min(len(own), len(theirs))):
                if own[index] is not None and theirs[index] is not None:
                    own[index] = theirs[index]


def _leave_scales_of_channels(sim: Any) -> None:
    """Leave the weights of norms with running statistics as they are: the device computes depthwise convolutions.

    A channel has one weight there, which the channel's own scale represents exactly. The NPU's own batch norm has one
    scale for all channels, and computes something else with 4-bit weights and for vectors of features
    (:mod:`lightning_quant.deploy.graph.lowering`). It is left to hardware without a scale for each channel, and to
    statistics of the batch.
    """
    if sim._hw_version in _COMPUTE_APART:
        return
    for op in sim.connected_graph.ordered_ops:
        module: Any = sim._get_qmodule(op)
        if not isinstance(module, _NormBase) or module.running_var is None or module.training:
            continue
        if op.inputs and op.inputs[0].shape is not None:
            module.__dict__[DEPTHWISE] = len(op.inputs[0].shape) - 2
            weights: Any = module.param_quantizers
            weights.update(dict.fromkeys(weights))


def _fuse_activations(sim: Any, returned: Container[nn.Module]) -> None:
    """Round once behind a ReLU or clip, not before it as well: the NPU computes it with the operation before it.

    AIMET's configurations do so for some pairs of operations, not behind depthwise convolutions, nor where one range
    was tied to both sides, which then covers values that a ReLU removes; those of chips before v73 for fewer, though
    ONNX Runtime's QNN provider fuses a convolution with a ReLU or Clip for all (``conv_activation_fusion.cc``). What
    the network returns is rounded, which AIMET's graph does not know of.
    """
    from lightning_quant.simulation.aimet import custom

    computed_with: Any = (nn.modules.conv._ConvNd, nn.Linear, custom.MatMul, custom.Add)
    modules = [sim._get_qmodule(op) for op in sim.connected_graph.ordered_ops]
    calls = Counter(modules)
    users = Counter(one for module in modules for one in getattr(module, "output_quantizers", ()) if one is not None)
    for op in sim.connected_graph.ordered_ops:
        after = sim._get_qmodule(op)
        source = op.inputs[0].producer if isinstance(after, (nn.ReLU, nn.ReLU6, nn.Hardtanh)) and op.inputs else None
        before = sim._get_qmodule(source) if source is not None and len(source.output_ops) == 1 else None
        is_one = isinstance(before, computed_with) or (before is not None and vars(before).get(DEPTHWISE))
        if not is_one or after.output_quantizers[0] is None:
            continue
        assert before is not None
        quantizers: Any = before.output_quantizers
        # of the two alone, the configuration of such hardware has it so
        is_tied = quantizers[0] is after.output_quantizers[0] and users[quantizers[0]] > 2
        if before in returned:
            quantizers[0] = quantizers[0] or copy.deepcopy(after.output_quantizers[0])
        elif calls[before] == 1 and (is_tied or sim._hw_version not in _COMPUTE_APART):
            quantizers[0] = None


def _round_before_activations(sim: Any) -> None:
    """Round what goes into LeakyReLU, PReLU and Hardswish: the NPU's compiler fuses ReLU and Clip only."""
    for op in sim.connected_graph.ordered_ops:
        if op.type not in ("LeakyRelu", "PRelu", "HardSwish"):
            continue
        source = op.inputs[0].producer
        before, after = (sim._get_qmodule(source) if source is not None else None), sim._get_qmodule(op)
        if before is None or after is None or len(getattr(before, "output_quantizers", ())) != 1:
            continue
        if before.output_quantizers[0] is None and after.output_quantizers[0] is not None:
            before.output_quantizers[0] = copy.deepcopy(after.output_quantizers[0])


def _round_before_norms(sim: Any) -> None:
    """Round what goes into a batch norm that the device computes as a convolution of its own.

    AIMET takes it as one with the convolution before it, which several norms may share.
    """
    for op in sim.connected_graph.ordered_ops:
        module: Any = sim._get_qmodule(op)
        source = op.inputs[0].producer if op.inputs else None
        if module is None or DEPTHWISE not in vars(module) or source is None:
            continue
        before: Any = sim._get_qmodule(source)
        quantizers: Any = getattr(before, "output_quantizers", ())
        if len(quantizers) == 1 and quantizers[0] is None and not passes_values(sim, source):
            quantizers[0] = copy.deepcopy(next((one for one in sim.quantizers() if one.shape == ()), None))


def _quantize_constants(sim: Any) -> None:
    """Round the parameters and buffers that operations take in addition to activations."""
    for module in _sites(sim):
        places = module.__dict__.get("_constant_inputs", ())
        if not places or not hasattr(module, "input_quantizers"):
            continue
        own = [one for one in (*module.output_quantizers, *module.input_quantizers) if one is not None]
        like = own[0] if own else next((one for one in sim.quantizers() if one.shape == ()), None)
        for index in places if like is not None else ():
            while len(module.input_quantizers) <= index:
                module.input_quantizers.append(None)
            if module.input_quantizers[index] is None:
                module.input_quantizers[index] = copy.deepcopy(like)


def _leave_numbers(sim: Any) -> None:
    """Leave out the quantizers of Python numbers, which no pass reaches: in a file they have a grid of their own."""
    for module in _sites(sim):
        for index in module.__dict__.get("_number_inputs", ()):
            if index < len(getattr(module, "input_quantizers", ())):
                module.input_quantizers[index] = None


def _guard_divisions(sim: Any) -> None:
    """Guard divisions and square roots against a zero that rounding produced."""
    from lightning_quant.simulation.aimet import QuantizationMixin, custom
    from lightning_quant.simulation.callsites.safe_division import SafeDivide, SafeSqrt  # imports AIMET

    # where AIMET looks up the float class
    QuantizationMixin.qcls_to_cls |= {SafeDivide: custom.Divide, SafeSqrt: custom.Sqrt}
    for op in sim.connected_graph.ordered_ops:
        module = sim._get_qmodule(op)
        kind: Any = type(module)
        if kind is custom.QuantizedSqrt:
            module.__class__ = SafeSqrt
        elif kind is custom.QuantizedDivide and len(op.inputs) == 2:
            quantizers: Any = module.input_quantizers
            quantizer = rounding(sim, op.inputs[1].producer)
            if quantizers[1] is None and quantizer is not None:
                module.__class__ = SafeDivide
                quantizers[1] = quantizer


def _note_roundings(sim: Any) -> None:
    """Let layers know what rounds their input: the hardware adds a bias in its units, and softplus is exported on it.

    A layer that several calls give inputs of other grids has no such unit: its bias is not rounded.
    """
    found: dict[Any, set[Any]] = {}
    for op in sim.connected_graph.ordered_ops:
        module: Any = sim._get_qmodule(op)
        has_statistics = isinstance(module, _NormBase) and module.running_var is not None
        is_known = has_statistics or isinstance(module, (nn.Linear, nn.modules.conv._ConvNd, nn.Softplus, nn.Tanh))
        if is_known and op.inputs:
            quantizers: Any = getattr(module, "input_quantizers", ())
            own = quantizers[0] if len(quantizers) else None
            found.setdefault(module, set()).add(own or rounding(sim, op.inputs[0].producer))
        if isinstance(module, (nn.Softplus, nn.Tanh)) and found[module] == {None}:
            module.__dict__[SCALED_FROM] = rounded_before(sim, op)
    for module, roundings in found.items():
        (module.__dict__[ROUNDED_BY],) = roundings if len(roundings) == 1 else (None,)


def _note_gates(sim: Any) -> None:
    """Note which sigmoids are multiplied with what they are of, x·sigmoid(x)."""
    from lightning_quant.simulation.aimet import custom

    for op in sim.connected_graph.ordered_ops:
        module: Any = sim._get_qmodule(op)
        if not isinstance(module, nn.Sigmoid) or not op.inputs:
            continue
        products = [taker for taker in _takers(sim, op) if isinstance(sim._get_qmodule(taker), custom.Multiply)]
        factors = [one.producer for taker in products for one in taker.inputs]
        if op.inputs[0].producer in factors:
            module.__dict__[GATES] = True


def _takers(sim: Any, op: Any) -> Iterator[Any]:
    """Yield the operations that take the values of another, as they are or moved."""
    for taker in op.output_ops:
        yield taker
        if passes_values(sim, taker):
            yield from _takers(sim, taker)


def _keep_ranges_of_inputs(sim: Any) -> None:
    """Let the ranges of the network's inputs stay as calibrated.

    Training does not change what a camera gives, and the gradient of such a range needs that of the image, which no
    float network computes.
    """
    of_activations = {one for op in sim.connected_graph.ordered_ops for one in outputs(sim, op)}
    for op in sim.connected_graph.ordered_ops:
        own: Any = getattr(sim._get_qmodule(op), "input_quantizers", ())
        for quantizer, product in zip(own, op.inputs, strict=False):
            if quantizer is not None and product.is_model_input and quantizer not in of_activations:
                for parameter in quantizer.parameters():
                    parameter.requires_grad_(False)
