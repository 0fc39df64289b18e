"""Ranges of what is masked in front of a softmax: numbers that stand for minus infinity take no part in them.

``scores.masked_fill(mask, -1e9)``, ``scores + mask`` with a mask of zeros and minus infinity, ``(mask - 1) * 1e9``: in
8 bits, one step of a range with such a number is wider than all scores. What lies far below the scores is nothing to a
softmax. So ranges are calibrated without it, end a little below that, and what is masked is cut off there; whether a
calibration sample masks anything does not matter.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.simulation.callsites.attributes import (
    FILLS,
    INFINITE,
    IS_CALIBRATED,
    MASKED,
    MASKED_FACTOR,
    NUMBER,
)
from lightning_quant.simulation.callsites.tied_ranges import passed_input, passes_values, rounding

# How far the range of scores ends below the least that is not masked: softmax turns that into 1e-7 of the largest.
_BELOW_SCORES = 16.0
# The same for what is added to scores, or goes elsewhere than into a softmax: a score that is masked can be larger than
# those that are not.
_BELOW_TERMS = 50.0
# What lies so many times that far below the largest of its row is nothing to a softmax either.
_FAR = 2.0
# What is masked is so many times as far below zero as all else: distances, which are that large too, fill the gap.
_GAP = 10.0
# By how much a factor that is not known when the network is read may shrink the distance.
_UNKNOWN_FACTOR = 0.25
# Names of what a quantizer of such values remembers: the distance, negative where the values are subtracted; whether
# calibration gave it something masked, and anything but zeros; and what it passes on there.
_BELOW, _HAS_MASKED, _HAS_VALUES = "_below_what_is_not_masked", "_has_masked", "_has_values"
_PASSED_ON = "_passed_on"
# The axis of the softmax, where that alone takes what is rounded; where minus infinity begins; and whether it is added.
_AXIS, _INFINITE, _IS_TERM = "_axis_of_softmax", "_infinite_from", "_is_added"


@dataclass(frozen=True)
class _Part:
    """An input of an operation, which becomes a part of scores.

    Args:
        op: the operation that takes it; ``None`` for what is returned.
        index: its place among the inputs of that.
        source: the operation that computes it; ``None`` for an input of the network, or a constant.
        quantizer: rounds it in front of the operation, if anything does.
        is_input: whether it is an input of the network, or moved out of one.
        below: how far its range ends below what is not masked; negative where it is subtracted.
        is_term: whether it is added to others on the way.
        infinite: from where on numbers stand for infinity.
    """

    op: Any
    index: int
    source: Any
    quantizer: Any
    is_input: bool
    below: float
    is_term: bool
    infinite: float


def note_masks(sim: Any, returned: Container[nn.Module]) -> None:
    """Let quantizers know that what they round becomes scores of a softmax, or has minus infinity filled in.

    Args:
        sim: AIMET's simulation, its quantizers complete; products among its layers change class.
        returned: the layers whose outputs the network returns.
    """
    from lightning_quant.simulation.aimet import QuantizationMixin, custom
    from lightning_quant.simulation.callsites.masked_product import MaskedMultiply  # imports AIMET

    QuantizationMixin.qcls_to_cls[MaskedMultiply] = custom.Multiply  # where AIMET looks up the float class
    parts = _parts(sim)
    for part in parts:
        module: Any = sim._get_qmodule(part.source) if part.source is not None else None
        for quantizer in (part.quantizer, *getattr(module, "output_quantizers", ())):
            if quantizer is not None and abs(part.below) > abs(vars(quantizer).get(_BELOW, 0.0)):
                vars(quantizer).update({_BELOW: part.below, _INFINITE: part.infinite, _IS_TERM: part.is_term})
        if isinstance(module, custom.QuantizedMultiply) and part.is_term:
            module.__class__ = MaskedMultiply
            vars(module)[MASKED_FACTOR] = max(abs(part.below), vars(module).get(MASKED_FACTOR, 0.0))
    users = Counter(one for op in sim.connected_graph.ordered_ops for one in _quantizers(sim._get_qmodule(op)))
    for part in parts:
        softmax: Any = sim._get_qmodule(part.op) if part.op is not None else None
        scores: Any = sim._get_qmodule(part.source) if part.source is not None else None
        if isinstance(softmax, nn.Softmax) and softmax.dim is not None and scores not in returned:
            for quantizer in _quantizers(scores):
                if users[quantizer] == 1 and quantizer in scores.output_quantizers:
                    vars(quantizer)[_AXIS] = softmax.dim


def _quantizers(module: Any) -> list[Any]:
    both = (*getattr(module, "input_quantizers", ()), *getattr(module, "output_quantizers", ()))
    return [one for one in both if one is not None]


def _parts(sim: Any) -> list[_Part]:
    """Return what becomes scores of a softmax, or has minus infinity filled in, and all that goes into that."""
    from lightning_quant.simulation.aimet import custom

    found: list[_Part] = []
    farthest: dict[tuple[Any, bool, bool], float] = {}

    def follow(waiting: list[_Part]) -> None:
        while waiting:
            part = waiting.pop()
            found.append(part)
            key = (part.source, part.below < 0, part.is_term)
            if part.source is not None and abs(part.below) > farthest.get(key, 0.0):
                farthest[key] = abs(part.below)
                waiting += _taken(sim, part)

    operations = [(op, sim._get_qmodule(op)) for op in sim.connected_graph.ordered_ops]
    for op, module in operations:
        if isinstance(module, nn.Softmax | nn.LogSoftmax | custom.Exponential):
            follow([_part(sim, op, 0, _BELOW_SCORES, False, INFINITE)])
    known = {source for source, _, _ in farthest}
    for op, module in operations:
        if op not in known and module is not None and FILLS in vars(module):
            follow([_Part(None, 0, op, None, False, _BELOW_TERMS, False, vars(module)[FILLS])])
    return found


def _part(sim: Any, op: Any, index: int, below: float, is_term: bool, infinite: float) -> _Part:
    quantizers: Any = getattr(sim._get_qmodule(op), "input_quantizers", ())
    quantizer = quantizers[index] if index < len(quantizers) else None
    product = op.inputs[index]
    return _Part(
        op, index, product.producer, quantizer, passed_input(sim, product) is not None, below, is_term, infinite
    )


def _taken(sim: Any, part: _Part) -> Iterator[_Part]:
    """Return the inputs whose values an operation adds up, chooses among, scales or passes on."""
    from lightning_quant.simulation.aimet import custom

    op, below, is_term = part.source, part.below, part.is_term
    module: Any = sim._get_qmodule(op)
    factors = [1.0] * len(op.inputs)
    if isinstance(module, custom.Add | custom.Subtract):
        below, is_term = math.copysign(max(abs(below), _BELOW_TERMS), below), True
        factors[1:] = [-1.0 if isinstance(module, custom.Subtract) else 1.0] * (len(factors) - 1)
    elif isinstance(module, custom.Multiply):
        below /= abs(vars(module).get(NUMBER) or _UNKNOWN_FACTOR)
    elif isinstance(module, custom.Divide):
        below *= abs(vars(module).get(NUMBER) or 1 / _UNKNOWN_FACTOR)
        del factors[1:]
    elif not isinstance(module, custom.Where | custom.MaskedFill | custom.Maximum | custom.Minimum):
        del factors[1 if passes_values(sim, op) else 0 :]
    for index, factor in enumerate(factors):
        yield _part(sim, op, index, below * factor, is_term, part.infinite)


def inputs_in_softmax(sim: Any) -> set[int]:
    """Return which of the network's inputs become scores of a softmax, or are added to them: they may be infinite."""
    names = {passed_input(sim, part.op.inputs[part.index]) for part in _parts(sim) if part.is_input}
    return {int(name.removeprefix("input_")) for name in names if name is not None}


@contextmanager
def masks_left_out(network: nn.Module) -> Iterator[None]:
    """Let quantizers observe what is masked as the least of what is not, for the length of a block: calibration."""
    handles = []
    products = [module for module in network.modules() if MASKED_FACTOR in vars(module)]
    for module in network.modules():
        if _BELOW in vars(module):
            vars(module).update({_HAS_MASKED: False, _HAS_VALUES: False})
            handles.append(module.register_forward_pre_hook(_left_out))
            handles.append(module.register_forward_hook(_restored))
    for product in products:
        vars(product)[IS_CALIBRATED] = True
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for product in products:
            del vars(product)[IS_CALIBRATED]


def _left_out(quantizer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    given, below = args[0], vars(quantizer)[_BELOW]
    if not isinstance(given, Tensor) or not given.is_floating_point():
        return None
    vars(quantizer)[_HAS_VALUES] = vars(quantizer)[_HAS_VALUES] or bool(given.any())
    scores = given if below > 0 else -given
    masked = scores <= -vars(quantizer)[_INFINITE]
    if bool(masked.all()):  # all scores are so low
        return None
    least = torch.where(masked, torch.inf, scores).amin()
    if bool(torch.where(masked, scores, -torch.inf).amax() > _GAP * least):  # they go on from one to the other
        masked = torch.zeros_like(masked)
    has_masked = bool(masked.any())
    least = torch.where(masked, torch.inf, scores).amin()
    cut = torch.where(masked, least, scores)
    if (axis := vars(quantizer).get(_AXIS)) is not None:
        cut = torch.maximum(cut, cut.amax(axis, keepdim=True) - _FAR * below)
    elif not has_masked:
        return None
    if has_masked:
        vars(quantizer)[_HAS_MASKED] = True
    lowest = (
        max(-MASKED, torch.finfo(scores.dtype).min)
        if vars(quantizer)[_IS_TERM]
        else (least - abs(below)).to(scores.dtype)
    )
    passed_on = torch.where(masked, lowest, scores)
    vars(quantizer)[_PASSED_ON] = passed_on if below > 0 else -passed_on
    return (cut if below > 0 else -cut, *args[1:])


def _restored(quantizer: nn.Module, args: Any, output: Any) -> Any:
    """Give the layer behind a quantizer that observes what is masked as such: added to scores, it still is."""
    return vars(quantizer).pop(_PASSED_ON, output)


def leave_room_for_masks(sim: Any) -> None:
    """Extend the calibrated ranges of what is masked, or may be where no calibration sample does."""
    parts = _parts(sim)
    masked = {part.source for part in parts if part.source is not None and _masks(sim._get_qmodule(part.source))}
    quantizers = {
        part.quantizer
        for part in parts
        if part.quantizer is not None and (_has_masked(part.quantizer) or (part.is_input and _is_zero(part.quantizer)))
    }
    while (
        more := {part.op for part in parts if part.source in masked or part.quantizer in quantizers} - masked - {None}
    ):
        masked |= more
    for part in parts:
        module = sim._get_qmodule(part.op) if part.op is not None else None
        if module is not None and _multiplies_by_infinity(module):
            _let_mask(rounding(sim, part.source), vars(module)[NUMBER] * part.below)
    for op in masked:
        quantizers.update(one for one in getattr(sim._get_qmodule(op), "output_quantizers", ()) if one is not None)
    for quantizer in quantizers:
        below = vars(quantizer).get(_BELOW)
        end = "max" if below is not None and below < 0 else "min"
        if below is not None and quantizer.is_initialized() and quantizer.is_overwrite_allowed(end):
            low, high = quantizer.get_min(), quantizer.get_max()
            quantizer.set_range(low - max(below, 0.0), high - min(below, 0.0))


def _let_mask(quantizer: Any, factor: float) -> None:
    """Give a mask that was zeros in all samples, and is multiplied with infinity, a range with the other end too."""
    if quantizer is not None and _is_zero(quantizer) and quantizer.is_overwrite_allowed("max"):
        quantizer.set_range(*((0.0, 1.0) if factor < 0 else (-1.0, 0.0)))


def _masks(module: Any) -> bool:
    """Return whether a layer fills in minus infinity, or multiplies with it, or was seen to compute it."""
    if module is None:
        return False
    own = getattr(module, "output_quantizers", ())
    return FILLS in vars(module) or _multiplies_by_infinity(module) or any(map(_has_masked, own))


def _multiplies_by_infinity(module: Any) -> bool:
    return MASKED_FACTOR in vars(module) and abs(vars(module).get(NUMBER) or 0.0) >= INFINITE


def _has_masked(quantizer: Any) -> bool:
    return quantizer is not None and bool(vars(quantizer).get(_HAS_MASKED))


def _is_zero(quantizer: Any) -> bool:
    return not vars(quantizer).get(_HAS_VALUES, True)
