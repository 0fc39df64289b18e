"""Ranges of what is masked in front of a softmax: numbers that stand for minus infinity take no part in them.

``scores.masked_fill(mask, -1e9)``, ``scores + mask`` with a mask of zeros and minus infinity, ``(mask - 1) * 1e9``: in
8 bits, one step of a range with such a number is wider than all scores. What lies far below the scores is nothing to a
softmax, so the range ends a little below them, and what is masked is cut off there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.simulation.callsites.attributes import FILLS, INFINITE, MASKED_FACTOR, NUMBER
from lightning_quant.simulation.callsites.tied_ranges import passed_input, passes_values

# How far the range of scores ends below the least that is not masked: softmax turns that into 1e-7 of the largest.
_BELOW_SCORES = 16.0
# The same for what is added to scores, or goes elsewhere than into a softmax: a score that is masked can be larger than
# those that are not.
_BELOW_TERMS = 50.0
# By how much a factor that is not known when the network is read may shrink the distance.
_UNKNOWN_FACTOR = 0.25
# Name of what a quantizer of such values remembers: the distance, negative where the values are subtracted.
_BELOW = "_below_what_is_not_masked"
# Name of what a quantizer that observes passes on, and what is masked there: finite, so that a row of nothing else is.
_PASSED_ON, _MASKED = "_passed_on", 1e30


@dataclass(frozen=True)
class _Part:
    """What becomes a part of scores.

    Args:
        op: the operation that computes it.
        below: how far its range ends below what is not masked; negative where it is subtracted.
        is_term: whether it is added to others on the way.
    """

    op: Any
    below: float
    is_term: bool


def note_masks(sim: Any) -> None:
    """Let quantizers know that what they round becomes scores of a softmax, or has minus infinity filled in.

    Args:
        sim: AIMET's simulation, its quantizers complete; products among its layers change class.
    """
    from lightning_quant.simulation.aimet import QuantizationMixin, custom
    from lightning_quant.simulation.callsites.masked_product import MaskedMultiply  # imports AIMET

    QuantizationMixin.qcls_to_cls[MaskedMultiply] = custom.Multiply  # where AIMET looks up the float class
    farthest: dict[tuple[Any, bool, bool], float] = {}

    def follow(waiting: list[_Part]) -> None:
        while waiting:
            part = waiting.pop()
            key = (part.op, part.below < 0, part.is_term)
            if abs(part.below) <= farthest.get(key, 0.0):
                continue
            farthest[key] = abs(part.below)
            module: Any = sim._get_qmodule(part.op)
            _note(getattr(module, "output_quantizers", ()), part.below)
            if isinstance(module, custom.QuantizedMultiply) and part.is_term:
                module.__class__ = MaskedMultiply
                vars(module)[MASKED_FACTOR] = abs(part.below)
            waiting += _given(sim, part.op, _terms(sim, part))

    operations = [(op, sim._get_qmodule(op)) for op in sim.connected_graph.ordered_ops]
    for op, module in operations:
        if isinstance(module, nn.Softmax | nn.LogSoftmax):
            follow(_given(sim, op, [(0, _BELOW_SCORES, False)]))
    known = {op for op, _, _ in farthest}
    for op, module in operations:
        if op not in known and module is not None and FILLS in vars(module):
            follow([_Part(op, _BELOW_TERMS, False)])


def _given(sim: Any, op: Any, terms: list[tuple[int, float, bool]]) -> list[_Part]:
    """Return what an operation is given at some places; note what rounds its other inputs."""
    quantizers: Any = getattr(sim._get_qmodule(op), "input_quantizers", ())
    parts = []
    for index, below, is_term in terms:
        _note(quantizers[index : index + 1], below)
        if index < len(op.inputs) and op.inputs[index].producer is not None:
            parts.append(_Part(op.inputs[index].producer, below, is_term))
    return parts


def _note(quantizers: Any, below: float) -> None:
    for quantizer in quantizers:
        if quantizer is not None and abs(below) > abs(vars(quantizer).get(_BELOW, 0.0)):
            vars(quantizer)[_BELOW] = below


def _terms(sim: Any, part: _Part) -> list[tuple[int, float, bool]]:
    """Return the inputs whose values an operation adds up, chooses among, scales or passes on."""
    from lightning_quant.simulation.aimet import custom

    op, below, is_term = part.op, part.below, part.is_term
    module: Any = sim._get_qmodule(op)
    every = range(len(op.inputs))
    if isinstance(module, custom.Add | custom.Subtract):
        far = math.copysign(max(abs(below), _BELOW_TERMS), below)
        return [(index, -far if index == 1 and isinstance(module, custom.Subtract) else far, True) for index in every]
    if isinstance(module, custom.Multiply):
        return [(index, below / abs(vars(module).get(NUMBER) or _UNKNOWN_FACTOR), is_term) for index in every]
    if isinstance(module, custom.Divide):
        return [(0, below * abs(vars(module).get(NUMBER) or 1 / _UNKNOWN_FACTOR), is_term)]
    if isinstance(module, custom.Where | custom.Maximum | custom.Minimum):
        return [(index, below, is_term) for index in every]
    return [(0, below, is_term)] if passes_values(sim, op) else []


def inputs_in_softmax(sim: Any) -> set[int]:
    """Return which of the network's inputs become scores of a softmax, or are added to them: they may be infinite."""
    names = {
        passed_input(sim, product)
        for op in sim.connected_graph.ordered_ops
        for quantizer, product in zip(getattr(sim._get_qmodule(op), "input_quantizers", ()), op.inputs, strict=False)
        if quantizer is not None and _BELOW in vars(quantizer)
    }
    return {int(name.removeprefix("input_")) for name in names if name is not None}


@contextmanager
def masks_left_out(network: nn.Module) -> Iterator[None]:
    """Let quantizers observe what is masked as little below what is not, for the length of a block: calibration."""
    handles = []
    products = []
    for module in network.modules():
        if _BELOW in vars(module):
            handles.append(module.register_forward_pre_hook(_cut_off))
            handles.append(module.register_forward_hook(_restored))
        elif MASKED_FACTOR in vars(module):
            products.append((module, vars(module)[MASKED_FACTOR]))
            vars(module)[MASKED_FACTOR] = _MASKED
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, factor in products:
            vars(module)[MASKED_FACTOR] = factor


def _cut_off(quantizer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    given, below = args[0], vars(quantizer)[_BELOW]
    if not isinstance(given, Tensor) or not given.is_floating_point():
        return None
    scores = given if below > 0 else -given
    masked = scores <= -INFINITE
    if not bool(masked.any()) or bool(masked.all()):  # all scores are so low
        return None
    lowest = torch.where(masked, torch.inf, scores).amin() - abs(below)
    passed_on = scores.masked_fill(masked, max(-_MASKED, torch.finfo(scores.dtype).min))
    cut = torch.where(masked, lowest.to(scores.dtype), scores)
    vars(quantizer)[_PASSED_ON] = passed_on if below > 0 else -passed_on
    return (cut if below > 0 else -cut, *args[1:])


def _restored(quantizer: nn.Module, args: Any, output: Any) -> Any:
    """Give the layer behind a quantizer that observes what is masked as such: added to scores, it still is."""
    return vars(quantizer).pop(_PASSED_ON, output)
